"""Takes steps of a small SDXL by the engine and by bare loops, for bench_step.py.

Run in a process of its own, it writes JSON: of several loops in alternation the CPU seconds of
each step, or of one loop alone its operations, its memory and what it waits for its data. The
engine's steps are those of `trainer train`: the stream of `engine.run`, followed from outside.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bench_prepare
import torch
from count_step import IDLE
from diffusers import DDPMScheduler, UNet2DConditionModel
from step_meter import after_each_step, covered
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import adapters, engine
from trainer.adapted.layers import Copies
from trainer.config import TrainingConfig
from trainer.data.dataset import Dataset
from trainer.encoding import Encodings
from trainer.events import StepEvent
from trainer.job import RunFolder
from trainer.machine import precision_of
from trainer.passes import Passes
from trainer.resolve import Layer, resolve

# Options of each form of adapter.
FORMS: Mapping[str, Mapping[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "lokr": {"lora_type": "lokr"},
    "loha": {"lora_type": "loha"},
    # PEFT's own default.
    "loha8": {"lora_type": "loha", "rank": 8},
    "lora8": {"rank": 8},
}
# Who takes the steps, and with whose layers.
LOOPS: Mapping[str, str] = {"engine": "ours", "bare": "ours", "peft": "peft"}

# Steps that still pay for allocations and caches.
WARM_UP = 4
TIMED = 8
COUNTED = 2

# Where a step gets its data: each of them, or what calls it, is all that it may wait for.
SOURCES = ((Dataset, "__getitem__"), (Passes, "ask"), (Encodings, "at"))

# What the processor asks a device for, and waits until it is computed.
READS = frozenset({torch.ops.aten._local_scalar_dense})
KINDS = ("operations", "views", "host_reads")


@dataclass(frozen=True)
class Setting:
    """What every loop of a contest trains.

    Args:
        resolution: side of the pictures in pixels.
        batch_size: pictures of a step.
        mixed_precision: as the option of that name; with `bf16` frozen weights have this format
            too, and all is computed under autocast.
    """

    resolution: int
    batch_size: int
    mixed_precision: str


@dataclass(frozen=True)
class Places:
    """Folders: of the base model, of the photographs, and an empty one for runs."""

    model: Path
    photos: Path
    runs: Path


def configuration(loop: str, setting: Setting, places: Places) -> TrainingConfig:
    """What `train` would make of a loop's name, such as `engine-dora`."""
    who, form = loop.split("-")
    given = {
        "model_url": str(places.model),
        "images_data_url": str(places.photos),
        "resolution_width": setting.resolution,
        "resolution_height": setting.resolution,
        "batch_size": setting.batch_size,
        "mixed_precision": setting.mixed_precision,
        "adapter_layers": LOOPS[who],
        "target_unet_modules": ["to_q", "to_k", "to_v", "to_out.0"],
        "rank": 32,
        # It is left before any of these ends.
        "max_train_steps": 10_000,
        "checkpointing_steps": 10_000,
        **FORMS[form],
    }
    return resolve([Layer("bench_step", given, explicit=True)])


def is_engine(loop: str) -> bool:
    """Whether these steps are the engine's."""
    return loop.split("-", maxsplit=1)[0] == "engine"


def steps_of(loop: str, setting: Setting, places: Places) -> Iterator[None]:
    """Takes a step each time it is asked; see `configuration` for the loop's name."""
    config = configuration(loop, setting, places)
    if is_engine(loop):
        return engine_steps(config, RunFolder(places.runs / loop))
    return bare_steps(config)


def engine_steps(config: TrainingConfig, folder: RunFolder) -> Iterator[None]:
    """The engine's: before the first one comes all that it prepares."""
    for event in engine.run(config, folder, lambda: False):
        if isinstance(event, StepEvent):
            yield


def bare_steps(config: TrainingConfig) -> Iterator[None]:
    """Those of a loop with nothing in it that could be left out, on inputs that never change."""
    dtype = precision_of(config).frozen
    model = Path(config.model.model_url)
    unet: Any = UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=dtype)
    unet.requires_grad_(False)
    adapter = config.adapter
    adapters.make_trainable(
        unet,
        adapter,
        adapter.target_unet_modules,
        field="target_unet_modules",
        component="unet",
        seed=config.run.seed,
        must_match=True,
    )
    # PEFT's layers have none.
    copies = Copies([unet], dtype)
    learnt = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=1e-4, fused=True)
    noises = DDPMScheduler.from_pretrained(model / "scheduler")
    latents, text, added = _inputs(config, unet)
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    while True:
        noise, timesteps = torch.randn_like(latents), torch.randint(1000, (len(latents),))
        noisy_latents = noises.add_noise(latents, noise, timesteps)
        with copies.of_this_step():
            with autocast:
                (prediction,) = unet(
                    noisy_latents, timesteps, text, added_cond_kwargs=added, return_dict=False
                )
            mse_loss(prediction.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield


def _inputs(
    config: TrainingConfig, unet: Any
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Latents, states of a caption and what SDXL is told beside, in the encoders' formats."""
    pixels, batch_size = config.data.resolution_width, config.run.batch_size
    assert pixels is not None
    times = 6 * unet.config.addition_time_embed_dim
    pooled = unet.config.projection_class_embeddings_input_dim - times
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(batch_size, *shape, generator=generator)

    added = {
        "text_embeds": drawn(pooled).to(unet.dtype),
        "time_ids": torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * batch_size),
    }
    side = pixels // 8
    text = drawn(77, unet.config.cross_attention_dim).to(unet.dtype)
    return drawn(4, side, side), text, added


def race(loops: Mapping[str, Iterator[None]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each loop's steps, one of each in each round, every other round backwards.

    What Python's search for garbage would find is frozen after the warm-up: it would go through
    the models of all loops in the step of one.
    """
    taken: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(-WARM_UP, rounds):
        if number == 0:
            gc.collect()
            gc.freeze()
        for name in sorted(loops, reverse=number % 2 == 1):
            started = time.process_time()
            next(loops[name])
            taken[name].append(time.process_time() - started)
    gc.unfreeze()
    return {name: seconds[WARM_UP:] for name, seconds in taken.items()}


class Operations(TorchDispatchMode):
    """Counts what is dispatched: views of tensors and allocations apart, they compute nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts one operation and lets it run."""
        idle = func.is_view or func.namespace == "prim" or func.overloadpacket in IDLE
        self.counts["views" if idle else "operations"] += 1
        self.counts["host_reads"] += func.overloadpacket in READS
        return func(*args, **(kwargs or {}))


class Follower:
    """Follows one loop: steps that warm up, timed ones, and some whose operations are counted."""

    STEPS = WARM_UP + TIMED + COUNTED

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self._ended = 0
        self._started = 0.0
        self._megabytes = bench_prepare.peak_megabytes()
        self._spans: list[tuple[float, float]] = []
        self._operations = Operations()

    @contextmanager
    def following(self) -> Iterator[None]:
        """Hears when a step of the engine ends, and how long it was with its data."""
        with ExitStack() as patches:
            patches.enter_context(after_each_step(self.end_step))
            for owner, name in SOURCES:
                patches.enter_context(patch.object(owner, name, self._timed(vars(owner)[name])))
            yield

    def _timed(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return plain(*args, **named)
            finally:
                self._spans.append((started, time.perf_counter()))

        return timed

    def end_step(self) -> None:
        """Hears that a step has ended."""
        self._ended += 1
        if self._ended == WARM_UP:
            self.figures["first_megabytes"] = bench_prepare.peak_megabytes() - self._megabytes
            forget_peak()
            self._spans.clear()
            self._started = time.perf_counter()
        elif self._ended == WARM_UP + TIMED:
            passed = time.perf_counter() - self._started
            self.figures["waiting"] = covered(self._spans) / passed
            self.figures["megabytes"] = bench_prepare.peak_megabytes() - self._megabytes
            self._operations.__enter__()
        elif self._ended == self.STEPS:
            self._operations.__exit__(None, None, None)
            counts = self._operations.counts
            self.figures |= {kind: counts[kind] / COUNTED for kind in KINDS}


def forget_peak() -> None:
    """Lets `peak_megabytes` begin anew, where Linux can."""
    switch = Path("/proc/self/clear_refs")
    if switch.exists():
        switch.write_text("5")


def alone(loop: str, setting: Setting, places: Places) -> dict[str, float]:
    """What one loop takes, of one step; call it in a process where no other has run.

    Returns:
        `operations`, `views` and `host_reads` that are dispatched; `megabytes` that the process
        grew by at its peak in steps, and `first_megabytes` from its start to the first of them;
        `waiting`, the share of a step's time in which it gets its data, of a loop that gets any.
    """
    follower = Follower()
    if is_engine(loop):
        # Read after the last of them, as on a GPU: in between nothing is waited for.
        config = configuration(loop, setting, places)
        config = config.with_leaf("report_steps", Follower.STEPS)
        with follower.following():
            next(engine_steps(config, RunFolder(places.runs / loop)))
    else:
        steps = steps_of(loop, setting, places)
        for _ in range(Follower.STEPS):
            next(steps)
            follower.end_step()
        del follower.figures["waiting"]
    return follower.figures


def measured(
    mode: str, loops: Sequence[str], setting: Setting, rounds: int, places: Places
) -> dict[str, Any]:
    """The seconds of a race of so many rounds, or the figures of a loop alone."""
    if mode == "alone":
        (loop,) = loops
        return {loop: alone(loop, setting, places)}
    return dict(race({loop: steps_of(loop, setting, places) for loop in loops}, rounds))


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = json.loads(sys.argv[1])
    given = Setting(**asked.pop("setting"))
    folders = Places(**{name: Path(folder) for name, folder in asked.pop("places").items()})
    Path(sys.argv[2]).write_text(json.dumps(measured(**asked, setting=given, places=folders)))

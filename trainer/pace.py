"""How steps are computed: recorded, compiled, in which layout and by which attention.

None of it changes what is learnt but for rounding. What nobody chose is decided from the
configuration, the kind of device and its memory alone, never from measured times: the same request
is computed the same way again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._triton import has_triton

from trainer.cache import cache_folder
from trainer.capacity import Room
from trainer.config import Note, TrainingConfig
from trainer.errors import InputError
from trainer.optim import CAPTURABLE

# Fewer steps are over before recording has paid.
_STEPS_WORTH_RECORDING = 50

# What compiling one size of pictures takes, and which share of a step's time it saves.
# Sources: diffusers' documentation of `compile_repeated_blocks` and its benchmarks on an L40S
# (1.35 to 1.40 times as fast).
_SECONDS_OF_COMPILING = 60.0
_SHARE_SAVED = 0.25
# What a GPU that compiles gets done in a second of such a step: a quarter of an H100's peak.
_OPERATIONS_PER_SECOND = 2e14

NO_WINDOWS = "this denoiser has no convolutions"

# Where inductor keeps what it compiled, by torch's own variable.
_COMPILED = "TORCHINDUCTOR_CACHE_DIR"

_BACKENDS: Mapping[str, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# In what torch says where it has none, on a GPU and on a processor.
_NO_KERNEL = ("No available kernel", "No viable backend")


@dataclass(frozen=True)
class Pace:
    """How the steps of one training are computed.

    Args:
        cuda_graph: record a step and play it again.
        compile_blocks: compile the denoiser's repeated blocks.
        channels_last: keep convolutions' frozen weights with channels last.
        tf32: multiply 32-bit floats with 10 bits of mantissa.
        attention: which kernel computes attention.
    """

    cuda_graph: bool
    compile_blocks: bool
    channels_last: bool
    tf32: bool
    attention: str

    def __str__(self) -> str:
        chosen = {
            "CUDA graph": self.cuda_graph,
            "compiled blocks": self.compile_blocks,
            "channels last": self.channels_last,
            "TF32": self.tf32,
            f"{self.attention} attention": self.attention != "auto",
        }
        return ", ".join(word for word, is_chosen in chosen.items() if is_chosen) or "plain"


@dataclass(frozen=True)
class Work:
    """What is to be computed.

    Args:
        denoiser: on the device that trains.
        steps: optimizer steps.
        sizes: trained (height, width) in pixels, each once.
        examples: of one optimizer step on this device.
        room: on the device, where that is foreseen.
    """

    denoiser: torch.nn.Module
    steps: int
    sizes: Sequence[tuple[int, int]]
    examples: int
    room: Room | None = None


def pace_of(
    config: TrainingConfig,
    work: Work,
    *,
    on_gpu: bool,
    num_processes: int,
    in_shards: bool = False,
) -> Pace:
    """What the configuration says, and where it leaves it open, what pays.

    Args:
        config: completed.
        work: what is to be computed.
        on_gpu: whether it is on a GPU.
        num_processes: that train together.
        in_shards: whether each of them holds a part of the denoiser.
    """
    run = config.run
    in_half = run.mixed_precision != "no"
    records = on_gpu and work.steps >= _STEPS_WORTH_RECORDING
    records = records and unrecordable(config, num_processes) is None
    # Recordings keep the memory that they share, and before one of a further size is made, steps
    # of that size are computed beside them.
    one_size = len(work.sizes) == 1
    records = records and (one_size or work.room is None or work.room.holds_two_steps)
    compiles = on_gpu and not in_shards and _pays_to_compile(config, work)
    # Weights that all learn, and shards of them, keep the layout that they are updated in.
    can_lay_out = config.adapter.use_lora and not in_shards and _convolves(work.denoiser)
    return Pace(
        cuda_graph=_given(run.cuda_graph, records),
        compile_blocks=_given(run.compile_blocks, compiles),
        channels_last=can_lay_out and _given(run.channels_last, on_gpu and in_half),
        tf32=_given(run.tf32, on_gpu and in_half),
        attention=run.attention,
    )


def without_meaning(config: TrainingConfig, denoiser: torch.nn.Module) -> TrainingConfig:
    """The configuration without what means nothing for this denoiser, which is noted.

    Args:
        config: completed.
        denoiser: its weights are not needed.
    """
    is_told = "channels_last" in config.resolved.ignored_options
    if config.run.channels_last is None or is_told or _convolves(denoiser):
        return config
    note = Note(kind="ignored", field="channels_last", message=NO_WINDOWS)
    return config.with_leaf("channels_last", None).with_notes(note)


def unrecordable(config: TrainingConfig, num_processes: int) -> str | None:
    """Why steps of this configuration cannot be recorded, or nothing.

    Args:
        config: with `mixed_precision` as it is used.
        num_processes: that train together.
    """
    adapter, optimizer = config.adapter, config.optim.optimizer
    reasons: Mapping[str, bool] = {
        "several processes train together": num_processes > 1,
        "fp16's scaler asks the device in each step": config.run.mixed_precision == "fp16",
        f"{optimizer} counts its steps on the processor": optimizer not in CAPTURABLE,
        "weights are updated one by one": not adapter.use_lora
        and (adapter.weights_dtype == "bf16" or config.optim.fused_backward),
        "latents are not cached": not config.data.cache_latents,
        "weights come from the computer's memory": config.run.offload_blocks > 0,
        "text encoders learn in every step": adapter.train_text_encoder
        and adapter.train_text_encoder_frac == 1,
        "new tokens learn in every step": config.token.train_text_encoder_ti
        and config.token.train_text_encoder_ti_frac == 1,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def refuse_impossible(config: TrainingConfig, num_processes: int, *, on_gpu: bool) -> None:
    """Finds out before anything is read whether what somebody chose can be done.

    Args:
        config: completed.
        num_processes: that train together.
        on_gpu: whether a GPU trains.

    Raises:
        InputError: it cannot.
    """
    reason = unrecordable(config, num_processes)
    if config.run.cuda_graph and reason is not None:
        raise InputError.of(
            "cuda_graph", f"true, but {reason}", "leave it out, or change that option"
        )
    if config.run.compile_blocks and not _compiler(on_gpu):
        needed = "Triton" if on_gpu else "a C++ compiler (`g++`, `clang++` or $CXX)"
        raise InputError.of(
            "compile_blocks", f"true, but compiling here needs {needed}", "install it, or leave out"
        )


def _convolves(denoiser: torch.nn.Module) -> bool:
    return any(isinstance(layer, torch.nn.Conv2d) for layer in denoiser.modules())


def _given(chosen: bool | None, otherwise: bool) -> bool:
    return otherwise if chosen is None else chosen


def _compiler(on_gpu: bool) -> bool:
    if on_gpu:
        return bool(has_triton())
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++"))


def _pays_to_compile(config: TrainingConfig, work: Work) -> bool:
    """Whether what compiling saves in all steps is more than it takes."""
    if config.model.quantization != "none" or config.run.offload_blocks or not _compiler(True):
        return False
    weights = sum(parameter.numel() for parameter in work.denoiser.parameters())
    # Two operations a weight and token forward, two backward; of 8 x 8 pixels, an eighth is a
    # token: between UNets, whose inner layers see fewer, and transformers, that see more.
    tokens = sum(height * width for height, width in work.sizes) / len(work.sizes) / 8**3
    seconds = 4 * weights * tokens * work.examples * work.steps / _OPERATIONS_PER_SECOND
    return seconds * _SHARE_SAVED > _SECONDS_OF_COMPILING * len(work.sizes)


def prepare(denoiser: Any, pace: Pace) -> None:
    """Lays out a denoiser's frozen weights and has its blocks compiled, in place.

    Args:
        denoiser: of diffusers, on the device that trains, with its adapter.
        pace: how it is computed.
    """
    if pace.channels_last:
        for parameter in denoiser.parameters():
            if parameter.ndim == 4 and not parameter.requires_grad:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    if pace.compile_blocks:
        # Read when the first block is compiled; compiled blocks serve all later trainings.
        os.environ.setdefault(_COMPILED, str(cache_folder() / "compiled"))
        denoiser.compile_repeated_blocks(fullgraph=True, dynamic=False)


@contextmanager
def arithmetic(pace: Pace) -> Iterator[None]:
    """Torch's switches while steps are computed; what was set comes back.

    Raises:
        InputError: the chosen attention cannot be computed here.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32, cudnn.allow_tf32 = pace.tf32, pace.tf32
    try:
        with _attention(pace.attention):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@contextmanager
def _attention(name: str) -> Iterator[None]:
    if name == "auto":
        yield
        return
    try:
        with sdpa_kernel(_BACKENDS[name]):
            yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_KERNEL):
            raise
        raise InputError.of(
            "attention",
            f"`{name}` cannot be computed here for this model and number format",
            "leave it out, or give another",
        ) from error

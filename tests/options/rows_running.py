"""Rows of the section run."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from options.bases import PRIOR, UNCACHED
from options.case import Case, near, same
from options.matrix import DDPM, FLOW, Leaves, Place, acts, idle, refused
from options.probe import Probe
from tiny import never
from torch.distributed import DistStoreError

from trainer import engine, results
from trainer.job import Result, RunFolder
from trainer.machine import NO_GRAPH, NO_TF32
from trainer.pace import NO_WINDOWS
from trainer.runner import supervise
from trainer.trackers import logs_for

Shows = Callable[[Case], None]


def everything_drawn_is_another(case: Case) -> None:
    one, other = case.before(), case.after()
    again = case.probe({"checkpointing_steps": 99})
    for ours, theirs in zip(one.steps, again.steps, strict=True):
        same(ours.passes[0].tensors(), theirs.passes[0].tensors())
        same(ours.after, theirs.after)
    assert one.seen.timesteps.tolist() != other.seen.timesteps.tolist()
    assert not torch.allclose(one.seen.target, other.seen.target)
    starts = [name for name in one.names if "lora_A" in name]
    assert all(not torch.equal(one.first.before[n], other.first.before[n]) for n in starts)


def takes_so_many_steps(number: int) -> Shows:
    def shows(case: Case) -> None:
        assert len(case.after(None).steps) == number
        assert len(case.before(None).steps) != number
        assert f"checkpoints/step-{number}" in case.after(None).files

    return shows


def every_picture_is_seen(times: int) -> Shows:
    """Asserts passes over the subject's three pictures in batches of two: two steps each."""

    def shows(case: Case) -> None:
        probe = case.after(None)
        assert len(probe.steps) == times * math.ceil(3 / 2)
        assert [len(one.noisy_latents) for one in probe.passes] == [4, 2] * times
        numbers = [
            number
            for step in range(len(probe.steps))
            for batch in probe.dataset[step]
            for number, other in zip(batch.numbers, batch.is_class.tolist(), strict=True)
            if not other
        ]
        assert sorted(numbers) == sorted([0, 1, 2] * times)
        assert len(case.before(None).steps) == 2

    return shows


def is_the_length_of_a_batch(case: Case) -> None:
    assert len(case.before().seen.noisy_latents) == 2
    assert len(case.after().seen.noisy_latents) == 1
    assert case.after().seen.shares.tolist() == [1.0]


def is_like_one_large_batch(case: Case) -> None:
    parts, whole = case.after(), case.probe({"batch_size": 2})
    assert [len(step.passes) for step in parts.steps] == [2, 2]
    assert [len(step.passes) for step in case.before().steps] == [1, 1]
    together = torch.cat([one.noisy_latents for one in parts.first.passes])
    assert torch.equal(together, whole.seen.noisy_latents)
    near(parts.first.gradients, whole.first.gradients, rtol=1e-4, atol=1e-6)
    assert [s.rates for s in parts.steps] == [s.rates for s in whole.steps]


def computes_in_bf16(case: Case) -> None:
    full, half = case.before(), case.after()
    assert full.dtypes == ({torch.float32}, {torch.float32})
    assert half.dtypes == ({torch.bfloat16}, {torch.float32})
    assert half.seen.prediction.dtype != torch.float64
    apart = (full.seen.prediction - half.seen.prediction.float()).abs().max()
    assert 1e-4 < float(apart) < 0.2
    assert {t.dtype for t in half.steps[-1].after.values()} == {torch.float32}


def computes_blocks_twice(case: Case) -> None:
    plain, again = case.before(), case.after()
    assert [step.inner_calls for step in plain.steps] == [1, 1]
    assert [step.inner_calls for step in again.steps] == [2, 2]
    near(again.first.gradients, plain.first.gradients, rtol=1e-4, atol=1e-7)


def computes_some_blocks_twice(case: Case) -> None:
    every, some = case.before(), case.after()
    assert set(every.first.block_calls.values()) == {2}
    calls = some.first.block_calls.values()
    # The first of each size of blocks.
    assert 1 <= sum(count == 2 for count in calls) < len(calls)
    near(some.first.gradients, every.first.gradients, rtol=1e-4, atol=1e-7)


def is_computed_by_one_kernel(case: Case) -> None:
    free, bound = case.before(), case.after()
    assert (free.kernels, bound.kernels) == ({"flash", "math"}, {"math"})
    near(bound.first.gradients, free.first.gradients, rtol=1e-3, atol=1e-6)


def has_its_channels_last(case: Case) -> None:
    first, last = case.before(), case.after()
    assert (first.layouts, last.layouts) == ({False}, {True})
    near(last.first.gradients, first.first.gradients, rtol=1e-3, atol=1e-6)


def compiles_each_block(case: Case) -> None:
    # Inductor takes a minute; a thorough test of `pace` has it.
    compile_by = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    with patch.object(torch.nn.Module, "compile", compile_by), warnings.catch_warnings():
        # The compiler warns of what it does itself.
        warnings.simplefilter("ignore")
        plain, compiled = case.before(), case.after()
    assert plain.compiled == 0
    assert compiled.compiled > 1
    near(compiled.first.gradients, plain.first.gradients, rtol=1e-3, atol=1e-6)


def others_read_the_pictures(case: Case) -> None:
    alone, helped = case.before(), case.after()
    assert alone.reading > 0
    assert helped.reading == 0
    for one, other in zip(alone.passes, helped.passes, strict=True):
        same(one.tensors(), other.tensors())


def losses_are_told_together(case: Case) -> None:
    one_by_one, together = case.before(), case.after()
    assert [len(step.passes) for step in one_by_one.steps] == [1, 1]
    assert [len(step.passes) for step in together.steps] == [2, 0]
    told = [
        [step.event.loss for step in probe.steps if step.event] for probe in (one_by_one, together)
    ]
    assert told[0] == told[1]


def checkpoints(probe: Probe) -> set[str]:
    found = {Path(name).parts for name in probe.files}
    return {parts[1] for parts in found if len(parts) == 2 and parts[0] == "checkpoints"}


def keeps(before: set[str], after: set[str]) -> Shows:
    def shows(case: Case) -> None:
        assert checkpoints(case.before(None)) == before
        assert checkpoints(case.after(None)) == after

    return shows


def watched(case: Case, more: Leaves) -> tuple[Result, RunFolder]:
    """A whole run with the listeners that its configuration asks for, but no result files."""
    folder, config = RunFolder(case.lab.folder()), case.config(more)
    listeners = logs_for(config, folder)
    with patch.object(results, "deliver", lambda *_: iter(())):
        result = supervise(config, folder, listeners, engine=engine.run, stop=never)
    assert result.status == "done", result
    return result, folder


def curves(folder: RunFolder) -> list[str]:
    return [path.name for path in folder.logs.rglob("*tfevents*")]


def curves_are_written(case: Case) -> None:
    _, with_curves = watched(case, case.row.flipped)
    _, without = watched(case, {})
    assert len(curves(with_curves)) == 1
    assert curves(without) == []


class FakeRun:
    """Takes points in the place of Weights & Biases' own run: it needs the outside network."""

    def __init__(self) -> None:
        self.points: list[dict[str, Any]] = []
        self.ended: int | None = None

    def log(self, values: dict[str, Any], **_: Any) -> None:
        self.points.append(values)

    def finish(self, exit_code: int = 0) -> None:
        self.ended = exit_code


def curves_are_sent(case: Case) -> None:
    runs: list[FakeRun] = []

    class FakeErrors:
        Error = RuntimeError

    def init(**_: Any) -> FakeRun:
        runs.append(FakeRun())
        return runs[-1]

    module: Any = ModuleType("wandb")
    module.init, module.errors = init, FakeErrors
    with patch.dict(sys.modules, {"wandb": module}):
        watched(case, {})
        assert runs == []
        watched(case, case.row.flipped)
    (run,) = runs
    assert len(run.points) == 1
    assert run.ended == 0


def others_are_waited_for(case: Case) -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "2"}
    for leaves, seconds in (({}, 5), (case.row.flipped, 6)):
        with (
            patch.dict(os.environ, launched),
            patch("trainer.processes.rendezvous", side_effect=DistStoreError("nobody")) as asked,
        ):
            folder = RunFolder(case.lab.folder())
            result = supervise(case.config(leaves), folder, [], engine=engine.run, stop=never)
        assert result.error_kind == "process"
        assert f"within {seconds} s" in f"{result.error}"
        assert asked.call_args.kwargs["timeout"].total_seconds() == seconds


SHORT: Leaves = {"max_train_steps": 2}
RUN = [
    acts(
        "seed",
        ("batch", "step"),
        "timesteps, noise and first weights are others; the same seed gives the same bits",
        everything_drawn_is_another,
        flipped={"seed": 7},
    ),
    acts(
        "max_train_steps",
        "step",
        "so many steps are taken, whatever is accumulated in each",
        takes_so_many_steps(3),
        base={**SHORT, "gradient_accumulation_steps": 2},
        flipped={"max_train_steps": 3},
    ),
    acts(
        "num_train_epochs",
        ("step", "batch"),
        "every picture of the subject is seen so many times, whatever max_train_steps is",
        every_picture_is_seen(3),
        base={
            **SHORT,
            **PRIOR,
            "images_data_url": Place("other class pictures"),
        },
        flipped={"num_train_epochs": 3},
    ),
    *idle(
        "num_train_epochs decides the length of the run",
        base={"num_train_epochs": 3},
        max_train_steps=2,
    ),
    acts(
        "batch_size",
        "batch",
        "so many pictures go into a forward pass",
        is_the_length_of_a_batch,
        flipped={"batch_size": 1},
    ),
    acts(
        "gradient_accumulation_steps",
        ("batch", "gradient", "step"),
        "two passes of one picture are a step like one pass of two",
        is_like_one_large_batch,
        base={"batch_size": 1, "lr_scheduler": "linear"},
        flipped={"gradient_accumulation_steps": 2},
    ),
    acts(
        "mixed_precision",
        "gradient",
        "bf16: the frozen denoiser computes in 16 bits, what is trained stays in 32",
        computes_in_bf16,
        flipped={"mixed_precision": "bf16"},
    ),
    refused("mixed_precision", {"mixed_precision": "fp16"}, "needs a GPU"),
    acts(
        "gradient_checkpointing",
        "gradient",
        "blocks are computed twice, and gradients are the same",
        computes_blocks_twice,
        flipped={"gradient_checkpointing": True},
    ),
    acts(
        "checkpointing_share",
        "gradient",
        "so many of the blocks are computed twice, and gradients are the same",
        computes_some_blocks_twice,
        base={"gradient_checkpointing": True},
        flipped={"checkpointing_share": 0.01},
    ),
    *idle(
        "gradient_checkpointing is false",
        base={"gradient_checkpointing": False},
        checkpointing_share=0.5,
    ),
    *idle(NO_GRAPH, cuda_graph=True),
    *idle(NO_TF32, tf32=True),
    acts(
        "attention",
        "gradient",
        "the chosen kernel alone may compute attention, and gradients are the same",
        is_computed_by_one_kernel,
        flipped={"attention": "math"},
    ),
    acts(
        "channels_last",
        "gradient",
        "convolutions' frozen weights have their channels last, and gradients are the same",
        has_its_channels_last,
        flipped={"channels_last": True},
        families=DDPM,
    ),
    *idle(NO_WINDOWS, channels_last=True, families=FLOW),
    acts(
        "compile_blocks",
        "gradient",
        "each repeated block is compiled, and gradients are the same",
        compiles_each_block,
        flipped={"compile_blocks": True},
    ),
    acts(
        "num_workers",
        "batch",
        "another process reads the pictures, and they are the same",
        others_read_the_pictures,
        base=UNCACHED,
        flipped={"num_workers": 1},
    ),
    *idle("latents are cached", num_workers=1),
    acts(
        "report_steps",
        "step",
        "both steps are taken before the first is told, with the same losses",
        losses_are_told_together,
        base={"report_steps": 1},
        flipped={"report_steps": 2},
    ),
    acts(
        "checkpointing_steps",
        "files",
        "a checkpoint is published after so many steps, and at the end",
        keeps({"step-2"}, {"step-1", "step-2"}),
        base=SHORT,
        flipped={"checkpointing_steps": 1},
    ),
    acts(
        "checkpoints_total_limit",
        "files",
        "the newest so many are kept",
        keeps({"step-3"}, {"step-2", "step-3"}),
        base={"max_train_steps": 3, "checkpointing_steps": 1, "checkpoints_total_limit": 1},
        flipped={"checkpoints_total_limit": 2},
    ),
    acts(
        "rank_timeout",
        "step",
        "processes that were launched together are waited for so long",
        others_are_waited_for,
        base={"rank_timeout": 5},
        flipped={"rank_timeout": 6},
    ),
    acts(
        "tensorboard",
        "files",
        "curves lie in logs/",
        curves_are_written,
        base={"max_train_steps": 1},
        flipped={"tensorboard": True},
    ),
    acts(
        "wandb",
        "files",
        "a run there gets a point for every step",
        curves_are_sent,
        base={"max_train_steps": 1},
        flipped={"wandb": True},
    ),
]

"""Rows about training all weights in less memory: how they are kept, and when they are updated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from options.case import Case, same
from options.matrix import Leaves, Row, acts, idle, refused
from options.sums import distance

WHOLE: Leaves = {"use_lora": False, "learning_rate": 1e-3, "rank": ..., "target_unet_modules": ...}
FREE: Leaves = {**WHOLE, "max_grad_norm": 0.0}
IN_BF16: Leaves = {**WHOLE, "mixed_precision": "bf16"}
FUSED: Leaves = {"fused_backward": True}


def weights_are_bf16_and_move_as_in_32_bits(case: Case) -> None:
    full, half = case.before(), case.after()
    assert full.dtypes[1] == {torch.float32}
    assert half.dtypes[1] == {torch.bfloat16}
    # State is kept in 32 bits either way, and moments are those of bf16 gradients.
    assert half.optimizer_state == {torch.float32}
    ours, theirs = half.steps[-1].after, full.steps[-1].after
    moved = {name: ours[name].float() - half.first.before[name].float() for name in ours}
    wanted = {name: theirs[name] - full.first.before[name] for name in theirs}
    along = sum(float((moved[n] * wanted[n]).sum()) for n in moved)
    length = sum(float(wanted[n].square().sum()) for n in moved)
    assert math.isclose(along / length, 1, abs_tol=0.15)


def files_are_bf16(case: Case) -> None:
    for leaves, dtype in (({}, torch.float32), (case.row.flipped, torch.bfloat16)):
        (weights,) = case.delivered(leaves).tensors.values()
        assert {t.dtype for t in weights.values() if t.is_floating_point()} == {dtype}


def no_gradient_is_left_and_every_bit_is_the_same(case: Case) -> None:
    apart, fused = case.before(), case.after()
    assert apart.first.gradients
    assert fused.first.gradients == {}
    assert [step.event.grad_norm for step in apart.steps if step.event] == [
        step.event.grad_norm for step in fused.steps if step.event
    ]
    for one, other in zip(apart.steps, fused.steps, strict=True):
        same(one.after, other.after)
    assert distance(fused.first.after, fused.first.before) > 0


def yields(leaf: str, value: Any) -> Callable[[Case], None]:
    """Asserts that an option left at its default gives way, and that it is said."""

    def shows(case: Case) -> None:
        config = case.config(case.row.flipped)
        assert config.leaf(leaf) == value
        assert {n.field for n in config.resolved.notes if n.kind == "yielded"} >= {leaf}
        assert case.config().leaf(leaf) != value

    return shows


def adafactors_first_step(case: Case) -> None:
    """Shazeer & Stern 2018, algorithm 4, without their relative step size."""
    step, checked = case.after().first, 0
    for name, gradient in step.clipped.items():
        square = gradient.double() ** 2 + 1e-30
        if square.ndim >= 2:
            rows, columns = square.mean(-1, keepdim=True), square.mean(-2, keepdim=True)
            square = rows * columns / rows.mean(-2, keepdim=True)
        update = gradient / square.sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        start = step.before[name].double()
        wanted = start * (1 - 1e-3 * 1e-4) - 1e-3 * update
        torch.testing.assert_close(step.after[name].double(), wanted, rtol=1e-6, atol=1e-6)
        checked += int(bool((gradient != 0).any()))
    assert checked > 1
    assert distance(step.after, case.before().first.after) > 1e-4


WHOLE_ROWS: tuple[Row, ...] = (
    acts(
        "weights_dtype",
        "step",
        "bf16: weights are kept so, and move as far as those in 32 bits",
        weights_are_bf16_and_move_as_in_32_bits,
        base=IN_BF16,
        flipped={"weights_dtype": "bf16"},
    ),
    acts(
        "weights_dtype",
        "tensors",
        "bf16: the weights are written so, unless save_dtype says otherwise",
        files_are_bf16,
        base={**IN_BF16, "max_train_steps": 1},
        flipped={"weights_dtype": "bf16"},
    ),
    Row(
        "weights_dtype",
        "bf16: mixed_precision gives way to it",
        yields("mixed_precision", "bf16"),
        base=WHOLE,
        flipped={"weights_dtype": "bf16"},
    ),
    *[
        refused("weights_dtype", {"weights_dtype": "bf16", **leaves}, message, base=WHOLE)
        for leaves, message in (
            ({"mixed_precision": "no"}, "compute in bf16"),
            ({"optimizer": "prodigy"}, "prodigy's estimate needs all of them"),
        )
    ],
    acts(
        "fused_backward",
        "gradient",
        "no gradient is left, and every weight is the same to the bit",
        no_gradient_is_left_and_every_bit_is_the_same,
        base=FREE,
        flipped=FUSED,
    ),
    Row(
        "fused_backward",
        "clipping gives way to it",
        yields("max_grad_norm", 0.0),
        base=WHOLE,
        flipped=FUSED,
    ),
    *[
        refused("fused_backward", {**FUSED, **leaves}, message, base=WHOLE)
        for leaves, message in (
            ({"max_grad_norm": 1.0}, "the norm of all gradients"),
            ({"gradient_accumulation_steps": 2}, "gradients are given up at once"),
            ({"mixed_precision": "fp16"}, "the scaler of fp16"),
            ({"optimizer": "prodigy"}, "prodigy's estimate needs all of them"),
        )
    ],
    acts(
        "optimizer",
        "step",
        "adafactor: the first step is that of its authors' algorithm",
        adafactors_first_step,
        flipped={"optimizer": "adafactor"},
    ),
    *idle(
        "an adapter is trained, in 32 bits and with small gradients",
        weights_dtype="bf16",
        fused_backward=True,
    ),
    *idle(
        "adafactor has no first moment, and a second with decay and epsilon of its own",
        base={"optimizer": "adafactor"},
        adam_beta1=0.5,
        adam_beta2=0.9,
        adam_epsilon=1e-2,
    ),
    *idle("all weights are trained, none is frozen", base=WHOLE, channels_last=True),
)

"""Rows of the section optim."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from options.bases import TEXT, TOKENS
from options.case import Case, near, same
from options.matrix import WITH_TEXT, Leaves, Row, acts, idle, refused
from options.rows_tokens import rows_of
from options.sums import distance, ratio_is, replayed
from prodigyopt import Prodigy

Shows = Callable[[Case], None]


def adamw(**settings: Any) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    usual = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4}
    return lambda groups: torch.optim.AdamW(groups, **(usual | settings))


def prodigy(**settings: Any) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    usual = {
        "lr": 1.0,
        "betas": (0.9, 0.999),
        "beta3": None,
        "weight_decay": 1e-4,
        "decouple": True,
        "use_bias_correction": True,
        "safeguard_warmup": True,
    }
    return lambda groups: Prodigy(groups, **(usual | settings))


Build = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def updates_are_those_of(after: Build, before: Build, steps: int = 3) -> Shows:
    """Asserts that the first steps are those of one optimizer, and not those of the other."""

    def shows(case: Case) -> None:
        for probe, build, other in (
            (case.before(steps), before, after),
            (case.after(steps), after, before),
        ):
            end = probe.steps[-1].after
            travelled = distance(end, probe.first.before)
            for name, weights in replayed(probe, build).items():
                # One rounding of 32 bits may fall the other way.
                near(end[name], weights, rtol=2e-7, atol=1e-5 * travelled)
            assert distance(replayed(probe, other), end) > 1e-3 * travelled

    return shows


def state_is_in_bytes(case: Case) -> None:
    assert torch.uint8 in case.after().optimizer_state
    assert case.before().optimizer_state == {torch.float32}


def moves_by(rate: float, text_rate: float, *parts: str) -> Shows:
    """Asserts the largest change of Adam's first step, lr * g / (|g| + eps), in every part."""

    def shows(case: Case) -> None:
        for name, moved in case.after().first.moved().items():
            if "lora_A" in name or name not in case.after().first.clipped:
                continue
            wanted = rate if name.startswith("denoiser.") else text_rate
            largest = float(moved.abs().max())
            if float(case.after().first.clipped[name].abs().max()) > 1e-6:
                assert math.isclose(largest, wanted, rel_tol=1e-2), name
        for part in parts:
            assert any(part in name for name in case.after().names)
        rates = case.after().first.rates
        assert set(rates.values()) == {rate, text_rate} if parts else {rate}
        assert case.before().first.rates != rates

    return shows


def rates_are(*factors: float) -> Shows:
    """Asserts the share of the learning rate that each of four steps takes."""

    def shows(case: Case) -> None:
        steps = case.after(4).steps
        used = [rate for step in steps for rate in step.rates.values()]
        assert used == pytest.approx([1e-3 * factor for factor in factors], rel=1e-6, abs=1e-12)
        moved = [any(bool(t.any()) for t in step.moved("lora_B").values()) for step in steps]
        assert moved == [factor > 0 for factor in factors]
        assert [step.rates for step in case.before(4).steps] != [step.rates for step in steps]

    return shows


def shrinks(part: str, share: float, *, others: float) -> Shows:
    """Asserts how much what has no gradient yet shrinks in the first step."""

    def shows(case: Case) -> None:
        step = case.after().first
        for name, start in step.before.items():
            if "lora_A" not in name or name not in step.gradients:
                continue
            wanted = share if name.startswith(part) else others
            near(step.after[name], start * (1 - 1e-3 * wanted), rtol=2e-6, atol=1e-9)
        assert not any(
            torch.equal(case.before().first.after[n], step.after[n])
            for n in step.gradients
            if n.startswith(part) and "lora_A" in n
        )

    return shows


def undisturbed_tokens_shrink(case: Case) -> None:
    # A dropped caption leaves new tokens without a gradient: nothing but the decay moves them.
    for probe, decay in ((case.before(), 0.0), (case.after(), 0.5)):
        for name, rows in rows_of(probe.first.before).items():
            near(probe.first.after[name], rows * (1 - 1e-3 * decay), rtol=2e-6, atol=1e-9)


def norm(tensors: Mapping[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def the_norm_is_at_most(largest: float) -> Shows:
    def shows(case: Case) -> None:
        free, clipped = case.before().first, case.after().first
        assert free.event is not None
        assert norm(free.gradients) > 2 * largest
        same(free.gradients, free.clipped)
        parts = {name.split(".")[0] for name in clipped.gradients}
        assert (parts > {"denoiser"}) == (case.family in WITH_TEXT)
        same(clipped.gradients, free.gradients)
        assert math.isclose(norm(clipped.clipped), largest, rel_tol=1e-3)
        ratio_is(clipped.clipped, free.gradients, largest / norm(free.gradients))

    return shows


RATES: Mapping[str, tuple[float, ...]] = {
    "constant": (1, 1, 1, 1),
    "linear": (1, 3 / 4, 2 / 4, 1 / 4),
    "cosine": tuple((1 + math.cos(math.pi * n / 4)) / 2 for n in range(4)),
    "cosine_with_restarts": tuple((1 + math.cos(math.pi * n / 4)) / 2 for n in range(4)),
    "polynomial": tuple(1e-4 + (1 - 1e-4) * (1 - n / 4) for n in range(4)),
    "constant_with_warmup": (0, 1 / 2, 1, 1),
}
FOUR: Leaves = {"max_train_steps": 4}
PRODIGY: Leaves = {
    "optimizer": "prodigy",
    "learning_rate": 1.0,
    "max_grad_norm": 0.0,
    # Almost nothing but noise to predict: gradients agree, so that the estimate of d grows.
    "min_timestep_trained": 990,
}
SHARP: Leaves = {"adam_epsilon": 1e-12, "adam_weight_decay": 0.0, "max_grad_norm": 0.0}
TEXT_LAYERS: Leaves = {"target_text_encoder_modules": ["q_proj", "v_proj"]}


def scheduler_row(name: str) -> Row:
    warm_up = {"lr_warmup_steps": 2} if name == "constant_with_warmup" else {}
    start = "linear" if name == "constant" else "constant"
    return acts(
        "lr_scheduler",
        "step",
        f"{name}: the rates of four steps",
        rates_are(*RATES[name]),
        base={**FOUR, **warm_up, "lr_scheduler": start},
        flipped={"lr_scheduler": name},
    )


# Without bias correction first steps are longer: the estimate of d grows within a few of them.
GROWING: Leaves = {**PRODIGY, "prodigy_use_bias_correction": False}
LONGER: Mapping[str, Any] = {"use_bias_correction": False}


def prodigy_row(leaf: str, value: Any, argument: str, **base: Any) -> Row:
    return acts(
        leaf,
        "step",
        f"seven steps are prodigyopt's with {argument} = {value}",
        updates_are_those_of(
            prodigy(**_settings(base), **{argument: value}), prodigy(**_settings(base)), 7
        ),
        base={**PRODIGY, **base},
        flipped={leaf: value},
    )


def _settings(base: Leaves) -> dict[str, Any]:
    """prodigyopt's arguments for a row's own leaves."""
    names = {
        "adam_weight_decay": "weight_decay",
        "prodigy_use_bias_correction": "use_bias_correction",
    }
    return {names[leaf]: value for leaf, value in base.items()}


def adamw_row(leaf: str, value: Any, **argument: Any) -> Row:
    return acts(
        leaf,
        "step",
        f"three steps are AdamW's with {leaf} = {value}",
        updates_are_those_of(adamw(**argument), adamw()),
        flipped={leaf: value},
    )


OPTIM = [
    acts(
        "optimizer",
        "step",
        "prodigy: three steps are prodigyopt's, otherwise torch's AdamW's",
        updates_are_those_of(prodigy(lr=1.0), adamw()),
        flipped={"optimizer": "prodigy", "learning_rate": 1.0},
    ),
    acts(
        "optimizer",
        "step",
        "adamw8bit: its state is kept in bytes",
        state_is_in_bytes,
        flipped={"optimizer": "adamw8bit"},
        base={"rank": 32},
    ),
    refused("optimizer", {"optimizer": "paged_adamw8bit"}, "needs a GPU"),
    refused(
        "optimizer",
        {"optimizer": "sgd"},
        "adamw, adamw8bit, paged_adamw8bit, adafactor, prodigy",
    ),
    acts(
        "learning_rate",
        "step",
        "the first step moves the denoiser's adapter by it, the text encoders' as before",
        moves_by(2e-4, 1e-3, "text_encoder."),
        base={**TEXT, **TEXT_LAYERS, **SHARP, "text_encoder_lr": 1e-3},
        families=WITH_TEXT,
        flipped={"learning_rate": 2e-4},
    ),
    acts(
        "text_encoder_lr",
        "step",
        "the first step moves the text encoders' adapter by it, the denoiser's as before",
        moves_by(1e-3, 2e-4, "text_encoder."),
        base={**TEXT, **TEXT_LAYERS, **SHARP, "text_encoder_lr": 1e-3},
        families=WITH_TEXT,
        flipped={"text_encoder_lr": 2e-4},
    ),
    acts(
        "text_encoder_lr",
        "step",
        "the first step moves new tokens by it, the denoiser's adapter as before",
        moves_by(1e-3, 2e-4, "tokens."),
        base={**TOKENS, **SHARP, "text_encoder_lr": 1e-3, "adam_weight_decay_text_encoder": 0.0},
        families=WITH_TEXT,
        flipped={"text_encoder_lr": 2e-4},
    ),
    refused(
        "text_encoder_lr",
        {"text_encoder_lr": 0.5},
        "one learning rate for everything",
        base={**TEXT, **PRODIGY},
    ),
    *[scheduler_row(name) for name in RATES],
    refused("lr_scheduler", {"lr_scheduler": "foo"}, "cosine_with_restarts"),
    acts(
        "lr_warmup_steps",
        "step",
        "rates rise linearly from 0 over so many steps",
        rates_are(0, 1 / 3, 2 / 3, 1),
        base={**FOUR, "lr_scheduler": "constant_with_warmup"},
        flipped={"lr_warmup_steps": 3},
    ),
    acts(
        "lr_num_cycles",
        "step",
        "the rate is at its top so many times",
        rates_are(1, 0.5, 1, 0.5),
        base={**FOUR, "lr_scheduler": "cosine_with_restarts"},
        flipped={"lr_num_cycles": 2},
    ),
    acts(
        "lr_power",
        "step",
        "rates fall with this power of the rest of the run",
        rates_are(*(1e-4 + (1 - 1e-4) * (1 - n / 4) ** 2 for n in range(4))),
        base={**FOUR, "lr_scheduler": "polynomial"},
        flipped={"lr_power": 2.0},
    ),
    adamw_row("adam_beta1", 0.5, betas=(0.5, 0.999)),
    adamw_row("adam_beta2", 0.9, betas=(0.9, 0.9)),
    adamw_row("adam_epsilon", 1e-2, eps=1e-2),
    adamw_row("adam_weight_decay", 50.0, weight_decay=50.0),
    acts(
        "adam_weight_decay",
        "step",
        "the denoiser's factors shrink by rate times decay, the text encoders' do not",
        shrinks("denoiser.", 0.5, others=0.0),
        base={**TEXT, **TEXT_LAYERS, "adam_weight_decay_text_encoder": 0.0},
        families=WITH_TEXT,
        flipped={"adam_weight_decay": 0.5},
    ),
    acts(
        "adam_weight_decay_text_encoder",
        "step",
        "the text encoders' factors shrink by rate times decay, the denoiser's do not",
        shrinks("text_encoder", 0.5, others=0.0),
        base={
            **TEXT,
            **TEXT_LAYERS,
            "adam_weight_decay": 0.0,
            "adam_weight_decay_text_encoder": 0.0,
        },
        flipped={"adam_weight_decay_text_encoder": 0.5},
        families=WITH_TEXT,
    ),
    acts(
        "adam_weight_decay_text_encoder",
        "step",
        "0.0 is no decay: factors keep every bit",
        shrinks("text_encoder", 0.0, others=0.5),
        base={**TEXT, **TEXT_LAYERS, "adam_weight_decay": 0.5},
        families=WITH_TEXT,
        flipped={"adam_weight_decay_text_encoder": 0.0},
    ),
    acts(
        "adam_weight_decay_text_encoder",
        "step",
        "new tokens shrink by rate times decay",
        undisturbed_tokens_shrink,
        base={**TOKENS, "caption_dropout": 1.0, "adam_weight_decay_text_encoder": 0.0},
        flipped={"adam_weight_decay_text_encoder": 0.5},
        families=WITH_TEXT,
    ),
    prodigy_row("prodigy_beta3", 0.1, "beta3", prodigy_use_bias_correction=False),
    prodigy_row("prodigy_decouple", False, "decouple", adam_weight_decay=5.0),
    prodigy_row("prodigy_use_bias_correction", False, "use_bias_correction"),
    acts(
        "prodigy_safeguard_warmup",
        "step",
        "seven steps are prodigyopt's without the safeguard, at a rate of a half",
        updates_are_those_of(
            prodigy(lr=0.5, safeguard_warmup=False, **LONGER), prodigy(lr=0.5, **LONGER), 7
        ),
        base={**GROWING, "learning_rate": 0.5},
        flipped={"prodigy_safeguard_warmup": False},
    ),
    acts(
        "max_grad_norm",
        "gradient",
        "all gradients together are scaled down to the norm; 0 leaves them",
        the_norm_is_at_most(1e-3),
        base={**TEXT, **TEXT_LAYERS, "max_grad_norm": 0.0},
        families=WITH_TEXT,
        flipped={"max_grad_norm": 1e-3},
    ),
    acts(
        "max_grad_norm",
        "gradient",
        "all gradients of the denoiser are scaled down to the norm; 0 leaves them",
        the_norm_is_at_most(1e-3),
        base={"max_grad_norm": 0.0},
        flipped={"max_grad_norm": 1e-3},
        families=("flux2",),
    ),
    *idle(
        "no text encoder and no new token is trained",
        text_encoder_lr=2e-4,
        adam_weight_decay_text_encoder=0.5,
    ),
    *idle("lr_scheduler is constant", lr_warmup_steps=3),
    *idle("lr_scheduler is not cosine_with_restarts", lr_num_cycles=2),
    *idle("lr_scheduler is not polynomial", lr_power=2.0),
    *idle(
        "optimizer is not prodigy",
        prodigy_beta3=0.1,
        prodigy_decouple=False,
        prodigy_use_bias_correction=False,
        prodigy_safeguard_warmup=False,
    ),
]

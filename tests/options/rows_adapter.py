"""Rows of the section adapter, for each form of an adapter that they concern."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from options.bases import TEXT
from options.case import Case, near, same
from options.matrix import ADAPTER_FORMS, WITH_TEXT, Own, Row, acts, for_each_form, idle, refused
from options.probe import Probe, Tensors
from options.rows_tokens import learn_until
from options.sums import changed, ratio_is

from trainer.families.base import adapted_encoders

Shows = Callable[[Case], None]
# What PEFT calls the parameters of each form.
PARTS = {
    "lora": ("lora_A", "lora_B"),
    "dora": ("lora_A", "lora_B", "lora_magnitude_vector"),
    "lokr": ("lokr_w1", "lokr_w2"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
}


def encoders(case: Case) -> tuple[str, ...]:
    """The text encoders that get an adapter."""
    return adapted_encoders(case.pipeline())


def layer_of(name: str) -> str:
    """The adapted layer of a parameter: its name before the form's part."""
    parts = {part for parts in PARTS.values() for part in parts}
    words = name.split(".")
    at = next(n for n, word in enumerate(words) if any(word.startswith(p) for p in parts))
    return ".".join(words[:at])


def layers(probe: Probe) -> set[str]:
    return {layer_of(name) for name in probe.names}


def ends_in(names: set[str], endings: tuple[str, ...]) -> set[str]:
    return {name for name in names if name.endswith(tuple(f".{end}" for end in endings))}


def pefts_layers_compute_the_same(case: Case) -> None:
    ours, theirs = case.before(), case.after()
    assert (ours.adapted_by, theirs.adapted_by) == ({"trainer"}, {"peft"})
    same(ours.first.before, theirs.first.before)
    near(theirs.first.gradients, ours.first.gradients, rtol=1e-3, atol=1e-6)


def linear_layers(case: Case, component: str = "denoiser") -> set[str]:
    name = case.world.denoiser if component == "denoiser" else component
    module = case.pipeline().pipeline.components[name]
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {f"{component}.{n}" for n, layer in module.named_modules() if isinstance(layer, kinds)}


def all_weights_learn(case: Case) -> None:
    adapted, whole = case.before(), case.after()
    base = case.world.weights()
    assert whole.names == {f"denoiser.{name}" for name in base}
    near(whole.first.before, {f"denoiser.{name}": t for name, t in base.items()})
    moved = changed(whole.first.before, whole.first.after)
    assert len(moved) > 0.9 * len(base)
    assert adapted.frozen[0] == adapted.frozen[1]
    assert adapted.names.isdisjoint(whole.names)


def no_adapter_is_written(case: Case) -> None:
    adapted, whole = case.delivered({}), case.delivered(case.row.flipped)
    assert "pytorch_lora_weights.safetensors" in adapted.tensors
    folder = case.world.denoiser
    assert set(whole.tensors) == {f"{folder}/diffusion_pytorch_model.safetensors"}
    (tensors,) = whole.tensors.values()
    near(tensors, {n.removeprefix("denoiser."): t for n, t in whole.steps[-1].after.items()})


def the_form_is(form: str) -> Shows:
    """Asserts the parameters of a form, that it starts at no change, and what is written."""

    def shows(case: Case) -> None:
        plain, other = case.before(), case.after()
        parts = PARTS[form]
        for part in parts:
            assert {layer_of(n) for n in other.names if part in n} == layers(plain)
        assert all(any(part in name for part in parts) for name in other.names)
        near(other.seen.prediction, plain.seen.prediction, rtol=1e-4, atol=1e-5)
        written = set().union(*case.delivered(case.row.flipped).tensors.values())
        for part in parts:
            in_file = {"lora_A": "lora_down", "lora_B": "lora_up"}.get(part, part)
            in_file = "dora_scale" if part == "lora_magnitude_vector" else in_file
            assert any(in_file in name for name in written), in_file

    return shows


def magnitudes_start_at_row_norms_and_move(case: Case) -> None:
    base, probe = case.world.weights(), case.after()
    magnitudes = {n: t for n, t in probe.first.before.items() if "magnitude" in n}
    assert {layer_of(name) for name in magnitudes} == layers(case.before())
    for name, start in magnitudes.items():
        weight = base[f"{layer_of(name).removeprefix('denoiser.')}.weight"]
        near(start.flatten(), weight.flatten(1).norm(dim=1), rtol=1e-4)
    assert len(changed(magnitudes, probe.first.after)) > 0.9 * len(magnitudes)
    near(probe.seen.prediction, case.before().seen.prediction, rtol=1e-4, atol=1e-5)


def inner_sizes(probe: Probe, form: str, component: str) -> set[int]:
    """The inner dimension of every factor of a component's adapter."""
    start = {n: t for n, t in probe.first.before.items() if n.startswith(f"{component}.")}
    if form == "lokr":
        return {t.shape[0] for n, t in start.items() if "lokr_w2_b" in n}
    part = {"loha": "hada_w1_b"}.get(form, "lora_A")
    return {t.shape[0] for n, t in start.items() if part in n}


def the_inner_size_is(before: int, after: int, form: str, component: str = "denoiser") -> Shows:
    def shows(case: Case) -> None:
        places = [component] if component == "denoiser" else list(encoders(case))
        for place in places:
            assert inner_sizes(case.before(), form, place) == {before}
            assert inner_sizes(case.after(), form, place) == {after}
        if component != "denoiser":
            assert inner_sizes(case.after(), form, "denoiser") == {4}
            assert any("lora_te" in n for n in _kohya(case.delivered(case.row.flipped).tensors))

    return shows


def _kohya(files: Any) -> Tensors:
    found: Tensors = files["lora.safetensors"]
    return found


def the_gradient_is_times(factor: float, component: str) -> Shows:
    """Asserts that an adapter, still without effect, feels so much more of the loss.

    The change of the weights is scale * product: so is the gradient of the factor that is zero.
    """

    def shows(case: Case) -> None:
        once, twice = case.before().first, case.after().first
        same(once.before, twice.before)
        for part in PARTS[case.row.form]:
            for place in ["denoiser"] if component == "denoiser" else encoders(case):
                names = [n for n in once.gradients if n.startswith(f"{place}.") and part in n]
                ours = {n: once.gradients[n] for n in names}
                if part == "lora_magnitude_vector":
                    near(ours, {n: twice.gradients[n] for n in names}, rtol=1e-3)
                elif any(float(t.abs().max()) > 0 for t in ours.values()):
                    ratio_is({n: twice.gradients[n] for n in names}, ours, factor)
        others = [
            n for n in once.gradients if (component == "denoiser") != n.startswith("denoiser.")
        ]
        near(
            {n: once.gradients[n] for n in others},
            {n: twice.gradients[n] for n in others},
            rtol=1e-3,
        )

    return shows


def small_factors_are(size: int) -> Shows:
    def shows(case: Case) -> None:
        def sizes(probe: Probe) -> set[tuple[int, ...]]:
            found = probe.first.before.items()
            return {tuple(t.shape[:2]) for name, t in found if "lokr_w1" in name}

        assert sizes(case.after()) == {(size, size)}
        assert (size, size) not in sizes(case.before())

    return shows


def learns_in(component: str, *endings: str) -> Shows:
    """Asserts that exactly the layers with these endings are adapted, move, and are written.

    Args:
        endings: none: those of the flip.
    """

    def shows(case: Case) -> None:
        ends = endings or tuple(case.leaves(case.row.flipped)["target_unet_modules"])
        places = [component] if component == "denoiser" else list(encoders(case))
        for place in places:
            found = {name for name in layers(case.after()) if name.startswith(f"{place}.")}
            assert found == ends_in(linear_layers(case, place), ends)
            assert found
        assert layers(case.before()) != layers(case.after())
        step = case.after().first
        # The last layer comes after the states that some families use: it has no gradient.
        learning = {layer_of(name) for name in step.gradients}
        assert {layer_of(name) for name in changed(step.before, step.after)} == learning
        assert len(learning) > 0.6 * len(layers(case.after()))

    return shows


def text_encoders_learn_by_their_adapter(case: Case) -> None:
    alone, with_text = case.before(), case.after()
    assert {name.split(".")[0] for name in alone.names} == {"denoiser"}
    assert {name.split(".")[0] for name in with_text.names} == {"denoiser", *encoders(case)}
    assert with_text.frozen[0] == with_text.frozen[1]
    for step in with_text.steps[:1]:
        for place in encoders(case):
            assert any(n.startswith(f"{place}.") for n in changed(step.before, step.after))
            assert any(
                float(g.abs().max()) > 0
                for n, g in step.gradients.items()
                if n.startswith(f"{place}.")
            )
    near(with_text.seen.text, alone.seen.text, rtol=1e-4, atol=1e-5)
    # The second step is given what the first one taught the text encoders.
    before, later = (probe.steps[1].passes[0].text for probe in (alone, with_text))
    assert any(not torch.allclose(before[name], later[name], atol=1e-6) for name in before)


TEXT_LAYERS = {"target_text_encoder_modules": ["q_proj", "v_proj"]}
SHORT = {**TEXT, **TEXT_LAYERS, "max_train_steps": 4}
FACTORED = {"lokr": {"lokr_factor": 2}}
NOT_TRAINED = "train_text_encoder is false"
NO_ADAPTER = "all weights are trained, there is no adapter"
WHOLE = {"use_lora": False, "rank": ..., "target_unet_modules": ..., "learning_rate": 1e-4}


def rank_row(form: str) -> Row:
    return acts(
        "rank",
        "step",
        "factors have so many rows",
        the_inner_size_is(4, 2, form),
        base=FACTORED.get(form),
        flipped={"rank": 2},
        form=form,
    )


def alpha_row(form: str) -> Row:
    return acts(
        "alpha",
        "gradient",
        "twice alpha: the adapter counts twice",
        the_gradient_is_times(2.0, "denoiser"),
        base={"alpha": 4.0},
        flipped={"alpha": 8.0},
        form=form,
    )


def layers_row(form: str) -> Row:
    return acts(
        "adapter_layers",
        "gradient",
        "peft: PEFT's own code computes the same first weights to the same gradients",
        pefts_layers_compute_the_same,
        flipped={"adapter_layers": "peft"},
        form=form,
    )


def targets_row(form: str) -> Row:
    return acts(
        "target_unet_modules",
        "step",
        "exactly the layers with these endings are adapted",
        learns_in("denoiser"),
        flipped={"target_unet_modules": Own("other layers")},
        form=form,
    )


def text_row(form: str) -> Row:
    return acts(
        "train_text_encoder",
        ("conditioning", "gradient", "step"),
        "every text encoder learns by an adapter of the same form",
        text_encoders_learn_by_their_adapter,
        base={"target_text_encoder_modules": ["q_proj", "v_proj"]},
        flipped=TEXT,
        form=form,
        families=WITH_TEXT,
    )


def text_end_row(form: str) -> Row:
    return acts(
        "train_text_encoder_frac",
        ("gradient", "step"),
        "half: text encoders learn in two of four steps, then keep every bit",
        learn_until(2, "text_encoder"),
        base={**SHORT, "lr_scheduler": "constant"},
        flipped={"train_text_encoder_frac": 0.5},
        form=form,
        families=WITH_TEXT,
    )


def text_targets_row(form: str) -> Row:
    return acts(
        "target_text_encoder_modules",
        "step",
        "exactly the text encoders' layers with these endings are adapted",
        learns_in("text_encoder", "k_proj"),
        base=TEXT,
        flipped={"target_text_encoder_modules": ["k_proj"]},
        form=form,
        families=WITH_TEXT,
    )


def text_rank_row(form: str) -> Row:
    return acts(
        "text_encoder_rank",
        ("step", "tensors"),
        "the text encoders' factors have so many rows, the denoiser's as many as before",
        the_inner_size_is(4, 2, form, "text_encoder"),
        base={**SHORT, "max_train_steps": 1, **FACTORED.get(form, {})},
        flipped={"text_encoder_rank": 2},
        form=form,
        families=WITH_TEXT,
    )


def text_alpha_row(form: str) -> Row:
    return acts(
        "text_encoder_alpha",
        "gradient",
        "twice: the text encoders' adapter counts twice, the denoiser's as before",
        the_gradient_is_times(2.0, "text_encoder"),
        base={**SHORT, "text_encoder_alpha": 4.0},
        flipped={"text_encoder_alpha": 8.0},
        form=form,
        families=WITH_TEXT,
    )


ADAPTER = [
    acts(
        "use_lora",
        "step",
        "false: the denoiser's own weights learn; true: they keep every bit",
        all_weights_learn,
        flipped=WHOLE,
    ),
    acts(
        "use_lora",
        "tensors",
        "false: all weights are written, and no adapter",
        no_adapter_is_written,
        base={"max_train_steps": 1},
        flipped=WHOLE,
    ),
    *[
        acts(
            "lora_type",
            ("step", "tensors"),
            f"{form}: factors of that form, which change nothing at first, are learnt and written",
            the_form_is(form),
            base={"max_train_steps": 1},
            flipped={"lora_type": form},
        )
        for form in ("lokr", "loha")
    ],
    acts(
        "use_dora",
        "step",
        "magnitudes begin as the norms of the weights' rows, and move",
        magnitudes_start_at_row_norms_and_move,
        flipped={"use_dora": True},
    ),
    acts(
        "use_dora",
        ("step", "tensors"),
        "direction and magnitude are learnt apart and written",
        the_form_is("dora"),
        base={"max_train_steps": 1},
        flipped={"use_dora": True},
    ),
    *[
        refused("use_dora", {"use_dora": True}, "DoRA exists for lora_type lora", form=form)
        for form in ("lokr", "loha")
    ],
    *for_each_form(rank_row),
    *for_each_form(alpha_row),
    acts(
        "lokr_factor",
        "step",
        "small factors have this size",
        small_factors_are(2),
        flipped={"lokr_factor": 2},
        form="lokr",
    ),
    *[
        row
        for form in ADAPTER_FORMS
        if form != "lokr"
        for row in idle("lora_type is not lokr", form=form, lokr_factor=2)
    ],
    *for_each_form(layers_row),
    *for_each_form(targets_row),
    refused("target_unet_modules", {"target_unet_modules": ["to_q", "to_kk"]}, "to_kk"),
    *for_each_form(text_row),
    refused("train_text_encoder", TEXT, "no text encoder .* can learn", families=("flux2",)),
    *for_each_form(text_end_row),
    *for_each_form(text_targets_row),
    refused(
        "target_text_encoder_modules",
        {"target_text_encoder_modules": ["q_prox"]},
        "q_prox",
        base=TEXT,
        families=WITH_TEXT,
    ),
    *for_each_form(text_rank_row),
    *for_each_form(text_alpha_row),
    *[
        row
        for form in ADAPTER_FORMS
        for row in idle(
            NOT_TRAINED,
            form=form,
            train_text_encoder_frac=0.5,
            target_text_encoder_modules=["k_proj"],
            text_encoder_rank=2,
            text_encoder_alpha=8.0,
        )
    ],
    *idle(
        NO_ADAPTER,
        base=WHOLE,
        rank=2,
        alpha=8.0,
        use_dora=True,
        target_unet_modules=["to_q"],
        adapter_layers="peft",
    ),
    *idle(
        NO_ADAPTER,
        base={**WHOLE, **TEXT},
        families=WITH_TEXT,
        target_text_encoder_modules=["k_proj"],
        text_encoder_rank=2,
        text_encoder_alpha=8.0,
    ),
]

"""Rows of the section model."""

from __future__ import annotations

import torch
from options.bases import CLEAN
from options.case import Case, near, same
from options.matrix import DDPM, FLOW, Place, acts, idle, meaningless, refused
from options.probe import Probe
from options.sums import clean_latents


def has_the_states_of(case: Case, probe: Probe, place: str) -> None:
    near(probe.seen.text, case.encoded(probe.batch.captions, place))


def trains_on_the_other_model(case: Case) -> None:
    has_the_states_of(case, case.before(), "model")
    has_the_states_of(case, case.after(), "other model")
    assert not torch.allclose(case.before().seen.hidden_states, case.after().seen.hidden_states)
    assert case.before().frozen[0] != case.after().frozen[0]
    gradients, others = case.before().first.gradients, case.after().first.gradients
    assert any(not torch.allclose(gradients[name], others[name]) for name in gradients)


def trains_on_the_variants_weights(case: Case) -> None:
    plain, other = (
        case.probe({"model_url": Place("model")}),
        case.probe({"model_url": Place("other model"), "variant": ...}),
    )
    same(case.before().seen.tensors(), plain.seen.tensors())
    same(case.after().seen.tensors(), other.seen.tensors())
    same(case.after().first.gradients, other.first.gradients)
    assert case.after().frozen[0] == other.frozen[0]


def the_latents_are_doubled(case: Case) -> None:
    once, twice = (clean_latents(case, p.seen) for p in (case.before(), case.after()))
    near(twice, 2 * once, rtol=1e-3, atol=1e-4)


def draws(case: Case, probe: Probe, place: str) -> torch.Tensor:
    """The standard normal numbers with which latents were drawn from a VAE's posterior."""
    pixels = torch.stack([probe.dataset.pixels_of(n, False) for n in probe.batch.numbers])
    with torch.no_grad():
        posterior = case.pipeline(place).encode_image(pixels)
    return (clean_latents(case, probe.seen) - posterior.mean) / posterior.std


def the_vae_is_the_given_one(case: Case) -> None:
    # The draws belong to the seed: they are the same only if each VAE's posterior is the right one.
    own, others = draws(case, case.before(), "model"), draws(case, case.after(), "other model")
    near(own, others, rtol=2e-2, atol=2e-2)
    assert 0.7 < float(own.std()) < 1.3
    assert not torch.allclose(case.before().seen.noisy_latents, case.after().seen.noisy_latents)


def the_latents_are_of_half_precision(case: Case) -> None:
    full, half = case.before().seen, case.after().seen
    in_32_bits = case.probe({"mixed_precision": "no"}).seen
    near(full.noisy_latents, in_32_bits.noisy_latents)
    assert not torch.allclose(half.noisy_latents, full.noisy_latents, atol=1e-5)
    near(half.noisy_latents, full.noisy_latents, rtol=0.1, atol=0.1)


def captions_have_as_many_tokens(case: Case) -> None:
    usual, short = (p.seen.hidden_states for p in (case.before(), case.after()))
    assert (usual.shape[1], short.shape[1]) == (512, 32)
    # As the pipeline encodes them for pictures of that many.
    pipeline, captions = case.pipeline().pipeline, list(case.after().batch.captions)
    with torch.no_grad():
        states = pipeline.encode_prompt(captions, device="cpu", max_sequence_length=32)[0]
    near(states, short)


MODEL = [
    acts(
        "model_url",
        ("conditioning", "gradient"),
        "text, frozen weights and gradients are those of the other base model",
        trains_on_the_other_model,
        flipped={"model_url": Place("other model")},
    ),
    *[
        refused("model_family", {"model_family": other}, f"is `{other}`, but", families=families)
        for other, families in (("flux", ("sd15", "sdxl", "flux2")), ("sd15", ("flux",)))
    ],
    acts(
        "single_file_config",
        "batch",
        "a configuration with twice the scale doubles the latents",
        the_latents_are_doubled,
        base={
            "model_url": Place("single file"),
            "single_file_config": Place("original model"),
            **CLEAN,
        },
        flipped={"single_file_config": Place("doubled latents")},
        families=DDPM,
    ),
    acts(
        "revision",
        ("conditioning", "gradient"),
        "everything is that of the other commit",
        trains_on_the_other_model,
        base={"model_url": Place("hub model")},
        flipped={"revision": "other"},
    ),
    acts(
        "variant",
        ("batch", "conditioning", "gradient"),
        "all weights are those of the variant's files",
        trains_on_the_variants_weights,
        base={"model_url": Place("two variants")},
        flipped={"variant": "fp16"},
    ),
    acts(
        "vae_url",
        "batch",
        "latents come from the given VAE, otherwise from the base model's own",
        the_vae_is_the_given_one,
        base=CLEAN,
        flipped={"vae_url": Place("vae")},
    ),
    acts(
        "upscale_vae_32bit",
        "batch",
        "latents are those of 32 bits, and without it those of the run's format",
        the_latents_are_of_half_precision,
        base={"mixed_precision": "bf16"},
        flipped={"upscale_vae_32bit": False},
    ),
    acts(
        "max_sequence_length",
        ("conditioning", "gradient"),
        "captions are so many tokens long, otherwise 512",
        captions_have_as_many_tokens,
        flipped={"max_sequence_length": 32},
        families=FLOW,
    ),
    *[
        row
        for family in DDPM
        for row in meaningless(
            "max_sequence_length",
            64,
            f"CLIP alone reads the captions of a `{family}`",
            families=(family,),
        )
    ],
    refused("max_sequence_length", {"max_sequence_length": 513}, "at most 512", families=FLOW),
    *idle("model_url is local", revision="main"),
    *idle("model_url is not a single file", single_file_config=Place("model")),
    *idle(
        "everything is computed in 32 bits",
        base={"mixed_precision": "no"},
        upscale_vae_32bit=False,
    ),
    *idle(
        "model_url is a single file",
        base={"model_url": Place("single file"), "single_file_config": Place("original model")},
        families=DDPM,
        variant="fp16",
    ),
]

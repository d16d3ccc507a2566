"""Rows of the sections token and prior."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from options.bases import PRIOR, TOKENS, UNCACHED
from options.case import Case, chosen, near, same
from options.matrix import WITH_TEXT, Place, acts, idle, refused
from options.probe import Probe, Tensors
from options.sums import changed, loss_is_the_sum, ratio_is
from PIL import Image

from trainer.families.base import token_encoders

Shows = Callable[[Case], None]


# token


def rows_of(tensors: Tensors) -> Tensors:
    """Those of the new tokens."""
    return {name: t for name, t in tensors.items() if name.startswith("tokens.")}


def denoiser_of(tensors: Tensors) -> Tensors:
    """Those of the denoiser."""
    return {name: t for name, t in tensors.items() if name.startswith("denoiser.")}


def encoders(case: Case) -> tuple[str, ...]:
    """The text encoders that learn new tokens."""
    return token_encoders(case.pipeline())


def new_ids(case: Case, probe: Probe, component: str) -> list[list[int]]:
    """The new tokens' numbers in each caption that an encoder was given, in order."""
    tokenizer = case.pipeline().pipeline.components[component.replace("text_encoder", "tokenizer")]
    given = torch.cat(probe.first.token_ids[component])
    return [[int(i) - len(tokenizer) for i in row if i >= len(tokenizer)] for row in given]


def encoded_with_rows(case: Case, probe: Probe, caption: str) -> Tensors:
    """A caption's conditioning by a pipeline whose tables were enlarged by the first rows."""
    pipe = DiffusionPipeline.from_pretrained(case.world.model)
    tables = rows_of(probe.first.before)
    count = len(next(iter(tables.values())))
    for component in encoders(case):
        tokenizer = pipe.components[component.replace("text_encoder", "tokenizer")]
        tokenizer.add_tokens([f"<s{n}>" for n in range(count)])
        encoder = pipe.components[component]
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            encoder.get_input_embeddings().weight[-count:] = tables[f"tokens.{component}"]
    with torch.no_grad():
        return dict(type(case.pipeline())(pipe).encode_text([caption]))


def captions_hold(replaced: str, ids: list[int], count: int) -> Shows:
    """Asserts which new tokens a caption becomes, and that it is encoded with their vectors."""

    def shows(case: Case) -> None:
        probe = case.after()
        for component in encoders(case):
            assert new_ids(case, probe, component) == [ids]
            table = probe.first.before[f"tokens.{component}"]
            assert len(table) == count
            used = probe.first.gradients[f"tokens.{component}"].abs().amax(1) > 0
            assert used.nonzero().flatten().tolist() == ids
        expected = encoded_with_rows(case, probe, replaced)
        near(chosen(probe.seen.text, slice(1)), expected)
        assert not torch.allclose(case.before().seen.hidden_states, probe.seen.hidden_states)

    return shows


def new_vectors_are_learnt(case: Case) -> None:
    before, after = case.before(), case.after()
    assert rows_of(before.first.before) == {}
    assert set(rows_of(after.first.before)) == {f"tokens.{name}" for name in encoders(case)}
    # Adam's first step is the learning rate, where there is a gradient at all.
    for moved in after.first.moved("tokens.").values():
        assert float(moved.abs().max()) == 1e-3 or abs(float(moved.abs().max()) - 1e-3) < 1e-5
    assert after.frozen[0] == after.frozen[1]
    for name, rows in rows_of(after.first.before).items():
        assert abs(float(rows.std()) / after.new_tokens[name.removeprefix("tokens.")] - 1) < 0.4


def learn_until(step: int, part: str) -> Shows:
    """Asserts that a part learns before a step and stays as it is to the bit from it on."""

    def shows(case: Case) -> None:
        for probe, end in ((case.before(4), 4), (case.after(4), step)):
            # Not all of them: what comes after the states that are used has no gradient.
            names = {name for name in probe.first.gradients if name.startswith(part)}
            assert len(names) > 0.5 * sum(name.startswith(part) for name in probe.names)
            for number, one in enumerate(probe.steps):
                learning = names if number < end else set()
                own = {name for name in one.gradients if name.startswith(part)}
                moved = changed(one.before, one.after)
                assert own == learning
                # A factor whose partner is still zero has a gradient of zero.
                assert len(moved & learning) >= 0.5 * len(learning)
                assert {name for name in moved if name.startswith(part)} <= learning
                assert any(name.startswith("denoiser.") for name in moved)

    return shows


def the_denoiser_waits_for_the_pivot(case: Case) -> None:
    for number, (one, other) in enumerate(
        zip(case.before(4).steps, case.after(4).steps, strict=True)
    ):
        moved = {name.split(".")[0] for name in changed(other.before, other.after)}
        assert moved == ({"tokens"} if number < 2 else {"denoiser"})
        assert "denoiser" in {name.split(".")[0] for name in changed(one.before, one.after)}


def the_deviation_is_pulled(case: Case) -> None:
    for name, free in rows_of(case.before().first.after).items():
        own = case.after().new_tokens[name.removeprefix("tokens.")]
        pulled = free * (own / float(free.std())) ** 0.5
        near(case.after().first.after[name], pulled)
        assert not torch.allclose(free, pulled, rtol=1e-3)
    same(denoiser_of(case.before().first.after), denoiser_of(case.after().first.after))


def pools_at_the_end_of_the_text(case: Case) -> None:
    largest, end = case.before().seen.text, case.after().seen.text
    # The right id of the end mark gives the pooling that is asked for.
    near(
        end["pooled_prompt_embeds"],
        case.probe({"model_url": Place("model")}).seen.text["pooled_prompt_embeds"],
    )
    assert not torch.allclose(
        largest["pooled_prompt_embeds"], end["pooled_prompt_embeds"], atol=1e-3
    )
    assert torch.equal(largest["prompt_embeds"], end["prompt_embeds"])


HALFWAY = {**TOKENS, "max_train_steps": 4, "train_text_encoder_ti_frac": 1.0}
TOKEN = [
    acts(
        "train_text_encoder_ti",
        ("conditioning", "step"),
        "new vectors in every text encoder learn, and nothing of its own changes",
        new_vectors_are_learnt,
        families=WITH_TEXT,
        base={"token_retraction": 0.0},
        flipped={"train_text_encoder_ti": True},
    ),
    acts(
        "train_text_encoder_ti",
        "step",
        "new vectors learn in 32 bits where everything else is in 16",
        new_vectors_are_learnt,
        families=WITH_TEXT,
        base={"token_retraction": 0.0, "mixed_precision": "bf16"},
        flipped={"train_text_encoder_ti": True},
    ),
    refused(
        "train_text_encoder_ti",
        {"train_text_encoder_ti": True, "train_text_encoder": True},
        "either by an adapter or by new tokens",
        field_named="train_text_encoder",
    ),
    acts(
        "token_abstraction",
        ("conditioning", "gradient"),
        "the second identifier becomes the third and fourth token, the first does not touch it",
        captions_hold("A photograph of a <s2><s3>", [2, 3], 4),
        base={
            **TOKENS,
            "token_abstraction": "TOK1",
            "instance_prompt": "A photograph of a TOK1",
        },
        families=WITH_TEXT,
        flipped={"token_abstraction": "TOK, TOK1"},
    ),
    acts(
        "num_new_tokens_per_abstraction",
        ("conditioning", "gradient"),
        "an identifier becomes so many tokens",
        captions_hold("A photograph of a <s0><s1><s2>", [0, 1, 2], 3),
        base=TOKENS,
        families=WITH_TEXT,
        flipped={"num_new_tokens_per_abstraction": 3},
    ),
    acts(
        "train_text_encoder_ti_frac",
        ("gradient", "step"),
        "half: the vectors learn in two of four steps, then keep every bit",
        learn_until(2, "tokens."),
        base=HALFWAY,
        families=WITH_TEXT,
        flipped={"train_text_encoder_ti_frac": 0.5},
    ),
    acts(
        "train_text_encoder_ti_frac",
        ("gradient", "step"),
        "half, with prodigy: no bit moves after the pivot either",
        learn_until(2, "tokens."),
        base={**HALFWAY, "optimizer": "prodigy", "learning_rate": 1.0},
        families=WITH_TEXT,
        flipped={"train_text_encoder_ti_frac": 0.5},
    ),
    acts(
        "disable_unet_during_ti_training",
        "step",
        "only the vectors learn before the pivot, only the denoiser after it",
        the_denoiser_waits_for_the_pivot,
        base={**HALFWAY, "train_text_encoder_ti_frac": 0.5},
        families=WITH_TEXT,
        flipped={"disable_unet_during_ti_training": True},
    ),
    refused(
        "train_text_encoder_ti",
        {"train_text_encoder_ti": True},
        "no text encoder .* can learn",
        families=("flux2",),
    ),
    refused(
        "disable_unet_during_ti_training",
        {"disable_unet_during_ti_training": True, "train_text_encoder_ti_frac": 1.0},
        "the denoiser would never learn",
        base={"train_text_encoder_ti": True},
    ),
    acts(
        "token_retraction",
        "step",
        "after a step vectors are times (own deviation / theirs) ** exponent",
        the_deviation_is_pulled,
        base=TOKENS,
        families=WITH_TEXT,
        flipped={"token_retraction": 0.5},
    ),
    acts(
        "ti_pooling",
        "conditioning",
        "eos: an old checkpoint's pooled vector is taken at the end mark",
        pools_at_the_end_of_the_text,
        base={**TOKENS, "model_url": Place("legacy model")},
        flipped={"ti_pooling": "eos"},
        families=("sdxl", "flux"),
    ),
    *idle(
        "this base model takes nothing from a pooled vector that new tokens could move",
        base=TOKENS,
        families=WITH_TEXT,
        ti_pooling="eos",
    ),
    *idle(
        "train_text_encoder_ti is false",
        num_new_tokens_per_abstraction=3,
        train_text_encoder_ti_frac=1.0,
        disable_unet_during_ti_training=True,
        token_retraction=0.5,
        ti_pooling="eos",
    ),
    *idle("no new tokens are trained and no captions are written", token_abstraction="TOK, TOK1"),
]


# prior


def class_pictures_stand_beside(case: Case) -> None:
    alone, beside = case.before(), case.after()
    assert len(alone.seen.noisy_latents) == 2
    assert beside.seen.is_class.tolist() == [False, False, True, True]
    assert torch.equal(beside.seen.noisy_latents[:2], alone.seen.noisy_latents)
    captions = ["A photograph of a TOK"] * 2 + ["a photo of a man"] * 2
    near(beside.seen.text, case.encoded(captions))
    loss_is_the_sum(case, beside)
    assert beside.seen.shares.tolist() == [0.5, 0.5, 0.5, 0.5]


def the_gradient_is_linear_in_the_weight(case: Case) -> None:
    none, one, more = (
        case.probe({"prior_loss_weight": weight}).first.gradients for weight in (0.0, 1.0, 2.5)
    )
    assert case.after().seen.shares.tolist() == [0.5, 0.5, 1.25, 1.25]
    of_class = {name: one[name] - none[name] for name in one}
    ratio_is({name: more[name] - none[name] for name in one}, of_class, 2.5)
    alone = case.probe({"with_prior_preservation": False, "prior_loss_weight": ...}).first.gradients
    near(none, alone, rtol=1e-3, atol=1e-6)
    loss_is_the_sum(case, case.after())


def class_captions_are(caption: str) -> Shows:
    def shows(case: Case) -> None:
        half = case.after().seen.is_class
        assert half.tolist() == [False, False, True, True]
        ours, theirs = case.after().seen.text, case.before().seen.text
        near(chosen(ours, half), case.encoded([caption] * 2))
        same(chosen(ours, ~half), chosen(theirs, ~half))
        states = "prompt_embeds"
        assert not torch.allclose(ours[states][half], theirs[states][half])

    return shows


def so_many_are_made(case: Case) -> None:
    for probe, count in ((case.before(), 2), (case.after(), 3)):
        made = [example for example in probe.dataset.examples if example.is_class]
        assert len(made) == count
        uses = {n for s in range(6) for b in probe.dataset[s] for n in b.numbers}
        assert {example.number for example in made} <= uses


def class_pixels(probe: Probe) -> torch.Tensor:
    """Every class picture as the VAE may be given it, in the order of numbers."""
    numbers = [example.number for example in probe.dataset.examples if example.is_class]
    return torch.stack([probe.dataset.pixels_of(number, False) for number in numbers])


def comes_from_the_folder(case: Case) -> None:
    folder = Path(case.world.path("other class pictures"))
    for row, path in enumerate(sorted(folder.iterdir())):
        image = torch.tensor(list(Image.open(path).tobytes())).view(64, 64, 3).permute(2, 0, 1)
        near(class_pixels(case.after())[row], image / 127.5 - 1, atol=1e-5)
    seen = case.after().first.pixels[0][case.after().seen.is_class]
    files = class_pixels(case.after())
    assert all(any(torch.equal(one, file) for file in files) for one in seen)
    assert not torch.equal(class_pixels(case.before()), files)


def is_made_by_the_pipeline(steps: int, **guided: float) -> Shows:
    """Asserts that class pictures are what diffusers makes with these settings, to a grey value.

    Args:
        guided: the guidance. None: what the pipeline takes by itself.
    """

    def shows(case: Case) -> None:
        from trainer.randomness import key  # noqa: PLC0415

        pipe = DiffusionPipeline.from_pretrained(case.world.model)
        pipe.set_progress_bar_config(disable=True)
        image = pipe(
            prompt="a photo of a man",
            width=64,
            height=64,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(key(42, "class image", 0)),
            output_type="pt",
            **guided,
        ).images[0]
        ours = class_pixels(case.after())[0]
        near((ours + 1) * 127.5, image.float() * 255, atol=1.01, rtol=0)
        assert not torch.equal(class_pixels(case.before())[0], ours)

    return shows


MADE = {
    "with_prior_preservation": True,
    "photo_class": "Man",
    "num_class_images": 2,
    "class_inference_steps": 2,
}
CLASS_RULE = "with_prior_preservation is false"
PRIORS = [
    acts(
        "with_prior_preservation",
        ("batch", "conditioning"),
        "as many class pictures follow the subject's, with their own caption",
        class_pictures_stand_beside,
        base={name: value for name, value in PRIOR.items() if name != "with_prior_preservation"},
        flipped={"with_prior_preservation": True},
    ),
    acts(
        "prior_loss_weight",
        ("batch", "gradient"),
        "the gradient is the subject's plus so many times the class's",
        the_gradient_is_linear_in_the_weight,
        base=PRIOR,
        flipped={"prior_loss_weight": 2.5},
    ),
    acts(
        "photo_class",
        "conditioning",
        "class pictures go with `a photo of a` and the class",
        class_captions_are("a photo of a woman"),
        base=PRIOR,
        flipped={"photo_class": "Woman"},
    ),
    refused("photo_class", {"with_prior_preservation": True}, "with_prior_preservation is true"),
    acts(
        "class_prompt",
        "conditioning",
        "class pictures go with the prompt",
        class_captions_are("someone's face"),
        base=PRIOR,
        flipped={"class_prompt": "someone's face"},
    ),
    acts(
        "num_class_images",
        "batch",
        "so many pictures are made, and all of them are used",
        so_many_are_made,
        base=MADE,
        flipped={"num_class_images": 3},
    ),
    acts(
        "class_images_url",
        "batch",
        "class pictures are those of the folder",
        comes_from_the_folder,
        base={**PRIOR, **UNCACHED},
        flipped={"class_images_url": Place("other class pictures")},
    ),
    acts(
        "class_inference_steps",
        "batch",
        "class pictures are denoised in so many steps",
        is_made_by_the_pipeline(3),
        base=MADE,
        flipped={"class_inference_steps": 3},
    ),
    acts(
        "class_guidance_scale",
        "batch",
        "class pictures are guided so strongly",
        is_made_by_the_pipeline(2, guidance_scale=2.0),
        base=MADE,
        flipped={"class_guidance_scale": 2.0},
    ),
    *idle(
        CLASS_RULE,
        prior_loss_weight=2.5,
        photo_class="Woman",
        class_prompt="someone's face",
        class_images_url=Place("class pictures"),
        num_class_images=3,
        class_inference_steps=3,
        class_guidance_scale=2.0,
    ),
    *idle(
        "class_images_url gives the class pictures",
        base=PRIOR,
        num_class_images=3,
        class_inference_steps=3,
        class_guidance_scale=2.0,
    ),
    *idle(
        "class_prompt has the words for the class",
        base={**PRIOR, "class_prompt": "someone's face"},
        photo_class="Woman",
    ),
]

"""Prior preservation: class pictures beside the subject's, in every batch and every text mode."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import snapshots
import torch
from diffusers import DDPMScheduler
from PIL import Image
from skimage import data as photographs
from snapshots import fresh, gradient, loss_of
from tiny import TWO_LAYERS, compose, configuration, digests, losses, never

from trainer import class_images as making
from trainer.data.dataset import Batch, Dataset
from trainer.events import StageEvent
from trainer.families.sdxl import StableDiffusionXL
from trainer.job import RunFolder
from trainer.training import Training

PRIOR: dict[str, Any] = {
    "with_prior_preservation": True,
    "photo_class": "Woman",
    "cache_latents": False,
    "snr_gamma": None,
    **TWO_LAYERS,
}
# Where numbers are compared: a sum over few layers is rounded more.
EVERY_LAYER = {"target_unet_modules": ["to_k", "to_q", "to_v", "to_out.0", "conv1", "conv2"]}
CLASS_PROMPT = "a photo of a woman"
MODES: dict[str, dict[str, Any]] = {
    "frozen": {},
    "new tokens": {"train_text_encoder_ti": True},
    "text encoders": {"train_text_encoder": True},
}


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures, each with a caption of its own."""
    folder = snapshots.write_pictures(tmp_path_factory.mktemp("prior") / "subject", 5)
    for number in range(5):
        (folder / f"{number}.txt").write_text(f"TOK number {number}")
    return folder


@pytest.fixture(scope="module")
def of_class(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prior") / "class"
    return snapshots.write_pictures(folder, 3, photograph=photographs.cat)


def composed(model: Path, subject: Path, of_class: Path, run: Path, **leaves: Any) -> Training:
    given = PRIOR | {"class_images_url": str(of_class)} | leaves
    return compose(configuration(model, subject, **given), run)[0]


def with_batch_size(training: Training, size: int) -> Dataset:
    """The same data set in batches of another size."""
    data = training.dataset
    return Dataset(data.examples, replace(data.plan, batch_size=size), data.data, with_pixels=True)


# What stands in a batch


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_is_the_subject_then_its_class_each_with_its_own_words_and_pictures(
    mode: str,
    sdxl_folder: Path,
    subject: Path,
    of_class: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[tuple[torch.Tensor, torch.Tensor, Any]] = []
    predict = StableDiffusionXL.predict

    def listen(self: Any, latents: Any, timesteps: Any, text: Any, geometry: Any) -> torch.Tensor:
        given.append((latents, timesteps, text))
        return predict(self, latents, timesteps, text, geometry)

    training = composed(sdxl_folder, subject, of_class, tmp_path, **MODES[mode])
    states = {
        caption: {name: rows[0] for name, rows in training.text.of([caption]).items()}
        for caption in (CLASS_PROMPT, *(f"TOK number {number}" for number in range(5)))
    }
    monkeypatch.setattr(StableDiffusionXL, "predict", listen)
    pipeline = fresh(sdxl_folder).pipeline
    for size in (1, 2, 3):
        batch = with_batch_size(training, size)[0][0]
        loss_of(training, batch)
        latents, timesteps, text = given.pop()

        assert batch.is_class.tolist() == [False] * size + [True] * size
        assert batch.positions == (*range(size), *(~place for place in range(size)))
        for row in range(2 * size):
            example = training.dataset.examples[batch.numbers[row]]
            stem = Path(example.name).stem
            folder, caption = (
                (of_class, CLASS_PROMPT) if row >= size else (subject, f"TOK number {stem}")
            )
            for name, rows in states[caption].items():
                torch.testing.assert_close(text[name][row], rows, rtol=0, atol=1e-6)
            expected = noisy(pipeline, folder / example.name, batch, row, int(timesteps[row]))
            torch.testing.assert_close(latents[row], expected, rtol=1e-5, atol=1e-5)
        assert len({batch.captions[row] for row in range(size)}) == size


def noisy(pipeline: Any, path: Path, batch: Batch, row: int, timestep: int) -> torch.Tensor:
    """The noisy latents of a picture at a position, by the reference's arithmetic."""
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels * 2 - 1).latent_dist
    position, size = batch.positions[row], posterior.mean.shape[1:]
    drawn = posterior.mean + posterior.std * reference.normal("posterior", position, *size)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    share = float(schedule.alphas_cumprod[timestep].double())
    noise = reference.normal("noise", position, *size)
    latents: torch.Tensor = (
        math.sqrt(share) * drawn * pipeline.vae.config.scaling_factor + math.sqrt(1 - share) * noise
    )
    return latents[0]


def test_class_pictures_never_lose_their_caption(
    sdxl_folder: Path, subject: Path, of_class: Path, tmp_path: Path
) -> None:
    training = composed(sdxl_folder, subject, of_class, tmp_path, caption_dropout=1.0, batch_size=2)
    batches = [batch for step in range(6) for batch in training.dataset[step]]
    shown = [
        (caption, bool(is_class))
        for batch in batches
        for caption, is_class in zip(batch.captions, batch.is_class, strict=True)
    ]
    assert set(shown) == {("", False), (CLASS_PROMPT, True)}
    empty = training.text.of([""])["prompt_embeds"]
    rows = training.text.of(batches[0].captions)["prompt_embeds"]
    assert torch.equal(rows[:2], empty.expand(2, -1, -1))
    assert not torch.allclose(rows[2], empty[0])


def test_an_epoch_counts_the_subjects_pictures_only(
    sd15_folder: Path, subject: Path, tmp_path: Path
) -> None:
    many = snapshots.write_pictures(tmp_path / "many", 7, photograph=photographs.cat)
    leaves = PRIOR | {"class_images_url": str(many), "num_train_epochs": 2, "batch_size": 2}
    config = configuration(sd15_folder, subject, **leaves)
    training, _ = compose(config, tmp_path / "run")
    assert (training.dataset.plan.num_examples, training.total_steps) == (5, 6)
    seen = [n for step in range(6) for batch in training.dataset[step] for n in batch.numbers]
    # Each picture of the subject twice; the class pictures in turn, none left out.
    assert sorted(n for n in seen if n < 5) == sorted([*range(5)] * 2)
    counts = [seen.count(number) for number in range(5, 12)]
    assert sum(counts) == 10
    assert set(counts) == {1, 2}


# The loss


def test_the_gradient_is_the_subjects_plus_the_weight_times_the_classs(
    sd15_folder: Path, subject: Path, of_class: Path, tmp_path: Path
) -> None:
    gradients = {}
    for weight in (0.0, 1.0, 2.5):
        run = tmp_path / str(weight)
        leaves = {"prior_loss_weight": weight, "batch_size": 3, **EVERY_LAYER}
        training = composed(sd15_folder, subject, of_class, run, **leaves)
        gradients[weight] = gradient(training, training.dataset[0][0])
    leaves = {"batch_size": 3, "cache_latents": False, "snr_gamma": None, **EVERY_LAYER}
    without, _ = compose(configuration(sd15_folder, subject, **leaves), tmp_path / "without")
    instance = gradient(without, without.dataset[0][0])
    of_the_class = gradients[1.0] - gradients[0.0]

    scale = float(instance.norm())
    assert float((gradients[0.0] - instance).norm()) < 1e-6 * scale
    assert float(of_the_class.norm()) > 0.1 * scale
    assert float((gradients[2.5] - instance - 2.5 * of_the_class).norm()) < 2e-6 * scale


def test_min_snr_weighs_the_subjects_half_only(
    sd15_folder: Path, subject: Path, of_class: Path, tmp_path: Path
) -> None:
    halves: dict[float | None, list[torch.Tensor]] = {}
    # One timestep, at which a signal-to-noise ratio of 0.5 is far exceeded.
    leaves = {"min_timestep_trained": 50, "max_timestep_trained": 51, "batch_size": 2}
    for gamma in (None, 0.5):
        training = composed(
            sd15_folder, subject, of_class, tmp_path / str(gamma), snr_gamma=gamma, **leaves
        )
        (batch,) = training.dataset[0]
        halves[gamma] = [gradient(training, half_of(batch, of)) for of in (False, True)]
    share = fresh(sd15_folder).pipeline.scheduler.alphas_cumprod[50]
    weight = float(0.5 * (1 - share) / share)
    (instance, of_the_class), (weighed, weighed_class) = halves[None], halves[0.5]
    torch.testing.assert_close(weighed, weight * instance, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(weighed_class, of_the_class, rtol=1e-6, atol=1e-12)
    assert weight < 0.1


def half_of(batch: Batch, is_class: bool) -> Batch:
    """A batch whose other half weighs nothing."""
    return replace(batch, weights=batch.weights * (batch.is_class == is_class))


# Masks on class pictures


@pytest.fixture(scope="module")
def half_white(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures whose left half is black and whose right half is white."""
    folder = tmp_path_factory.mktemp("halves")
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, 32:] = 255
    for number in range(2):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("source", "tolerance"),
    # The segmenter's probability of black is 1e-7; in a given mask, black is nothing.
    [({"clip_seg_mask_prompt": "head", "segmenter": "luminance"}, 1e-5), ({}, 0.0)],
    ids=["segmented", "given"],
)
def test_the_mask_style_decides_which_part_of_a_class_picture_is_learnt(
    source: dict[str, Any],
    tolerance: float,
    sd15_folder: Path,
    half_white: Path,
    tmp_path: Path,
) -> None:
    photos = Path(shutil.copytree(half_white, tmp_path / "photos"))
    for number in range(0 if source else 2):
        shutil.copy(half_white / "0.png", photos / f"{number}_mask.png")
    black, white = slice(0, 4), slice(4, 8)
    reacts, own = {}, {}
    for style in ("none", "normal", "invert"):
        training = composed(
            sd15_folder,
            photos,
            photos,
            tmp_path / style,
            **source,
            **({"clip_seg_mask_bias": 0.0} if source else {}),
            class_image_mask_style=style,
            batch_size=1,
        )
        (batch,) = training.dataset[0]
        own[style] = gradient(training, half_of(batch, False))
        class_half = half_of(batch, True)
        reacts[style] = tuple(
            moves(training, class_half, columns, tolerance) for columns in (black, white)
        )
        # The subject's pictures are masked as always: the black half counts for nothing.
        assert not moves(training, half_of(batch, False), black, tolerance)
        assert moves(training, half_of(batch, False), white, tolerance)
    assert reacts == {"none": (True, True), "normal": (False, True), "invert": (True, False)}
    assert torch.equal(own["normal"], own["none"])
    assert torch.equal(own["normal"], own["invert"])


def moves(training: Training, batch: Batch, columns: slice, tolerance: float) -> bool:
    """Whether another target in these columns changes the gradient by more than a share of it."""
    before, target = gradient(training, batch), training.passes.objective.target

    def other(*arguments: torch.Tensor) -> torch.Tensor:
        changed = target(*arguments).clone()
        changed[..., columns] += 1
        return changed

    training.passes.objective.target = other  # type: ignore[method-assign]
    try:
        after = gradient(training, batch)
    finally:
        training.passes.objective.target = target  # type: ignore[method-assign]
    return float((after - before).norm()) > tolerance * float(before.norm())


# Where class pictures come from


def test_class_pictures_are_made_by_the_base_model_once_and_found_again_by_the_next_run(
    sd15_folder: Path, subject: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    leaves = PRIOR | {"num_class_images": 2, "class_inference_steps": 2, "max_train_steps": 2}
    sample, samples = making.sample, []

    def listen(family: Any, *arguments: Any, **named: Any) -> Image.Image:
        # The base model as it was found: nothing learns in it yet.
        assert not [n for n, _ in family.denoiser.named_modules() if "lora_" in n]
        samples.append(arguments[0])
        return sample(family, *arguments, **named)

    monkeypatch.setattr(making, "sample", listen)
    # The second run has another adapter, which has no part in its class pictures.
    first = configuration(sd15_folder, subject, **leaves)
    second = configuration(sd15_folder, subject, **leaves, use_dora=True, train_text_encoder=True)
    told = []
    for name, config in (("one", first), ("two", second)):
        training, events = compose(config, tmp_path / name)
        told.append(
            [(e.done, e.total) for e in events if isinstance(e, StageEvent) and e.stage == STAGE]
        )
        assert all(math.isfinite(loss) for loss in losses(run_of(training, tmp_path / name)))
    assert told == [[(0, 2), (1, 2), (2, 2)], [(2, 2)]]
    assert samples == [CLASS_PROMPT] * 2
    one, two = (
        digests(tmp_path / "one" / "class_images"),
        digests(tmp_path / "two" / "class_images"),
    )
    assert len(one) == 2
    assert one == two


STAGE = "class images"


def run_of(training: Training, folder: Path) -> list[Any]:
    return list(training.steps(RunFolder(folder), never))


def test_pictures_of_the_users_own_are_taken_instead_of_made_ones(
    sd15_folder: Path,
    subject: Path,
    of_class: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = configuration(sd15_folder, subject, **PRIOR, class_images_url=str(of_class))
    training, events = compose(config, tmp_path / "run")
    classes = [example for example in training.dataset.examples if example.is_class]
    assert [example.name for example in classes] == ["0.png", "1.png", "2.png"]
    assert {example.caption for example in classes} == {CLASS_PROMPT}
    assert not [e for e in events if isinstance(e, StageEvent) and e.stage == STAGE]
    assert not list((tmp_path / "cache").rglob("class_images"))
    assert not (tmp_path / "run" / "class_images").exists()


def test_without_prior_preservation_there_are_no_class_pictures(
    sd15_folder: Path, subject: Path, tmp_path: Path
) -> None:
    training, events = compose(configuration(sd15_folder, subject), tmp_path)
    assert not any(example.is_class for example in training.dataset.examples)
    assert not any(bool(batch.is_class.any()) for batch in training.dataset[0])
    assert not [e for e in events if isinstance(e, StageEvent) and e.stage == STAGE]


@pytest.mark.parametrize(
    ("leaves", "prompt"),
    [
        ({"photo_class": "Baby"}, "a photo of a baby"),
        ({"class_prompt": "portrait of somebody"}, "portrait of somebody"),
    ],
)
def test_the_class_is_what_class_pictures_are_called(
    leaves: dict[str, str],
    prompt: str,
    sd15_folder: Path,
    subject: Path,
    of_class: Path,
    tmp_path: Path,
) -> None:
    training = composed(sd15_folder, subject, of_class, tmp_path, **leaves)
    captions = {e.caption for e in training.dataset.examples if e.is_class}
    assert captions == {prompt}

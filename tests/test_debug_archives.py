"""The archives that show a training its own pictures, captions and masks: exactly what it used."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import snapshots
import torch
from PIL import Image
from skimage import data as photographs
from tiny import configuration, losses, train

from trainer import loss
from trainer.encoding import Text
from trainer.events import Event, FileEvent
from trainer.families.base import Family
from trainer.families.sdxl import StableDiffusionXL

FORMATS = {"zip": "zip", "tar": "tar", "tar.gz": "tar.gz"}
STEPS = 3


def unpacked(path: Path) -> dict[str, bytes]:
    """Name to content of an archive's entries."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    with tarfile.open(path, "r:gz" if path.suffix == ".gz" else "r:") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


class Used:
    """What the denoiser and the loss were given, in the order of the steps."""

    def __init__(self) -> None:
        self.pixels: list[torch.Tensor] = []
        self.captions: list[str] = []
        self.encoded: list[str] = []
        self.weights: list[torch.Tensor] = []
        self.is_class: list[bool] = []


@pytest.fixture(scope="module")
def runs(
    sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Used, dict[str, list[Event]]]:
    """One training with everything drawn, delivered again in each container."""
    root = tmp_path_factory.mktemp("debug")
    subject = snapshots.write_pictures(root / "subject", 4)
    (subject / "2.txt").write_text("TOK, looking up")
    of_class = snapshots.write_pictures(root / "class", 3, photograph=photographs.cat)
    leaves: dict[str, Any] = {
        "resolution_width": 64,
        "resolution_height": 64,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_train_steps": STEPS,
        "random_flip": True,
        "random_rotation_start": -20,
        "random_rotation_end": 20,
        "caption_dropout": 0.4,
        "clip_seg_mask_prompt": "head",
        "segmenter": "luminance",
        "class_image_mask_style": "invert",
        "with_prior_preservation": True,
        "photo_class": "Person",
        "class_images_url": str(of_class),
        "train_text_encoder_ti": True,
        "train_text_encoder_ti_frac": 1.0,
        "debug_dataset": True,
        "debug_loss_masks": True,
        "rank": 2,
        "target_unet_modules": ["to_q"],
    }
    used, events = Used(), {}
    with pytest.MonkeyPatch.context() as patch:
        _listen(patch, used)
        snapshots.skip_reading_back(patch)
        for container, suffix in FORMATS.items():
            config = configuration(sdxl_folder, subject, data_archive_format=container, **leaves)
            events[container] = train(config, root / "run")
            outputs = root / "run" / "outputs"
            for stem in ("debug_dataset", "debug_masks"):
                shutil.copy(outputs / f"{stem}.{suffix}", root)
    return root, used, events


def _listen(patch: pytest.MonkeyPatch, used: Used) -> None:
    encode_image = StableDiffusionXL.encode_image
    encode_text = StableDiffusionXL.encode_text
    diffusion_loss, conditioning = loss.diffusion_loss, Text.of
    given: list[str] = []

    def images(self: Family, pixels: torch.Tensor) -> Any:
        used.pixels += list(pixels)
        return encode_image(self, pixels)  # type: ignore[arg-type]

    def encoders(self: Family, captions: Sequence[str]) -> Any:
        given[:] = captions
        return encode_text(self, captions)  # type: ignore[arg-type]

    def texts(self: Text, captions: Sequence[str]) -> Any:
        used.captions += captions
        encoded = conditioning(self, captions)
        # Each caption is encoded once, in the order in which they first come.
        of = dict(zip(dict.fromkeys(captions), given, strict=True))
        used.encoded += [of[caption] for caption in captions]
        return encoded

    def weighed(prediction: torch.Tensor, target: torch.Tensor, **named: Any) -> torch.Tensor:
        mask, size = named["mask"], tuple(target.shape[-2:])
        mask = torch.ones(len(target), 1, 64, 64) if mask is None else mask
        used.weights += list(loss.latent_weights(mask, size)[:, 0])  # type: ignore[arg-type]
        used.is_class += named["is_class"].tolist()
        return diffusion_loss(prediction, target, **named)

    patch.setattr(StableDiffusionXL, "encode_image", images)
    patch.setattr(StableDiffusionXL, "encode_text", encoders)
    patch.setattr(Text, "of", texts)
    patch.setattr(loss, "diffusion_loss", weighed)


def lines_of(entries: dict[str, bytes]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in entries["examples.jsonl"].decode().splitlines()]


def order_used(lines: list[dict[str, Any]]) -> list[int]:
    """The archive's numbers in the order of the batches: subjects, then the class beside them."""
    batches: dict[tuple[int, int], list[int]] = {}
    for number, line in enumerate(lines):
        position = line["position"]
        place = ~position if position < 0 else position
        # Two subjects a batch, and two batches a step.
        batches.setdefault((line["step"], place // 2), []).append(number)
    ordered = []
    for _, numbers in sorted(batches.items()):
        ordered += sorted(numbers, key=lambda n: (lines[n]["is_class"], n))
    return ordered


def test_the_archived_pictures_are_the_pixels_that_were_trained(
    runs: tuple[Path, Used, dict[str, list[Event]]],
) -> None:
    root, used, _ = runs
    entries = unpacked(root / "debug_dataset.zip")
    lines = lines_of(entries)

    # Steps of four pictures of the subject and four of its class.
    assert len(lines) == len(used.pixels) == 8 * STEPS
    for number, pixels in zip(order_used(lines), used.pixels, strict=True):
        with Image.open(io.BytesIO(entries[lines[number]["file"]])) as image:
            shown = np.asarray(image)
        trained = ((pixels.permute(1, 2, 0).double() + 1) * 127.5).round().to(torch.uint8).numpy()
        np.testing.assert_array_equal(shown, trained)
    assert len({line["angle"] for line in lines}) == len(lines)
    assert {line["flipped"] for line in lines} == {True, False}


def test_the_archived_captions_are_those_that_were_trained(
    runs: tuple[Path, Used, dict[str, list[Event]]],
) -> None:
    root, used, _ = runs
    lines = lines_of(unpacked(root / "debug_dataset.zip"))
    assert [lines[number]["caption"] for number in order_used(lines)] == used.captions
    assert [lines[number]["encoded"] for number in order_used(lines)] == used.encoded
    assert {"", "A photograph of a <s0><s1>", "a photo of a person"} < set(used.encoded)
    own = {(line["name"], line["caption"]) for line in lines if not line["is_class"]}
    assert {caption for _, caption in own} == {"", "A photograph of a TOK", "TOK, looking up"}
    assert {name for name, caption in own if "looking" in caption} == {"2.png"}
    of_class = {line["caption"] for line in lines if line["is_class"]}
    assert of_class == {"a photo of a person"}


def test_the_archived_masks_are_the_weights_of_the_loss(
    runs: tuple[Path, Used, dict[str, list[Event]]],
) -> None:
    root, used, _ = runs
    lines = lines_of(unpacked(root / "debug_dataset.zip"))
    masks = unpacked(root / "debug_masks.zip")
    arrays = {int(Path(name).stem[:6]): name for name in masks if name.endswith(".npy")}
    order = order_used(lines)

    assert len(used.weights) == len(order) == len(arrays)
    assert [lines[number]["is_class"] for number in order] == used.is_class
    for number, weights in zip(order, used.weights, strict=True):
        found = np.load(io.BytesIO(masks[arrays[number]]))
        np.testing.assert_array_equal(found, weights.numpy())
        assert Path(arrays[number]).stem == Path(lines[number]["file"]).stem
        assert len(np.unique(found)) > 10


@pytest.mark.parametrize("stem", ["debug_dataset", "debug_masks"])
def test_every_container_holds_the_same(
    stem: str, runs: tuple[Path, Used, dict[str, list[Event]]]
) -> None:
    root, _, events = runs
    found = {name: root / f"{stem}.{suffix}" for name, suffix in FORMATS.items()}
    contents = [unpacked(path) for path in found.values()]
    assert len(contents[0]) > 8 * STEPS
    assert contents[0] == contents[1] == contents[2]
    # The first bytes of a zip and of gzip, and the magic word of a tar's first header.
    assert found["zip"].read_bytes()[:4] == b"PK\x03\x04"
    assert found["tar.gz"].read_bytes()[:2] == b"\x1f\x8b"
    assert found["tar"].read_bytes()[257:262] == b"ustar"
    # Another container is delivered without training again.
    assert [len(losses(told)) for told in events.values()] == [STEPS, 0, 0]


def test_archives_that_were_not_asked_for_are_not_there(
    sdxl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots.skip_reading_back(monkeypatch)
    subject = snapshots.write_pictures(tmp_path / "subject", 2)
    leaves = {"max_train_steps": 1, "target_unet_modules": ["to_q"], "debug_loss_masks": True}
    events = train(configuration(sdxl_folder, subject, **leaves), tmp_path / "run")
    roles = {event.role for event in events if isinstance(event, FileEvent)}
    assert "debug_masks" in roles
    assert "debug_dataset" not in roles
    assert not list((tmp_path / "run" / "outputs").glob("debug_dataset*"))

"""Two processes train as one does with the same global batch, and twice to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import several_processes
import snapshots
import torch
from PIL import Image
from rank_jobs import Zygote
from safetensors.torch import load_file
from skimage import data as photographs
from tiny import SMALL, TWO_LAYERS

# Relative, per step. A whole model's errors of rounding grow with Adam's first updates, whose size
# does not depend on that of the gradients.
NEAR: dict[str, float] = {"all weights": 1e-4}
USUALLY_NEAR = 2e-6

SIZES = {"max_train_steps": 6, "use_dora": True}
# Each needs something of the other process: its share of a batch or of accumulated gradients,
# gradients of rows, of text encoders, class pictures. A batch holds pictures of one size: where
# sizes differ, batches of another length are others.
FEW: dict[str, dict[str, Any]] = {
    "tokens": {
        "use_dora": True,
        "train_text_encoder_ti": True,
        "with_prior_preservation": True,
        "photo_class": "Woman",
        "clip_seg_mask_prompt": "head",
        "segmenter": "luminance",
        "gradient_accumulation_steps": 2,
    },
    "made class pictures": {
        "with_prior_preservation": True,
        "photo_class": "Man",
        "num_class_images": 3,
        "class_inference_steps": 2,
    },
}
MORE: dict[str, dict[str, Any]] = {
    "batches": SIZES | {"enable_bucket": False},
    "accumulated gradients": SIZES | {"batch_size": 2},
    "text encoders": {"train_text_encoder": True, "train_text_encoder_frac": 0.5},
    "waiting denoiser": {"train_text_encoder_ti": True, "disable_unet_during_ti_training": True},
    "tokens, Prodigy": {
        "train_text_encoder_ti": True,
        "optimizer": "prodigy",
        "learning_rate": 1.0,
        "text_encoder_lr": 1.0,
        "max_train_steps": 10,
    },
    "all weights": {
        "use_lora": False,
        "learning_rate": 1e-4,
        "max_train_steps": 10,
        "enable_bucket": False,
    },
}
ON_SD15 = ("batches", "accumulated gradients", "all weights")


def test_two_processes_train_as_one_with_the_same_global_batch_and_twice_alike(
    sd15_folder: Path,
    sdxl_folder: Path,
    photo_folder: Path,
    zygote: Zygote,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    thorough: bool,
    figure: Callable[[str], None],
) -> None:
    cases = FEW | MORE if thorough else FEW
    # Five pictures of two a process: the second batch of an epoch leaves the second process idle.
    subject = snapshots.write_pictures(tmp_path / "subject", 5)
    of_class = snapshots.write_pictures(tmp_path / "class", 3, photograph=photographs.cat)
    places = {"tokens": {"class_images_url": str(of_class)}}
    common = {"model_url": str(sdxl_folder), "images_data_url": str(subject), **SMALL, **TWO_LAYERS}
    plain = {"model_url": str(sd15_folder), "images_data_url": str(photo_folder)}
    alone, together = (
        {
            name: common
            | {"batch_size": size}
            | own
            | places.get(name, {})
            | (plain if name in ON_SD15 else {})
            for name, own in cases.items()
        }
        for size in (4, 2)
    )
    if thorough:
        alone["accumulated gradients"]["gradient_accumulation_steps"] = 2
    repeated = list(cases) if thorough else []
    together |= {f"{name} again": together[name] for name in repeated}
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    (tmp_path / "2.json").write_text(json.dumps(together))
    job = zygote.start(
        ["several", str(tmp_path / "2.json"), str(tmp_path / "2")], tmp_path / "2", agent=True
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, leaves in alone.items():
        several_processes.train_one(leaves, tmp_path / f"1/{name}.run", tmp_path / "1" / name)
    assert job.ended(300) == [0, 0], job.said()

    furthest = max(compared(tmp_path, name, own) for name, own in cases.items())
    for name in repeated:
        first, second = (tmp_path / f"2/{of}.0.safetensors" for of in (name, f"{name} again"))
        assert first.read_bytes() == second.read_bytes()
        assert facts(tmp_path, f"2/{name}.0") == facts(tmp_path, f"2/{name} again.0") | {
            "class_images": facts(tmp_path, f"2/{name}.0")["class_images"]
        }
    made_as_one(tmp_path)
    figure(f"{len(cases)} trainings, losses within {furthest:.1e}, {len(repeated)} twice alike")


def facts(folder: Path, name: str) -> dict[str, Any]:
    """What a process said of a training."""
    said: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return said


def compared(folder: Path, name: str, leaves: dict[str, Any]) -> float:
    """How far the losses of one process and of two lie apart where most, relatively."""
    one, first, second = (facts(folder, place) for place in at(name))
    tensors = [load_file(folder / f"{place}.safetensors") for place in at(name)]
    assert len(one["losses"]) == leaves.get("max_train_steps", SMALL["max_train_steps"])
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(one["losses"], rel=NEAR.get(name, USUALLY_NEAR)), name
    assert tensors[1].keys() == tensors[2].keys() == tensors[0].keys()
    assert all(torch.equal(tensors[1][n], tensors[2][n]) for n in tensors[1])
    assert one["class_images"] == ([0, 1, 2, 3] if "made" in name else [])
    pairs = zip(first["losses"], one["losses"], strict=True)
    return max(abs(two - alone) / alone for two, alone in pairs)


def at(name: str) -> tuple[str, str, str]:
    """One process, and the first and second of two."""
    return f"1/{name}.0", f"2/{name}.0", f"2/{name}.1"


def made_as_one(folder: Path) -> None:
    """One process made the first and the third class picture, the other the second."""
    name = "made class pictures"
    assert [len(facts(folder, f"2/{name}.{rank}")["class_images"]) - 1 for rank in (0, 1)] == [2, 1]
    one, two = (
        sorted((folder / place / f"{name}.run/class_images").rglob("*.png")) for place in ("1", "2")
    )
    assert [path.name for path in one] == [path.name for path in two]
    assert len(one) == 3
    for path, other in zip(one, two, strict=True):
        # Processes may have another number of threads: sums are rounded in another order.
        assert np.abs(pixels_of(path) - pixels_of(other)).max() <= 1


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)

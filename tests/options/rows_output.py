"""Rows of the section output: what is written, and under which names."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from options.bases import LUMINANCE, PRIOR, UNCACHED
from options.case import Case, near, same
from options.matrix import Leaves, Row, acts
from options.probe import Delivery
from options.rows_adapter import WHOLE
from PIL import Image
from stand_in_hub import Hub, stand_in_hub
from tiny import never
from torch.nn.functional import avg_pool2d

from trainer.config import TrainingConfig
from trainer.events import Event, FileEvent
from trainer.job import RunFolder
from trainer.publishing import published
from trainer.runner import Stop

Shows = Callable[[Case], None]
KOHYA, DIFFUSERS = "lora.safetensors", "pytorch_lora_weights.safetensors"
COMFYUI = "lora_comfyui.safetensors"


def pair(case: Case) -> tuple[Delivery, Delivery]:
    return case.delivered({}), case.delivered(case.row.flipped)


def another_name(case: Case) -> None:
    usual, named = pair(case)
    assert set(usual.tensors) == {KOHYA, DIFFUSERS}
    assert set(named.tensors) == {"My result.safetensors", DIFFUSERS}
    same(usual.tensors[KOHYA], named.tensors["My result.safetensors"])


def half_precision(case: Case) -> None:
    full, half = pair(case)
    for name, tensors in full.tensors.items():
        weights = {n: t for n, t in tensors.items() if "alpha" not in n}
        others = {n: half.tensors[name][n] for n in weights}
        assert {t.dtype for t in weights.values()} == {torch.float32}
        assert {t.dtype for t in others.values()} == {torch.float16}
        near({n: t.float() for n, t in others.items()}, weights, rtol=1e-3, atol=1e-5)


def dora_files_are(*names: str) -> Shows:
    def shows(case: Case) -> None:
        both, chosen = pair(case)
        assert set(both.tensors) == {KOHYA, COMFYUI, DIFFUSERS}
        assert set(chosen.tensors) == {*names, DIFFUSERS}
        for name in names:
            same(chosen.tensors[name], both.tensors[name])
        scales = [n for n in both.tensors[KOHYA] if "dora_scale" in n]
        ours, theirs = (both.tensors[file] for file in (KOHYA, COMFYUI))
        # One divides by the norm of W, the other by that of W + dW.
        assert any(not torch.equal(ours[n], theirs[n]) for n in scales)

    return shows


def unpacked(path: Path) -> dict[str, bytes]:
    """Names and contents of a zip or tar archive."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    with tarfile.open(path) as tar:
        members = {m.name: tar.extractfile(m) for m in tar.getmembers() if m.isfile()}
        return {name: file.read() for name, file in members.items() if file is not None}


def pictures_are_those_of_the_steps(case: Case) -> None:
    without, with_debug = pair(case)
    assert "debug_dataset.zip" not in without.files
    entries = unpacked(with_debug.folder / "debug_dataset.zip")
    files = {
        np.asarray(Image.open(io.BytesIO(content))).tobytes()
        for name, content in entries.items()
        if name.endswith(".png")
    }
    trained = {
        ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy().tobytes()
        for step in with_debug.steps
        for batch in step.pixels
        for pixels in batch
    }
    assert len(trained) == 4
    assert files == trained
    lines = [json.loads(line) for line in entries["examples.jsonl"].splitlines()]
    assert [line["caption"] for line in lines] == ["A photograph of a TOK"] * 4


def masks_are_those_of_the_loss(case: Case) -> None:
    without, with_debug = pair(case)
    assert "debug_masks.zip" not in without.files
    entries = unpacked(with_debug.folder / "debug_masks.zip")
    arrays = [np.load(io.BytesIO(c)) for n, c in sorted(entries.items()) if n.endswith(".npy")]
    mask = with_debug.steps[0].passes[0].mask
    assert mask is not None
    means = avg_pool2d(mask, 8)[:, 0]
    used = means / means.mean((1, 2), keepdim=True)
    assert len(arrays) == len(used) == 4
    for row in used:
        assert any(np.allclose(row.numpy(), array, atol=1e-5) for array in arrays)


MAGIC = {"zip": b"PK", "tar.gz": b"\x1f\x8b"}


def container_is(container: str, suffix: str) -> Shows:
    def shows(case: Case) -> None:
        zipped, other = pair(case)
        path = other.folder / f"debug_dataset.{suffix}"
        assert "debug_dataset.zip" not in other.files
        head = path.read_bytes()[:512]
        assert head.startswith(MAGIC["tar.gz"]) if container == "tar.gz" else b"ustar" in head
        assert unpacked(path) == unpacked(zipped.folder / "debug_dataset.zip")

    return shows


def is_the_best_of_its_rank(case: Case) -> None:
    without, with_lora = pair(case)
    assert DIFFUSERS not in without.tensors
    base, denoiser = case.world.weights(), case.world.denoiser
    trained = with_lora.tensors[f"{denoiser}/diffusion_pytorch_model.safetensors"]
    extracted = with_lora.tensors[DIFFUSERS]
    downs = [name for name in extracted if "lora_A" in name]
    linear = [n for n in downs if extracted[n].ndim == 2 and n.endswith("to_q.lora_A.weight")]
    assert {extracted[name].shape[0] for name in downs} == {2}
    assert linear
    for name in linear:
        layer = name.removeprefix(f"{denoiser}.").removesuffix(".lora_A.weight")
        change = trained[f"{layer}.weight"] - base[f"{layer}.weight"]
        u, s, v = torch.linalg.svd(change.double())
        best = u[:, :2] * s[:2] @ v[:2]
        got = extracted[name.replace("lora_A", "lora_B")] @ extracted[name]
        near(got.double(), best, rtol=1e-2, atol=1e-2 * float(best.abs().max()))


def on_the_hub(case: Case, more: Leaves) -> tuple[Hub, Delivery]:
    """What the hub has after a delivery, and the delivery."""
    delivery = case.delivered(more)

    def engine(_: TrainingConfig, __: RunFolder, ___: Stop) -> Iterator[Event]:
        for name in sorted(delivery.files):
            yield FileEvent("diffusers_lora", f"outputs/{name}")

    config, folder = case.config(more), RunFolder(delivery.folder.parent)
    with stand_in_hub(case.lab.folder()) as hub:
        list(published(engine, config, never)(config, folder, never))
    return hub, delivery


def are_on_the_hub(case: Case) -> None:
    untouched, _ = on_the_hub(case, {})
    hub, delivery = on_the_hub(case, case.row.flipped)
    assert untouched.requests == []
    sent = hub.repositories["anna/lora"].files
    assert sent == {name: (delivery.folder / name).read_bytes() for name in delivery.files}


def are_in_this_repository(case: Case) -> None:
    assert set(on_the_hub(case, {})[0].repositories) == {"anna/lora"}
    assert set(on_the_hub(case, case.row.flipped)[0].repositories) == {"studio/anna"}


def are_seen_by_everybody(case: Case) -> None:
    for more, is_private in (({}, True), (case.row.flipped, False)):
        (repository,) = on_the_hub(case, more)[0].repositories.values()
        assert repository.private == is_private


def unused(leaf: str, value: object, reason: str, base: Leaves) -> Row:
    """A row about an option of the files without effect: the files are the same."""

    def shows(case: Case) -> None:
        assert case.config({leaf: value}).resolved.ignored_options[leaf] == reason
        without, with_it = pair(case)
        # The configuration and what describes it may name the option.
        assert without.files == with_it.files
        for name in without.tensors:
            same(without.tensors[name], with_it.tensors[name])

    says = f"does nothing: {reason}"
    return Row(leaf, says, shows, (), base, {leaf: value})


ONE: Leaves = {"max_train_steps": 1}
DORA: Leaves = {**ONE, "use_dora": True}
DEBUG: Leaves = {"max_train_steps": 2, **UNCACHED, "center_crop": False}
OUTPUT = [
    acts(
        "output_name",
        "files",
        "the file has this name and holds the same",
        another_name,
        base=ONE,
        flipped={"output_name": "My result"},
    ),
    acts(
        "save_dtype",
        "tensors",
        "fp16: weights are written in 16 bits",
        half_precision,
        base=ONE,
        flipped={"save_dtype": "fp16"},
    ),
    acts(
        "kohya_dora",
        ("tensors", "files"),
        "paper: only the paper's magnitudes are written",
        dora_files_are(KOHYA),
        base=DORA,
        flipped={"kohya_dora": "paper"},
    ),
    acts(
        "kohya_dora",
        ("tensors", "files"),
        "comfyui: only ComfyUI's magnitudes are written",
        dora_files_are(COMFYUI),
        base=DORA,
        flipped={"kohya_dora": "comfyui"},
    ),
    acts(
        "debug_dataset",
        "files",
        "the archive holds what the VAE was given, with its captions",
        pictures_are_those_of_the_steps,
        base=DEBUG,
        flipped={"debug_dataset": True},
    ),
    acts(
        "debug_loss_masks",
        "files",
        "the archive holds the weights that the loss used, of class pictures too",
        masks_are_those_of_the_loss,
        base={**ONE, **LUMINANCE, **PRIOR, "class_image_mask_style": "invert"},
        flipped={"debug_loss_masks": True},
    ),
    *[
        acts(
            "data_archive_format",
            "files",
            f"{container}: the same folder in this container",
            container_is(container, container),
            base={**DEBUG, "debug_dataset": True},
            flipped={"data_archive_format": container},
        )
        for container in ("tar", "tar.gz")
    ],
    acts(
        "extract_rank",
        "tensors",
        "a LoRA of this rank holds the nearest to the change of the weights",
        is_the_best_of_its_rank,
        base={**ONE, **WHOLE},
        flipped={"extract_rank": 2},
    ),
    acts(
        "push_to_hub",
        "files",
        "the result files are on the hub too",
        are_on_the_hub,
        base=ONE,
        flipped={"push_to_hub": True},
    ),
    acts(
        "hub_model_id",
        "files",
        "they are in the repository of this name",
        are_in_this_repository,
        base={**ONE, "push_to_hub": True},
        flipped={"hub_model_id": "studio/anna"},
    ),
    acts(
        "hub_private",
        "files",
        "false: the repository is public",
        are_seen_by_everybody,
        base={**ONE, "push_to_hub": True},
        flipped={"hub_private": False},
    ),
    unused("hub_model_id", "studio/anna", "push_to_hub is false", ONE),
    unused("hub_private", False, "push_to_hub is false", ONE),
    unused("kohya_dora", "paper", "no DoRA is trained", ONE),
    unused("extract_rank", 2, "an adapter is trained already", ONE),
    unused("data_archive_format", "tar", "no folders are delivered", ONE),
]

"""Every way of spoiling a file that the formats are known to be spoilt in fails verification."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checking import Change, rewrite, run_verification
from torch import Tensor
from trained_adapters import TrainedAdapter

from trainer.export.diffusers import FILE_NAME, METADATA_KEY, write_diffusers, write_peft_folders
from trainer.export.facts import TrainingFacts
from trainer.export.kohya import write_kohya

Tensors = dict[str, Tensor]
Header = dict[str, str]

# Few layers of every kind, so that a verification takes a moment: readers take their time by layer.
FEW = (
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
    "mid_block.resnets.0.conv1",
    "down_blocks.0.resnets.0.conv1",
)


def scaled(ending: str, factor: float) -> Change:
    def change(tensors: Tensors, header: Header) -> None:
        for key in [key for key in tensors if key.endswith(ending)]:
            tensors[key] = tensors[key] * factor

    return change


def reshaped(ending: str, shape: Callable[[Tensor], tuple[int, ...]]) -> Change:
    def change(tensors: Tensors, header: Header) -> None:
        for key in [key for key in tensors if key.endswith(ending)]:
            tensors[key] = tensors[key].reshape(shape(tensors[key]))

    return change


def without(mark: str, *, only_first: bool = False) -> Change:
    def change(tensors: Tensors, header: Header) -> None:
        keys = sorted(key for key in tensors if mark in key)
        assert keys
        for key in keys[: 1 if only_first else None]:
            del tensors[key]

    return change


def without_convolutions(tensors: Tensors, header: Header) -> None:
    keys = [key for key in tensors if "_conv1." in key or "_in_layers_2." in key]
    assert keys
    for key in keys:
        del tensors[key]


def renamed(old: str, new: str) -> Change:
    def change(tensors: Tensors, header: Header) -> None:
        keys = [key for key in tensors if old in key]
        assert keys
        moved = {key.replace(old, new): tensors.pop(key) for key in keys}
        tensors.update(moved)

    return change


def swapped(one: str, other: str) -> Change:
    def change(tensors: Tensors, header: Header) -> None:
        pairs = {key: key.replace(one, other) for key in tensors if one in key}
        pairs = {a: b for a, b in pairs.items() if b in tensors}
        assert pairs
        for a, b in pairs.items():
            tensors[a], tensors[b] = tensors[b], tensors[a]

    return change


def with_nan(tensors: Tensors, header: Header) -> None:
    key = sorted(key for key in tensors if tensors[key].ndim > 1)[0]
    tensors[key].flatten()[0] = float("nan")


def without_header(tensors: Tensors, header: Header) -> None:
    header.clear()


def with_header(key: str, value: str) -> Change:
    def change(tensors: Tensors, header: Header) -> None:
        header[key] = value

    return change


def both(*changes: Change) -> Change:
    def change(tensors: Tensors, header: Header) -> None:
        for each in changes:
            each(tensors, header)

    return change


def with_mixed_alphas(tensors: Tensors, header: Header) -> None:
    """Doubles the alpha of every second layer and halves its factor: right by the formula."""
    for key in sorted(key for key in tensors if key.endswith(".alpha"))[::2]:
        up = key.replace(".alpha", ".lora_up.weight")
        tensors[key], tensors[up] = tensors[key] * 2, tensors[up] / 2


def with_alpha_in_the_header(tensors: Tensors, header: Header) -> None:
    """The trained, unfolded form: right in diffusers, too strong where headers are ignored."""
    scaled("lora_B.weight", 2)(tensors, header)
    config = json.loads(header[METADATA_KEY])
    for key in [key for key in config if key.endswith(".lora_alpha")]:
        config[key] = config[key] / 2
    header[METADATA_KEY] = json.dumps(config)


def with_old_attention_keys(tensors: Tensors, header: Header) -> None:
    """diffusers' training scripts name attention layers so, and convolutions as PEFT does."""
    for key in [key for key in tensors if ".to_" in key]:
        new = key.replace("lora_A", "lora.down").replace("lora_B", "lora.up")
        tensors[new] = tensors.pop(key)


KOHYA_LORA: dict[str, Change] = {
    "wrong alpha": both(scaled(".alpha", 2), with_header("ss_network_alpha", "8.0")),
    "no alpha": without(".alpha"),
    "one alpha missing": without(".alpha", only_first=True),
    "mixed alphas": with_mixed_alphas,
    "alpha of shape (1,)": reshaped(".alpha", lambda t: (1,)),
    "alpha not folded": scaled("lora_up.weight", 2),
    "no convolutions": without_convolutions,
    "flat convolutions": reshaped("lora_up.weight", lambda t: t.shape[:2]),
    "no text encoder": without("_text_model_"),
    "no text_model": renamed("_text_model_", "_"),
    "to_k and to_v swapped": swapped("to_k.", "to_v."),
    "up and down swapped": swapped("lora_up", "lora_down"),
    "NaN": with_nan,
    "no header": without_header,
    "header and tensors of different alpha": with_header("ss_network_alpha", "1.0"),
}
KOHYA_ONE_ENCODER = {"lora_te1_": renamed("lora_te_", "lora_te1_")}
KOHYA_TWO_ENCODERS = {
    "no second encoder": without("lora_te2_"),
    "encoders swapped": swapped("lora_te1_", "lora_te2_"),
    "lora_te_ for the first": renamed("lora_te1_", "lora_te_"),
    "diffusers' block names": renamed("middle_block_1_", "mid_block_attentions_0_"),
}
KOHYA_DORA: dict[str, Change] = {
    "transposed dora_scale": reshaped("dora_scale", lambda t: (1, *t.shape[:1], *t.shape[2:])),
    "flat dora_scale": reshaped("dora_scale", lambda t: (-1,)),
    "scaled dora_scale": scaled("dora_scale", 1.01),
    "no dora_scale": without("dora_scale"),
    "one dora_scale missing": without("dora_scale", only_first=True),
    "marked for ComfyUI": with_header("dora_convention", "comfyui"),
    "not marked": lambda tensors, header: header.pop("dora_convention"),
}
DIFFUSERS_LORA: dict[str, Change] = {
    "alpha not folded": scaled("lora_B.weight", 2),
    "alpha in the header alone": with_alpha_in_the_header,
    "alpha not folded, no header": both(scaled("lora_B.weight", 2), without_header),
    "no header": without_header,
    "no convolutions": without("conv1"),
    "no text encoder": without("text_encoder."),
    "no text_model": renamed("text_encoder.text_model.", "text_encoder."),
    "old keys for attention": with_old_attention_keys,
    "to_k and to_v swapped": swapped("to_k.", "to_v."),
    "alpha tensors": lambda tensors, header: tensors.update({"unet.conv_in.alpha": torch.ones(())}),
    "NaN": with_nan,
}
DIFFUSERS_DORA: dict[str, Change] = {
    "magnitudes of text encoders without .weight": renamed(
        "q_proj.lora_magnitude_vector.weight", "q_proj.lora_magnitude_vector"
    ),
    "magnitudes scaled": scaled("lora_magnitude_vector.weight", 1.01),
    "no magnitudes": without("lora_magnitude_vector"),
}
LOKR: dict[str, Change] = {
    "factors swapped": swapped("lokr_w1", "lokr_w2"),
    "alpha not folded": scaled("lokr_w1", 2),
    "NaN": with_nan,
    "no text encoder": without("text_model"),
}
LOKR_DIFFUSERS = {**LOKR, "no header": without_header}
LOHA: dict[str, Change] = {
    "alpha not folded": scaled("hada_w1_a", 2),
    "another alpha, folded for it": both(
        scaled(".alpha", 2), scaled("hada_w1_a", 0.5), with_header("ss_network_alpha", "8.0")
    ),
    "no convolutions": without_convolutions,
    "second product missing": without("hada_w2_b"),
}


def cases() -> list[pytest.param]:
    """Family, adapter, role and change, named after what is wrong."""
    dora = {"use_dora": True}
    table = [
        ("sd15", "lora", {}, "kohya_lora", KOHYA_LORA | KOHYA_ONE_ENCODER),
        ("sdxl", "lora", {}, "kohya_lora", KOHYA_TWO_ENCODERS),
        ("sd15", "lora", dora, "kohya_lora", KOHYA_DORA),
        ("sd15", "lora", {}, "diffusers_lora", DIFFUSERS_LORA),
        ("sdxl", "lora", dora, "diffusers_lora", DIFFUSERS_DORA),
        ("sd15", "lokr", {}, "kohya_lora", LOKR),
        ("sdxl", "lokr", {}, "diffusers_lora", LOKR_DIFFUSERS),
        ("sdxl", "loha", {}, "kohya_lora", LOHA),
    ]
    return [
        pytest.param(family, algorithm, options, role, change, id=f"{family} {role}: {name}")
        for family, algorithm, options, role, changes in table
        for name, change in changes.items()
    ]


def write(folder: Path, role: str, adapter: TrainedAdapter, facts: TrainingFacts) -> Path:
    """The file of this role, as it should be."""
    path = folder / FILE_NAME
    if role == "kohya_lora":
        write_kohya(path, adapter.state, adapter.names, facts, torch.float32)
    else:
        write_diffusers(path, adapter.state, torch.float32)
    return path


def _hashable(value: object) -> object:
    return tuple(value.items()) if isinstance(value, dict) else value


@pytest.mark.parametrize(("family", "algorithm", "options", "role", "change"), cases())
def test_a_broken_file_fails(
    family: str,
    algorithm: str,
    options: dict[str, bool],
    role: str,
    change: Change,
    trained: Callable[..., TrainedAdapter],
    facts: TrainingFacts,
    tmp_path: Path,
) -> None:
    adapter = trained(family, algorithm, alpha=2, targets=FEW, **options)
    path = write(tmp_path, role, adapter, facts)
    rewrite(path, change)

    checks, _ = run_verification(tmp_path, [(role, path)], adapter)

    assert "failed" in {check.status for check in checks}
    assert all(check.reason for check in checks if check.status == "failed")


@pytest.mark.parametrize(
    ("family", "algorithm", "options", "role"),
    sorted({tuple(map(_hashable, case.values[:4])) for case in cases()}, key=str),
)
def test_an_unbroken_file_of_the_same_adapter_passes(
    family: str,
    algorithm: str,
    options: tuple[tuple[str, bool], ...],
    role: str,
    trained: Callable[..., TrainedAdapter],
    facts: TrainingFacts,
    tmp_path: Path,
) -> None:
    adapter = trained(family, algorithm, alpha=2, targets=FEW, **dict(options))
    path = write(tmp_path, role, adapter, facts)

    checks, _ = run_verification(tmp_path, [(role, path)], adapter)

    assert "failed" not in {check.status for check in checks}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_file_for_comfyui_with_the_papers_magnitudes_fails(
    family: str,
    trained: Callable[..., TrainedAdapter],
    facts: TrainingFacts,
    tmp_path: Path,
) -> None:
    adapter = trained(family, alpha=2, targets=FEW, use_dora=True)
    path = tmp_path / "astronaut_comfyui.safetensors"
    write_kohya(path, adapter.state, adapter.names, facts, torch.float32)
    rewrite(path, with_header("dora_convention", "comfyui"))

    checks, _ = run_verification(tmp_path, [("kohya_lora_comfyui", path)], adapter)

    assert [c.status for c in checks if c.reader == "comfyui formula"] == ["failed"]


def test_an_adapter_on_a_layer_that_was_not_trained_fails(
    trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    adapter = trained("sd15", targets=FEW)
    path = tmp_path / FILE_NAME
    write_diffusers(path, adapter.state, torch.float32)
    weights = {component: dict(layers) for component, layers in adapter.weights.items()}
    del weights["unet"]["mid_block.resnets.0.conv1"]
    fewer = TrainedAdapter(adapter.state, weights, adapter.base, adapter.names)

    checks, _ = run_verification(tmp_path, [("diffusers_lora", path)], fewer)

    assert {check.status for check in checks} == {"failed"}


def test_a_peft_folder_without_its_configuration_fails(
    trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    adapter = trained("sd15", "loha", alpha=2, targets=FEW)
    written = write_peft_folders(tmp_path / "peft", adapter.state, torch.float32)
    (tmp_path / "peft" / "unet" / "adapter_config.json").unlink()
    files = [("peft_folder", path) for path in written if path.exists()]

    checks, _ = run_verification(tmp_path, files, adapter)

    status = {check.path: check.status for check in checks}
    assert status == {
        "peft/text_encoder/adapter_model.safetensors": "passed",
        "peft/unet/adapter_model.safetensors": "failed",
    }

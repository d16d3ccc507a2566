"""Whole text encoders: their folder, its readers, and how it can be spoilt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checking import Change, rewrite, run_checks
from safetensors.torch import load_file
from torch import Tensor
from trained_adapters import TrainedAdapter
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from trainer.export.full import write_text_encoder
from trainer.export.verify import WrittenFile

# The first is flattened in memory by transformers 5, the second is not.
ENCODERS = [
    ("sd15", "text_encoder", CLIPTextModel),
    ("sdxl", "text_encoder", CLIPTextModel),
    ("sdxl", "text_encoder_2", CLIPTextModelWithProjection),
]


def changed(adapter: TrainedAdapter, component: str) -> dict[str, Tensor]:
    """All weights of an encoder after something like a training."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: tensor + 1e-3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in adapter.base.components[component].named_parameters()
    }


def write(
    root: Path, adapter: TrainedAdapter, component: str, dtype: torch.dtype = torch.float32
) -> WrittenFile:
    """The weights as a result file; the configuration lies beside it."""
    weights = {name: tensor.detach() for name, tensor in changed(adapter, component).items()}
    config = adapter.base.components[component].config.to_dict()
    _, path = write_text_encoder(root / component, weights, config, dtype)
    return WrittenFile(f"{component}_weights", path, {component: weights})


@pytest.mark.parametrize(("family", "component", "kind"), ENCODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_transformers_gets_every_tensor_bit_for_bit(
    dtype: torch.dtype,
    family: str,
    component: str,
    kind: type,
    trained: Callable[..., TrainedAdapter],
    tmp_path: Path,
) -> None:
    adapter = trained(family)
    file = write(tmp_path, adapter, component, dtype)

    model = kind.from_pretrained(tmp_path / component, dtype=torch.float32)
    checks, _ = run_checks(tmp_path, [file], adapter)

    for name, tensor in file.holds[component].items():
        assert torch.equal(model.get_parameter(name), tensor.to(dtype).float())
    assert [(c.reader, c.status) for c in checks] == [("transformers", "passed")]
    assert checks[0].keys_matched == checks[0].keys_total == len(file.holds[component])
    assert checks[0].largest_change > 0


@pytest.mark.parametrize(("family", "component", "kind"), ENCODERS)
def test_names_are_those_of_all_versions_of_transformers(
    family: str,
    component: str,
    kind: type,
    trained: Callable[..., TrainedAdapter],
    tmp_path: Path,
) -> None:
    file = write(tmp_path, trained(family), component)

    keys = load_file(file.path).keys()
    config = json.loads((tmp_path / component / "config.json").read_text())

    assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in keys
    assert {key.split(".")[0] for key in keys} <= {"text_model", "text_projection"}
    assert config["architectures"] == [kind.__name__]
    assert (config["model_type"], config["vocab_size"]) == ("clip_text_model", 514)
    assert {
        "torch_dtype",
        "dtype",
        "transformers_version",
        "_name_or_path",
    } & config.keys() == set()


def test_the_same_encoder_gives_the_same_bytes(
    trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    for name in ("first", "second"):
        write(tmp_path / name, trained("sdxl"), "text_encoder_2")

    for name in ("config.json", "model.safetensors"):
        contents = {
            (tmp_path / run / "text_encoder_2" / name).read_bytes() for run in ("first", "second")
        }
        assert len(contents) == 1


def test_a_tensor_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="conv_in"):
        write_text_encoder(tmp_path, {"conv_in.weight": torch.ones(1)}, {}, torch.float32)


def flattened(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    for key in [key for key in tensors if key.startswith("text_model.")]:
        tensors[key.removeprefix("text_model.")] = tensors.pop(key)


def without_a_tensor(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    del tensors["text_model.final_layer_norm.weight"]


def with_a_further_tensor(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    tensors["text_model.encoder.layers.9.mlp.fc1.bias"] = torch.ones(1)


def with_nan(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    tensors["text_model.final_layer_norm.weight"][0] = float("nan")


def with_another_value(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    key = "text_model.encoder.layers.0.mlp.fc1.weight"
    tensors[key] = tensors[key] * 1.001


def with_swapped_layers(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    one, other = (f"text_model.encoder.layers.0.self_attn.{n}_proj.weight" for n in "kv")
    tensors[one], tensors[other] = tensors[other], tensors[one]


BROKEN: list[Change] = [
    flattened,
    without_a_tensor,
    with_a_further_tensor,
    with_nan,
    with_another_value,
    with_swapped_layers,
]


@pytest.mark.parametrize("change", BROKEN)
@pytest.mark.parametrize(("family", "component", "kind"), ENCODERS[1:])
def test_a_broken_text_encoder_fails(
    family: str,
    component: str,
    kind: type,
    change: Change,
    trained: Callable[..., TrainedAdapter],
    tmp_path: Path,
) -> None:
    adapter = trained(family)
    file = write(tmp_path, adapter, component)
    rewrite(file.path, change)

    checks, _ = run_checks(tmp_path, [file], adapter)

    assert [check.status for check in checks] == ["failed"]
    assert checks[0].reason


@pytest.mark.parametrize("fault", ["missing", "of the other kind"])
def test_a_text_encoder_without_its_own_configuration_fails(
    fault: str, trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    adapter = trained("sdxl")
    file = write(tmp_path, adapter, "text_encoder_2")
    config = tmp_path / "text_encoder_2" / "config.json"
    if fault == "missing":
        config.unlink()
    else:
        config.write_text(config.read_text().replace("WithProjection", ""))

    checks, _ = run_checks(tmp_path, [file], adapter)

    assert [check.status for check in checks] == ["failed"]

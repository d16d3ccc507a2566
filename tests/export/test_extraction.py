"""A LoRA from fully trained weights: exact where it can be, the best of its rank elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checking import run_checks
from torch import Tensor
from trained_adapters import TABLES, TrainedAdapter

from trainer.adapters import adaptable_layers
from trainer.events import StageEvent
from trainer.export import extraction
from trainer.export.diffusers import METADATA_KEY, write_diffusers
from trainer.export.extraction import (
    Extraction,
    Weights,
    extract,
    write_extraction_report,
)
from trainer.export.facts import TrainingFacts
from trainer.export.kohya import write_kohya
from trainer.export.readers import metadata_of
from trainer.export.verify import WrittenFile
from trainer.stages import drained

SHAPES = {
    "tall": (24, 9),
    "wide": (9, 24),
    "conv": (12, 5, 3, 3),
    "pointwise": (7, 20, 1, 1),
}


def weights(generator: torch.Generator) -> dict[str, Tensor]:
    return {f"{n}.weight": torch.randn(s, generator=generator) for n, s in SHAPES.items()}


def of_rank(rank: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    up = torch.randn(rows, rank, generator=generator)
    return (up @ torch.randn(rank, columns, generator=generator)).reshape(shape)


def product(extraction: Extraction, name: str) -> Tensor:
    """BA of a layer in 64 bits, in the shape of its weight."""
    factors = extraction.state.layers()["unet", name]
    down, up = factors["lora_A"].double(), factors["lora_B"].double()
    return (up.flatten(1) @ down.flatten(1)).reshape(SHAPES[name])


def extracted(base: dict[str, Tensor], after: dict[str, Tensor], rank: int) -> Extraction:
    return drained(extract({"unet": base}, {"unet": after}, {"unet": SHAPES}, rank=rank))


def test_a_change_of_at_most_this_rank_comes_back_exactly() -> None:
    generator = torch.Generator().manual_seed(1)
    base = weights(generator)
    after = {key: value + 0.01 * of_rank(3, value.shape, generator) for key, value in base.items()}

    found = extracted(base, after, rank=4)

    assert found.residual < 1e-5
    for name in SHAPES:
        change = (after[f"{name}.weight"] - base[f"{name}.weight"]).double()
        error = (product(found, name) - change).norm() / change.norm()
        assert error < 1e-5, name


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_what_is_lost_is_the_tail_of_the_singular_values(rank: int) -> None:
    generator = torch.Generator().manual_seed(2)
    base, after = weights(generator), weights(generator)

    found = extracted(base, after, rank)

    for layer in found.layers:
        name = f"{layer.path}.weight"
        change = after[name] - base[name]
        # A second implementation: the singular values in 64 bits.
        squares = torch.linalg.svdvals(change.flatten(1).double()) ** 2
        error = (product(found, layer.path) - change).norm() ** 2
        tail = float(squares[rank:].sum())
        assert layer.rank == rank
        assert float(error) == pytest.approx(tail, rel=1e-5)
        assert layer.lost**2 == pytest.approx(tail, rel=1e-5)
        assert layer.captured == pytest.approx(
            float(squares[:rank].sum() / squares.sum()), rel=1e-5
        )


@pytest.mark.parametrize("shape", [(150, 400), (400, 150), (160, 40, 3, 3)])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_layer_too_wide_to_decompose_gets_nearly_the_best_product_and_an_exact_residual(
    shape: tuple[int, ...], decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "_EXACT_UP_TO", 64)
    generator = torch.Generator().manual_seed(6)
    base = torch.randn(shape, generator=generator)
    # Noise alone, whose singular values hardly fall, and with values that fall as a power.
    change = torch.randn(shape, generator=generator)
    for number in range(1, 20):
        change += 30 * decay * number**-1.5 * of_rank(1, shape, generator)
    after = base + 1e-3 * change
    change = (after - base).flatten(1).double()

    found = drained(
        extract(
            {"unet": {"a.weight": base}}, {"unet": {"a.weight": after}}, {"unet": {"a"}}, rank=8
        )
    )

    factors = found.state.layers()["unet", "a"]
    made = factors["lora_B"].double().flatten(1) @ factors["lora_A"].double().flatten(1)
    (layer,) = found.layers
    # A second implementation: the singular values in 64 bits.
    tail = float((torch.linalg.svdvals(change)[8:] ** 2).sum())
    assert layer.lost**2 == pytest.approx(float((change - made).norm()) ** 2, rel=1e-5)
    assert layer.change == pytest.approx(float(change.norm()), rel=1e-9)
    assert tail * (1 - 1e-6) <= layer.lost**2 <= tail * 1.01


def test_a_wide_layers_change_of_low_rank_comes_back_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "_EXACT_UP_TO", 64)
    generator = torch.Generator().manual_seed(7)
    base = {"a.weight": torch.zeros(120, 300)}
    after = {"a.weight": of_rank(3, (120, 300), generator)}
    found = drained(extract({"unet": base}, {"unet": after}, {"unet": {"a"}}, rank=8))
    assert [layer.rank for layer in found.layers] == [3]
    assert found.residual < 1e-6


def test_extraction_tells_how_far_it_is() -> None:
    tensors = {"unet": {f"{name}.weight": torch.ones(2, 2) for name in "abc"}}
    told = list(extract(tensors, tensors, {"unet": set("abc")}, rank=1))
    assert [(e.stage, e.done, e.total) for e in told if isinstance(e, StageEvent)] == [
        ("extract", number, 3) for number in (1, 2, 3)
    ]


def test_the_residual_of_all_layers_is_that_of_their_common_change() -> None:
    generator = torch.Generator().manual_seed(3)
    base, after = weights(generator), weights(generator)

    found = extracted(base, after, rank=2)

    lost = sum(float((product(found, n) - (after[k] - base[k])).norm()) ** 2 for n, k in _keys())
    whole = sum(float((after[k] - base[k]).norm()) ** 2 for _, k in _keys())
    assert found.residual == pytest.approx((lost / whole) ** 0.5, rel=1e-5)


def _keys() -> list[tuple[str, str]]:
    return [(name, f"{name}.weight") for name in SHAPES]


def test_a_rank_is_at_most_that_of_the_layer_and_of_its_change() -> None:
    generator = torch.Generator().manual_seed(4)
    base, after = weights(generator), weights(generator)
    after["wide.weight"] = base["wide.weight"] + of_rank(2, (9, 24), generator)

    found = extracted(base, after, rank=100)

    assert {layer.path: layer.rank for layer in found.layers} == {
        "conv": 12,
        "pointwise": 7,
        "tall": 9,
        "wide": 2,
    }
    assert found.state.rank == 12


def test_a_layer_that_did_not_change_is_left_out() -> None:
    base = weights(torch.Generator().manual_seed(5))
    after = {**base, "tall.weight": base["tall.weight"] + 1}

    found = extracted(base, after, rank=2)

    assert {path for _, path in found.state.layers()} == {"tall"}


def test_weights_that_did_not_change_at_all_give_nothing() -> None:
    base = weights(torch.Generator().manual_seed(5))

    found = extracted(base, base, rank=2)

    assert (found.layers, found.left_out, found.state.components) == ((), {}, {})
    assert (found.residual, found.left_out_share) == (0, 0)


def test_norms_biases_and_embeddings_are_told_with_their_share() -> None:
    base = {
        "a.weight": torch.zeros(4, 4),
        "a.bias": torch.zeros(4),
        "table.weight": torch.zeros(2, 2),
    }
    after = {
        "a.weight": torch.eye(4),
        "a.bias": torch.tensor([1.0, 0, 0, 0]),
        "table.weight": torch.zeros(2, 2),
    }

    found = drained(extract({"unet": base}, {"unet": after}, {"unet": {"a"}}, rank=3))

    assert found.left_out == {"unet.a.bias": 1.0}
    # By hand: four ones in the layer, of which three stay, and one in the bias.
    assert found.left_out_share == pytest.approx(1 / 5)
    assert found.residual == pytest.approx((1 / 4) ** 0.5)
    assert found.layers[0].captured == pytest.approx(3 / 4)


def test_both_factors_share_the_size_of_the_change() -> None:
    base = {"a.weight": torch.zeros(8, 8)}
    # Too small for 16-bit numbers if one factor had all of it: their smallest is 6e-8.
    after = {"a.weight": 1e-7 * torch.randn(8, 8, generator=torch.Generator().manual_seed(6))}

    found = drained(extract({"unet": base}, {"unet": after}, {"unet": {"a"}}, rank=8))

    factors = found.state.layers()["unet", "a"]
    up, down = factors["lora_B"], factors["lora_A"]
    assert float(up.norm()) == pytest.approx(float(down.norm()), rel=1e-5)
    assert float((up.half() - up).norm() / up.norm()) < 1e-3


def fully_trained(adapter: TrainedAdapter) -> tuple[Weights, Weights, Extraction]:
    """Weights before and after a change of all components, and its LoRA of rank 6."""
    components = ["unet", *adapter.names.text_encoder_prefixes]
    models = {component: adapter.base.components[component] for component in components}
    generator = torch.Generator().manual_seed(8)
    base = {component: dict(model.named_parameters()) for component, model in models.items()}
    after = {
        component: {
            name: tensor.detach() + 0.01 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in parameters.items()
        }
        for component, parameters in base.items()
    }
    layers = {component: adaptable_layers(model) for component, model in models.items()}
    return base, after, drained(extract(base, after, layers, rank=6))


@pytest.mark.parametrize(
    ("family", "dtype", "tolerance"),
    [
        ("sd15", torch.float32, 1e-4),
        ("sd15", torch.float16, 1e-2),
        ("sdxl", torch.float32, 1e-4),
    ],
)
def test_every_reader_gets_base_and_product_from_the_files(
    family: str,
    dtype: torch.dtype,
    tolerance: float,
    trained: Callable[..., TrainedAdapter],
    facts: TrainingFacts,
    tmp_path: Path,
) -> None:
    adapter = trained(family)
    base, after, found = fully_trained(adapter)
    diffusers, kohya = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_diffusers(diffusers, found.state, dtype)
    write_kohya(kohya, found.state, TABLES[family], facts, dtype)
    holds = found.effective(base)

    checks, _ = run_checks(
        tmp_path,
        [WrittenFile("diffusers_lora", diffusers, holds), WrittenFile("kohya_lora", kohya, holds)],
        adapter,
    )

    assert [(c.reader, c.status) for c in checks] == [
        ("diffusers", "passed"),
        ("formula", "passed"),
        ("diffusers", "passed"),
        ("lycoris", "passed"),
        ("formula", "passed"),
    ]
    assert max(c.largest_change_difference for c in checks) < tolerance
    pattern = json.loads(metadata_of(diffusers)[METADATA_KEY])["unet.rank_pattern"]
    # conv_out has four rows.
    assert pattern == {"conv_out": 4}
    weight = holds["unet"]["conv_in"] - base["unet"]["conv_in.weight"].detach()
    change = after["unet"]["conv_in.weight"] - base["unet"]["conv_in.weight"].detach()
    assert 0 < float((weight - change).norm()) < float(change.norm())


def test_the_report_tells_of_every_layer_and_of_what_is_left_out(
    trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    _, after, found = fully_trained(trained("sd15"))

    for name in ("a.json", "b.json"):
        write_extraction_report(tmp_path / name, found)

    report = json.loads((tmp_path / "a.json").read_text())
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert report["rank"] == 6
    assert report["captured"] == pytest.approx(1 - report["residual"] ** 2, rel=1e-4)
    told = {f"{name}.weight" for name in report["layers"]} | report["left_out"].keys()
    assert told == {f"{component}.{name}" for component, names in after.items() for name in names}
    table = "text_encoder.embeddings.token_embedding.weight"
    assert report["left_out"][table]["share"] > 0
    shares = sum(entry["share"] for entry in report["left_out"].values())
    assert shares == pytest.approx(report["left_out_share"], rel=1e-3)
    layer = report["layers"]["unet.conv_in"]
    assert layer["captured"] == pytest.approx(1 - layer["residual"] ** 2, abs=1e-5)

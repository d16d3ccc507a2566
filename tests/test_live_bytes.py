"""Counting of memory: by hand, and with a few blocks for many to the byte as with all of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer import base_model, dataless, memory
from trainer.base_model import Precision
from trainer.live_bytes import LiveBytes, shorten
from trainer.memory import Footprint, training_footprint
from trainer.outcomes import Outcomes
from trainer.resolve import Layer, resolve

MEBI = 2**20


def test_a_chain_of_operations_is_counted_by_hand() -> None:
    # x and y live together, then y and z; x is gone before z is made.
    with LiveBytes() as counter:
        x = torch.empty(MEBI, dtype=torch.uint8)
        y = x + 1
        del x
        z = torch.cat([y, y])
        assert counter.now == 3 * MEBI
        del y, z
    assert counter.now == 0
    assert counter.peak == 3 * MEBI


def test_views_and_changes_in_place_take_no_memory() -> None:
    with LiveBytes() as counter:
        x = torch.zeros(MEBI, dtype=torch.uint8)
        y = x.view(2, -1).T
        y.add_(1)
    assert counter.peak == MEBI


def test_a_training_step_of_one_layer_is_counted_by_hand() -> None:
    # Weight, input, output and the output's gradient; backward adds the weight's gradient.
    layer = torch.nn.Linear(512, 512, bias=False)
    with LiveBytes() as counter:
        counter.hold(layer)
        x = torch.ones(512, 512)
        layer(x).backward(torch.ones(512, 512))
        del x
    assert counter.peak == 5 * MEBI
    assert counter.now == 2 * MEBI


class Wide(torch.nn.Linear):
    """A layer that sees its input several times: backward, that takes much for a moment."""

    times = 8

    def __init__(self, width: int) -> None:
        super().__init__(self.times * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product with what is repeated."""
        return super().forward(x.repeat(1, self.times))


class Row(torch.nn.Module):
    """Layers one after another."""

    def __init__(self, *sizes: int, wide: bool = False) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            Wide(one) if wide else torch.nn.Linear(one, other, bias=False)
            for one, other in zip(sizes, sizes[1:], strict=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All layers, and something unlike them at the end."""
        for layer in self.layers:
            x = layer(x).square()
        return x.repeat(1, 2)


def test_rows_of_more_than_three_equal_blocks_are_shortened_to_three() -> None:
    # Two of width 8, then one from 8 to 4, then five of width 4.
    row = Row(8, 8, 8, 4, 4, 4, 4, 4, 4)
    (stand_in,) = shorten(row, row.layers)
    assert [tuple(each.weight.shape) for each in row.layers] == [
        (8, 8),
        (8, 8),
        (4, 8),
        *[(4, 4)] * 3,
    ]
    assert stand_in.others == 2
    assert stand_in.block is row.layers[4]
    assert stand_in.successor is row.layers[5]


def test_a_block_that_learns_is_not_equal_to_one_that_does_not() -> None:
    row = Row(4, 4, 4, 4, 4, 4, 4)
    row.layers[1].requires_grad_(False)
    (stand_in,) = shorten(row, row.layers)
    assert (len(row.layers), stand_in.others) == (5, 1)


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize(
    ("width", "batch", "wide"), [(64, 512, False), (512, 64, False), (64, 32, True)]
)
def test_few_layers_for_many_count_as_many_do(
    learns: bool, width: int, batch: int, wide: bool
) -> None:
    # Activations or weights are the larger part, so that backward frees or takes memory; or the
    # last of the layers left out takes most, because the first needs no gradient of its input.
    def measured(short: bool) -> tuple[int, list[int]]:
        row = Row(*[width] * 9, wide=wide).requires_grad_(learns)
        with LiveBytes(shorten(row, row.layers) if short else ()) as counter:
            counter.hold(row)
            marks = [counter.now]
            for _ in range(2):
                y = row(torch.ones(batch, width)).sum()
                if learns:
                    y.backward()
                marks += [counter.peak, counter.now]
                del y
        return counter.peak, marks

    assert measured(short=True) == measured(short=False)


@pytest.fixture(scope="module")
def long_flux(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX.1 with rows of six and seven blocks."""
    folder = tmp_path_factory.mktemp("long") / "flux"
    shutil.copytree(flux_folder, folder)
    return changed(folder / "transformer", num_layers=6, num_single_layers=7)


@pytest.fixture(scope="module")
def long_sdxl(sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL with rows of five blocks."""
    folder = tmp_path_factory.mktemp("long") / "sdxl"
    shutil.copytree(sdxl_folder, folder)
    return changed(folder / "unet", transformer_layers_per_block=(1, 1, 5))


def changed(part: Path, **values: Any) -> Path:
    path = part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return part.parent


@pytest.fixture
def all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes no block out."""
    monkeypatch.setattr(dataless, "shorten", lambda *_: ())


def forecast(folder: Path, **leaves: Any) -> Footprint:
    given = {"model_url": str(folder), "images_data_url": "photos", "rank": 4, **leaves}
    given |= {"resolution_width": 64, "resolution_height": 64}
    config = resolve([Layer("test", given, explicit=True)])
    base = base_model.locate(config.model)
    narrow = torch.bfloat16 if config.run.mixed_precision == "bf16" else torch.float32
    whole = torch.bfloat16 if config.adapter.weights_dtype == "bf16" else torch.float32
    precision = Precision(narrow, narrow if config.adapter.use_lora else whole, narrow, narrow)
    return training_footprint(base, precision, torch.device("cpu"), config)


LORA = [
    {"mixed_precision": "bf16", "gradient_checkpointing": True, "batch_size": 2},
    {"quantization": "nf4", "offload_blocks": 8, "gradient_accumulation_steps": 2},
    {"target_unet_modules": "single_transformer_blocks.3.attn.to_q", "mixed_precision": "bf16"},
]
WHOLE = [
    # Autocast keeps all weights in bf16 until the end of the forward pass.
    {"mixed_precision": "bf16", "gradient_checkpointing": True, "optimizer": "adamw8bit"},
    {"weights_dtype": "bf16", "optimizer": "adafactor", "fused_backward": True},
]


@pytest.mark.parametrize(
    "leaves",
    [
        LORA[0],
        {"use_lora": False, "max_grad_norm": 0.0, **WHOLE[1]},
        *(pytest.param(leaves, marks=pytest.mark.thorough) for leaves in LORA[1:]),
        pytest.param(
            {"use_lora": False, "max_grad_norm": 0.0, **WHOLE[0]}, marks=pytest.mark.thorough
        ),
    ],
)
def test_few_blocks_of_a_transformer_count_to_the_byte_as_all_do(
    long_flux: Path, leaves: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    if not leaves.get("use_lora", True):
        leaves = {**leaves, "rank": 16}
    short = forecast(long_flux, **leaves)
    request.getfixturevalue("all_blocks")
    assert forecast(long_flux, **leaves) == short


@pytest.mark.thorough
def test_norms_of_equal_layers_are_counted_one_by_one(
    long_flux: Path, request: pytest.FixtureRequest
) -> None:
    # Those of several layers lie together, where fewer of them are rounded up.
    leaves = {"use_dora": True, "mixed_precision": "bf16", "rank": 8}
    short = forecast(long_flux, **leaves).peak_bytes
    request.getfixturevalue("all_blocks")
    assert forecast(long_flux, **leaves).peak_bytes == pytest.approx(short, rel=1e-3)


@pytest.mark.parametrize("leaves", [LORA[0], {"quantization": "nf4", "mixed_precision": "bf16"}])
def test_operations_whose_outcomes_are_remembered_count_to_the_byte_as_all(
    flux_folder: Path, leaves: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = forecast(flux_folder, **leaves)
    monkeypatch.setattr(Outcomes, "of", lambda _, func, args, kwargs: func(*args, **kwargs))
    assert forecast(flux_folder, **leaves) == quick


@pytest.mark.parametrize("leaves", [LORA[0], {"use_lora": False, "max_grad_norm": 0.0}])
def test_further_passes_take_their_gradients_beside_those_of_the_first(
    flux_folder: Path, leaves: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two passes of real operations, against one beside gradients that are there before.
    leaves = {**leaves, "rank": 16}
    once = forecast(flux_folder, **leaves)
    twice = forecast(flux_folder, **leaves, gradient_accumulation_steps=2)
    predict = memory._predict

    def after_another(family: Any, latents: torch.Tensor, text: Any) -> torch.Tensor:
        (predict(family, latents, text).float() - latents).square().mean().backward()
        return predict(family, latents, text)

    monkeypatch.setattr(memory, "_predict", after_another)
    assert forecast(flux_folder, **leaves) == twice
    assert twice.stages[memory.STEPS] > once.stages[memory.STEPS]


def test_a_forecast_made_after_others_is_as_if_it_were_the_first(
    flux_folder: Path, photo_folder: Path
) -> None:
    def footprints(*all_leaves: dict[str, Any]) -> list[Footprint]:
        made = None
        found = []
        for leaves in all_leaves:
            given = {"model_url": str(flux_folder), "images_data_url": "photos", "rank": 4}
            given |= {"resolution_width": 64, "resolution_height": 64, **leaves}
            config = resolve([Layer("test", given, explicit=True)])
            made = made or memory.Forecast(base_model.locate(config.model), torch.device("cpu"))
            found.append(made.footprint(config, Precision(*[torch.float32] * 4)))
        return found

    several = [{}, {"gradient_checkpointing": True, "batch_size": 4}, {"batch_size": 4}, {}]
    assert footprints(*several) == [footprints(leaves)[0] for leaves in several]


@pytest.mark.thorough
def test_few_blocks_of_a_unet_count_to_the_byte_as_all_do(
    long_sdxl: Path, request: pytest.FixtureRequest
) -> None:
    leaves = {"train_text_encoder_ti": True, "mixed_precision": "bf16"}
    short = forecast(long_sdxl, **leaves)
    request.getfixturevalue("all_blocks")
    assert forecast(long_sdxl, **leaves) == short

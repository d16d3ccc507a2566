"""What a step is given: rows of tensors that were made once, wherever these lie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grid import grid_examples, plan_of, with_mask
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import loss, resident
from trainer.config import DataConfig
from trainer.data.dataset import Dataset
from trainer.data.plan import Portion
from trainer.encoding import Encodings
from trainer.families.base import LatentDistribution
from trainer.resident import Pictures, Rows, StepInputs

CPU = torch.device("cpu")
SQUARE, WIDE = (64, 64), (64, 96)
GIB = 2**30


class Words:
    """Captions whose conditioning is kept: each one's is its length."""

    is_live = False

    def __init__(self) -> None:
        self._rows = Rows({"prompt_embeds": torch.arange(20)[:, None]}, CPU)
        self.resident = self._rows.resident

    def rows_of(self, captions: Any) -> list[int]:
        return [len(caption) for caption in captions]

    def at(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return self._rows.at(rows)


def dataset_of(folder: Path, masks: dict[int, np.ndarray] | None = None) -> Dataset:
    """Four pictures, the last two of the class and one of them wide, all of them mirrored too."""
    examples = grid_examples(folder, 2, height=80, width=100, num_class_images=2)
    examples = tuple(
        with_mask(e, (masks or {})[e.number]) if e.number in (masks or {}) else e for e in examples
    )
    examples = (*examples[:3], replace(examples[3], target=WIDE))
    portion = Portion((0, 1), class_images=(2, 3))
    plan = plan_of(portion, batch_size=2, sizes=tuple(e.target for e in examples))
    return Dataset(examples, plan, DataConfig(random_flip=True), with_pixels=False)


def latents_of(dataset: Dataset) -> dict[tuple[int, bool], LatentDistribution]:
    made = {}
    for number, flipped in dataset.all_views():
        height, width = dataset.examples[number].target
        mean = torch.full((1, 4, height // 8, width // 8), number + flipped / 2)
        made[number, flipped] = LatentDistribution(mean, mean + 10)
    return made


def encodings_of(dataset: Dataset) -> Encodings:
    pictures: Any = Pictures(latents_of(dataset), dataset, CPU)
    words: Any = Words()
    nobody: Any = None
    return Encodings(nobody, words, pictures, CPU)


@pytest.fixture(params=[True, False], ids=["resident", "beside the device"])
def lies_there(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether rows lie on the device."""
    monkeypatch.setattr(resident, "fit", lambda *_: request.param)
    return bool(request.param)


def test_each_example_of_a_batch_is_given_what_belongs_to_its_picture_and_caption(
    tmp_path: Path, lies_there: bool
) -> None:
    dataset = dataset_of(tmp_path)
    encodings = encodings_of(dataset)
    latents = latents_of(dataset)

    for batch in [batch for step in range(8) for batch in dataset[step]]:
        inputs = encodings.inputs(batch)

        for row, view in enumerate(batch.views):
            assert torch.equal(inputs.mean[row], latents[view].mean[0])
            assert torch.equal(inputs.std[row], latents[view].std[0])
            assert inputs.text["prompt_embeds"][row] == len(batch.captions[row])
        for name, sizes in batch.geometry.items():
            assert torch.equal(inputs.geometry[name], sizes)
        assert torch.equal(inputs.is_class, batch.is_class)
        assert torch.equal(inputs.shares, batch.weights)
        assert inputs.mask is None
    assert encodings.resident == lies_there


def test_masks_are_kept_as_the_loss_averages_them(tmp_path: Path, lies_there: bool) -> None:
    ramp = np.linspace(0.1, 1, 80 * 100, dtype=np.float32).reshape(80, 100)
    dataset = dataset_of(tmp_path, {0: ramp})
    encodings = encodings_of(dataset)

    for batch in [batch for step in range(8) for batch in dataset[step]]:
        mask = encodings.inputs(batch).mask
        if batch.size == WIDE:
            assert mask is None
            continue
        assert mask is not None
        whole = torch.ones(1, 64, 64)
        seen = [dataset.mask_of(*view) for view in batch.views]
        shown = torch.stack([whole if one is None else one for one in seen])
        expected = loss.latent_weights(shown, (8, 8))
        assert torch.equal(loss.latent_weights(mask, (8, 8)), expected)
        for row, number in enumerate(batch.numbers):
            assert bool((expected[row] == 1).all()) == (number != 0)


def test_a_picture_of_which_nothing_counts_has_no_mask_and_weighs_nothing(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, {0: np.zeros((80, 100), np.float32)})
    encodings = encodings_of(dataset)

    batches = [batch for step in range(4) for batch in dataset[step]]

    assert all(encodings.inputs(batch).mask is None for batch in batches)
    shares = {n: float(w) for b in batches for n, w in zip(b.numbers, b.weights, strict=True)}
    assert shares[0] == 0
    assert shares[1] > 0


class Operations(TorchDispatchMode):
    """Names of everything that tensors are put through."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_resident_inputs_are_taken_by_nothing_but_selecting_rows(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path)
    encodings = encodings_of(dataset)
    (batch, *_) = dataset[0]
    where = encodings.where(batch)

    with Operations() as seen:
        inputs = encodings.at(where)

    assert set(seen.names) == {"aten::unbind.int", "aten::index_select"}
    # All that changes from step to step: two numbers for each example, and its share.
    assert where.rows.shape == (2, 3)
    assert where.shares.shape == (3,)
    for name, tensor in encodings.inputs(batch).flat().items():
        assert torch.equal(tensor, inputs.flat()[name])


def test_after_the_first_step_no_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = dataset_of(tmp_path, {0: np.full((80, 100), 0.5, np.float32)})
    encodings = encodings_of(dataset)
    encodings.inputs(dataset[0][0])

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("is read")

    monkeypatch.setattr(np, "load", read)
    monkeypatch.setattr("PIL.Image.open", read)
    for step in range(1, 6):
        for batch in dataset[step]:
            encodings.inputs(batch)


@pytest.mark.parametrize("with_mask", [True, False])
def test_flat_inputs_are_the_same_inputs(with_mask: bool) -> None:
    rows = torch.arange(2)
    inputs = StepInputs(
        mean=torch.rand(2, 4, 8, 8),
        std=torch.rand(2, 4, 8, 8),
        text={"prompt_embeds": torch.rand(2, 77, 8), "pooled_prompt_embeds": torch.rand(2, 8)},
        geometry={"original_size": rows[:, None].expand(2, 2), "target_size": rows[:, None]},
        shares=torch.rand(2),
        is_class=rows > 0,
        mask=torch.rand(2, 1, 8, 8) if with_mask else None,
    )

    again = StepInputs.of_flat(inputs.flat())

    assert vars(again) == vars(inputs)
    assert len(inputs.flat()) == 8 + with_mask


@pytest.mark.parametrize(("megabytes", "stay"), [(10, True), (30, False)])
def test_rows_lie_on_a_gpu_where_they_take_little_of_its_free_memory(
    monkeypatch: pytest.MonkeyPatch, megabytes: int, stay: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (GIB, 80 * GIB))
    one = torch.empty(megabytes * 2**20 // 2, dtype=torch.uint8, device="meta")

    # A fiftieth of 1 GiB is 20 MiB.
    assert resident.fit([{"mean": one}, {"mean": one}], torch.device("cuda")) == stay
    assert resident.fit([{"mean": one}], CPU)


def test_rows_are_given_in_the_order_that_is_asked_for(lies_there: bool) -> None:
    rows = Rows({"mean": torch.arange(12.0).view(6, 2)}, CPU)

    given = rows.at(torch.tensor([5, 0, 5]))

    assert given["mean"].tolist() == [[10, 11], [0, 1], [10, 11]]

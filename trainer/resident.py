"""What every step is given, in rows of tensors that were made once: a step says which rows.

Rows lie on the training device where they take a small share of its free memory, else in the
processor's, from where they are copied while the device is at work. What they mean to a model is
not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from trainer.data.dataset import Dataset, View
from trainer.families.base import Conditioning, Geometry, LatentDistribution
from trainer.images.crop import Size
from trainer.transfers import moved

# Of a device's free memory, what rows may take: steps are forecast without them.
_SHARE = 1 / 50

# Parts of the names of flat tensors.
_TEXT, _GEOMETRY = "text.", "geometry."


@dataclass(frozen=True)
class StepInputs:
    """What one forward pass and its loss are given, all on the training device.

    Args:
        mean: of the latents' distribution (B, C, h, w).
        std: likewise.
        text: the conditioning of the captions.
        geometry: see `Batch`.
        shares: float32 (B,), see `plan.Slot`.
        is_class: bool (B,).
        mask: float32 weights (B, 1, h, w) of latent pixels or (B, 1, H, W) of pixels, or nothing
            where all count alike.
    """

    mean: torch.Tensor
    std: torch.Tensor
    text: Conditioning
    geometry: Geometry
    shares: torch.Tensor
    is_class: torch.Tensor
    mask: torch.Tensor | None

    def flat(self) -> dict[str, torch.Tensor]:
        """Every tensor by a name of its own; one that is not there is left out."""
        alone = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        text = {f"{_TEXT}{name}": states for name, states in self.text.items()}
        return alone | text | flat_geometry(self.geometry)

    @classmethod
    def of_flat(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        """The inputs that `flat` gave these tensors of."""
        return cls.of(tensors, _below(_TEXT, tensors), tensors["shares"])

    @classmethod
    def of(
        cls, pictures: Mapping[str, torch.Tensor], text: Conditioning, shares: torch.Tensor
    ) -> Self:
        """The inputs of what `Pictures.at` gives of pictures, their captions and their shares."""
        return cls(
            mean=pictures["mean"],
            std=pictures["std"],
            text=text,
            geometry=_below(_GEOMETRY, pictures),
            shares=shares,
            is_class=pictures["is_class"],
            mask=pictures.get("mask"),
        )


@dataclass(frozen=True)
class Where:
    """Where the inputs of one forward pass lie.

    Args:
        size: trained (height, width).
        rows: int64 (2, B): of the pictures among those of this size, and of the captions.
        shares: float32 (B,), see `StepInputs`.
    """

    size: Size
    rows: torch.Tensor
    shares: torch.Tensor


class Rows:
    """Tensors in rows, read by row.

    Args:
        columns: name to tensor (N, …), in any place.
        device: where rows are needed.
        resident: whether they lie there. None: if they fit.
    """

    def __init__(
        self,
        columns: Mapping[str, torch.Tensor],
        device: torch.device,
        *,
        resident: bool | None = None,
    ) -> None:
        self._device = device
        self.resident = fit([columns], device) if resident is None else resident
        self._columns = {
            name: tensor.to(device if self.resident else "cpu") for name, tensor in columns.items()
        }

    def at(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rows on the device that they are needed on.

        Args:
            rows: int64 (B,); on the device only where all rows are resident there.
        """
        if self.resident:
            rows = moved(rows, self._device)
            return {name: column.index_select(0, rows) for name, column in self._columns.items()}
        return {name: self._copied(column, rows) for name, column in self._columns.items()}

    def shape_of(self, name: str) -> torch.Size:
        """The shape of one row of a column."""
        return self._columns[name].shape[1:]

    def _copied(self, column: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        shape, pinned = (len(rows), *column.shape[1:]), self._device.type == "cuda"
        staged = torch.empty(shape, dtype=column.dtype, pin_memory=pinned)
        return moved(torch.index_select(column, 0, rows, out=staged), self._device)


class Pictures:
    """Encoded pictures with all that goes with them, in rows of one trained size each.

    Args:
        encoded: every view, rows of one, on the processor.
        dataset: which views there are, and their geometry and masks.
        device: where they are needed; `resident` says whether they lie there.
    """

    def __init__(
        self,
        encoded: Mapping[View, LatentDistribution],
        dataset: Dataset,
        device: torch.device,
    ) -> None:
        of_sizes: dict[Size, list[View]] = {}
        for view in dataset.all_views():
            of_sizes.setdefault(dataset.examples[view[0]].target, []).append(view)
        columns = {
            size: _columns(encoded, dataset, views, device) for size, views in of_sizes.items()
        }
        self.resident = fit(columns.values(), device)
        self._rows = {
            size: Rows(of_size, device, resident=self.resident) for size, of_size in columns.items()
        }
        self._places = {view: row for views in of_sizes.values() for row, view in enumerate(views)}

    def rows_of(self, views: Sequence[View]) -> list[int]:
        """The rows of views, among those of their size."""
        return [self._places[view] for view in views]

    def latents_shape(self, size: Size) -> torch.Size:
        """The shape (C, h, w) of the latents of one view of a size."""
        return self._rows[size].shape_of("mean")

    def at(self, size: Size, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """`mean`, `std`, `is_class`, `geometry.…` and perhaps `mask` of views of one size."""
        return self._rows[size].at(rows)


def flat_geometry(geometry: Geometry) -> dict[str, torch.Tensor]:
    """The geometry by the names that it has among other inputs."""
    return {f"{_GEOMETRY}{name}": sizes for name, sizes in geometry.items()}


def fit(tables: Iterable[Mapping[str, torch.Tensor]], device: torch.device) -> bool:
    """Whether these tensors may all lie on a device for the whole training."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return sum(tensor.nbytes for table in tables for tensor in table.values()) <= _SHARE * free


def _columns(
    encoded: Mapping[View, LatentDistribution],
    dataset: Dataset,
    views: Sequence[View],
    device: torch.device,
) -> dict[str, torch.Tensor]:
    latents = [encoded[view] for view in views]
    columns = {
        "mean": torch.cat([row.mean for row in latents]),
        "std": torch.cat([row.std for row in latents]),
        "is_class": torch.tensor([dataset.examples[number].is_class for number, _ in views]),
    }
    columns |= flat_geometry(dataset.geometry_of(views))
    height, width = columns["mean"].shape[-2:]
    masks = [_pooled(dataset.mask_of(*view), (height, width), device) for view in views]
    if any(mask is not None for mask in masks):
        whole = torch.ones(1, height, width)
        columns["mask"] = torch.stack([whole if mask is None else mask for mask in masks])
    return columns


def _pooled(
    mask: torch.Tensor | None, size: tuple[int, int], device: torch.device
) -> torch.Tensor | None:
    """A mask (1, h, w) of latent pixels, as the loss averages them, of which it makes the same.

    Args:
        device: where the loss would average: the last bits are those of its arithmetic.
    """
    if mask is None:
        return None
    means = torch.nn.functional.adaptive_avg_pool2d(mask[None].to(device), size)
    return means[0].cpu()


def _below(start: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}

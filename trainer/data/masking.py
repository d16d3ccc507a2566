"""The mask of one picture at the trained scale: given, its opacity, or what a segmenter finds.

What a mask means stands in `trainer.images.masks`; files of the run folder are not known here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO

import numpy as np
import numpy.typing as npt

from trainer.config import MaskConfig
from trainer.data.store import Store, key_of
from trainer.data.views import Rendering, View
from trainer.images.crop import Mask
from trainer.images.faces import others_removed
from trainer.images.findings import Remark
from trainer.images.masks import (
    MaskOrigin,
    Segmenter,
    given_mask,
    is_faint,
    mask_of,
    mask_origin,
    resized_mask,
)
from trainer.images.segmenters import SEGMENTERS


@dataclass(frozen=True)
class Masked:
    """The mask of a picture.

    Args:
        weights: at the trained scale.
        remarks: what the user should know of it.
        without_other_faces: whether faces but the largest were taken out.
    """

    weights: Mask
    remarks: tuple[Remark, ...] = ()
    without_other_faces: bool = False


@dataclass
class Masking:
    """Makes the masks of a set of pictures.

    Args:
        mask: the section on masks.
        of_class: whether they are class pictures.
        one_subject: whether faces but the largest belong to other people.
        store: what segmenters found before.
    """

    mask: MaskConfig
    of_class: bool
    one_subject: bool
    store: Store = field(repr=False)

    def check(self) -> None:
        """Refuses a segmenter that cannot be had, without loading it.

        Raises:
            InputError: it cannot.
        """
        style = self.mask.class_image_mask_style if self.of_class else "normal"
        if self.mask.clip_seg_mask_prompt.strip() and style != "none":
            self._identity  # noqa: B018 - the way to it raises

    def origin(self, view: View, given_sha256: str | None) -> MaskOrigin | None:
        """What the mask of a view is to be made of; nothing where the whole picture counts.

        Args:
            given_sha256: of the mask file that belongs to the picture, if there is one.
        """
        return mask_origin(
            self.mask,
            of_class=self.of_class,
            given_sha256=given_sha256,
            has_alpha=view.has_alpha,
            without_other_faces=self.one_subject and len(view.faces_in_region()) > 1,
        )

    def made(
        self,
        origin: MaskOrigin,
        view: View,
        given: bytes | None,
        rendering: Callable[[], Rendering],
    ) -> Masked:
        """The mask of a view.

        Args:
            origin: what it is made of.
            given: content of the mask file that belongs to the picture, if it is wanted.
            rendering: gives the view's pixels.

        Raises:
            BadMask: the given mask cannot be used.
        """
        if origin.kind == "given":
            assert given is not None
            whole = given_mask(given, view.picture_size, inverted=origin.inverted)
            return Masked(_at_the_view(whole, view))
        if origin.kind == "alpha":
            alpha = rendering().alpha
            assert alpha is not None
            return Masked(1 - alpha if origin.inverted else alpha)
        return self._found(origin, view, rendering())

    def _found(self, origin: MaskOrigin, view: View, rendering: Rendering) -> Masked:
        logits = self._logits(origin, rendering)
        if is_faint(logits, temperature=origin.temperature):
            # Class pictures need not show everything that the subject's do.
            missing = f"shows nothing like `{origin.prompt}`: the whole picture is learned"
            remarks = () if self.of_class else (Remark.warning(missing),)
            return Masked(np.ones(view.size, np.float32), remarks)
        mask = mask_of(
            logits, temperature=origin.temperature, bias=origin.bias, inverted=origin.inverted
        )
        mask = resized_mask(mask, view.size)
        if not origin.without_other_faces:
            return Masked(mask)
        kept = others_removed(mask, view.faces_at(view.size), view.size)
        if kept is None:
            elsewhere = f"shows nothing like `{origin.prompt}` but in its other faces: they stay"
            return Masked(mask, (Remark.warning(f"{elsewhere} in its mask"),))
        return Masked(kept, without_other_faces=True)

    def _logits(self, origin: MaskOrigin, rendering: Rendering) -> npt.NDArray[np.float32]:
        ingredients = {
            "picture": rendering.sha256,
            "segmenter": origin.segmenter,
            "identity": self._identity,
            "prompt": origin.prompt,
        }
        key = key_of("logits", ingredients)
        known = self.store.get(key)
        if known is not None:
            stored: npt.NDArray[np.float32] = np.load(BytesIO(known))
            return stored
        logits = self._segmenter(rendering.image(), origin.prompt)
        content = BytesIO()
        np.save(content, logits)
        self.store.put(key, content.getvalue())
        return logits

    @cached_property
    def _segmenter(self) -> Segmenter:
        return SEGMENTERS[self.mask.segmenter].ready(self.mask)

    @cached_property
    def _identity(self) -> str:
        return SEGMENTERS[self.mask.segmenter].identity(self.mask)


def _at_the_view(mask: Mask, view: View) -> Mask:
    """What of a mask of the whole picture lies over the part that is used, at the view's size."""
    left, top, width, height = view.part
    across, down = mask.shape[1] / view.picture_size[1], mask.shape[0] / view.picture_size[0]
    if view.exact_region is not None:
        part = left * across, top * down, width * across, height * down
        return resized_mask(mask, view.size, part=part)
    rows = slice(round(top * down), max(round((top + height) * down), round(top * down) + 1))
    columns = slice(
        round(left * across), max(round((left + width) * across), round(left * across) + 1)
    )
    return resized_mask(mask[rows, columns], view.size)

"""Masks of pictures with more than one face: what stays of the others, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from grid import encoded, picture_set, prepared, write_folder
from PIL import Image, ImageDraw

from trainer.config import FaceConfig, MaskConfig
from trainer.data import masking
from trainer.data.prepared import Example
from trainer.events import NoteEvent
from trainer.images.segmenters import SegmenterKind

# Sees a red square on a blue one as a face.
SQUARES = Path(__file__).parent.parent / "samples" / "red_square_yunet.onnx"
SIDE = 128
LARGE, SMALL = (20, 30, 40), (88, 36, 24)


def two_people() -> bytes:
    """Two heads, given as left, top and side, before grey."""
    image = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
    draw = ImageDraw.Draw(image)
    for left, top, side in (LARGE, SMALL):
        draw.rectangle((left, top, left + side - 1, top + side - 1), (255, 0, 0))
        draw.rectangle((left, top + side, left + side - 1, top + 2 * side - 1), (0, 0, 255))
    return encoded(image)


def masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logits: np.ndarray
) -> tuple[np.ndarray | None, list[str]]:
    """The mask of two people from a segmenter that answers so, and what is said of it."""
    kind = SegmenterKind(lambda _: lambda *_: logits, lambda _: "")
    monkeypatch.setattr(masking, "SEGMENTERS", {"luminance": kind})
    wanted = picture_set(
        write_folder(tmp_path / "set", {"a.png": two_people()}),
        mask=MaskConfig(clip_seg_mask_prompt="head", segmenter="luminance"),
        face=FaceConfig(face_detector_path=str(SQUARES)),
        face_aware_cropping=True,
        width=SIDE,
        height=SIDE,
    )
    events, (example,) = prepared(wanted, tmp_path / "prepared")
    texts = [event.message for event in events if isinstance(event, NoteEvent)]
    return mask_of(example), [text for text in texts if "face" in text]


def mask_of(example: Example) -> np.ndarray | None:
    return None if example.mask_path is None else np.load(example.mask_path)


def nothing() -> np.ndarray:
    return np.full((SIDE, SIDE), -8, np.float32)


def with_head(logits: np.ndarray, head: tuple[int, int, int], value: float) -> np.ndarray:
    left, top, side = head
    logits[top : top + side, left : left + side] = value
    return logits


def test_other_heads_are_taken_out_and_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = with_head(with_head(nothing(), LARGE, 0), SMALL, 6)

    mask, said = masked(tmp_path, monkeypatch, logits)

    assert mask is not None
    assert mask[48, 100] == 0
    assert mask[50, 40] == mask.max() == 1
    (text,) = said
    assert "the others are left out of the loss" in text


def test_where_only_other_heads_show_the_subject_they_stay_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask, said = masked(tmp_path, monkeypatch, with_head(nothing(), SMALL, 6))

    assert mask is not None
    assert mask[48, 100] == 1
    assert mask[50, 40] < 0.05
    assert sorted(text.partition("` ")[2] for text in said) == [
        "shows 2 faces: the largest is used, the others are learned too; crop it to one person",
        "shows nothing like `head` but in its other faces: they stay in its mask",
    ]


def test_where_nothing_shows_the_subject_the_other_faces_are_learned_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask, said = masked(tmp_path, monkeypatch, nothing())

    assert mask is None
    (text,) = said
    assert "the others are learned too" in text

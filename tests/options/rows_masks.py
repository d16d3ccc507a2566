"""Rows of the section mask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from options.bases import CLIPSEG, LUMINANCE, PRIOR, UNCACHED
from options.case import Case, near, pictures
from options.matrix import Place, acts, idle, refused
from options.probe import Probe
from options.sums import grid_masks, loss_is_the_sum, mask_of_brightness, middle
from options.world import LIT, SHAPES, SIDE, grid
from PIL import Image
from transformers import CLIPSegForImageSegmentation, CLIPTokenizer

Shows = Callable[[Case], None]


def mask_in_the_loss(probe: Probe) -> torch.Tensor:
    assert probe.seen.mask is not None
    return probe.seen.mask


def another_gradient(case: Case) -> bool:
    gradients, others = case.before().first.gradients, case.after().first.gradients
    return any(not torch.allclose(gradients[name], others[name]) for name in gradients)


def is_the_brightness(temperature: float = 1.0, bias: float = 0.001) -> Shows:
    def shows(case: Case) -> None:
        expected = grid_masks(pictures(case.after().first.pixels[0]), temperature, bias)
        near(mask_in_the_loss(case.after()), expected, rtol=1e-4, atol=1e-5)
        loss_is_the_sum(case, case.after())
        assert another_gradient(case)

    return shows


def every_pixel_counts_alike(case: Case) -> None:
    assert case.before().seen.mask is not None
    assert case.after().seen.mask is None
    loss_is_the_sum(case, case.after())
    assert another_gradient(case)


def class_masks(case: Case, probe: Probe, *, inverted: bool) -> torch.Tensor:
    """The masks of a batch's class pictures, which have the trained size already."""
    folder = Path(case.world.path("class pictures"))
    files = [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]
    half = int(probe.seen.is_class.sum())
    chosen = [number - 2 for number in probe.batch.numbers[-half:]]
    return torch.stack([mask_of_brightness(files[n], inverted=inverted) for n in chosen])[:, None]


def class_half_is(style: str) -> Shows:
    """Asserts the class half's masks for a style, and that the instance half has the usual."""

    def shows(case: Case) -> None:
        normal, other = case.before(), case.after()
        ours, theirs = mask_in_the_loss(normal), mask_in_the_loss(other)
        assert normal.seen.is_class.tolist() == [False, False, True, True]
        assert torch.equal(ours[:2], theirs[:2])
        near(ours[2:], class_masks(case, normal, inverted=False), rtol=1e-4, atol=1e-5)
        expected = torch.ones(2, 1, SIDE, SIDE)
        if style == "invert":
            expected = class_masks(case, other, inverted=True)
        near(theirs[2:], expected, rtol=1e-4, atol=1e-5)
        loss_is_the_sum(case, other)
        assert another_gradient(case)

    return shows


def the_given_mask_counts(case: Case) -> None:
    # White are the first rows and columns of the middle window.
    expected = torch.zeros(2, 1, SIDE, SIDE)
    expected[:, :, :LIT, :LIT] = 1
    near(mask_in_the_loss(case.before()), expected)
    loss_is_the_sum(case, case.before())
    assert case.after().seen.mask is None
    loss_is_the_sum(case, case.after())
    assert another_gradient(case)


def clipseg_finds(prompt: str, place: str = "clipseg") -> Shows:
    """Asserts the masks that cog-sdxl's preprocess.py makes of a CLIPSeg's map of the prompt."""

    def shows(case: Case) -> None:
        folder = str(case.world.path(place))
        model = CLIPSegForImageSegmentation.from_pretrained(folder)
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        words = tokenizer([prompt, ""], padding=True, return_tensors="pt")
        expected = []
        for name in pictures(case.after().first.pixels[0]):
            with torch.no_grad():
                maps = model(**words, pixel_values=_as_clipseg_sees(grid(name))).logits
            weights = (maps.double().softmax(0)[0] + 0.001).clamp(0, 1)
            whole = Image.fromarray((weights / weights.max()).float().numpy())
            height, width = SHAPES[name]
            laid_over = whole.resize((width, height), Image.Resampling.BILINEAR)
            expected.append(torch.tensor(middle(np.asarray(laid_over))))
        near(mask_in_the_loss(case.after()), torch.stack(expected)[:, None], rtol=0, atol=1e-4)
        assert float(torch.stack(expected).std()) > 0.01
        loss_is_the_sum(case, case.after())
        assert another_gradient(case)

    return shows


def _as_clipseg_sees(pixels: Any) -> torch.Tensor:
    """A picture squeezed to 352 x 352 and normalised by ImageNet's mean and deviation, twice."""
    squeezed = Image.fromarray(pixels).resize((352, 352), Image.Resampling.BILINEAR)
    values = torch.tensor(np.asarray(squeezed, np.float32) / 255)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((values - mean) / deviation).permute(2, 0, 1).expand(2, -1, -1, -1)


MASK = [
    acts(
        "clip_seg_mask_prompt",
        ("batch", "gradient"),
        "what CLIPSeg finds weighs the loss; empty: no mask",
        clipseg_finds("head"),
        base={**CLIPSEG, "clip_seg_mask_prompt": ""},
        flipped={"clip_seg_mask_prompt": "head"},
    ),
    acts(
        "clip_seg_mask_prompt",
        ("batch", "gradient"),
        "CLIPSeg finds something else by other words",
        clipseg_finds("a red square"),
        base=CLIPSEG,
        flipped={"clip_seg_mask_prompt": "a red square"},
    ),
    acts(
        "clip_seg_mask_prompt",
        ("batch", "gradient"),
        "what the segmenter finds weighs the loss; empty: no mask",
        is_the_brightness(),
        base={**UNCACHED, "segmenter": "luminance"},
        flipped={"clip_seg_mask_prompt": "head"},
    ),
    acts(
        "clip_seg_mask_temperature",
        ("batch", "gradient"),
        "the mask is sigmoid(logits / temperature), with the largest at 1",
        is_the_brightness(temperature=3.0),
        base=LUMINANCE,
        flipped={"clip_seg_mask_temperature": 3.0},
    ),
    acts(
        "clip_seg_mask_bias",
        ("batch", "gradient"),
        "the bias is added before the largest becomes 1",
        is_the_brightness(bias=0.25),
        base=LUMINANCE,
        flipped={"clip_seg_mask_bias": 0.25},
    ),
    acts(
        "clip_seg_mask_bias",
        ("batch", "gradient"),
        "1: every pixel counts alike",
        every_pixel_counts_alike,
        base=LUMINANCE,
        flipped={"clip_seg_mask_bias": 1.0},
    ),
    acts(
        "class_image_mask_style",
        ("batch", "gradient"),
        "invert: class pictures keep what the prompt does not mean",
        class_half_is("invert"),
        base={**LUMINANCE, **PRIOR},
        flipped={"class_image_mask_style": "invert"},
    ),
    acts(
        "class_image_mask_style",
        ("batch", "gradient"),
        "none: class pictures count wholly",
        class_half_is("none"),
        base={**LUMINANCE, **PRIOR},
        flipped={"class_image_mask_style": "none"},
    ),
    acts(
        "segmenter",
        ("batch", "gradient"),
        "luminance: the mask is each picture's brightness",
        is_the_brightness(),
        base=UNCACHED,
        flipped={"segmenter": "luminance", "clip_seg_mask_prompt": "head"},
    ),
    acts(
        "segmenter",
        ("batch", "gradient"),
        "clipseg: the mask is what CLIPSeg finds",
        clipseg_finds("head"),
        base={**CLIPSEG, "segmenter": "luminance"},
        flipped={"segmenter": "clipseg"},
    ),
    refused("segmenter", {"segmenter": "sam"}, "clipseg, luminance"),
    acts(
        "clipseg_url",
        ("batch", "gradient"),
        "the mask is what the other weights find",
        clipseg_finds("head", "other clipseg"),
        base=CLIPSEG,
        flipped={"clipseg_url": Place("other clipseg")},
    ),
    refused("clipseg_url", {"clipseg_url": "owner/nowhere"}, "out of reach", base=CLIPSEG),
    refused("clipseg_url", {"clipseg_url": Place("captioner")}, "allowed: `clipseg`", base=CLIPSEG),
    *idle("segmenter is not clipseg", base=LUMINANCE, clipseg_url=Place("clipseg")),
    acts(
        "use_given_masks",
        ("batch", "gradient"),
        "a mask beside its picture weighs the loss; false: it is left aside",
        the_given_mask_counts,
        base={**UNCACHED, "images_data_url": Place("masked pictures")},
        flipped={"use_given_masks": False},
    ),
    *idle(
        "clip_seg_mask_prompt is empty",
        clip_seg_mask_temperature=3.0,
        clip_seg_mask_bias=0.25,
        segmenter="luminance",
        clipseg_url=Place("clipseg"),
    ),
    *idle("there are no class pictures with masks", class_image_mask_style="invert"),
]

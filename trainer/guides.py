"""The picture that guides another one: a depth map, edges, or a picture with a hole.

Edges and depth are given ready, or found here: depth by a model, near things bright.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import torch
import transformers
from PIL import Image

from trainer.base_model import BaseModel
from trainer.errors import InputError
from trainer.fetch import download
from trainer.generation import GenerationRequest
from trainer.images import pretrained
from trainer.images.pictures import BadPicture, Picture, decode
from trainer.images.pretrained import Unusable
from trainer.locations import is_web_address, shown_location

_MOST_BYTES = 64 * 2**20
# For a whole picture from an address, beside what its server may take to begin.
_FETCH_SECONDS = 60
# Models that predict how far things are; all others predict how near.
_OF_DISTANCE = ("zoedepth", "depth_pro", "glpn")
_ESTIMATOR_HINT = "give a depth map, or another depth model of transformers, such as Depth Anything"


@dataclass(frozen=True)
class Guiding:
    """Pictures for the pipeline's call.

    Args:
        pictures: argument to picture.
        size: (width, height) of the guiding one.
    """

    pictures: Mapping[str, Image.Image]
    size: tuple[int, int]


def guiding(request: GenerationRequest, base: BaseModel) -> Guiding:
    """Reads what guides a request's pictures, and makes it as large as those of the base model.

    Args:
        request: with a guide.
        base: made for this guide.

    Raises:
        InputError: a picture cannot be had, or nothing says what is to be filled.
    """
    assert request.guide is not None
    assert request.guide_image is not None
    checkpoints = base.family.checkpoints
    call = checkpoints.guided[request.guide]
    picture = _read("guide_image", request.guide_image)
    size = fitted(picture.image.size, base.native_size**2, checkpoints.side_step)
    image = picture.image.resize(size, Image.Resampling.LANCZOS)
    if request.canny_thresholds is not None:
        image = edges(image, *request.canny_thresholds)
    if request.depth_estimator is not None:
        image = depth(image, request.depth_estimator)
    pictures = {call.image: image}
    if call.mask:
        mask = _mask(request, picture)
        pictures[call.mask] = mask.resize(size, Image.Resampling.LANCZOS)
    return Guiding(pictures, size)


def fitted(size: tuple[int, int], area: int, step: int) -> tuple[int, int]:
    """The size of about this area whose sides are multiples of a step, in about the same shape."""
    scale = math.sqrt(area / (size[0] * size[1]))
    width, height = (max(step, round(side * scale / step) * step) for side in size)
    return width, height


def edges(image: Image.Image, low: int, high: int) -> Image.Image:
    """White edges on black, by Canny's detector (Canny 1986) as OpenCV has it.

    Args:
        image: RGB.
        low: gradients below it are no edge.
        high: gradients above it are one; those between where they touch one.
    """
    found = cv2.Canny(np.asarray(image.convert("L")), low, high)
    return Image.fromarray(found).convert("RGB")


def depth(image: Image.Image, url: str) -> Image.Image:
    """How near things are, from black to white, as a depth model of transformers sees them.

    Args:
        image: RGB.
        url: folder or hub id of the model.

    Raises:
        InputError: the model cannot be had.
    """
    try:
        found = pretrained.find(url)
        processor = pretrained.load_image_processor(found)
        model = pretrained.load_model(
            found,
            lambda: transformers.AutoModelForDepthEstimation,
            dtype=torch.float32,
            device=pretrained.device_kind(),
        )
    except Unusable as error:
        raise InputError.of("depth_estimator", str(error), _ESTIMATOR_HINT) from error
    with pretrained.quiet(), torch.no_grad():
        pixels = processor(image, return_tensors="pt").pixel_values
        nearness = model(pixel_values=pixels.to(model.device)).predicted_depth[0].float().cpu()
    is_metric = found.config.get("depth_estimation_type") == "metric"
    if is_metric or found.model_type in _OF_DISTANCE:
        nearness = -nearness
    low, high = nearness.min(), nearness.max()
    share = (nearness - low) / (high - low).clamp_min(torch.finfo(torch.float32).eps)
    scaled = Image.fromarray(share.numpy()).resize(image.size, Image.Resampling.BICUBIC)
    grey = (np.asarray(scaled).clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _mask(request: GenerationRequest, picture: Picture) -> Image.Image:
    """White where the picture is to be made anew."""
    if request.guide_mask is None:
        if picture.alpha is None:
            message = "is missing, and nothing in `guide_image` is transparent"
            raise InputError.of("guide_mask", message, "give a mask that is white in the hole")
        return picture.alpha.point([255 - opacity for opacity in range(256)])
    mask = _read("guide_mask", request.guide_mask).image.convert("L")
    if mask.size != picture.image.size:
        message = f"is of {mask.size[0]}x{mask.size[1]} pixels, the picture to be filled of "
        message += f"{picture.image.width}x{picture.image.height}"
        raise InputError.of("guide_mask", message, "give a mask of the picture's size")
    return mask


def _read(field: str, location: str) -> Picture:
    try:
        return decode(_content(field, location))
    except BadPicture as error:
        shown = shown_location(location)
        raise InputError.of(field, f"`{shown}`: {error}", "give another picture") from error


def _content(field: str, location: str) -> bytes:
    if is_web_address(location):
        return _fetched(field, location)
    try:
        return Path(location).read_bytes()
    except OSError as error:
        message = f"`{location}` cannot be read: {error.strerror}"
        raise InputError.of(field, message, "check the path") from error


def _fetched(field: str, url: str) -> bytes:
    file, until = BytesIO(), time.monotonic() + _FETCH_SECONDS
    for _ in download(url, field, file, limit=_MOST_BYTES):
        if time.monotonic() > until:
            message = f"`{shown_location(url)}` did not come within {_FETCH_SECONDS} seconds"
            raise InputError.of(field, message, "give the picture itself")
    return file.getvalue()

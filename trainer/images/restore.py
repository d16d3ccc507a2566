"""Redraws small faces: cut out upright at the size the model knows, redrawn, and put back softly.

How faces are found is not known here.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import pickle
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from trainer.cache import cache_folder
from trainer.config import FaceConfig
from trainer.durable import disk_errors
from trainer.errors import InputError
from trainer.events import StageEvent
from trainer.fetch import download
from trainer.images.crop import Pixels, Size
from trainer.images.faces import Face, Point
from trainer.images.findings import Remark, first_line
from trainer.images.pretrained import device_kind
from trainer.images.rotation import Places

# An upright, aligned face, uint8 (512, 512, 3), to the same one redrawn.
Restorer = Callable[[Pixels], Pixels]

SIDE = 512
# Where FFHQ has right eye, left eye, nose and corners of the mouth in pictures of that side, and
# what lies around them; as in facexlib's FaceRestoreHelper.
TEMPLATE: tuple[Point, ...] = (
    (192.98138, 239.94708),
    (318.90277, 240.1936),
    (256.63416, 314.01935),
    (201.26117, 371.41043),
    (313.08905, 371.15118),
)
_BORDER = (135, 133, 132)

# Eyes nearer to each other than so many pixels say too little of a face.
_LEAST_EYE_DISTANCE = 5.0
# A face of more pixels would lose some of them.
_LARGEST_FACE = 512.0

# The part of the aligned picture that is put back, in pixels: an ellipse from brow to chin, whole
# up to this share of its radius and nothing from there on out.
_MIDDLE = (256.0, 296.0)
_RADII = (200.0, 216.0)
_WHOLE = 0.8

GFPGAN_URL = "https://github.com/TencentARC/GFPGAN/releases/download/v1.3.0/GFPGANv1.4.pth"
GFPGAN_SHA256 = "e2cd4703ab14f4d01fd1383a8a8b266f9a5833dacee8e6a79d3bf21a1b6be5ad"
_GFPGAN_BYTES = 348_632_874
_BY_HAND = f"download {GFPGAN_URL} by hand and give its path as face_restorer_path"
# Before it, a pickle could run code although nothing but tensors was asked for (CVE-2026-24747).
_SAFE_UNPICKLER = "2.10"
# What torch and its restricted unpickler raise for other files.
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
)
_MEBIBYTE = 2**20

# What the user must know before a model redraws faces, by its name in `FaceConfig`.
LICENCES: Mapping[str, str] = {
    "gfpgan_1.4": "GFPGAN is under Apache-2.0, but holds parts of StyleGAN2 (NVIDIA: research or "
    "evaluation only) and DFDNet (CC BY-NC-SA); look whether your use is allowed"
}

Reals = npt.NDArray[np.float64]


def _eye_distance(face: Face) -> float:
    right_eye, left_eye = (face.landmarks or ((0.0, 0.0), (0.0, 0.0)))[:2]
    return math.dist(right_eye, left_eye)


# Which faces are left as they are, and what is said of it; the first line that fits counts.
_LEFT_ALONE: tuple[tuple[Callable[[Face], bool], Remark], ...] = (
    (
        lambda face: face.landmarks is None,
        Remark.warning("keeps its face as it is: face_restore needs the face detector YuNet"),
    ),
    (
        lambda face: _eye_distance(face) < _LEAST_EYE_DISTANCE,
        Remark.info("has a face too small to be redrawn"),
    ),
    (
        lambda face: max(face.width, face.height) > _LARGEST_FACE,
        Remark.info("has a face large enough not to be redrawn"),
    ),
)


def restored(
    image: Image.Image, faces: Sequence[Face], restorer: Restorer, *, upscale: float
) -> tuple[Image.Image, tuple[Remark, ...]]:
    """The picture with its small faces redrawn, and what was done; itself where none was.

    What is put back is what the restorer changes, so that the rest keeps its pixels.

    Args:
        image: upright, mode RGB.
        faces: in its pixels; those whose middle lies outside it do not count.
        upscale: a picture with redrawn faces becomes so many times larger, by LANCZOS.
    """
    inside = [face for face in faces if _is_inside(face, image)]
    verdicts = [_left_alone(face) for face in inside]
    remarks = tuple(dict.fromkeys(remark for remark in verdicts if remark is not None))
    chosen = [face for face, remark in zip(inside, verdicts, strict=True) if remark is None]
    if not chosen:
        return image, remarks
    size = round(image.width * upscale), round(image.height * upscale)
    pixels = np.array(image.resize(size, Image.Resampling.LANCZOS))
    smaller = np.diag([image.width / size[0], image.height / size[1], 1.0])
    alignments = [alignment(face.landmarks or ()) for face in chosen]
    for to_aligned in alignments:
        aligned = aligned_face(image, to_aligned)
        change = restorer(aligned).astype(np.float64) - aligned
        _put_back(pixels, change, to_aligned @ smaller, [each @ smaller for each in alignments])
    told = "has its face redrawn" if len(chosen) == 1 else f"has {len(chosen)} faces redrawn"
    return Image.fromarray(pixels), (*remarks, Remark.info(told))


def _is_inside(face: Face, image: Image.Image) -> bool:
    x, y = face.centre
    return 0 <= x < image.width and 0 <= y < image.height


def _left_alone(face: Face) -> Remark | None:
    return next((remark for fits, remark in _LEFT_ALONE if fits(face)), None)


def alignment(landmarks: Sequence[Point]) -> Reals:
    """(3, 3): takes points (x, y, 1) of a picture to where `TEMPLATE` has them.

    The turn, scale and move with the least squares (Umeyama 1991, without mirroring), which in
    the plane is a straight line through complex numbers.

    Args:
        landmarks: as many as `TEMPLATE` has, in its order.
    """
    source, target = (np.array([complex(*p) for p in ps]) for ps in (landmarks, TEMPLATE))
    centred = source - source.mean()
    slope = np.vdot(centred, target - target.mean()) / np.vdot(centred, centred).real
    shift = target.mean() - slope * source.mean()
    rows = [[slope.real, -slope.imag, shift.real], [slope.imag, slope.real, shift.imag], [0, 0, 1]]
    return np.array(rows, np.float64)


def aligned_face(image: Image.Image, to_aligned: Reals) -> Pixels:
    """(512, 512, 3): what a picture shows where the alignment looks, grey outside it."""
    aligned = image.transform(
        (SIDE, SIDE),
        Image.Transform.AFFINE,
        tuple(np.linalg.inv(to_aligned)[:2].ravel()),
        Image.Resampling.BICUBIC,
        fillcolor=_BORDER,
    )
    return np.asarray(aligned)


def _put_back(
    pixels: Pixels, change: Reals, to_aligned: Reals, alignments: Sequence[Reals]
) -> None:
    """Adds what changed in an aligned face to the picture, fading out around the face.

    Where faces overlap they share a pixel, which changes by a mean of what they would make of it.

    Args:
        pixels: (H, W, 3), written to.
        change: (512, 512, 3).
        to_aligned: takes points of the picture to the aligned face.
        alignments: those of all faces, this one's among them.
    """
    rows, columns = _region(to_aligned, (pixels.shape[0], pixels.shape[1]))
    region = pixels[rows, columns]
    y, x = np.mgrid[rows, columns] + 0.5
    u, v = _places(to_aligned, x, y)
    # Averaged first where the picture has fewer pixels: each of its pixels is a mean of them.
    scale = math.sqrt(np.linalg.det(to_aligned[:2, :2]))
    block = min(2 ** max(0, math.floor(math.log2(scale))), SIDE)
    blocks = change.reshape(SIDE // block, block, SIDE // block, block, 3).mean(axis=(1, 3))
    seen = Places(rows=v / block, columns=u / block).read(blocks)
    shared = sum(_softness(*_places(each, x, y)) for each in alignments)
    share = _softness(u, v) / np.maximum(shared, 1)
    values = region + share[..., None] * seen
    region[:] = np.rint(values).clip(0, 255).astype(np.uint8)


def _places(to_aligned: Reals, x: Reals, y: Reals) -> tuple[Reals, Reals]:
    """Where places of the picture lie in the aligned face."""
    across, down = (row[0] * x + row[1] * y + row[2] for row in to_aligned[:2])
    return across, down


def _region(to_aligned: Reals, size: Size) -> tuple[slice, slice]:
    """Rows and columns of a picture of this size that hold the ellipse that is put back."""
    (x, y), (radius_x, radius_y) = _MIDDLE, _RADII
    corners = [(x + i * radius_x, y + j * radius_y, 1) for i in (-1, 1) for j in (-1, 1)]
    across, down, _ = np.linalg.solve(to_aligned, np.array(corners).T)
    return _span(down, size[0]), _span(across, size[1])


def _span(places: Reals, limit: int) -> slice:
    first, last = (int(place.clip(0, limit)) for place in (places.min(), places.max() + 1))
    return slice(first, last)


def _softness(x: Reals, y: Reals) -> Reals:
    """How much of a change is put back at places of the aligned face: 1 inside, 0 outside."""
    radius = np.hypot((x - _MIDDLE[0]) / _RADII[0], (y - _MIDDLE[1]) / _RADII[1])
    along = ((1 - radius) / (1 - _WHOLE)).clip(0, 1)
    smooth: Reals = along**2 * (3 - 2 * along)
    return smooth


def restorer_of(settings: FaceConfig) -> Generator[StageEvent, None, tuple[str, Restorer]]:
    """The restorer that the section names, ready, and its identity: name and weights.

    What it fetches is told on the way.

    Raises:
        InputError: it is not installed, or its weights cannot be had.
    """
    assert settings.face_restore is not None
    return (yield from RESTORERS[settings.face_restore](settings))


def restorer_from(network: Callable[[torch.Tensor], torch.Tensor], device: str) -> Restorer:
    """A restorer that runs a network.

    Args:
        network: (1, 3, 512, 512) in [-1, 1], float32, to the same.
        device: where it computes.
    """

    def restorer(pixels: Pixels) -> Pixels:
        values = torch.from_numpy(np.array(pixels)).to(device).permute(2, 0, 1)[None].float()
        with torch.inference_mode():
            redrawn = network(values / 127.5 - 1)[0]
        redrawn = ((redrawn.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return redrawn.permute(1, 2, 0).cpu().numpy()

    return restorer


def _gfpgan(settings: FaceConfig) -> Generator[StageEvent, None, tuple[str, Restorer]]:
    """GFPGAN 1.4, its architecture from spandrel."""
    spandrel = _spandrel()
    weights, digest = yield from _gfpgan_weights(settings)
    device = device_kind()
    try:
        state = spandrel.canonicalize_state_dict(_tensors(weights, digest))
        found = spandrel.ModelLoader(device).load_from_state_dict(state)
    except (spandrel.UnsupportedModelError, RuntimeError) as error:
        raise _bad_weights(weights, "it holds another model") from error
    if found.architecture.id != "GFPGAN":
        raise _bad_weights(weights, f"it holds another model ({found.architecture.id})")
    network = found.model.float().eval()

    # The network itself: spandrel's call neither takes pictures to its range of -1 … 1 nor turns
    # off its noise, which would come from torch's global generator.
    def redraw(values: torch.Tensor) -> torch.Tensor:
        redrawn: torch.Tensor = network(values, return_rgb=False, randomize_noise=False)[0]
        return redrawn

    return f"gfpgan_1.4-{digest}", restorer_from(redraw, device)


def _spandrel() -> Any:
    try:
        return importlib.import_module("spandrel")
    # A torchvision that does not belong to the installed torch raises RuntimeError.
    except (ImportError, RuntimeError) as error:
        raise InputError.of(
            "face_restore",
            f"`gfpgan_1.4` needs spandrel and torchvision ({first_line(error)})",
            "pip install 'tok-trainer[restore]', with the torchvision made for the installed torch",
        ) from error


def _gfpgan_weights(settings: FaceConfig) -> Generator[StageEvent, None, tuple[Path, str]]:
    """The user's file of weights or GFPGAN's official one, and its sha256."""
    if settings.face_restorer_path is not None:
        given = Path(os.path.expanduser(settings.face_restorer_path))
        return given, _digest(given)
    path = cache_folder() / "weights" / GFPGAN_URL.rpartition("/")[2]
    if not path.is_file():
        yield from _fetched_gfpgan(path)
    digest = _digest(path)
    if digest != GFPGAN_SHA256:
        path.unlink()
        message = f"`{path.name}`: its checksum differs (got {digest}); it is deleted"
        raise InputError.of("face_restore", message, f"run again, or {_BY_HAND}")
    return path, digest


def _fetched_gfpgan(path: Path) -> Iterator[StageEvent]:
    """Downloads GFPGAN's official file, unchecked; to its place only when it is complete."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb", buffering=0) as target:
                told = download(GFPGAN_URL, "face_restore", target, limit=_GFPGAN_BYTES)
                for done, _ in told:
                    yield StageEvent("download", done // _MEBIBYTE, _GFPGAN_BYTES // _MEBIBYTE)
            os.replace(partial, path)
    except InputError as error:
        raise InputError.of("face_restore", error.problems[0].message, _BY_HAND) from error
    finally:
        partial.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _bad_weights(path, error.strerror or str(error)) from error


def _tensors(path: Path, digest: str) -> dict[str, Any]:
    """What a file of weights holds; a pickle may hold tensors only, whoever made it."""
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if digest != GFPGAN_SHA256 and torch.__version__ < _SAFE_UNPICKLER:
            raise InputError.of(
                "face_restorer_path",
                f"`{path}` is a pickle, which torch {torch.__version__} cannot read safely",
                "give the official GFPGANv1.4.pth or a .safetensors file, or install torch>=2.10",
            )
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (*_UNREADABLE, SafetensorError) as error:
        # torch's own words advise to trust the file.
        raise _bad_weights(path, "it is damaged, or holds more than tensors") from error


def _bad_weights(path: Path, reason: str) -> InputError:
    message = f"`{path}` cannot be used: {reason}"
    return InputError.of("face_restorer_path", message, "give the file GFPGANv1.4.pth, complete")


# A name in `FaceConfig` to how the restorer is made ready.
RESTORERS: Mapping[
    str, Callable[[FaceConfig], Generator[StageEvent, None, tuple[str, Restorer]]]
] = {"gfpgan_1.4": _gfpgan}

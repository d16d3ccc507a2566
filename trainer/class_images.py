"""Prior preservation's pictures: what the base model shows of a class before it learns.

They are kept in the user's cache folder under a key of everything that decides them, one file
each, and in the run folder, which is enough where the cache cannot be written. A picture depends
on the seed and its own number alone, so that more can be added later and any number of processes
makes the same ones.
Knows nothing of concepts, captions or training.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from trainer.durable import disk_errors, write_bytes
from trainer.errors import DiskError
from trainer.events import Event, StageEvent
from trainer.families.base import Family, text_options
from trainer.sampling import Sampler, sample

STAGE = "class images"
# Where a picture's file says what decided it.
_KEY = "key"
# What Pillow raises for files that are absent or no whole PNG; a false checksum is a SyntaxError.
_DAMAGE = (OSError, SyntaxError, ValueError)


@dataclass(frozen=True)
class ClassImages:
    """The class pictures that a training wants.

    Args:
        prompt: what they show.
        count: how many.
        sampler: size, steps and guidance.
        seed: the run's seed.
        base_contents: digest of the base model, see `contents.contents_digest`.
    """

    prompt: str
    count: int
    sampler: Sampler
    seed: int
    base_contents: str

    def key(self, family: Family) -> str:
        """sha256 of all that decides a picture beside its number; the count is no part of it."""
        names = (family.denoiser_name, "vae", *family.text_encoder_names)
        facts = {
            "base model": self.base_contents,
            "prompt": self.prompt,
            "seed": self.seed,
            "number formats": {name: str(family.unread.dtype_of(name)) for name in names},
            **asdict(self.sampler),
            **text_options(family),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def picture(self, family: Family, number: int) -> Image.Image:
        """Makes one of the pictures.

        Raises:
            NonFiniteError: the base model overflows.
        """
        return sample(
            family,
            self.prompt,
            self.sampler,
            seed=self.seed,
            purpose="class image",
            number=number,
        )


def class_images(
    family: Family,
    wanted: ClassImages,
    cache: Path,
    destination: Path,
    *,
    process_index: int,
    num_processes: int,
    device: torch.device,
    in_turns: bool = False,
) -> Generator[Event, None, Path]:
    """Puts the wanted pictures, and no others, into a folder; makes those the cache lacks.

    Process p of N takes care of the pictures p, p + N, p + 2N, …: the folder is complete when
    all processes are through. Between two events is a place to stop: what is made stays made.

    Args:
        family: just loaded, without an adapter. Its parts go to the device while pictures are
            made, and afterwards back to where they were.
        wanted: which pictures.
        cache: the user's cache folder of this program.
        destination: belongs to this function: 000.png, 001.png, …
        process_index: this one, from 0.
        num_processes: processes that share the work.
        device: where pictures are made.
        in_turns: let text encoders, denoiser and VAE be there one at a time.

    Returns:
        `destination`.

    Raises:
        NonFiniteError: the base model overflows.
        DiskError: the destination cannot be written.
    """
    key = wanted.key(family)
    folder = cache / "class_images" / key
    size = (wanted.sampler.width, wanted.sampler.height)
    own = range(process_index, wanted.count, num_processes)
    # A run that goes on elsewhere, without this cache, must not depend on other hardware
    # making the same pictures.
    lacking = [n for n in own if not _is_intact(destination / _name(n), size, key)]
    missing = [n for n in lacking if not _is_intact(folder / _name(n), size, key)]
    yield _progress((folder, destination), wanted.count, missing)
    for number in sorted(set(lacking).difference(missing)):
        write_bytes(destination / _name(number), (folder / _name(number)).read_bytes())
    if missing:
        family.unread.have("vae", *family.text_encoder_names)
        with _parts_in_turns(family, device) if in_turns else _parts_on(family, device):
            for done, number in enumerate(missing, start=1):
                content = _encoded(wanted.picture(family, number), key)
                # What the cache does not take is made again by the next training.
                with suppress(DiskError):
                    _keep(folder / _name(number), content)
                write_bytes(destination / _name(number), content)
                yield _progress((folder, destination), wanted.count, missing[done:])
    if process_index == 0:
        _remove_others(destination, wanted.count)
    return destination


def _name(number: int) -> str:
    return f"{number:03d}.png"


def _progress(folders: Iterable[Path], count: int, missing: list[int]) -> StageEvent:
    """How many files are there, those of other processes too, but none that is to be made again."""
    there = {n for n in range(count) if any((folder / _name(n)).exists() for folder in folders)}
    return StageEvent(STAGE, len(there.difference(missing)), count)


@contextmanager
def _parts_on(family: Family, device: torch.device) -> Iterator[None]:
    """The models on the device; what is computed next has its memory to itself again."""
    names = (family.denoiser_name, "vae", *family.text_encoder_names)
    parts = [family.pipeline.components[name] for name in names]
    places = [part.device for part in parts]
    try:
        for part in parts:
            part.to(device)
        yield
    finally:
        for part, place in zip(parts, places, strict=True):
            part.to(place)


@contextmanager
def _parts_in_turns(family: Family, device: torch.device) -> Iterator[None]:
    """Each model on the device while it works, and on the processor before and afterwards."""
    family.pipeline.enable_model_cpu_offload(device=device)
    try:
        yield
    finally:
        family.pipeline.remove_all_hooks()
        family.pipeline.to("cpu", silence_dtype_warnings=True)
        for part in family.pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                # What is left of a hook refers to its part, which then outlives its last use.
                vars(part).pop("forward", None)


def _is_intact(path: Path, size: tuple[int, int], key: str) -> bool:
    """Whether a file is a whole picture of this size and key: PNG has a checksum for each part."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            fits = image.size == size and image.mode == "RGB" and image.info.get(_KEY) == key
            image.verify()
    except _DAMAGE:
        return False
    return fits


def _encoded(image: Image.Image, key: str) -> bytes:
    encoded, facts = BytesIO(), PngInfo()
    facts.add_text(_KEY, key)
    image.save(encoded, format="PNG", pnginfo=facts)
    return encoded.getvalue()


def _keep(path: Path, content: bytes) -> None:
    # Another training may be making the same picture: each writes under a name of its own.
    private = path.with_name(f".{uuid.uuid4().hex}.png")
    write_bytes(private, content)
    with disk_errors(path):
        os.replace(private, path)


def _remove_others(destination: Path, count: int) -> None:
    current = {_name(number) for number in range(count)}
    with disk_errors(destination):
        # Other processes write beside this one, under names that begin with a dot.
        for file in destination.glob("[0-9]*.png"):
            if file.name not in current:
                file.unlink()

"""Pictures of validation prompts while a training runs, the base model's first.

Each starts from the same noise at every step. Text encoders that have done their work are not
needed: prompts were encoded with the captions.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO

import torch
from PIL import Image

from trainer import randomness
from trainer.durable import disk_errors, write_bytes
from trainer.encoding import Text
from trainer.events import Event, NoteEvent, SampleEvent
from trainer.families.base import Family
from trainer.job import RunFolder
from trainer.looks import NEVER, Moments
from trainer.sampling import Sampler, sample_encoded
from trainer.spread import Spread

PURPOSE = "validation prompt"
# What leads away from a prompt: nothing.
EMPTY = ""

_NO_MEMORY = (
    "the device has too little memory to make pictures beside the training, which goes on without; "
    "a result's pictures: trainer sample"
)


class Previews:
    """Makes the pictures of all prompts.

    Args:
        family: the loaded base model with what learns in it, and with its VAE.
        text: encodes the prompts, and no text.
        prompts: as the user wrote them.
        sampler: size, steps and guidance.
        seed: of the run.
        moments: when to look.
        folder: of the run.
        spread: its processes share the pictures, where none has but a part of the denoiser.
    """

    def __init__(
        self,
        family: Family,
        text: Text,
        prompts: Sequence[str],
        sampler: Sampler,
        *,
        seed: int,
        moments: Moments,
        folder: RunFolder,
        spread: Spread,
    ) -> None:
        self._family, self._text, self._prompts = family, text, tuple(prompts)
        self._sampler, self._seed, self.moments = sampler, seed, moments
        self._folder, self._spread = folder, spread

    def at(self, step: int) -> Iterator[Event]:
        """Makes a picture of each prompt; an earlier training's are removed before the first.

        Where the device has too little memory for it, the training goes on without.

        Raises:
            NonFiniteError: the denoiser or the VAE overflows.
            DiskError: a picture cannot be written.
        """
        if step == 0 and self._spread.processes.is_main:
            with disk_errors(self._folder.samples):
                shutil.rmtree(self._folder.samples, ignore_errors=True)
        with _on(self._family, self._spread.accelerator.device):
            for number, picture in self._pictures():
                if picture is None:
                    yield NoteEvent("warning", "validation_prompts", _NO_MEMORY)
                    self.moments = NEVER
                    return
                path = self._folder.samples / f"{step:06d}" / f"{number}.png"
                if self._spread.processes.is_main:
                    write_bytes(path, _png(picture))
                place = path.relative_to(self._folder.root).as_posix()
                yield SampleEvent(step, number, self._prompts[number], place)

    def _pictures(self) -> Iterator[tuple[int, Image.Image | None]]:
        """Number and picture of each prompt; nothing in place of one that memory does not allow."""
        numbers = range(len(self._prompts))
        if self._spread.sharding is None:
            return self._spread.processes.shared(numbers, self._picture_if_possible)
        return ((number, self._picture(number)) for number in numbers)

    def _picture_if_possible(self, number: int) -> Image.Image | None:
        try:
            return self._picture(number)
        except torch.OutOfMemoryError:
            return None

    def _picture(self, number: int) -> Image.Image:
        key = randomness.key(self._seed, PURPOSE, number)
        with torch.no_grad():
            prompt, empty = (self._text.of([text]) for text in (self._prompts[number], EMPTY))
        return sample_encoded(
            self._family, prompt, empty, self._sampler, key=key, told=self._prompts[number]
        )


@contextmanager
def _on(family: Family, device: torch.device) -> Iterator[None]:
    """The VAE on the device, and afterwards where it was."""
    vae = family.pipeline.vae
    place = vae.device
    vae.to(device)
    try:
        yield
    finally:
        vae.to(place)


def _png(picture: Image.Image) -> bytes:
    content = BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()

"""Pictures of validation prompts while a training runs, the base model's first.

Each starts from the same noise at every step. Text encoders that have done their work are not
needed: prompts were encoded with the captions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO

import torch
from PIL import Image

from trainer import randomness
from trainer.durable import write_bytes
from trainer.encoding import Text
from trainer.errors import NonFiniteError
from trainer.events import Event, NoteAtStep, SampleEvent
from trainer.families.base import Family
from trainer.job import RunFolder
from trainer.looks import NEVER, Moments, Stop
from trainer.out_of_memory import ran_out_of_memory
from trainer.sampling import Sampler, sample_encoded
from trainer.spread import Spread

PURPOSE = "validation prompt"
# What leads away from a prompt: nothing.
EMPTY = ""

_NO_MEMORY = "the device has too little memory for pictures beside the training"


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
        self.is_cut = False

    def at(self, step: int, stop: Stop) -> Iterator[Event]:
        """Makes a picture of each prompt; of a look that was cut short, those that are missing.

        Where memory does not allow one, or it overflows, the training goes on without any. In
        shards no process can go on alone, and that ends the training.

        Args:
            stop: asked before each, or before as many as processes make at once.

        Raises:
            DiskError: a picture cannot be written.
        """
        processes = self._spread.processes
        made = self._told(step) if self.is_cut else ()
        missing = [number for number in range(len(self._prompts)) if number not in made]
        self.is_cut = False
        together = processes.count if self._spread.sharding is None else 1
        later = len(self._prompts) * self.moments.after(step)
        for start in range(0, len(missing), together):
            # Files and listeners take the main process longer than others.
            processes.wait()
            if processes.any(stop()):
                self.is_cut = True
                return
            left = later + len(missing) - start
            yield from self._made(step, missing[start : start + together], left, together)
            if self.moments is NEVER:
                return

    def _made(self, step: int, numbers: Sequence[int], left: int, together: int) -> Iterator[Event]:
        """Makes these pictures at once.

        Args:
            left: how many are to be made with them.
            together: how many all processes make at once.
        """
        began = time.perf_counter()
        pictures = list(self._pictures(numbers))
        # Of a whole look's time, though the last group of its pictures may be smaller than others.
        groups = math.ceil(len(self._prompts) / together)
        seconds = (time.perf_counter() - began) * groups / len(self._prompts)
        for place, (number, picture) in enumerate(pictures, start=1):
            if isinstance(picture, str):
                message = f"{picture}; the training goes on without pictures on the way"
                yield NoteAtStep("warning", "validation_prompts", message, step)
                self.moments = NEVER
                return
            path = self._folder.samples / f"{step:06d}" / f"{number}.png"
            if self._spread.processes.is_main:
                write_bytes(path, _png(picture))
            name = path.relative_to(self._folder.root).as_posix()
            yield SampleEvent(step, number, self._prompts[number], name, seconds, left - place)

    def _told(self, step: int) -> Sequence[int]:
        """The numbers of the pictures after so many steps that the main process has told of."""

        def read(step: int) -> list[int]:
            told = [e for e in self._folder.read_events() if e.get("event") == SampleEvent.kind]
            of_step = {(e["number"], e["prompt"]) for e in told if e["step"] == step}
            # Prompts may be others when a training goes on.
            return [n for n, prompt in enumerate(self._prompts) if (n, prompt) in of_step]

        ((_, numbers),) = self._spread.processes.shared([step], read)
        return numbers

    def _pictures(self, numbers: Sequence[int]) -> Iterator[tuple[int, Image.Image | str]]:
        """Number and picture of each of these prompts, or why there is none."""
        if self._spread.sharding is None:
            return self._spread.processes.shared(numbers, self._picture_if_possible)
        return ((number, self._picture(number)) for number in numbers)

    def _picture_if_possible(self, number: int) -> Image.Image | str:
        try:
            return self._picture(number)
        except NonFiniteError as error:
            return f"{error.message} ({error.hint})"
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            return _NO_MEMORY

    def _picture(self, number: int) -> Image.Image:
        key = randomness.key(self._seed, PURPOSE, number)
        with torch.no_grad():
            prompt, empty = (self._text.of([text]) for text in (self._prompts[number], EMPTY))
        with _on(self._family, self._spread.accelerator.device):
            return sample_encoded(
                self._family, prompt, empty, self._sampler, key=key, told=self._prompts[number]
            )


@contextmanager
def _on(family: Family, device: torch.device) -> Iterator[None]:
    """The VAE on the device, and afterwards where it was."""
    vae = family.pipeline.vae
    place = vae.device
    try:
        vae.to(device)
        yield
    finally:
        vae.to(place)


def _png(picture: Image.Image) -> bytes:
    content = BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()

"""The models that write captions: which of them this machine can run, and running it.

A captioner is told what to write and answers in raw text. What to ask of it, and what becomes of
the answer, is not known here.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from trainer.config import CaptionConfig
from trainer.errors import InputError, OutOfMemoryError
from trainer.images import pretrained
from trainer.images.pretrained import Pretrained, Unusable
from trainer.images.prompting import Kind, inputs_of, kind_of, processor_of

FIELD = "captioner"
# Modes in which a model may tell all it sees, so that it need not follow instructions.
MODES_WITHOUT_INSTRUCTIONS = ("plain", "general")

_MAX_NEW_TOKENS = 96
_GB = 10**9
# Memory that a picture and the answer take beside the weights. A guess.
_HEADROOM = 15 * _GB // 10
_REMEDY = "give a local folder, another captioner, captions, or `skip_caption_generation: true`"


class Unavailable(Exception):
    """No captioner that was left to us to choose can be had; its text is the reason."""


class Captioner(Protocol):
    """A loaded model that puts pictures into words.

    Args:
        follows_instructions: whether it writes what it is asked; else all that it sees.
    """

    @property
    def follows_instructions(self) -> bool: ...

    def caption(self, image: Image.Image, instruction: str) -> str:
        """What the model writes about an upright picture, word for word."""
        ...

    def close(self) -> None:
        """Gives its memory back; it can write nothing afterwards."""
        ...


@dataclass(frozen=True)
class Known:
    """A captioner with a name of ours.

    Args:
        url: its hub id.
        size: bytes of its weights in 16 bits.
        size_in_4bit: bytes of them in 4 bits.
        follows_instructions: see `Captioner`.
    """

    url: str
    size: int
    size_in_4bit: int
    follows_instructions: bool = True

    def needs(self, in_4bit: bool) -> int:
        """Bytes that must be free for it."""
        return (self.size_in_4bit if in_4bit else self.size) + _HEADROOM


KNOWN: Mapping[str, Known] = {
    "llava": Known("llava-hf/llava-1.5-7b-hf", 141 * _GB // 10, 47 * _GB // 10),
    "joycaption": Known("fancyfeast/llama-joycaption-beta-one-hf-llava", 17 * _GB, 7 * _GB),
    "qwen3-vl-8b": Known("Qwen/Qwen3-VL-8B-Instruct", 176 * _GB // 10, 72 * _GB // 10),
    "qwen3-vl-2b": Known("Qwen/Qwen3-VL-2B-Instruct", 43 * _GB // 10, 2 * _GB),
    "florence-2": Known("florence-community/Florence-2-large", 16 * _GB // 10, _GB, False),
    "blip": Known("Salesforce/blip-image-captioning-large", _GB, _GB, False),
}
# What `auto` takes, the best first, each with the free bytes that it asks for in 16 bits. Without
# torchvision, Qwen's preparation of pictures is put together from its parts and has not been
# tried on its real weights: then LLaVA, which needs nothing of it.
_AUTO: Mapping[bool, tuple[tuple[str, int], ...]] = {
    True: (("qwen3-vl-8b", 24 * _GB), ("qwen3-vl-2b", 0)),
    False: (("llava", 0),),
}


@dataclass(frozen=True)
class Choice:
    """The captioner that a run takes.

    Args:
        name: as the user or `auto` named it.
        url: folder or hub id.
        in_4bit: whether its weights are kept in 4 bits.
        dtype: of its weights, or in 4 bits of what is computed with them.
        mode: `caption_mode`.
        is_explicit: whether the user named it; what `auto` chose may be had or not.
    """

    name: str
    url: str
    in_4bit: bool
    dtype: torch.dtype
    mode: str
    is_explicit: bool


def choose(
    settings: CaptionConfig,
    *,
    free_bytes: int,
    has_torchvision: bool,
    has_bitsandbytes: bool = True,
    device: str = "cpu",
) -> Choice:
    """The captioner for a machine.

    Args:
        settings: the section on captions.
        free_bytes: memory that it may take.
        has_torchvision: whether torchvision can be imported.
        has_bitsandbytes: whether weights can be kept in 4 bits.
        device: where it is to run.

    Raises:
        Unavailable: `auto`, and no captioner fits.
        InputError: the captioner named does not fit, or cannot write captions of this mode.
    """
    name, mode = settings.captioner, settings.caption_mode
    widths = _widths(settings.captioner_load_in_4bit, has_bitsandbytes)
    if name == "auto":
        name, in_4bit = _automatic(widths, free_bytes, has_torchvision)
        known = KNOWN[name]
        dtype = _dtype(known, free_bytes, device)
        return Choice(name, known.url, in_4bit, dtype, mode, is_explicit=False)
    sized = KNOWN.get(name) or _by_its_files(name)
    dtype = _dtype(sized, free_bytes, device)
    if sized is None:
        _check_name(name)
        return Choice(name, name, widths[0], dtype, mode, is_explicit=True)
    if not sized.follows_instructions:
        _check_mode(name, mode)
    for in_4bit in widths:
        if sized.needs(in_4bit) <= free_bytes:
            return Choice(name, sized.url, in_4bit, dtype, mode, is_explicit=True)
    message = _too_large(name, sized.needs(widths[-1]), free_bytes)
    in_4bit_helps = has_bitsandbytes and True not in widths and sized.needs(True) <= free_bytes
    raise InputError.of(FIELD, message, _hint(sized, free_bytes, mode, in_4bit_helps))


def _widths(wish: bool | None, has_bitsandbytes: bool) -> tuple[bool, ...]:
    """Whether weights are kept in 4 bits: what is to be tried, in this order.

    Raises:
        InputError: 4 bits are wished, and what packs them is not installed.
    """
    if wish and not has_bitsandbytes:
        raise InputError.of(
            "captioner_load_in_4bit",
            "`true` needs bitsandbytes, which is not installed or too old",
            "pip install bitsandbytes, or leave the option out",
        )
    if wish is not None:
        return (wish,)
    return (False, True) if has_bitsandbytes else (False,)


def identity_of(choice: Choice) -> str:
    """What changes with the model and its precision; no weights are read or fetched.

    Raises:
        Unavailable: `auto` chose it, and it cannot be had.
        InputError: the user chose it, and it cannot be had.
    """
    try:
        precision = f"{choice.dtype}, in 4 bits" if choice.in_4bit else f"{choice.dtype}"
        return f"{pretrained.find(choice.url).identity} {precision}"
    except Unusable as error:
        raise _not_to_be_had(choice, error) from error


def _not_to_be_had(choice: Choice, error: Unusable) -> Unavailable | InputError:
    if not choice.is_explicit:
        return Unavailable(f"the captioner cannot be had: {error}")
    return InputError.of(FIELD, str(error), _REMEDY)


def load(choice: Choice) -> Captioner:
    """The captioner with its weights, on the GPU where there is one.

    Raises:
        Unavailable: `auto` chose it, and it cannot be had.
        InputError: the user chose it, and it cannot be had, or not for this mode.
        OutOfMemoryError: the user chose it, and it does not fit.
    """
    try:
        found = pretrained.find(choice.url)
        kind = kind_of(found)
        if not kind.follows_instructions:
            _check_mode(choice.name, choice.mode)
        return _loaded(choice, found, kind)
    except Unusable as error:
        raise _not_to_be_had(choice, error) from error
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(choice) from error


def _automatic(widths: tuple[bool, ...], free: int, has_torchvision: bool) -> tuple[str, bool]:
    """The best name that fits, in 4 bits only where nothing does otherwise, or as wished."""
    names = _AUTO[has_torchvision]
    tried = [(name, False, least) for name, least in names] if False in widths else []
    if True in widths:
        # Where 4 bits are not wished, only the smallest gets another chance by them.
        tried += [(name, True, 0) for name, _ in (names[-1:] if tried else names)]
    for name, in_4bit, least in tried:
        if free >= max(least, KNOWN[name].needs(in_4bit)):
            return name, in_4bit
    smallest = min(KNOWN[name].needs(in_4bit) for name, in_4bit, _ in tried)
    raise Unavailable(_too_large("the captioner", smallest, free))


def _by_its_files(url: str) -> Known | None:
    """What is known of a local folder: its weights are mostly published in 16 bits."""
    size = pretrained.weight_bytes(url)
    return None if size is None else Known(url, size, size * 2 // 5)


def _too_large(name: str, needed: int, free: int) -> str:
    shown = name if name == "the captioner" else f"`{name}`"
    return f"{shown} needs about {_in_gb(needed)} GB; {_in_gb(free)} GB are free"


def _hint(known: Known, free: int, mode: str, in_4bit_helps: bool) -> str:
    """What can be done about a captioner that does not fit: only what fits itself."""
    fitting = {
        other.size: f"use `captioner: {name}`"
        for name, other in KNOWN.items()
        if other.size < known.size and other.needs(False) <= free
        if other.follows_instructions or mode in MODES_WITHOUT_INSTRUCTIONS
    }
    ways = [fitting[max(fitting)]] if fitting else []
    ways += ["load it in 4 bits"] if in_4bit_helps else []
    return f"{', '.join(ways)}, or give captions" if ways else "give captions"


def _in_gb(size: int) -> str:
    return f"{size / _GB:.0f}" if size >= 10 * _GB else f"{size / _GB:.1f}"


def _out_of_memory(choice: Choice) -> Unavailable | OutOfMemoryError:
    known = KNOWN.get(choice.name) or _by_its_files(choice.url)
    free = pretrained.free_bytes()
    if known is None:
        message, hint = "the captioner has too little memory", "give captions"
    else:
        needed = known.needs(choice.in_4bit)
        message = _too_large("the captioner", needed, free)
        # What is free now is what the captioner left: it is enough for what needs less than it.
        hint = _hint(known, needed - 1, choice.mode, not choice.in_4bit)
    return OutOfMemoryError(message, hint) if choice.is_explicit else Unavailable(message)


def _check_name(name: str) -> None:
    """A hub id has an owner, so that a word alone is a name of ours, or a folder."""
    if "/" in name or Path(name).is_dir():
        return
    names = ", ".join(f"`{known}`" for known in ("auto", *KNOWN))
    raise InputError.of(
        FIELD,
        f"got `{name}`; allowed: {names}, a hub id such as `owner/name`, or a local folder",
        "take one of these names",
    )


def _check_mode(name: str, mode: str) -> None:
    if mode in MODES_WITHOUT_INSTRUCTIONS:
        return
    able = ", ".join(f"`{other}`" for other, known in KNOWN.items() if known.follows_instructions)
    raise InputError.of(
        "caption_mode",
        f"got `{mode}`, but `{name}` tells all that it sees and cannot leave anything out",
        f"use one of the captioners {able}, or `caption_mode: general`",
    )


@dataclass
class _Model:
    """A loaded model, its processor, and how the two are asked; nothing of it after `close`."""

    choice: Choice
    kind: Kind
    processor: Any
    model: Any

    @property
    def follows_instructions(self) -> bool:
        return self.kind.follows_instructions

    def caption(self, image: Image.Image, instruction: str) -> str:
        """What the model writes about an upright picture; the same each time it is asked.

        Raises:
            Unavailable: `auto` chose the model, and the memory does not suffice.
            OutOfMemoryError: the user chose it, and the memory does not suffice.
        """
        assert self.model is not None, "the captioner was closed"
        try:
            with pretrained.quiet(), torch.no_grad():
                return self._answer(image, instruction)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(self.choice) from error

    def close(self) -> None:
        """Gives the memory of the model back."""
        self.model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _answer(self, image: Image.Image, instruction: str) -> str:
        inputs = inputs_of(self.processor, self.kind, image, instruction)
        inputs = inputs.to(self.model.device, self.choice.dtype)
        (tokens,) = self.model.generate(
            **inputs, do_sample=False, num_beams=1, max_new_tokens=_MAX_NEW_TOKENS
        )
        start = inputs["input_ids"].shape[1] if self.kind.answer_follows_prompt else 0
        text: str = self.processor.tokenizer.decode(tokens[start:], skip_special_tokens=True)
        return text.strip()


def _loaded(choice: Choice, found: Pretrained, kind: Kind) -> _Model:
    processor = processor_of(found, kind)
    # Files that do not say all are found out before the weights are fetched.
    with pretrained.readable(found.url):
        inputs_of(processor, kind, Image.new("RGB", (64, 64)), "describe the picture")
    model = pretrained.load_model(
        found,
        kind.model_class,
        dtype=choice.dtype,
        device=pretrained.device_kind(),
        in_4bit=choice.in_4bit,
    )
    return _Model(choice, kind, processor, model)


def _dtype(known: Known | None, free: int, device: str) -> torch.dtype:
    """16 bits on a GPU; 32 on a processor, which is faster with them, where they fit."""
    fits = known is None or 2 * known.size + _HEADROOM <= free
    return torch.float32 if device == "cpu" and fits else torch.bfloat16

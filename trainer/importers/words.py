"""Words that several programs have: number formats, ways to draw times, names of files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.importers import reasons
from trainer.importers.desk import Desk
from trainer.sections.running import DIFFUSERS_NAME

# Tokens of a caption that a language model may read.
_FEWEST_TOKENS, _MOST_TOKENS = 16, 512
PRECISIONS: Mapping[str, str] = {
    **{"no": "no", "fp32": "no", "float32": "no", "float": "no"},
    **{"fp16": "fp16", "float16": "fp16", "bf16": "bf16", "bfloat16": "bf16"},
}
SAVED: Mapping[str, str] = {
    **{"float": "fp32", "fp32": "fp32", "float32": "fp32"},
    **{"fp16": "fp16", "float16": "fp16", "bf16": "bf16", "bfloat16": "bf16"},
}


def take_way(desk: Desk, name: str, ways: Mapping[str, tuple[str, Any]]) -> str | None:
    """Takes over how times of flow matching are drawn.

    Args:
        ways: the word there to a density and the shift after it.

    Returns:
        The density; None where there is none.
    """
    way = str(desk.setting(name)).lower()
    if way not in ways:
        desk.leave(name, reasons.NO_TIMES)
        return None
    density, shift = ways[way]
    desk.take(name, "timestep_density", density)
    desk.take(name, "timestep_shift", shift)
    return density


def take_tokens(desk: Desk, name: str, value: Any) -> None:
    """Takes over how many tokens of a caption are read, where as many can be read here."""
    tokens = desk.whole(name)
    if _FEWEST_TOKENS <= tokens <= _MOST_TOKENS:
        desk.take(name, "max_sequence_length", value)
    else:
        reason = f"captions have {_FEWEST_TOKENS} to {_MOST_TOKENS} tokens here"
        desk.leave(name, f"{reason}, {_MOST_TOKENS} by themselves")


def take_name(desk: Desk, name: str, words: str, otherwise: str) -> None:
    """Takes over the name of the result, with what stands in names of files.

    Args:
        otherwise: what is said of one that cannot be a file's name.
    """
    text = "".join(c if c.isascii() and (c.isalnum() or c in "._- ") else "-" for c in words)
    text = text.strip("-. ")[:100]
    if text and text.lower() != DIFFUSERS_NAME:
        desk.take(name, "output_name", text)
    else:
        desk.leave(name, otherwise, matters=False)

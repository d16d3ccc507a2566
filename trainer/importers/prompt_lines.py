"""Prompts with options after two dashes, as sd-scripts and those that follow it write them."""

from __future__ import annotations

import re


def parted(line: str) -> tuple[str, dict[str, str]]:
    """A prompt and its options: `a cup --w 768` is `a cup` and w."""
    prompt, *options = re.split(r"\s+--", line)
    found = {}
    for option in options:
        key, _, value = option.strip().partition(" ")
        found[key.lower()] = value.strip()
    return prompt.strip(), found

"""kohya's files of sample prompts: a prompt a line, with options after two dashes."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.importers import reasons
from trainer.importers.desk import Desk
from trainer.importers.prompt_lines import parted

# Options of a line: what they are, and the option here that is one for all lines.
_STEPS, _GUIDANCE = "s", "l"
_FOR_ALL: Mapping[str, str] = {
    _STEPS: "sample_inference_steps",
    _GUIDANCE: "sample_guidance_scale",
}
_OTHERS: Mapping[str, str] = {
    "w": "width: pictures have the trained size",
    "h": "height: pictures have the trained size",
    "d": "seed: the noise of a prompt is always the same",
    "n": "negative prompt",
    "ss": "sampler: as the base model's pipeline",
    "g": "distilled guidance: as the base model's pipeline",
    "fs": "shift: as the base model's pipeline",
    "cn": "picture of a ControlNet",
}
# The same options in prompt files of TOML and JSON.
_LONG: Mapping[str, str] = {
    "sample_steps": _STEPS,
    "scale": _GUIDANCE,
    "width": "w",
    "height": "h",
    "seed": "d",
    "negative_prompt": "n",
}


def take_samples(desk: Desk, name: str, value: Any) -> None:
    """Takes over the prompts of a file as validation prompts."""
    path = Path(str(value))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        desk.leave(name, "cannot be read here: give --validation-prompts", matters=False)
        return
    try:
        lines = [*_lines(path, text)]
    except ValueError:
        desk.leave(name, "is no TOML or JSON: give --validation-prompts", matters=False)
        return
    prompts = [prompt for prompt, _ in lines if prompt]
    if not prompts:
        desk.leave(name, "holds no prompt", matters=False)
        return
    desk.take(name, "validation_prompts", prompts)
    for key, leaf in _FOR_ALL.items():
        _take_for_all(desk, name, key, leaf, [options.get(key) for _, options in lines])
    for key in dict.fromkeys(k for _, options in lines for k in options if k not in _FOR_ALL):
        given = [options[key] for _, options in lines if key in options]
        reason = _OTHERS.get(key, reasons.UNKNOWN)
        desk.leave(f"{name} --{key}", reason, matters=False, value=given[0])


def _take_for_all(desk: Desk, name: str, key: str, leaf: str, values: list[str | None]) -> None:
    found = list(dict.fromkeys(value for value in values if value is not None))
    if len(found) == 1:
        desk.take(name, leaf, found[0])
    elif found:
        reason = f"one value for all prompts: give --{leaf.replace('_', '-')}"
        desk.leave(f"{name} --{key}", reason, matters=False, value=found)


def _lines(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each prompt with its options.

    Raises:
        ValueError: TOML or JSON that is none.
    """
    if path.suffix.lower() == ".toml":
        content = tomllib.loads(text)
        shared = content.get("prompt", {})
        rows = shared.get("subset", [shared]) if isinstance(shared, dict) else []
        for row in rows:
            yield _row({**shared, **row})
    elif path.suffix.lower() == ".json":
        for row in json.loads(text):
            yield _row(row if isinstance(row, dict) else {"prompt": str(row)})
    else:
        for line in text.splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield parted(line.strip())


def _row(row: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    known = {_LONG[key]: str(value) for key, value in row.items() if key in _LONG}
    return str(row.get("prompt", "")), known

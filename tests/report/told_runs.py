"""Run folders as trainings leave them, written by hand: what a report is made of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.config_files import write_config
from trainer.job import Result, ResultFile, RunFolder
from trainer.resolve import Layer, resolve

PROMPTS = ("a photograph of TOK at the sea", "a drawing of TOK")
STRENGTHS = (0.0, 0.5, 1.0)
DIGEST = "0123456789abcdef" * 4
CARD = """\
---
tags:
- lora
---

# me

## Files

- `me.safetensors`: the adapter for ComfyUI & <others>

## Loading with diffusers

From the folder of this card:

```python
pipe = StableDiffusionPipeline.from_pretrained("owner/base")

## not a heading
pipe.load_lora_weights(".", weight_name="me.safetensors")
```

## New tokens

| identifier | in diffusers |
|---|---|
| `TOK` | `<s0><s1>` |

## Verification

| file | reader |
|---|---|
"""


def configured(folder: RunFolder, **leaves: Any) -> None:
    """Writes a resolved configuration in which the named leaves are explicit."""
    given = {"images_data_url": "photos", "output_name": "me", **leaves}
    config = resolve([Layer("test", given, explicit=True)])
    folder.root.mkdir(parents=True, exist_ok=True)
    folder.config.write_text(write_config(config))


def said(folder: RunFolder, events: Iterable[Mapping[str, Any]]) -> None:
    """Appends events to the log."""
    folder.root.mkdir(parents=True, exist_ok=True)
    with open(folder.events, "a") as file:
        file.writelines(json.dumps({**event, "time": 1.7e9}) + "\n" for event in events)


def begun(total_steps: int) -> dict[str, Any]:
    details = {"model": "/secret/place", "resolution": "64x64", "device": "cpu", "processes": 1}
    return {
        "event": "run",
        "start_step": 0,
        "total_steps": total_steps,
        "steps_per_epoch": 2,
        "num_examples": 4,
        "details": {**details, "precision": "float32", "trained_parameters": 1234},
        "num_pictures": 4,
    }


def stepped(number: int, **values: Any) -> dict[str, Any]:
    told = {"loss": 1 / number, "smoothed_loss": 1 / number, "learning_rate": 1e-4}
    rest = {"epoch": 0, "grad_norm": 0.5, "seconds": 0.25}
    return {"event": "step", "step": number, **told, **rest, **values}


def picture(path: Path, side: int = 32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (200, 80, 40)).save(path)
    return path


def sampled(folder: RunFolder, step: int, prompts: Iterable[str] = PROMPTS) -> None:
    """The pictures of the validation prompts after a step."""
    events = []
    for number, prompt in enumerate(prompts):
        path = picture(folder.samples / f"{step:06d}" / f"{number}.png")
        where = path.relative_to(folder.root).as_posix()
        told = {"step": step, "number": number, "prompt": prompt, "path": where}
        events.append({"event": "sample", **told})
    said(folder, events)


def measured_likeness(folder: RunFolder, likeness: float | None = 0.5) -> None:
    """What `trainer sample` leaves: each prompt at each strength."""
    made = []
    for number in range(len(PROMPTS)):
        for strength in STRENGTHS:
            name = picture(folder.pictures / f"{number}-{strength:g}.png").name
            found = None if likeness is None else likeness * strength
            what = {"prompt": number, "strength": strength, "path": name, "likeness": found}
            made.append(what)
    prompts = [
        {"name": f"scene {n}", "prompt": p, "seed": 7, "steps": None} for n, p in enumerate(PROMPTS)
    ]
    told = {"prompts": prompts, "strengths": STRENGTHS, "likeness_model": None, "pictures": made}
    (folder.pictures / "pictures.json").write_text(json.dumps(told))


def prepared(folder: RunFolder, name: str = "", remark: str = "is blurred") -> None:
    """A set of prepared pictures with its contact sheet."""
    place = folder.prepared / name if name else folder.prepared
    picture(place / "contact_sheet_1.jpg", 64)
    line = {"topic": "count", "found": "1 picture", "advice": "more", "level": "act"}
    told = {
        "name": "face.jpg",
        "size": [480, 640],
        "trained_size": [64, 64],
        "caption": "a photograph of TOK",
        "remarks": [{"kind": "warning", "text": remark}],
        "mask": "given",
    }
    report = {"advice": {"lines": [line]}, "pictures": [told], "left_out": [], "notes": []}
    (place / "report.json").write_text(json.dumps(report))


def delivered(folder: RunFolder) -> tuple[ResultFile, ...]:
    """Result files, what readers found in them, and their card."""
    folder.outputs.mkdir(parents=True)
    checks = [
        {"path": "outputs/me.safetensors", "reader": "diffusers", "status": "passed"},
        {
            "path": "outputs/me.safetensors",
            "reader": "lycoris",
            "status": "not checked",
            "reason": "it is `not installed`",
        },
    ]
    (folder.outputs / "verify.json").write_text(json.dumps({"passed": True, "checks": checks}))
    (folder.outputs / "README.md").write_text(CARD)
    (folder.outputs / "me.safetensors").write_bytes(b"weights")
    return (
        ResultFile(
            role="kohya_lora",
            path="outputs/me.safetensors",
            size=1_234_567,
            sha256=DIGEST,
            content_type="application/octet-stream",
        ),
    )


def finished(root: Path, steps: int = 4, **leaves: Any) -> RunFolder:
    """A run that ended well, with all that a run can leave."""
    folder = RunFolder(root)
    configured(folder, max_train_steps=steps, **leaves)
    prepared(folder)
    said(folder, [begun(steps)])
    sampled(folder, 0)
    said(folder, map(stepped, range(1, steps + 1)))
    values = {"validation/loss": 0.4, "tokens/text_encoder/<s0>": 0.38}
    said(folder, [{"event": "measures", "step": steps, "values": values}])
    sampled(folder, steps)
    said(folder, [{"event": "memory", "peaks": {"steps": {"process": 2_500_000_000}}}])
    measured_likeness(folder)
    folder.write_result(
        Result(status="done", exit_code=0, step=steps, total_steps=steps, files=delivered(folder))
    )
    return folder

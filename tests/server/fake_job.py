"""A job that trains nothing: leaves in the run folder what a training leaves, and ends.

What it does is told by the environment: FAKE_SECONDS that it takes, FAKE_EXIT with this code and
no result, FAKE_FAIL with this kind of error, FAKE_EVENTS that it says beside, FAKE_RESULT with more
of its result, FAKE_ONCE that it leaves after one request for pictures, FAKE_LOG and FAKE_ENDS to
count its starts and its ends in.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63"
    "f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
)


def main(output: Path) -> int:
    output.mkdir(parents=True, exist_ok=True)
    note("FAKE_LOG", output)
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    say(output, {"event": "run", "start_step": 0, "total_steps": 4, "steps_per_epoch": 2})
    for event in json.loads(os.environ.get("FAKE_EVENTS", "[]")):
        say(output, event)
    for step in range(1, 5):
        until = time.monotonic() + float(os.environ.get("FAKE_SECONDS", "0")) / 4
        while not stopped and time.monotonic() < until:
            time.sleep(0.02)
        if stopped:
            return 75
        say(output, {"event": "step", "step": step, "loss": 0.5 / step, "seconds": 0.1})
    if "FAKE_EXIT" in os.environ:
        return int(os.environ["FAKE_EXIT"])
    if "FAKE_FAIL" in os.environ:
        return fail(output, os.environ["FAKE_FAIL"])
    files = [
        write(output, "diffusers_lora", "pytorch_lora_weights.safetensors", b"diffusers"),
        write(output, "kohya_lora", "lora.safetensors", b"kohya"),
        write(output, "config", "config.yaml", b"rank: 4\n", "application/yaml"),
    ]
    end(output, {"status": "done", "exit_code": 0, "step": 4, "total_steps": 4, "files": files})
    return 0


def prepare(output: Path) -> int:
    """What a preparation leaves: one small picture, and what is said of it."""
    folder = output / "prepared"
    folder.mkdir(parents=True, exist_ok=True)
    note("FAKE_LOG", output)
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
    if "FAKE_FAIL" in os.environ:
        return fail(output, os.environ["FAKE_FAIL"])
    say(output, {"event": "stage", "stage": "prepare", "done": 1, "total": 1})
    for name in ("000.png", "000.source.jpg", "contact_sheet_1.jpg"):
        (folder / name).write_bytes(PIXEL)
    picture = {
        **{"name": "000-a.png", "size": [64, 96], "trained_size": [64, 64]},
        **{
            "trained_box": [16, 0, 64, 64],
        },
        "faces": [{"left": 20, "top": 4, "width": 16, "height": 16, "score": 1}],
        **{"caption": "a cup", "caption_origin": "instance_prompt", "repeats": 1, "mask": None},
        **{"remarks": [{"kind": "warning", "text": "is soft"}], "each_time": []},
    }
    line = {"topic": "count", "found": "only 1 picture", "advice": "at least 10", "level": "act"}
    report = {"advice": {"level": "act", "lines": [line]}, "notes": [], "pictures": [picture]}
    left_out = [{"name": "001-b.png", "reason": "is no picture"}]
    (folder / "report.json").write_text(json.dumps({**report, "left_out": left_out}))
    index = {"pictures": [{"name": "000-a.png", "thumbnail": "000.source.jpg", "mask": None}]}
    (folder / "prepared.json").write_text(json.dumps(index))
    end(output, {"status": "done", "exit_code": 0})
    return 0


def generate(folder: Path) -> None:
    """What the inference process does for one folder."""
    request = json.loads((folder / "generation.json").read_text())
    note("FAKE_LOG", folder)
    notes = request.get("notes", [])
    for told in notes:
        field, message = told["field"], told["message"]
        say(folder, {"event": "note", "note": told["kind"], "field": field, "message": message})
    ignored = {told["field"]: told["message"] for told in notes if told["kind"] == "ignored"}
    kind = request["output_format"]
    files = [
        write(folder, "picture", f"{number}.{kind}", PIXEL, f"image/{kind}")
        for number in range(request["num_images"])
    ]
    result = {"status": "done", "exit_code": 0, "files": files}
    end(folder, {**result, "ignored_options": ignored})


def note(variable: str, output: Path) -> None:
    log = os.environ.get(variable)
    if log:
        with open(log, "a") as file:
            file.write(f"{output.parent.name}\n")


def fail(output: Path, kind: str) -> int:
    problems = [{"field": "rank", "message": "got 0; allowed: at least 1", "hint": ""}]
    result = {"status": "failed", "exit_code": 2, "error_kind": kind, "error": "it went wrong"}
    end(output, {**result, "problems": problems if kind == "input" else []})
    return 2


def say(output: Path, event: dict[str, object]) -> None:
    more = {"num_pictures": 3, "num_examples": 3, "details": {}} if event["event"] == "run" else {}
    with open(output / "events.jsonl", "a") as file:
        file.write(json.dumps({**event, **more, "time": time.time()}) + "\n")


def write(
    output: Path,
    role: str,
    name: str,
    content: bytes,
    content_type: str = "application/octet-stream",
) -> dict[str, object]:
    path = output / "outputs" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return {
        "role": role,
        "path": f"outputs/{name}",
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "content_type": content_type,
    }


def end(output: Path, result: dict[str, object]) -> None:
    note("FAKE_ENDS", output)
    temporary = output / ".result"
    more = json.loads(os.environ.get("FAKE_RESULT", "{}"))
    temporary.write_text(json.dumps({**result, **more}))
    temporary.rename(output / "result.json")


if __name__ == "__main__":
    if sys.argv[1] == "--stdin":
        for line in sys.stdin:
            generate(Path(line.strip()))
            if "FAKE_ONCE" in os.environ:
                break
        sys.exit(0)
    if sys.argv[1] == "--prepare":
        sys.exit(prepare(Path(sys.argv[2])))
    sys.exit(main(Path(sys.argv[2])))

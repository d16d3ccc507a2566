"""The page of a run: well made, whole by itself, and safe whatever stands in prompts and names."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from read_pages import Page, page_of
from told_runs import (
    PROMPTS,
    begun,
    configured,
    finished,
    measured_likeness,
    picture,
    prepared,
    said,
    sampled,
    stepped,
)

from trainer.job import Result, RunFolder
from trainer.report.page import write_report

HOSTILE = "</td><script>alert('x')</script> \"TOK\" & <img src=http://evil.example/a.png>"


@pytest.fixture
def whole(tmp_path: Path) -> Page:
    return page_of(finished(tmp_path / "run", rank=4))


def test_a_finished_run_has_every_part_in_the_order_of_interest(whole: Page) -> None:
    expected = ["pictures", "likeness", "curves", "photographs", "files", "loading", "settings"]

    assert whole.sections() == expected
    links = {element.get("href") for element in whole.named("a")}
    assert {f"#{name}" for name in expected} <= links


def test_headings_are_in_order_and_ids_are_unique(whole: Page) -> None:
    levels = [int(each.name[1]) for each in whole.named("h1", "h2", "h3", "h4")]
    ids = [each.get("id") for each in whole.elements if each.get("id")]

    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    assert len(ids) == len(set(ids))


def test_pictures_charts_and_tables_say_what_they_show(whole: Page) -> None:
    pictures = whole.named("img")

    assert len(pictures) == 2 * len(PROMPTS) + 3 * len(PROMPTS) + 1
    assert all(each.get("alt") for each in pictures)
    assert all(each.get("aria-label") for each in whole.named("svg") if each.get("role") == "img")
    assert all(each.get("scope") in ("col", "row") for each in whole.named("th"))


def test_nothing_is_asked_of_the_network_and_nothing_runs(whole: Page) -> None:
    sources = [each.get("src") for each in whole.elements if "src" in each.attributes]
    links = [each.get("href") for each in whole.named("a")]

    assert all(source.startswith("data:image/") for source in sources)
    assert all(link.startswith("#") or not re.match(r"[a-z]+:|/", link) for link in links)
    assert whole.named("script", "link", "iframe", "object", "form", "base") == []
    assert not re.search(r"https?:|@import|url\(", whole.html)
    assert not any(name.startswith("on") for each in whole.elements for name in each.attributes)
    assert "default-src 'none'" in whole.html


def test_hostile_prompts_and_names_are_only_text(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run", instance_prompt=HOSTILE)
    sampled(folder, 2, [HOSTILE])
    prepared(folder, remark=HOSTILE)
    said(folder, [{"event": "note", "note": "warning", "field": HOSTILE, "message": HOSTILE}])
    values = {f"tokens/{HOSTILE}/{HOSTILE}": 0.1, HOSTILE: 0.2}
    said(folder, [{"event": "measures", "step": 4, "values": values}])
    (folder.outputs / "README.md").write_text(f"# me\n\n## {HOSTILE}\n\n- {HOSTILE}\n")
    told = json.loads((folder.pictures / "pictures.json").read_text())
    told["prompts"][0] |= {"prompt": HOSTILE, "name": HOSTILE, "negative_prompt": HOSTILE}
    (folder.pictures / "pictures.json").write_text(json.dumps(told))

    page = page_of(folder)

    assert page.named("script") == []
    assert all(each.get("src").startswith("data:") for each in page.named("img"))
    assert page.text.count("<script>alert('x')</script>") >= 8


def test_no_picture_leads_out_of_the_run_folder(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    picture(tmp_path / "secret.png")
    told = {"step": 1, "number": 0, "prompt": "TOK", "path": "../secret.png"}
    said(folder, [{"event": "sample", **told}])

    page = page_of(folder)

    assert "secret" not in page.html


def test_keys_contents_and_places_are_not_shown(tmp_path: Path) -> None:
    folder = finished(
        tmp_path / "run",
        images_data_url="https://user:pass@host.example/photos.zip?signature=KEY1",
        model_url="/home/somebody/models/base.safetensors",
        captions_file_url="data:text/plain;base64,U0VDUkVUS0VZMg==",
    )

    page = page_of(folder)

    for hidden in ("KEY1", "user:pass", "somebody", "U0VDUkVU", "/secret/place"):
        assert hidden not in page.html
    assert "host.example/photos.zip" in page.text
    assert "base.safetensors" in page.text


def test_a_run_that_failed_before_its_first_step_says_why_and_what_to_do(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    configured(folder)
    said(folder, [begun(10)])
    folder.write_result(
        Result(
            status="failed",
            exit_code=4,
            total_steps=10,
            error_kind="memory",
            error="the GPU has no room",
            hint="take a smaller `--batch-size`",
        )
    )

    page = page_of(folder)

    assert page.sections() == ["pictures", "curves", "files", "settings"]
    assert "Failed" in page.text
    assert "the GPU has no room" in page.text
    assert "What to do: take a smaller --batch-size" in page.text
    assert page.named("img", "figure") == []


def test_an_interrupted_run_says_how_it_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "my run")
    configured(folder)
    said(folder, [begun(10), stepped(1)])
    folder.write_result(Result(status="interrupted", exit_code=75, step=1, total_steps=10))

    page = page_of(folder)

    assert "Interrupted after 1 of 10 steps" in page.text
    assert f"trainer train '{folder.config}' --output '{folder.root}'" in page.text
    assert "likeness" not in page.sections()


def test_a_run_without_a_result_is_told_as_it_stands(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    configured(folder)
    said(folder, [begun(10), stepped(1), stepped(2)])

    page = page_of(folder)

    assert "Unfinished has no result yet, after 2 of 10 steps" in page.text
    assert page.named("figure")


def test_a_folder_with_nothing_but_a_beginning_gives_a_page(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    said(folder, [begun(3)])

    page = page_of(folder)

    assert page.sections() == ["pictures", "curves", "files"]


def test_damaged_files_in_the_folder_are_left_out(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    (folder.samples / "000000" / "0.png").write_bytes(b"no picture")
    (folder.samples / "000000" / "1.png").unlink()
    (folder.pictures / "pictures.json").write_text("{")
    (folder.prepared / "report.json").write_text("[]")
    (folder.outputs / "verify.json").write_bytes(b"\xff\xfe")

    page = page_of(folder)

    assert page.text.count("none") >= 2
    assert "photographs" not in page.sections()


@pytest.fixture
def long_run(tmp_path: Path) -> RunFolder:
    """A run of 5,000 steps with 50 noisy pictures, which JPEG cannot make small."""
    folder = RunFolder(tmp_path / "run")
    configured(folder)
    said(folder, [begun(5000), *map(stepped, range(1, 5001))])
    noise = np.random.default_rng(0)
    for step in range(0, 5001, 1000):
        sampled(folder, step, [f"prompt {number}" for number in range(6)])
    measured_likeness(folder)
    for path in [*folder.samples.rglob("*.png"), *folder.pictures.glob("*.png")]:
        pixels = noise.integers(0, 256, (512, 512, 3), np.uint8)
        Image.fromarray(pixels).save(path, compress_level=1)
    return folder


def test_the_page_of_a_long_run_is_small_and_soon_made(long_run: RunFolder) -> None:
    began = time.process_time()

    written = write_report(long_run, None)

    # Seconds of the processor, which other programs on the machine change little.
    assert time.process_time() - began < 4
    assert written == long_run.report
    assert written.stat().st_size < 8_000_000
    longest = max(
        len(points.split()) for points in re.findall(r'points="([^"]*)"', written.read_text())
    )
    assert longest <= 600

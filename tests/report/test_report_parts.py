"""What each part of a report says, and what it says where there is nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from read_pages import page_of
from told_runs import (
    DIGEST,
    begun,
    configured,
    finished,
    measured_likeness,
    prepared,
    said,
    sampled,
    stepped,
)

from trainer.config import LEAVES
from trainer.job import Result, RunFolder
from trainer.report.charts import Chart, Line, Marks, figure
from trainer.report.markdown import as_html, sections


@pytest.fixture
def started(tmp_path: Path) -> RunFolder:
    """A run of 20 steps of which three are done."""
    folder = RunFolder(tmp_path / "run")
    configured(folder, rank=4, learning_rate=3e-4)
    said(folder, [begun(20), *map(stepped, (1, 2, 3))])
    return folder


def test_without_pictures_on_the_way_it_is_told_how_to_get_them(started: RunFolder) -> None:
    page = page_of(started)

    assert "--validation-prompts" in page.text
    assert page.named("img") == []


def test_of_many_steps_eight_columns_are_shown_from_the_base_to_the_last(
    started: RunFolder,
) -> None:
    for step in range(0, 21, 2):
        sampled(started, step)

    text = page_of(started).text

    assert "base model" in text
    assert "step 20" in text
    assert "Shown are 8 of 11 steps" in text


def test_the_last_pictures_of_a_finished_run_are_those_of_the_trained_model(
    tmp_path: Path,
) -> None:
    assert "trained, step 4" in page_of(finished(tmp_path / "run")).text


def test_the_picture_of_a_resumed_run_takes_the_place_of_the_earlier_one(
    started: RunFolder,
) -> None:
    sampled(started, 2, ["TOK"])
    sampled(started, 2, ["TOK"])

    assert len(page_of(started).named("img")) == 1


def test_likeness_is_told_with_the_means_of_rows_and_columns(tmp_path: Path) -> None:
    # Half of the strength, and the mean of 0, 0.25 and 0.5, by hand.
    figures = re.findall(r'class="figure">([\d.]*)<', page_of(finished(tmp_path / "run")).html)
    row = ["0.00", "0.25", "0.50", "0.25"]

    assert figures == [*row, *row, *row]


def test_without_measured_likeness_there_is_no_mean(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    measured_likeness(folder, likeness=None)

    heads = re.findall(r'<th scope="col">([^<]*)</th>', page_of(folder).html)

    assert "strength 1" in heads
    assert "mean" not in heads


def test_a_finished_run_without_scenes_names_the_command_that_makes_them(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    (folder.pictures / "pictures.json").unlink()

    assert f"trainer sample {folder.root}" in page_of(folder).text


def test_curves_have_what_was_measured_and_mark_phases_and_checkpoints(
    started: RunFolder,
) -> None:
    phase = {"event": "phase", "step": 2, "learning": ["denoiser"], "frozen": ["tokens"]}
    checkpoint = {"event": "checkpoint", "step": 2, "path": "checkpoints/step-2"}
    values = {"validation/loss": 0.5, "train/prodigy_d": 1e-6, "tokens/text_encoder/<s0>": 0.4}
    said(started, [phase, checkpoint, {"event": "measures", "step": 3, "values": values}])

    page = page_of(started)

    labels = [each.get("aria-label") for each in page.named("svg") if each.get("role") == "img"]
    assert [label.partition(" by step")[0] for label in labels] == [
        "Loss",
        "Learning rate",
        "Norm of the gradients",
        "Prodigy's estimate of the step size, d",
        "Norm of new tokens in text_encoder",
    ]
    assert "smoothed from 1 at step 1 to 0.333 at step 3" in labels[0]
    assert "of pictures left out of training" in labels[0]
    assert "from step 3 on: the denoiser learning; new tokens frozen" in page.text
    assert "checkpoint of step 2" in page.text


def test_a_loss_that_is_not_finite_leaves_a_gap() -> None:
    points = [(1, 1.0), (2, 1.0), (3, None), (4, 1.0), (5, 1.0)]

    drawn = figure(Chart("Loss", [Line("each step", 1, points)], 5, Marks()))

    assert [len(each.split()) for each in re.findall(r'points="([^"]*)"', drawn)] == [2, 2]


def test_photographs_are_shown_with_what_was_noted_about_each(started: RunFolder) -> None:
    prepared(started, remark="is darker than the others")

    page = page_of(started)

    assert "is darker than the others" in page.text
    assert "640×480" in page.text
    assert "mask: given" in page.text
    assert "mend" in page.text
    [sheet] = page.named("img")
    assert sheet.get("alt").startswith("Contact sheet, page 1 of 1")


def test_each_concept_and_class_has_its_photographs(started: RunFolder) -> None:
    for name in ("concept_1", "concept_2", "class_1"):
        prepared(started, name)

    titles = re.findall(r"<h3>([^<]*)</h3>", page_of(started).html)

    assert titles[:3] == ["Concept 1", "Concept 2", "Class 1"]


def test_what_was_set_on_purpose_stands_before_what_was_decided(started: RunFolder) -> None:
    html = page_of(started).html
    purpose, others = html.split("Set on purpose")[1].split("Decided by preset")

    shown = re.findall(r"<dt><code>(\w+)</code></dt>", purpose)
    assert set(shown) == {"images_data_url", "output_name", "rank", "learning_rate"}
    assert "0.0003" in purpose
    assert str(LEAVES["rank"].info.description)[:20] in purpose
    assert "<code>batch_size</code>" in others
    assert '<span class="how">default</span>' in others


def test_options_without_effect_are_told_with_the_reason(started: RunFolder) -> None:
    text = page_of(started).text

    assert re.search(r"\d+ options without effect in this run, and why", text)
    assert "lokr_factor: lora_type is not lokr" in text


def test_every_option_has_its_place(tmp_path: Path) -> None:
    html = page_of(finished(tmp_path / "run")).html

    missing = [name for name in LEAVES if f"<code>{name}</code>" not in html]
    assert missing == []


def test_warnings_come_before_notes_and_each_is_told_once(started: RunFolder) -> None:
    yielded = {"event": "note", "note": "yielded", "field": "alpha", "message": "is the rank's"}
    warning = {"event": "note", "note": "warning", "field": "rank", "message": "is `4`"}
    nobody = {"event": "note", "note": "ignored", "field": "lokr_factor", "message": "not LoKr"}
    said(started, [yielded, warning, warning, nobody])

    notes = page_of(started).html.split('<ul class="notes">')[1].split("</ul>")[0]

    assert notes.count("<li>") == 2
    assert notes.index("warning") < notes.index("gave way")


def test_files_have_their_meaning_and_every_readers_verdict(tmp_path: Path) -> None:
    page = page_of(finished(tmp_path / "run"))

    assert "the adapter for ComfyUI & <others>" in page.text
    assert DIGEST[:12] in page.text
    assert any(each.get("title") == DIGEST for each in page.named("code"))
    assert "1.2 MB" in page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert "diffusers passed" in page.text
    assert "lycoris not checked: it is not installed" in page.text
    assert "2.50 GB" in page.text


def test_a_run_whose_files_were_refused_still_shows_them(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    said(folder, [{"event": "file", "role": "kohya_lora", "path": "outputs/me.safetensors"}])
    said(folder, [{"event": "file", "role": "kohya_lora", "path": "outputs/gone.safetensors"}])
    folder.write_result(
        Result(status="failed", exit_code=1, error_kind="verification", error="wrong", step=4)
    )

    text = page_of(folder).text

    assert "me.safetensors" in text
    assert "gone.safetensors" not in text


def test_how_to_load_the_files_is_what_their_card_says(tmp_path: Path) -> None:
    text = page_of(finished(tmp_path / "run")).text
    loading = text.split("How to load the files")[-1]

    assert 'pipe.load_lora_weights(".", weight_name="me.safetensors")' in loading
    assert "<s0><s1>" in loading
    assert "Verification" not in loading


def test_a_heading_within_code_is_no_heading() -> None:
    text = "## One\n\n```python\n## two\n```\n\n## Three\n\nwords\ngo on\n"

    assert [title for title, _ in sections(text)] == ["One", "Three"]


def test_markdown_becomes_paragraphs_lists_tables_and_code() -> None:
    text = (
        "a `b`\nc\n\n- one\n- two **three**\n\n| h | i |\n|---|---|\n| `x` | y |\n\n```\n<a>\n```\n"
    )

    html = as_html(text)

    assert html.startswith("<p>a <code>b</code> c</p><ul><li>one</li>")
    assert "<li>two <strong>three</strong></li>" in html
    assert '<th scope="row"><code>x</code></th><td>y</td>' in html
    assert "<code>&lt;a&gt;</code></pre>" in html

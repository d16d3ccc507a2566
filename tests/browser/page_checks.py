"""The page in a real browser: what a user does, by mouse and keyboard, wide and narrow.

Run by `scripts/check_page`, which knows where Chromium is; no ordinary run of pytest collects this.
With PAGE_SCREENSHOTS each view is kept in that folder, to be looked at.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx2
import make_demo_photos
import pytest
from fake_job import PIXEL
from playwright.sync_api import Browser, Page, expect, sync_playwright
from running import RunningServer, fake_jobs_environment, running_server, wait_for, warm_jobs

SHOTS = os.environ.get("PAGE_SCREENSHOTS")
WIDE = {"width": 1280, "height": 900}
NARROW = {"width": 360, "height": 740}
VIEWS = ("#/photographs", "#/settings", "#/training", "#/jobs")
SECONDS = 1000
# A busy machine is no fault of the page.
expect.set_options(timeout=30 * SECONDS)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium, as `scripts/check_page` found it."""
    with sync_playwright() as playwright:
        path = os.environ["CHROMIUM"]
        # Containers give a root without a sandbox of Chromium's own.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = playwright.chromium.launch(executable_path=path, args=arguments)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Photographs of one person."""
    return make_demo_photos.make_photos(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def real(sd15_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that really trains, on a tiny base model."""
    folder = tmp_path_factory.mktemp("real")
    models = folder / "models.yaml"
    models.write_text(f"tiny: {{model_url: {sd15_folder}, note: for trials}}\n")
    with warm_jobs(folder) as jobs:
        environment = {**jobs, "TRAINER_BASE_MODELS": str(models), "CUDA_VISIBLE_DEVICES": ""}
        with running_server(folder / "data", environment=environment) as server:
            yield server


@pytest.fixture(scope="session")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose jobs only pretend, two seconds each."""
    sample = {"event": "sample", "step": 0, "number": 0, "prompt": "a cup in the sun"}
    note = {"event": "note", "note": "warning", "field": "rank", "message": "is large"}
    events = [{**sample, "path": "samples/000000/0.png"}, note]
    environment = {
        **fake_jobs_environment(),
        **{"FAKE_SECONDS": "2", "FAKE_EVENTS": json.dumps(events)},
    }
    folder = tmp_path_factory.mktemp("fake")
    with running_server(folder / "data", "--gpus", "cpu", environment=environment) as server:
        yield server


class Visit:
    """A page, and what it asked for and complained of."""

    def __init__(self, page: Page, server: RunningServer) -> None:
        self.page = page
        self.server = server
        self.addresses: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.addresses.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda said: self._hear(said.type, said.text))

    def _hear(self, kind: str, text: str) -> None:
        # What the server refuses is said by the browser itself, too.
        if kind in ("error", "warning") and "the server responded with a status of" not in text:
            self.complaints.append(text)

    def open(self, view: str = "") -> Page:
        """Opens a view of the page."""
        self.page.goto(f"{self.server.url}/{view}")
        self.page.bring_to_front()
        expect(self.page.locator("h1")).to_be_visible()
        return self.page

    def shot(self, name: str) -> None:
        """Keeps what is seen, where that is wanted."""
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)

    def is_its_own(self) -> bool:
        """Whether nothing was asked of others, and nothing went wrong."""
        own = (self.server.url, "blob:", "data:")
        assert [address for address in self.addresses if not address.startswith(own)] == []
        assert self.complaints == []
        return True


Open = Callable[..., Visit]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Opens the browser anew: `visit(server, color_scheme="dark")`."""
    contexts = []

    def opened(server: RunningServer, **settings: Any) -> Visit:
        context = browser.new_context(**{"viewport": WIDE, **settings})
        context.set_default_timeout(30 * SECONDS)
        contexts.append(context)
        return Visit(context.new_page(), server)

    yield opened
    for context in contexts:
        context.close()


def bring(page: Page, photos: list[Path]) -> None:
    """Chooses photographs and waits until they are on the server."""
    page.get_by_label("Drop photographs here").set_input_files([str(path) for path in photos])
    expect(page.get_by_text("on the server")).to_be_visible()


def fill(page: Page, **texts: str) -> None:
    """Types into fields of the main part, each known by its option."""
    for name, text in texts.items():
        field = page.locator(f".field[data-field={name}]").locator("input, textarea")
        field.fill(text)
        field.blur()


def begun(server: RunningServer, name: str) -> str:
    """The id of a training that another program began."""
    headers = {"x-fal-file-name": "a.png"}
    upload = httpx2.post(f"{server.url}/files/upload", content=PIXEL, headers=headers).json()
    body = {"archive": upload["access_url"], "options": {"output_name": name}}
    id: str = httpx2.post(f"{server.url}/trainer/trainings", json=body).json()["id"]
    return id


def state_of(page: Page, state: str, seconds: float = 120) -> None:
    """Waits until the job that is shown stands so."""
    expect(page.locator("h1 + .state")).to_have_text(state, timeout=seconds * SECONDS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_user_goes_from_photographs_to_files_and_pictures(
    visit: Open, real: RunningServer, photos: list[Path], scheme: str
) -> None:
    seen = visit(real, color_scheme=scheme)
    page = seen.open()
    seen.shot(f"{scheme}-1-empty")
    bring(page, photos)
    page.get_by_role("link", name="Go on").click()
    fill(page, model_url="tiny", max_train_steps="30", rank="4", output_name=f"me {scheme}")
    fill(page, validation_prompts="a photograph of TOK\na cup on a table")
    expect(page.get_by_label("Changed options")).to_contain_text("rank: 4")
    seen.shot(f"{scheme}-2-settings")

    page.get_by_role("link", name="Back to the photographs").click()
    page.get_by_role("button", name="Look at what is trained").click()
    expect(page.locator(".prepared > li")).to_have_count(len(photos), timeout=120 * SECONDS)
    expect(page.locator(".prepared .face").first).to_be_attached()
    page.locator(".prepared textarea").first.fill("TOK before a flag")
    page.locator(".prepared textarea").first.blur()
    seen.shot(f"{scheme}-3-prepared")

    page.get_by_role("link", name="Go on").click()
    page.get_by_role("button", name="Start the training").click()
    expect(page.locator("svg.chart")).to_be_visible(timeout=120 * SECONDS)
    seen.shot(f"{scheme}-4-training")
    state_of(page, "done")
    expect(page.get_by_role("link", name="pytorch_lora_weights.safetensors")).to_be_visible()
    expect(page.get_by_text("Passed · diffusers").first).to_be_visible()
    previews = page.get_by_label("Previews", exact=True)
    expect(previews.get_by_role("img")).to_have_count(4)
    report = page.frame_locator("iframe[title='Report of the training']")
    expect(report.get_by_role("heading").first).to_be_attached()
    with page.expect_download() as downloading:
        page.get_by_role("link", name=f"me {scheme}.safetensors").first.click()
    assert downloading.value.path().stat().st_size > 10_000

    page.get_by_label("Strength").fill("0.5")
    fill(page, num_images="2", num_inference_steps="2")
    page.get_by_role("button", name="Make pictures").click()
    expect(page.locator(".trials img")).to_have_count(2, timeout=120 * SECONDS)
    expect(page.locator(".trials").get_by_text("strength 0.5").first).to_be_visible()
    seen.shot(f"{scheme}-5-done")

    id = page.url.rpartition("/")[2]
    told = httpx2.get(f"{real.url}/trainer/jobs/{id}").json()
    assert told["request"]["pictures"][0]["caption"] == "TOK before a flag"
    assert told["options"]["rank"] == 4
    page.get_by_role("link", name="Jobs").click()
    expect(page.get_by_role("link", name=f"me {scheme}")).to_have_count(3)
    seen.shot(f"{scheme}-6-jobs")
    assert seen.is_its_own()


def test_what_cannot_be_read_is_told_with_its_reason(
    visit: Open, real: RunningServer, tmp_path: Path
) -> None:
    (tmp_path / "photos.zip").write_bytes(b"no archive" * 50)
    seen = visit(real)
    page = seen.open()
    bring(page, [tmp_path / "photos.zip"])
    page.get_by_role("link", name="Go on").click()
    fill(page, model_url="tiny", output_name="broken")
    page.get_by_role("button", name="Start the training").click()

    state_of(page, "failed")
    expect(page.get_by_role("alert")).to_contain_text("neither an archive nor a picture")
    seen.shot("light-7-failed")
    assert seen.is_its_own()


def test_everything_is_done_by_keyboard_alone(
    visit: Open, fake: RunningServer, photos: list[Path]
) -> None:
    seen = visit(fake)
    # Choosers are taken from here on: asked for at the moment of the key, one may come before.
    seen.page.on("filechooser", lambda _: None)
    page = seen.open()

    def reach(words: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            name = page.evaluate(
                "() => { const e = document.activeElement; return [e.textContent, e.ariaLabel,"
                " ...[...(e.labels ?? [])].map((l) => l.textContent)].join(' '); }"
            )
            if words in name and page.evaluate("() => document.activeElement !== document.body"):
                assert page.evaluate("() => document.activeElement.matches(':focus-visible')")
                return
        raise AssertionError(f"`{words}` is not reached")

    reach("Skip to the content")
    page.keyboard.press("Enter")
    reach("Drop photographs here")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files([str(path) for path in photos[:2]])
    expect(page.get_by_text("2 photographs on the server")).to_be_visible()
    reach(f"Take out {photos[0].name}")
    page.keyboard.press("Enter")
    expect(page.get_by_text("1 photograph on the server")).to_be_visible()
    reach("Go on: what and how")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="What and how")).to_be_focused()
    reach("A person")
    page.keyboard.press("ArrowDown")
    expect(page.get_by_label("A thing")).to_be_checked()
    reach("Name of the result")
    page.keyboard.press("Control+A")
    page.keyboard.type("by keyboard")
    reach("Every option")
    page.keyboard.press("Enter")
    reach("Find an option")
    page.keyboard.type("snr gamma")
    reach("snr_gamma")
    page.keyboard.type("5")
    reach("Start the training")
    page.keyboard.press("Enter")

    expect(page.get_by_role("heading", name="by keyboard")).to_be_visible()
    state_of(page, "done")
    expect(page.get_by_label("Previews", exact=True).get_by_role("row")).to_have_count(2)
    assert seen.is_its_own()


@pytest.mark.parametrize("size", [NARROW, WIDE], ids=["narrow", "wide"])
def test_no_view_is_wider_than_the_screen(
    visit: Open, fake: RunningServer, photos: list[Path], size: dict[str, int]
) -> None:
    begun(fake, f"at {size['width']}")
    seen = visit(fake, viewport=size)
    page = seen.open()
    bring(page, photos[:3])
    page.get_by_role("button", name="Look at what is trained").click()
    expect(page.locator(".prepared > li")).to_have_count(1)

    for view in VIEWS:
        page.goto(f"{fake.url}/{view}")
        expect(page.locator("h1")).to_be_visible()
        page.wait_for_timeout(800)
        for box in page.locator("details").all():
            if box.is_visible():
                box.evaluate("(e) => { e.open = true; }")
        seen.shot(f"{size['width']}-{view.removeprefix('#/')}")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= size["width"]
        unnamed = "(all) => all.filter((e) => !e.labels?.length && !e.ariaLabel).map((e) => e.id)"
        fields = page.locator("input:visible, select:visible, textarea:visible")
        assert fields.evaluate_all(unnamed) == []
    assert seen.is_its_own()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them(
    visit: Open, fake: RunningServer, scheme: str
) -> None:
    page = visit(fake, color_scheme=scheme).open("#/settings")
    colours = page.evaluate(
        "() => Object.fromEntries(['ink', 'soft', 'accent', 'warm', 'bad', 'good', 'paper', 'card',"
        " 'sunk', 'tint', 'warm-tint', 'bad-tint', 'on-accent'].map((name) => [name,"
        " getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim()]))"
    )
    pairs = [
        *((text, behind) for text in ("ink", "soft", "accent") for behind in ("paper", "card")),
        *[("warm", "warm-tint"), ("bad", "bad-tint"), ("good", "tint"), ("ink", "tint")],
        *[("on-accent", "accent"), ("soft", "sunk"), ("accent", "tint")],
    ]

    # WCAG 2.2, 1.4.3.
    assert {
        pair: round(contrast(colours[pair[0]], colours[pair[1]]), 2)
        for pair in pairs
        if contrast(colours[pair[0]], colours[pair[1]]) < 4.5
    } == {}
    light = luminance(colours["paper"]) > 0.5
    assert light == (scheme == "light")


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance of `#rrggbb`."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, contrast ratio."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_what_is_refused_is_told_at_its_field(
    visit: Open, fake: RunningServer, photos: list[Path]
) -> None:
    seen = visit(fake)
    page = seen.open()
    bring(page, photos[:1])
    page.get_by_role("link", name="Go on").click()
    fill(page, rank="0")
    field = page.locator(".field[data-field=rank]")
    expect(field.locator(".problem")).to_contain_text("at least 1")
    expect(field.locator("input")).to_have_attribute("aria-invalid", "true")

    page.get_by_role("button", name="Start the training").click()
    page.get_by_role("alert").get_by_role("link", name="rank").click()
    expect(field.locator("input")).to_be_focused()
    seen.shot("light-8-refused")
    fill(page, rank="8")
    expect(field.locator(".problem")).to_have_count(0)
    page.locator(".every > summary").click()
    page.get_by_label("Find an option").fill("lr warmup")
    page.get_by_label("lr_warmup_steps").first.fill("many")
    page.get_by_label("lr_warmup_steps").first.blur()
    row = page.locator(".option[data-field=lr_warmup_steps]")
    expect(row.locator(".problem")).to_contain_text("a whole number")
    row.get_by_role("button", name="Take back").click()
    expect(row.locator(".problem")).to_have_count(0)
    assert seen.is_its_own()


def test_a_server_with_keys_is_used_with_one(
    visit: Open, photos: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("right-key\n")
    options = ("--gpus", "cpu", "--key-file", str(tmp_path / "keys"))
    with running_server(tmp_path / "data", *options, environment=fake_jobs_environment()) as server:
        seen = visit(server)
        page = seen.open()
        page.get_by_label("Drop photographs here").set_input_files([str(photos[0])])
        page.get_by_label("Key", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_text("none of the server's keys")).to_be_visible()
        seen.shot("light-9-key")
        page.get_by_label("Key", exact=True).fill("right-key")
        page.keyboard.press("Enter")
        expect(page.get_by_text("on the server")).to_be_visible()
        page.get_by_role("button", name="Look at what is trained").click()

        shown = page.locator(".prepared img").first
        expect(shown).to_have_attribute("src", re.compile("^blob:"))
        expect(shown).to_have_js_property("naturalWidth", 1)
        assert "right-key" not in page.url
        assert seen.is_its_own()


def test_a_lost_server_is_told_and_the_page_goes_on_with_it(
    visit: Open, fake: RunningServer
) -> None:
    seen = visit(fake)
    page = seen.open("#/jobs")
    page.context.set_offline(True)
    expect(page.locator("#connection")).to_contain_text("does not answer")
    page.context.set_offline(False)

    expect(page.locator("#connection")).to_be_hidden()


def test_a_waiting_and_a_running_job_are_cancelled(visit: Open, fake: RunningServer) -> None:
    running, waiting = begun(fake, "one"), begun(fake, "two")
    page = visit(fake).open("#/jobs")
    page.get_by_role("button", name="Take out two").click()
    page.get_by_role("button", name="Stop one").click()

    for id in (running, waiting):
        address = f"{fake.url}/trainer/jobs/{id}"
        wait_for(lambda at=address: httpx2.get(at).json()["state"] == "cancelled", seconds=10)
    expect(page.get_by_text("cancelled").nth(1)).to_be_visible()


def test_nothing_runs_in_a_report_and_previews_come_as_they_are_made(
    visit: Open, fake: RunningServer
) -> None:
    id = begun(fake, "told")
    run = fake.data / "jobs" / id / "run"
    wait_for((run / "events.jsonl").exists)
    (run / "samples/000000").mkdir(parents=True)
    (run / "samples/000000/0.png").write_bytes(PIXEL)
    script = "<script>document.body.textContent = 'it runs'; parent.document.title = 'x'</script>"
    (run / "report.html").write_text(f"<style>p {{ color: red }}</style><p>the end{script}")
    seen = visit(fake)
    page = seen.open(f"#/jobs/{id}")

    expect(page.get_by_role("img", name="a cup in the sun")).to_have_js_property("naturalWidth", 1)
    expect(page.get_by_text("is large")).to_be_visible()
    state_of(page, "done")
    expect(page.locator("iframe")).to_have_attribute("sandbox", "")
    frame = page.frame_locator("iframe")
    expect(frame.get_by_text("the end")).to_have_css("color", "rgb(255, 0, 0)")
    assert page.title().startswith("told")
    assert [said for said in seen.complaints if "sandboxed" not in said] == []


@contextmanager
def elsewhere(body: str) -> Iterator[str]:
    """The address of a page of somebody else's."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_page_of_another_origin_begins_nothing_and_frames_nothing(
    visit: Open, fake: RunningServer
) -> None:
    before = httpx2.get(f"{fake.url}/trainer/jobs").json()["jobs"]
    ask = f"""<iframe src="{fake.url}/"></iframe><script>
    const body = JSON.stringify({{ archive: "https://a.example/a.zip" }});
    const kinds = ["application/json", "text/plain"];
    Promise.allSettled(kinds.map((kind) => fetch("{fake.url}/trainer/trainings", {{
      method: "POST", mode: kind === "text/plain" ? "no-cors" : "cors", body,
      headers: {{ "Content-Type": kind }} }})))
      .then(() => {{ document.title = "asked"; }});
    </script>"""
    with elsewhere(ask) as address:
        page = visit(fake).page
        page.goto(address)
        expect(page).to_have_title("asked")
        page.wait_for_timeout(500)

        assert page.frames[1].locator("#main").count() == 0
    assert httpx2.get(f"{fake.url}/trainer/jobs").json()["jobs"] == before

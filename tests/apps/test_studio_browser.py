"""The studio in a real Chromium: type, draw, keep, download, bring back, compare, read the bundle.

Skipped, with the reason, where no Chromium is installed; `make setup-browser` installs Debian's.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chromium_at_hand import CHROMIUM, needs_chromium

from tiue_export.drawing.picture import parameters_from_png

sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is missing")
expect = sync_api.expect
# Where to leave screenshots of the tabs for people to look at.
SCREENSHOTS = os.environ.get("TIUE_STUDIO_SCREENSHOTS")
PROMPT = "#tiue-prompt textarea"
PICTURES = "#tiue-pictures .grid-container img"
HISTORY = "#tiue-history .grid-container img"
STATUS = "#tiue-status"
# Patience for busy machines; none of this takes long on an idle one.
TIMEOUT_MS = 60_000

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """Where the studio keeps its history."""
    return tmp_path_factory.mktemp("studio") / "kept"


@contextmanager
def started(folder: Path, *arguments: object) -> Iterator[str]:
    """A studio as a user starts it, in a process of its own: its address."""
    command = [sys.executable, "-m", "tiue_export", "studio", *map(str, arguments)]
    options = ["--port", "0", "--out", "kept"]
    with (
        (folder / "stderr").open("w") as errors,
        subprocess.Popen(
            [*command, *options, "--json"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line == "}\n":
                break
        assert lines, (folder / "stderr").read_text()
        try:
            yield json.loads("".join(lines))["url"]
        finally:  # a test that failed must not wait for a studio that nobody stops
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert (folder / "stderr").read_text() == ""


@pytest.fixture(scope="module")
def studio(demo_bundle, kept) -> Iterator[str]:
    """A student's, with two runtimes. Shared."""
    runtimes = ("--runtime", "ort", "--runtime", "openvino")
    with started(kept.parent, demo_bundle.root, *runtimes) as url:
        yield url


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        # Chromium refuses its sandbox to root, which containers run as.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 860), (390, 844)], ids=["desktop", "phone"])
def page(request, chromium, studio):
    """The studio, open at a width."""
    with opened(chromium, studio, *request.param) as page:
        yield page


@contextmanager
def opened(chromium, url: str, width: int, height: int):
    """A page of that size; ends by checking that nothing was fetched from elsewhere."""
    context = chromium.new_context(viewport={"width": width, "height": height})
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    foreign, complaints = [], []
    page.on("request", lambda sent: foreign.append(sent.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
    page.goto(url)
    page.wait_for_selector(PROMPT)
    yield page
    context.close()
    own = (url, url.replace("http:", "ws:"), "data:", "blob:")
    assert [sent for sent in foreign if not sent.startswith(own)] == []
    assert complaints == []


def count_is(page, selector: str, count: int) -> None:
    expect(page.locator(selector)).to_have_count(count, timeout=TIMEOUT_MS)


def picture(page, name: str) -> None:
    """No tab is wider than the screen; a screenshot where one was asked for."""
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"studio-{name}-{width}.png", full_page=True)


def test_a_visitor_draws_keeps_downloads_and_brings_a_picture_back(page, kept, tmp_path):
    # Typing draws by itself; nothing is kept yet.
    # One prompt a width: it is kept once, whoever draws it again.
    ground = {1280: "light blue", 390: "pink"}[page.viewport_size["width"]]
    prompt = f"a fox on a {ground} background"
    before = len(list(kept.glob("*.png")))
    count_is(page, HISTORY, before)
    page.locator(PROMPT).press_sequentially(prompt, delay=20)
    count_is(page, PICTURES, 1)
    expect(page.locator(STATUS)).to_contain_text("1 picture", timeout=TIMEOUT_MS)
    count_is(page, HISTORY, before)

    # Four pictures, kept with Enter.
    page.locator("#tiue-count input[type=number]").fill("4")
    page.locator("#tiue-count input[type=number]").press("Tab")
    count_is(page, PICTURES, 4)
    expect(page.locator(STATUS)).to_contain_text("4 of 4 pictures", timeout=TIMEOUT_MS)
    page.locator(PROMPT).press("Enter")
    count_is(page, HISTORY, before + 4)
    picture(page, "draw")

    # Another seed by key, another runtime by list.
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("]")
    expect(page.locator("#tiue-seed input")).to_have_value("1", timeout=TIMEOUT_MS)
    page.keyboard.press("/")
    expect(page.locator(PROMPT)).to_be_focused()
    page.locator("#tiue-runtime input").click()
    page.get_by_role("option", name="openvino fp32").click()
    expect(page.locator(STATUS)).to_contain_text("openvino cpu fp32", timeout=TIMEOUT_MS)

    # The file that is downloaded tells how it was made.
    with page.expect_download() as download:
        page.locator("#tiue-download").click()
    download.value.save_as(tmp_path / "fox.png")
    parameters = parameters_from_png(tmp_path / "fox.png")
    assert (parameters["prompt"], parameters["seed"]) == (prompt, 1)
    assert parameters["runtime"] == "openvino cpu fp32"

    # Brought back after other work, it fills in the form again.
    page.locator(PROMPT).fill("something else")
    page.locator("#tiue-drop input[type=file]").set_input_files(tmp_path / "fox.png")
    expect(page.locator(PROMPT)).to_have_value(prompt, timeout=TIMEOUT_MS)
    expect(page.locator("#tiue-seed input")).to_have_value("1")
    expect(page.locator("#tiue-note")).to_contain_text("Recovered: seed 1", timeout=TIMEOUT_MS)
    expect(page.locator(STATUS)).to_contain_text("1 picture", timeout=TIMEOUT_MS)

    # A file without parameters is refused in words.
    (tmp_path / "no.png").write_bytes(b"no picture")
    page.locator("#tiue-drop input[type=file]").set_input_files(tmp_path / "no.png")
    expect(page.get_by_text("cannot be read as a PNG")).to_be_visible(timeout=TIMEOUT_MS)

    # The history outlives the page, and opens its pictures again.
    page.reload()
    count_is(page, HISTORY, before + 4)
    page.locator(HISTORY).nth(3).click()  # the newest comes first, and seed 0 was kept first
    expect(page.locator(PROMPT)).to_have_value(prompt, timeout=TIMEOUT_MS)
    expect(page.locator("#tiue-note")).to_contain_text("Recovered: seed 0", timeout=TIMEOUT_MS)
    count_is(page, PICTURES, 1)


def test_guidance_is_asked_for_where_it_is_not_in_the_weights(
    page, chromium, faster_bundle, tiny_bundle, tmp_path
):
    expect(page.locator("#tiue-steering")).to_be_hidden()
    width, height = page.viewport_size.values()
    with (
        started(tmp_path, faster_bundle.root, tiny_bundle.root, "--runtime", "ort") as url,
        opened(chromium, url, width, height) as both,
    ):
        both.locator("#tiue-negative textarea, #tiue-negative input").fill("blue")
        both.locator("#tiue-guidance input").fill("2")
        both.locator(PROMPT).fill("a red fox")
        expect(both.locator(STATUS)).to_contain_text("1 picture", timeout=TIMEOUT_MS)
        both.locator(PROMPT).press("Enter")
        count_is(both, HISTORY, 1)
        picture(both, "guidance")
        (file,) = (tmp_path / "kept").glob("*.png")
        written = parameters_from_png(file)
        assert (written["guidance"], written["negative_prompt"]) == (2.0, "blue")

        # The student among the bundles has no such fields; the picture brings them back.
        both.locator("#tiue-runtime input").click()
        both.get_by_role("option", name="tiny-fp32: ort fp32").click()
        expect(both.locator("#tiue-steering")).to_be_hidden(timeout=TIMEOUT_MS)
        expect(both.locator(STATUS)).to_contain_text("1 picture", timeout=TIMEOUT_MS)
        both.locator("#tiue-drop input[type=file]").set_input_files(file)
        expect(both.locator("#tiue-guidance input")).to_have_value("2", timeout=TIMEOUT_MS)
        expect(both.locator("#tiue-steering")).to_be_visible(timeout=TIMEOUT_MS)

        # What cannot be is said where the picture would be.
        both.locator("#tiue-guidance input").fill("0.5")
        expect(both.locator(STATUS)).to_contain_text("guidance is 0.5", timeout=TIMEOUT_MS)


def test_a_visitor_compares_two_runtimes_and_reads_the_bundle(page):
    page.locator(PROMPT).fill("a panda on a light green background")
    count_is(page, PICTURES, 1)

    # The prompt comes along to the other tab.
    page.keyboard.press("Alt+2")
    expect(page.locator("#tiue-compare-prompt textarea")).to_have_value(
        "a panda on a light green background"
    )
    expect(page.locator("#tiue-right input")).to_have_value(re.compile("openvino"))
    page.locator("#tiue-compare").click()
    report = page.locator("#tiue-report")
    expect(report).to_contain_text("Median of 3 runs", timeout=TIMEOUT_MS)
    expect(report).to_contain_text("passed")
    assert report.locator(".tiue-stage").count() == 5
    expect(page.locator("#tiue-slider img")).to_have_count(2)
    expect(page.locator("#tiue-difference img")).to_be_visible()
    picture(page, "compare")

    # The manifest as a page.
    page.keyboard.press("Alt+3")
    manifest = page.locator("#tiue-manifest")
    for text in ("unet_decoder", "+4.234612", "Parity", "Runtimes here"):
        expect(manifest).to_contain_text(text)
    picture(page, "bundle")

"""`tiue-export web` in a real Chromium: draw, prove, keep, offline, phone, and what goes wrong.

Skipped, with the reason, where Chromium or npm's packages are not at hand.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium_at_hand import CHROMIUM, needs_chromium
from npm_at_hand import npm_files
from PIL import Image

from tiue_export.apps.browser.local_server import LOOPBACK, site_server
from tiue_export.apps.browser.site import SiteText, write_site
from tiue_export.apps.web.listening import bound
from tiue_export.benchmarks.studies.browser_latency import EMULATED_GPU
from tiue_export.bundle.read import Bundle
from tiue_export.drawing.picture import parameters_from_png

sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is missing")
# Where to leave screenshots for people to look at.
SCREENSHOTS = os.environ.get("TIUE_WEB_SCREENSHOTS")
PROMPT, SEED = "a red fox, in the SNOW", 7
TIMEOUT_MS = 120_000

pytestmark = needs_chromium


DRAWS_OFFLINE = "/draws too/.test(document.getElementById('facts').textContent)"


def made_site(bundle: Bundle, folder: Path) -> Path:
    return write_site(bundle, folder, npm_files(), SiteText("Foxes", PROMPT)).root


@pytest.fixture(scope="module")
def site(tiny_bundle, made_once) -> Path:
    """A student's, in one pass. Shared."""
    return made_once("web-site", lambda folder: made_site(tiny_bundle, folder))


@contextmanager
def served(root: Path) -> Iterator[str]:
    """The site as --open serves it; the address."""
    with bound(LOOPBACK, 0) as listener:
        server = site_server(root, listener)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://{LOOPBACK}:{listener.getsockname()[1]}/"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        # Chromium refuses its sandbox to root, which containers run as.
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", *EMULATED_GPU]
        )
        yield browser
        browser.close()


@contextmanager
def opened(chromium: Any, address: str, **context: Any) -> Iterator[Any]:
    """A visitor's first visit; whatever the page throws fails the test."""
    visitor = chromium.new_context(**context)
    visitor.set_default_timeout(TIMEOUT_MS)
    page = visitor.new_page()
    thrown: list[str] = []
    page.on("pageerror", lambda error: thrown.append(str(error)))
    page.goto(address)
    yield page
    visitor.close()
    assert thrown == []


def text_of(page: Any, selector: str) -> str:
    return str(page.locator(selector).inner_text())


def holds(page: Any, condition: str) -> bool:
    """Whether a JavaScript expression holds; while the page is loaded again it does not."""
    try:
        return bool(page.evaluate(condition))
    except sync_api.Error as error:
        if "context was destroyed" in str(error):
            return False
        raise


def wait_until(page: Any, condition: str) -> None:
    """Until a JavaScript expression holds; the page's own policy lets no text be code in it."""
    deadline_s = time.monotonic() + TIMEOUT_MS / 1000
    while not holds(page, condition):
        assert time.monotonic() < deadline_s, f"{condition}: {text_of(page, '#status')}"
        page.wait_for_timeout(100)


def wait_for_picture(page: Any) -> None:
    drawn = "/drawn in/.test(document.getElementById('status').textContent)"
    failed = "!document.getElementById('failure').hidden"
    wait_until(page, f"{drawn} || {failed}")
    assert page.locator("#failure").is_hidden(), text_of(page, "#failure")


def wait_for_failure(page: Any) -> str:
    page.locator("#failure").wait_for(state="visible")
    return text_of(page, "#failure")


def drawn_pixels(page: Any, index: int = 0) -> np.ndarray:
    width, values = page.evaluate(
        """index => {
          const canvas = document.querySelectorAll('#pictures canvas')[index];
          const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
          return [canvas.width, Array.from(data)];
        }""",
        index,
    )
    return np.array(values, np.int16).reshape(-1, width, 4)[..., :3]


def parity_of(page: Any) -> dict[str, tuple[float, float]]:
    """What the button says of each stage: its dB, and those that it has to reach."""
    page.locator("summary").click()
    page.locator("#measure").click()
    page.locator("#parity").wait_for(state="visible")
    rows = page.locator("#parity tbody tr").all()
    cells = [row.locator("td").all_inner_texts() for row in rows]
    return {stage: (float(reached), float(gate)) for stage, reached, gate in cells}


def generated(run: Any, bundle: Bundle, folder: Path, *options: object) -> np.ndarray:
    """What `generate` draws, as pixels."""
    out = folder / "own.png"
    code, _, err = run(
        "generate", bundle.root, PROMPT, "--seed", SEED, "--runtime", "ort", "--device", "cpu",
        "--out", out, *options,
    )  # fmt: skip
    assert code == 0, err
    return np.asarray(Image.open(out).convert("RGB"), np.int16)


def screenshot(page: Any, name: str) -> None:
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png", full_page=True)


# What a visitor sees


def test_a_visit_draws_the_picture_of_generate_and_proves_itself(
    chromium, site, tiny_bundle, run, tmp_path
):
    asked: list[str] = []
    with served(site) as address, opened(chromium, "about:blank") as page:
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{address}?seed={SEED}")
        wait_for_picture(page)
        assert page.title() == "Foxes"
        difference = drawn_pixels(page) - generated(run, tiny_bundle, tmp_path)
        assert np.abs(difference).max() <= 1
        bars = [row.inner_text() for row in page.locator("#times .stage span").all()]
        assert bars == ["text", "UNet", "VAE"]
        parity = parity_of(page)
        assert set(parity) == {"text", "latents", "picture"}
        assert all(reached > gate == 100 for reached, gate in parity.values())
        assert "every stage is as near" in text_of(page, "#status")
        assert "WASM, " in text_of(page, "#facts")
        screenshot(page, "desktop")
    assert asked
    assert {url for url in asked if not url.startswith((address, f"blob:{address}"))} == set()


def test_typing_draws_and_a_click_keeps_a_png_with_its_parameters(chromium, site, tmp_path):
    with served(site) as address, opened(chromium, address) as page:
        wait_for_picture(page)
        page.locator("#prompt").fill("a blue bird")
        page.locator(".picture[title^='a blue bird, seed 0']").wait_for()
        page.locator("#count").fill("3")
        page.locator("#seed").fill("5")
        page.locator("#prompt").press("Control+Enter")
        wait_until(page, "document.querySelectorAll('#pictures canvas').length === 3")
        wait_until(page, "/^3 drawn in/.test(document.getElementById('status').textContent)")
        with page.expect_download() as download:
            page.locator(".picture").nth(2).click()
        kept = tmp_path / download.value.suggested_filename
        download.value.save_as(kept)
        shown = drawn_pixels(page, 2)
        screenshot(page, "three")
    assert kept.name == "a-blue-bird-7.png"
    parameters = parameters_from_png(kept)
    assert (parameters["prompt"], parameters["seed"]) == ("a blue bird", 7)
    assert parameters["runtime"] == "onnxruntime-web wasm"
    assert parameters["model_hash"]
    with Image.open(kept) as image:
        assert "seed: 7" in image.text["parameters"]
        assert np.array_equal(np.asarray(image.convert("RGB"), np.int16), shown)


def test_a_second_visit_needs_no_network(chromium, site):
    with served(site) as address, opened(chromium, address) as page:
        wait_for_picture(page)
        first = drawn_pixels(page)
        page.context.set_offline(True)
        page.reload()
        wait_for_picture(page)
        assert np.array_equal(drawn_pixels(page), first)


def test_a_host_that_sends_no_headers_is_isolated_by_the_page_itself(chromium, site):
    handler = functools.partial(Plain, directory=str(site))
    with ThreadingHTTPServer((LOOPBACK, 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with opened(chromium, f"http://{LOOPBACK}:{server.server_port}/") as page:
            wait_for_picture(page)
            assert page.evaluate("crossOriginIsolated")
        server.shutdown()
        thread.join()


class Plain(SimpleHTTPRequestHandler):
    """Any web server."""

    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}  # noqa: RUF012

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_phone_needs_no_sideways_scrolling(chromium, site):
    phone = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
    with served(site) as address, opened(chromium, address, **phone) as page:
        wait_for_picture(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.locator("#draw").tap()
        wait_for_picture(page)
        screenshot(page, "phone")


# Other plans, and the GPU


def test_steps_with_fresh_noise_are_those_of_generate(chromium, few_step_bundle, run, tmp_path):
    root = made_site(few_step_bundle, tmp_path / "site")
    with served(root) as address, opened(chromium, f"{address}?seed={SEED}") as page:
        wait_for_picture(page)
        own = generated(run, few_step_bundle, tmp_path)
        assert np.abs(drawn_pixels(page) - own).max() <= 1
        assert "in 3 steps" in text_of(page, "#about")
        assert page.locator("#guided").is_hidden()
        parity = parity_of(page)
        assert set(parity) == {"text", "outputs", "picture"}
        assert all(reached > gate == 100 for reached, gate in parity.values())
        assert "every stage is as near" in text_of(page, "#status")


def test_guidance_and_what_shall_not_be_drawn_are_those_of_generate(
    chromium, faster_bundle, run, tmp_path
):
    root = made_site(faster_bundle, tmp_path / "site")
    with served(root) as address, opened(chromium, f"{address}?seed={SEED}") as page:
        wait_for_picture(page)
        page.locator("#negative").fill("snow")
        page.locator("#guidance").fill("2.75")
        page.evaluate("document.getElementById('status').textContent = ''")
        page.locator("#draw").click()
        wait_for_picture(page)
        own = generated(run, faster_bundle, tmp_path, "--negative", "snow", "--guidance", "2.75")
        assert np.abs(drawn_pixels(page) - own).max() <= 1


@pytest.mark.parametrize("browser", ["new", "old"])
def test_half_precision_draws_what_generate_draws(chromium, half_bundle, run, tmp_path, browser):
    root = made_site(half_bundle, tmp_path / "site")
    if browser == "old":
        worker = root / "drawing_worker.js"
        source = worker.read_text("utf-8")
        worker.write_text(f"{source}\ndelete globalThis.Float16Array;\n", "utf-8")
    with served(root) as address, opened(chromium, f"{address}?seed={SEED}") as page:
        wait_for_picture(page)
        difference = drawn_pixels(page) - generated(run, half_bundle, tmp_path)
        assert np.abs(difference).max() <= 3  # ONNX Runtime rounds elsewhere for other processors
        assert np.abs(difference).mean() < 0.5
        parity = parity_of(page)
        assert all(reached > gate == 60 for reached, gate in list(parity.values())[:2])


def test_a_browser_that_computes_something_else_is_told_so(chromium, site, tmp_path):
    root = Path(shutil.copytree(site, tmp_path / "site"))
    described = json.loads((root / "site.json").read_text("utf-8"))
    described["gates_db"]["unet_decoder"] = 400.0
    (root / "site.json").write_text(json.dumps(described), "utf-8")
    with served(root) as address, opened(chromium, address) as page:
        wait_for_picture(page)
        reached, gate = parity_of(page)["latents"]
        assert reached < gate
        assert "computes something else" in text_of(page, "#status")
        assert page.locator("tr.short td").first.inner_text() == "latents"


def test_webgpu_draws_the_same_picture(chromium, site, tiny_bundle, run, tmp_path):
    with (
        served(site) as address,
        opened(chromium, f"{address}?backend=webgpu&seed={SEED}") as page,
    ):
        if not page.evaluate("navigator.gpu && navigator.gpu.requestAdapter().then(Boolean)"):
            pytest.skip("this Chromium has no WebGPU, not even an emulated one")
        wait_for_picture(page)
        page.locator("summary").click()
        assert "WebGPU" in text_of(page, "#facts")
        own = generated(run, tiny_bundle, tmp_path)
        assert np.abs(drawn_pixels(page) - own).max() <= 1


# What goes wrong is told


def test_a_damaged_graph_is_told_by_its_name(chromium, site, tmp_path):
    root = Path(shutil.copytree(site, tmp_path / "site"))
    part = next((root / "bundle/unet_decoder").glob("model.onnx.data.0-*"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with served(root) as address, opened(chromium, address) as page:
        told = wait_for_failure(page)
        assert told.startswith("unet_decoder/model.onnx.data is damaged: its SHA-256 is not")
        assert "Reload the page" in told
        # Mended, a reload draws: the damaged part was not kept.
        shutil.copy(next((site / "bundle/unet_decoder").glob(part.name)), part)
        page.reload()
        wait_for_picture(page)


def test_a_part_that_is_not_there_is_told(chromium, site, tmp_path):
    root = Path(shutil.copytree(site, tmp_path / "site"))
    next((root / "bundle/vae_decoder").glob("model.onnx.data.0-*")).unlink()
    with served(root) as address, opened(chromium, address) as page:
        told = wait_for_failure(page)
    assert "bundle/vae_decoder/model.onnx.data.0-" in told
    assert "is not there (404). Reload the page; if this stays" in told


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        ("site.json", "site.json is not there (404). Reload the page"),
        ("vendor/ort-wasm-simd-threaded.wasm", "What draws cannot be loaded"),
        ("clip_tokenizer.js", "What draws cannot be started"),
        ("vendor/ort.wasm.min.mjs", "ort.wasm.min.mjs"),
    ],
)
def test_a_site_that_was_not_copied_whole_says_so(chromium, site, tmp_path, lost, told):
    root = Path(shutil.copytree(site, tmp_path / "site"))
    (root / lost).unlink()
    with served(root) as address, opened(chromium, address) as page:
        assert told in wait_for_failure(page)


def test_graphs_that_do_not_fit_into_memory_are_told_with_their_size(chromium, site, tmp_path):
    root = Path(shutil.copytree(site, tmp_path / "site"))
    described = json.loads((root / "site.json").read_text("utf-8"))
    described["files"]["unet_encoder/model.onnx.data"]["size_bytes"] = 9 * 10**15
    (root / "site.json").write_text(json.dumps(described), "utf-8")
    with served(root) as address, opened(chromium, address) as page:
        told = wait_for_failure(page)
    assert "unet_encoder/model.onnx.data (9000000.0 GB) does not fit into memory" in told
    assert "--precision fp16" in told


def test_a_large_first_visit_is_asked_for_and_a_second_is_not(chromium, site, tmp_path):
    root = Path(shutil.copytree(site, tmp_path / "site"))
    described = json.loads((root / "site.json").read_text("utf-8"))
    described["unasked_bytes"] = 1000
    (root / "site.json").write_text(json.dumps(described), "utf-8")
    with served(root) as address, opened(chromium, address) as page:
        load = page.locator("#load")
        load.wait_for(state="visible")
        assert load.inner_text() == f"Load {described['total_bytes'] / 1e6:.1f} MB"
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.wait_for_timeout(500)
        assert asked == []
        load.click()
        wait_for_picture(page)
        wait_until(page, DRAWS_OFFLINE)
        page.reload()
        wait_for_picture(page)
        lost = described["files"]["unet_decoder/model.onnx.data"]["parts"][0]
        page.evaluate(
            """async path => {
              for (const name of await caches.keys()) await (await caches.open(name)).delete(path);
            }""",
            lost["path"],
        )
        page.reload()
        load.wait_for(state="visible")
        assert load.inner_text() == f"Load {lost['size_bytes'] / 1e6:.1f} MB"


def test_a_kept_part_that_is_damaged_is_loaded_again(chromium, site):
    with served(site) as address, opened(chromium, address) as page:
        wait_for_picture(page)
        wait_until(page, DRAWS_OFFLINE)
        kept = page.evaluate(
            """async () => {
              const name = (await caches.keys()).find(each => each.endsWith(" parts"));
              const cache = await caches.open(name);
              const requests = await cache.keys();
              // As a host that answers everything with its first page.
              const wrong = () => new Response("<html>".repeat(10000000));
              for (const request of requests.slice(0, 3)) await cache.put(request, wrong());
              return requests.length;
            }"""
        )
        assert kept >= 3
        page.reload()
        wait_for_picture(page)


def test_a_site_replaced_between_two_visits_draws_its_new_bundle(
    chromium, site, half_bundle, tmp_path
):
    root = Path(shutil.copytree(site, tmp_path / "site"))
    with served(root) as address, opened(chromium, address) as page:
        wait_for_picture(page)
        assert "fp32" in page.locator("#facts").text_content()
        shutil.rmtree(root)
        made_site(half_bundle, root)
        page.reload()
        news = "!document.getElementById('news').hidden"
        wait_until(page, f"{news} || /fp16/.test(document.getElementById('facts').textContent)")
        page.reload()
        wait_until(page, "/fp16/.test(document.getElementById('facts').textContent)")
        wait_for_picture(page)


def test_what_is_typed_while_it_measures_is_drawn_after(chromium, site):
    with served(site) as address, opened(chromium, address) as page:
        wait_for_picture(page)
        page.locator("summary").click()
        page.locator("#measure").click()
        page.locator("#prompt").fill("something else")
        page.locator("#parity").wait_for(state="visible")
        page.locator("button[title^='something else']").wait_for()
        assert page.locator("#failure").is_hidden()


def test_in_a_frame_of_another_page_nothing_is_loaded_unasked(chromium, site, tmp_path):
    root = Path(shutil.copytree(site, tmp_path / "site" / "draw")).parent
    (root / "index.html").write_text("<iframe src='draw/'></iframe>", "utf-8")
    with served(root) as address, opened(chromium, "about:blank") as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        frame = page.frame_locator("iframe")
        frame.locator("#load").wait_for(state="visible")
        page.wait_for_timeout(500)
        assert any(url.endswith("draw/page.js") for url in asked)
        assert [url for url in asked if "/bundle/" in url or url.endswith(".wasm")] == []
        frame.locator("#load").click()
        frame.locator("#pictures canvas").wait_for()


def test_a_page_whose_own_scripts_are_not_all_there_says_so(chromium, site, tmp_path):
    root = Path(shutil.copytree(site, tmp_path / "site"))
    (root / "png.js").unlink()
    with served(root) as address, opened(chromium, address) as page:
        wait_until(page, "/cannot start/.test(document.getElementById('status').textContent)")


STOPPED = """
export const env = { wasm: {} };
export class Tensor { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } }
const run = () => {
  Promise.reject(new WebAssembly.RuntimeError("memory access out of bounds"));
  return new Promise(() => {});
};
export const InferenceSession = { create: async () => ({ run }) };
"""


def test_a_runtime_that_stops_without_an_answer_ends_the_drawing(chromium, site, tmp_path):
    root = Path(shutil.copytree(site, tmp_path / "site"))
    (root / "vendor" / "ort.wasm.min.mjs").write_text(STOPPED, "utf-8")
    with served(root) as address, opened(chromium, address) as page:
        told = wait_for_failure(page)
        assert "memory access out of bounds" in told
        assert page.locator("#status").inner_text() == ""
        assert page.locator("#draw").is_enabled()


@pytest.mark.parametrize(
    ("lacking", "named"),
    [
        ("delete globalThis.WebAssembly", "no WebAssembly"),
        ("WebAssembly.validate = () => false", "no SIMD in WebAssembly"),
        ("delete globalThis.Worker", "no web workers"),
    ],
)
def test_an_old_browser_is_told_what_it_lacks(chromium, site, lacking, named):
    with served(site) as address, opened(chromium, "about:blank") as page:
        page.add_init_script(lacking)
        page.goto(address)
        wait_until(page, "/too old/.test(document.getElementById('status').textContent)")
        assert named in text_of(page, "#status")

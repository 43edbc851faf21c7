"""A bundle's page in a browser beside ONNX Runtime on the same cores: time by stage, and memory.

    python -m tiue_export.benchmarks.studies.browser_latency BUNDLE --out record.json

Writes the bundle's site with `tiue-export web`, opens it in a Chromium of this machine, and draws
the same prompts with the same seeds there and by ONNX Runtime with as many threads, in turn. Parity
is what the page's own button says. Needs the package playwright, and npm or `--packages`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tiue_export import Pipeline
from tiue_export.errors import RuntimeFailure, UsageError
from tiue_export.registry.packages import require
from tiue_export.registry.spokes import run_explained
from tiue_export.specs import RuntimeOptions
from tiue_export.system.child_process import child_command
from tiue_export.system.disk_errors import disk_errors
from tiue_export.system.owned_path import temporary_folder

from ..latency.environment import describe_environment

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PROMPT = "a fox on a dark green background"
# The page's words for what ONNX Runtime's stages are here.
STAGES = {
    "text": ("text_encoder",),
    "UNet": ("unet_encoder", "unet_decoder"),
    "VAE": ("vae_decoder",),
}
# WebGPU on a machine without a GPU: slow, and without half precision.
EMULATED_GPU = (
    "--enable-unsafe-swiftshader",
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan",
)
_LOAD_S = _DRAW_S = 1800
_POLL_S = 0.05


@dataclass(frozen=True)
class BrowserLatency:
    """What was measured. Medians by stage; memory is the peak of the tab's and the GPU's process.

    `parity_db` is the page's own comparison with the model in float32.
    """

    bundle: str
    browser: str
    drawn_by: str
    threads: int
    rounds: int
    loaded_in_s: float
    page_ms: dict[str, float]
    ort_ms: dict[str, float]
    parity_db: dict[str, float]
    tab_peak_bytes: int
    gpu_process_peak_bytes: int


def measure(
    bundle: Path, backend: str, rounds: int, browser_path: str, packages: Path | None
) -> BrowserLatency:
    """Draw `rounds` pictures in each, in turn; the first, which warms up, is not counted."""
    require("a page in a browser", ("playwright",), "dev")
    from playwright.sync_api import sync_playwright

    with _site(bundle, packages) as address, sync_playwright() as playwright:
        # Chromium refuses its sandbox to root, which containers run as.
        browser = playwright.chromium.launch(
            executable_path=browser_path, args=["--no-sandbox", *EMULATED_GPU]
        )
        page = browser.new_page()
        start = time.perf_counter()
        page.goto(f"{address}?backend={backend}")
        _wait_for_picture(page, _LOAD_S)
        loaded_in_s = time.perf_counter() - start
        if page.locator("#typing").is_visible():
            page.locator("#typing").uncheck()
        page.locator("summary").click()
        drawn_by = _fact(page, "drawn by")
        found = re.search(r"(\d+) threads?", drawn_by)
        threads = int(found[1]) if found else (os.cpu_count() or 1)
        pipeline = Pipeline.open(bundle, "ort", RuntimeOptions(device="cpu", threads=threads))
        page_ms, ort_ms = defaultdict(list), defaultdict(list)
        for seed in range(rounds + 1):
            prompt = f"{PROMPT} {seed}"  # whose text is known to neither
            in_page, here = _draw(page, prompt, seed), pipeline(prompt, seed=seed).stage_latency_ms
            if seed == 0:
                continue
            for stage, parts in STAGES.items():
                page_ms[stage].append(in_page[stage])
                ort_ms[stage].append(sum(sum(here[part]) for part in parts))
        parity_db = _parity(page)
        tab, gpu = _peak_bytes(browser, "renderer"), _peak_bytes(browser, "GPU")
        return BrowserLatency(
            bundle.name, browser.version, drawn_by, threads, rounds, loaded_in_s,
            _medians(page_ms), _medians(ort_ms), parity_db, tab, gpu,
        )  # fmt: skip


def _medians(values: dict[str, list[float]]) -> dict[str, float]:
    return {stage: statistics.median(timed) for stage, timed in values.items()}


@contextlib.contextmanager
def _site(bundle: Path, packages: Path | None) -> Iterator[str]:
    """The bundle's site as a user opens it; the address."""
    with temporary_folder() as folder:
        command = child_command("tiue_export", "web", str(bundle), "--out", str(folder / "site"))
        command += ["--prompt", PROMPT, "--open", "--port", "0"]
        command += [] if packages is None else ["--packages", str(packages)]
        # BROWSER: the one that --open would start looks on, and ends at once.
        environment = {**os.environ, "BROWSER": "true"}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            try:
                assert process.stdout
                told = (re.search(r"http://\S+/", line) for line in process.stdout)
                address = next(filter(None, told), None)
                if address is None:
                    raise RuntimeFailure("the site was not opened; the reason stands above")
                yield address[0]
            finally:
                process.terminate()


def _wait_for_picture(page: Any, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while "drawn in" not in (told := page.locator("#status").inner_text()):
        if page.locator("#failure").is_visible():
            raise RuntimeFailure(f"the page says: {page.locator('#failure').inner_text()}")
        if page.locator("#load").is_visible():
            page.locator("#load").click()
        if time.monotonic() > deadline:
            raise RuntimeFailure(f"no picture after {timeout_s} s; the page says: {told}")
        page.wait_for_timeout(1e3 * _POLL_S)


def _draw(page: Any, prompt: str, seed: int) -> dict[str, float]:
    """Milliseconds by the page's stages."""
    page.locator("#prompt").fill(prompt)
    page.locator("#seed").fill(str(seed))
    page.evaluate("document.getElementById('status').textContent = ''")
    page.locator("#draw").click()
    _wait_for_picture(page, _DRAW_S)
    stages = page.locator("#times .stage").all()
    return {
        stage.locator("span").inner_text(): _milliseconds(stage.locator("b").inner_text())
        for stage in stages
    }


def _milliseconds(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"ms": 1.0, "s": 1e3}[unit]


def _fact(page: Any, term: str) -> str:
    return str(page.locator(f"#facts dt:text-is('{term}') + dd").inner_text())


def _parity(page: Any) -> dict[str, float]:
    page.set_default_timeout(1e3 * _DRAW_S)
    page.locator("#measure").click()
    page.locator("#parity").wait_for(state="visible")
    rows = page.locator("#parity tbody tr").all()
    cells = [row.locator("td").all_inner_texts() for row in rows]
    return {stage: float(decibels) for stage, decibels, *_ in cells}


def _peak_bytes(browser: Any, kind: str) -> int:
    """The largest resident memory that a process of this kind ever had."""
    session = browser.new_browser_cdp_session()
    listed = session.send("SystemInfo.getProcessInfo")["processInfo"]
    peaks = [0]
    for process in listed:
        if process["type"] == kind:
            status = Path(f"/proc/{process['id']}/status").read_text("utf-8")
            peak = re.search(r"VmHWM:\s+(\d+) kB", status)
            peaks += [int(peak[1]) * 1024] if peak else []
    return max(peaks)


def result_table(result: BrowserLatency) -> Table:
    """Stages, both times, their ratio, and the parity of the page."""
    table = Table(
        title=f"{result.drawn_by}, Chromium {result.browser}, beside ONNX Runtime with "
        f"{result.threads} threads; medians of {result.rounds}, in turn",
        title_justify="left",
    )
    for name in ("stage", "page, ms", "ONNX Runtime, ms", "page / ONNX Runtime", "parity, dB"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    parity = [f"{decibels:.1f}" for decibels in result.parity_db.values()]
    for stage, decibels in zip(STAGES, parity, strict=True):
        here, there = result.page_ms[stage], result.ort_ms[stage]
        table.add_row(stage, f"{here:.0f}", f"{there:.0f}", f"{here / there:.2f}", decibels)
    here, there = sum(result.page_ms.values()), sum(result.ort_ms.values())
    table.add_row("all", f"{here:.0f}", f"{there:.0f}", f"{here / there:.2f}", "")
    table.caption = (
        f"first picture {result.loaded_in_s:.1f} s after the visit began; at most "
        f"{result.tab_peak_bytes / 1e6:.0f} MB in the tab's process, "
        f"{result.gpu_process_peak_bytes / 1e6:.0f} MB in the GPU's"
    )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", choices=("wasm", "webgpu"), default="wasm")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--browser", help="Chromium's program; by default the one on PATH")
    parser.add_argument("--packages", type=Path, help="as `tiue-export web` takes it")
    parser.add_argument("--out", type=Path, help="record to write (.json)")
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        raise UsageError(f"--rounds is {given.rounds}; expected 1 or more")
    browser = given.browser or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UsageError(
            f"no browser: none of {', '.join(BROWSERS)} is on PATH", "Pass --browser PATH."
        )
    environment = describe_environment()
    result = measure(given.bundle, given.backend, given.rounds, browser, given.packages)
    Console(width=None if sys.stdout.isatty() else 120).print(result_table(result))
    if given.out is not None:
        with disk_errors(given.out):
            record = {"environment": asdict(environment), **asdict(result)}
            given.out.write_text(json.dumps(record, indent=1, default=str) + "\n", "utf-8")


if __name__ == "__main__":
    run_explained(main)

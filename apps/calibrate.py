"""`tiue-export calibrate`: capture what real prompts feed the UNet, for quantization."""

from __future__ import annotations

import importlib
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiue_export.bundle.folder import open_bundle, require_one_pass
from tiue_export.errors import UsageError
from tiue_export.registry.packages import require
from tiue_export.specs import RuntimeOptions
from tiue_export.train.prompts import read_prompts

from .report.stages import stage_bar
from .report.tables import console, megabytes, print_json


@dataclass(frozen=True)
class CalibrateRequest:
    """The options of `tiue-export calibrate`."""

    bundle: Path
    out: Path | None = None
    prompts: Path | None = None
    column: str | None = None
    count: int | None = None
    seed: int = 0
    runtime: str = "ort"
    device: str = "auto"
    threads: int | None = None
    dry_run: bool = False
    force: bool = False
    as_json: bool = False


def run(request: CalibrateRequest) -> None:
    """Capture, or go on with a capture that was stopped, and say what there is."""
    capture = importlib.import_module("tiue_export.calibration.capture")
    require("calibration", ("psutil",), "export")
    bundle, prompts = open_bundle(request.bundle), _prompts(request, capture)
    require_one_pass(bundle, "calibrate")
    out = request.out or Path(f"{request.bundle.resolve().name}-calibration")
    count = min(capture.DEFAULT_COUNT, len(prompts)) if request.count is None else request.count
    options = capture.CaptureOptions(
        prompts=tuple(prompts),
        count=count,
        seed=request.seed,
        runtime=request.runtime,
        runtime_options=RuntimeOptions(device=request.device, threads=request.threads),
    )
    capture.check_request(bundle, options)
    if request.dry_run:
        _print_plan(request, out, count, capture.run_bytes(bundle), bundle.manifest.batch or 1)
        return
    from tiue_export.system.memory import PeakMemory

    start = time.perf_counter()
    with stage_bar(quiet=request.as_json) as bar, PeakMemory() as memory:
        bar.expect(1)
        bar.begin("capture")
        data = capture.capture(
            bundle,
            out,
            options,
            force=request.force,
            on_run=lambda done, wanted: bar.within(done / wanted, f"run {done}/{wanted}"),
        )
        seconds = time.perf_counter() - start
    # After the block: the peak is known then.
    if request.as_json:
        print_json(
            {
                "calibration": str(out),
                "sha256": data.sha256,
                "prompts": len(data.index.prompts),
                "runs": data.index.captured_runs,
                "size_bytes": data.index.size_bytes,
                "shards": len(data.index.shards),
                "seconds": round(seconds, 2),
                "peak_memory_bytes": memory.peak_bytes,
            }
        )
        return
    size = megabytes(data.index.size_bytes)
    console.print(
        f"{out}: {len(data.index.prompts)} prompts, {size} in {len(data.index.shards)} shard(s); "
        f"{seconds:.0f} s, peak memory {megabytes(memory.peak_bytes)}",
        markup=False,
    )
    quoted = f"{shlex.quote(str(request.bundle))} --calibration {shlex.quote(str(out))}"
    console.print(f"next:  tiue-export quantize {quoted}", markup=False)


def _prompts(request: CalibrateRequest, capture: Any) -> list[str]:
    if request.prompts is None:
        if request.column is not None:
            raise UsageError("--column names a field of --prompts, which was not given")
        shipped: list[str] = capture.shipped_prompts()
        return shipped
    return read_prompts(request.prompts, request.column)


def _print_plan(
    request: CalibrateRequest, out: Path, count: int, run_bytes: int, batch: int
) -> None:
    runs = -(-count // batch)
    facts = {"calibration": str(out), "prompts": count, "runs": runs}
    if request.as_json:
        print_json({**facts, "size_bytes": runs * run_bytes})
        return
    console.print(
        f"{out}: {count} prompts in {runs} runs, {megabytes(runs * run_bytes)} (nothing was "
        "written)",
        markup=False,
    )

"""`tiue-export calibrate`: capture what real prompts feed the UNet, for quantization."""

from __future__ import annotations

import time
from pathlib import Path

from tiue_export.bundle.read import open_bundle
from tiue_export.errors import UsageError
from tiue_export.proof.calibration import CaptureOptions, CapturePlan
from tiue_export.registry.packages import require
from tiue_export.registry.spokes import capture, plan_capture
from tiue_export.registry.support import require_support
from tiue_export.specs import RuntimeOptions
from tiue_export.system.command_line import command_line
from tiue_export.train.prompts import read_prompts

from .options.calibrate import CalibrateRequest
from .options.group import picked
from .report.next_line import print_next
from .report.stages import stage_bar
from .report.tables import console, megabytes, print_json


def run(request: CalibrateRequest) -> None:
    """Capture, or go on with a capture that was stopped, and say what there is."""
    require("calibration", ("psutil",), "export")
    request.check_runtime()
    bundle, prompts = open_bundle(request.bundle), _prompts(request)
    require_support("calibrate", bundle)
    out = request.out or Path(f"{request.bundle.resolve().name}-calibration")
    runtime_options = picked(RuntimeOptions, request)
    options = picked(CaptureOptions, request, prompts=prompts, runtime_options=runtime_options)
    plan = plan_capture(bundle, options)
    if request.dry_run:
        _print_plan(request, out, plan)
        return
    from tiue_export.system.memory import PeakMemory

    start = time.perf_counter()
    with stage_bar(quiet=request.as_json) as bar, PeakMemory() as memory:
        bar.expect(1)
        bar.begin("capture")
        data = capture(
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
    print_next(command_line("quantize", request.bundle, "--calibration", out))


def _prompts(request: CalibrateRequest) -> tuple[str, ...] | None:
    """Those of `--prompts`; None for the list that comes with the program."""
    if request.prompts is None:
        if request.column is not None:
            raise UsageError("--column names a field of --prompts, which was not given")
        return None
    return tuple(read_prompts(request.prompts, request.column))


def _print_plan(request: CalibrateRequest, out: Path, plan: CapturePlan) -> None:
    if request.as_json:
        print_json(
            {
                "calibration": str(out),
                "prompts": len(plan.prompts),
                "runs": plan.runs,
                "size_bytes": plan.size_bytes,
            }
        )
        return
    console.print(
        f"{out}: {len(plan.prompts)} prompts in {plan.runs} runs, {megabytes(plan.size_bytes)} "
        "(nothing was written)",
        markup=False,
    )

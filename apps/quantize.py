"""`tiue-export quantize`: int8 where it is proven to be close enough and faster."""

from __future__ import annotations

import dataclasses
import importlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from tiue_export.bundle.folder import check_target, open_bundle, require_one_pass
from tiue_export.errors import UsageError
from tiue_export.proof.calibration import open_calibration
from tiue_export.proof.quantization_plan import read_plan
from tiue_export.system.atomic_file import write_atomically
from tiue_export.system.progress import StageReport

from .report.next_line import draw_line
from .report.stages import stage_bar
from .report.tables import console, megabytes, print_json

_PACKAGE = "tiue_export.calibration"
_KIND = "w8a8"
# Sets of layers that --plots has measured beside those the search needs: a curve, not a point.
_CURVE_SETS = 6
_NO_SENSITIVITY = "--plots needs a sensitivity, which this plan does not have"


@dataclass(frozen=True)
class QuantizeRequest:
    """The options of `tiue-export quantize`; None means the default of what it is passed to."""

    bundle: Path
    calibration: Path
    out: Path | None = None
    kind: str | None = None
    backend: str = "onnx"
    target_psnr: float | None = None
    ranges: str | None = None
    percentile: float | None = None
    smooth: float | None = None
    no_smooth: bool = False
    sensitivity: str | None = None
    plan: Path | None = None
    scales: str = "auto"
    held_out: int | None = None
    runtime: str | None = None
    precision: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    low_memory: bool = False
    rounds: int | None = None
    any_speed: bool = False
    allow_parity_loss: bool = False
    allow_slower: bool = False
    plots: Path | None = None
    save_plan: Path | None = None
    plan_only: bool = False
    force: bool = False
    as_json: bool = False


def run(request: QuantizeRequest) -> None:
    """Plan, write, judge; print what was gained and what was lost."""
    quantizer = importlib.import_module(f"{_PACKAGE}.quantize")
    options = _options(request, quantizer)
    bundle = open_bundle(request.bundle)
    require_one_pass(bundle, "quantize")
    out = request.out or Path(f"{request.bundle.resolve().name}-{request.kind or _KIND}")
    if not request.plan_only:
        check_target(out, force=request.force)
    data = open_calibration(request.calibration, bundle)
    start = time.perf_counter()
    reports: list[StageReport] = []
    with stage_bar(quiet=request.as_json) as bar:
        observer = bar.observer(reports)
        if request.plan_only:
            analysis = quantizer.make_plan(bundle, data, options, observer)
            plan = analysis.plan
            curve = analysis.selection.points if analysis.selection else []
            made = None
        else:
            made = quantizer.quantize(
                bundle,
                data,
                out,
                options,
                force=request.force,
                observer=observer,
            )
            plan, curve = made.plan, made.curve
    pictures = _pictures(request, plan, curve)
    if request.save_plan is not None:
        write_atomically(request.save_plan, plan.to_json().encode())
    seconds = round(time.perf_counter() - start, 2)
    if request.as_json:
        print_json(_facts(request, out, plan, curve, made, reports, pictures, seconds))
        return
    _print(request, out, plan, made, pictures, seconds)


def _options(request: QuantizeRequest, quantizer: Any) -> Any:
    histogram = importlib.import_module(f"{_PACKAGE}.histogram")
    analysis = importlib.import_module(f"{_PACKAGE}.analysis")
    verdict = importlib.import_module(f"{_PACKAGE}.verdict")
    _refuse_beside_plan(request)
    _refuse_plots_of_nothing(request)
    ranges = request.ranges or "percentile"
    if request.percentile is not None and ranges != "percentile":
        raise UsageError(f"--percentile belongs to --ranges percentile, not {ranges}")
    if request.smooth is not None and request.no_smooth:
        raise UsageError("--smooth and --no-smooth contradict each other", "Leave one out.")
    given: dict[str, float | int | None] = {
        "target_psnr_db": request.target_psnr,
        "held_out": request.held_out,
        "smoothing_alpha": request.smooth,
    }
    chosen: dict[str, float | int | None] = {
        name: value for name, value in given.items() if value is not None
    }
    if request.no_smooth:
        chosen["smoothing_alpha"] = None
    if request.held_out is not None:
        chosen["probed"] = min(request.held_out, analysis.AnalysisOptions().probed)
    method: dict[str, str | float] = {"name": ranges}
    if request.percentile is not None:
        method["percentile"] = request.percentile
    runtime = request.runtime or ("openvino" if request.backend == "openvino" else "ort")
    judged = {"rounds": request.rounds} if request.rounds is not None else {}
    return quantizer.QuantizeOptions(
        kind=request.kind or _KIND,
        backend=request.backend,
        analysis=analysis.AnalysisOptions(
            ranges=histogram.RangeMethod(**method),
            sensitivity=request.sensitivity or "layer",
            threads=request.threads,
            curve_sets=0 if request.plots is None else _CURVE_SETS,
            **chosen,
        ),
        judged=verdict.VerdictOptions(
            runtime=runtime,
            precision=request.precision,
            device=request.device,
            threads=request.threads,
            low_memory=request.low_memory,
            **judged,
        ),
        plan=request.plan,
        scales=request.scales,
        any_speed=request.any_speed,
        allow_loss=request.allow_parity_loss,
        allow_slower=request.allow_slower,
    )


def _refuse_beside_plan(request: QuantizeRequest) -> None:
    """A plan says of each layer what it becomes, and with which range: nothing else may."""
    if request.plan is None:
        return
    given = {
        # NNCF takes the layers from the plan, and from the kind what becomes of linear ones.
        "--kind": None if request.backend == "openvino" else request.kind,
        "--target-psnr": request.target_psnr,
        "--ranges": request.ranges,
        "--percentile": request.percentile,
        "--smooth": request.smooth,
        "--no-smooth": request.no_smooth or None,
        "--sensitivity": request.sensitivity,
    }
    for option, value in given.items():
        if value is not None:
            raise UsageError(
                f"{option} has no say beside --plan: {request.plan} decides for every layer",
                f"Leave {option} out, edit the plan, or leave --plan out to make another.",
            )


def _refuse_plots_of_nothing(request: QuantizeRequest) -> None:
    """Pictures show what single layers cost, which not every recipe measures."""
    if request.plots is None:
        return
    if request.plan is not None:
        if all(layer.psnr_db is None for layer in read_plan(request.plan).layers):
            raise UsageError(_NO_SENSITIVITY, "Leave --plots out.")
        return
    if request.sensitivity == "none":
        raise UsageError(_NO_SENSITIVITY, "Leave out --sensitivity none.")
    if request.kind in ("int8-weights", "4-bit"):
        raise UsageError(
            f"--plots shows what single layers cost; --kind {request.kind} measures none",
            "Leave --plots out.",
        )


def _pictures(request: QuantizeRequest, plan: Any, curve: Any) -> list[str]:
    if request.plots is None:
        return []
    plots = importlib.import_module(f"{_PACKAGE}.plots")
    made = [plots.plot_sensitivity(plan, request.plots / "sensitivity.png")]
    if curve:
        made.append(plots.plot_curve(plan, curve, request.plots / "int8-share.png"))
    return [str(path) for path in made]


def _facts(
    request: QuantizeRequest,
    out: Path,
    plan: Any,
    curve: Any,
    made: Any,
    reports: list[StageReport],
    pictures: list[str],
    seconds: float,
) -> dict[str, object]:
    modes = [layer.mode for layer in plan.layers]
    facts: dict[str, object] = {
        "bundle": None if made is None else str(out),
        "layers": {mode: modes.count(mode) for mode in dict.fromkeys(modes)},
        "int8_share": round(plan.int8_share, 4),
        "curve": [dataclasses.asdict(point) for point in curve],
        "plots": pictures,
        "stages": [dataclasses.asdict(report) for report in reports],
        "seconds": seconds,
    }
    if made is None:
        facts["plan"] = dataclasses.asdict(plan)
    else:
        facts["verdict"] = made.verdict.to_data()
    return facts


def _print(
    request: QuantizeRequest, out: Path, plan: Any, made: Any, pictures: list[str], seconds: float
) -> None:
    console.print(_plan_table(plan))
    for picture in pictures:
        console.print(f"picture: {picture}", markup=False)
    if made is None:
        console.print(f"A plan of {len(plan.layers)} layers in {seconds:.0f} s; no bundle written.")
        return
    console.print(_verdict_table(made.verdict))
    verdict = made.verdict
    if not verdict.accurate:
        console.print("[bold yellow]Below its gate, and allowed; the manifest says so.[/]")
    if not verdict.worth_it:
        console.print(f"[bold yellow]Not {verdict.must_be} here, and allowed.[/]")
    console.print(
        f"[bold green]{escape(str(out))}[/]: {verdict.speed_ratio:.2f}x the speed on "
        f"{escape(verdict.runtime)}, {verdict.latents_psnr_db:.1f} dB, in {seconds:.0f} s",
        highlight=False,
    )
    runtime = verdict.runtime.partition(" ")[0]
    console.print(f"next:  {draw_line(made.bundle, f'--runtime {runtime}')}", markup=False)


def _plan_table(plan: Any) -> Table:
    title = f"{plan.int8_share:.0%} of the UNet's operations in int8, ranges by {plan.ranges}"
    table = Table(title=title, title_justify="left", title_style="bold")
    for column, justify in (("what", "left"), ("layers", "right"), ("of operations", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    groups: dict[tuple[str, str], list[int]] = {}
    for layer in plan.layers:
        groups.setdefault((layer.mode, layer.why), []).append(layer.flops)
    for (mode, why), flops in groups.items():
        share = f"{sum(flops) / plan.total_flops:.1%}"
        table.add_row(escape(f"{mode}: {why}"), str(len(flops)), share)
    return table


def _verdict_table(verdict: Any) -> Table:
    title = f"Side by side on {verdict.runtime}, {verdict.inputs}"
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    table.add_column("")
    for column in ("UNet ms", "size", "PSNR dB", "gate"):
        table.add_column(column, justify="right")
    for name, times in verdict.latency_ms.items():
        own = name == "quantized"
        size = verdict.size_bytes["quantized" if own else "float"]
        psnr = f"{verdict.latents_psnr_db:.1f}" if own else "-"
        gate = f"{verdict.gate_psnr_db:.0f}" if own else "-"
        table.add_row(escape(name), f"{times['unet']:.1f}", megabytes(size), psnr, gate)
    return table

"""`tiue-export quantize`: int8 where it is proven to be close enough and faster."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TypeVar

from rich.markup import escape
from rich.table import Table

from tiue_export.bundle.read import open_bundle
from tiue_export.bundle.write import check_target
from tiue_export.errors import UsageError
from tiue_export.proof.calibration import open_calibration
from tiue_export.proof.quantization import (
    CONTENDER,
    OPENVINO,
    AnalysisOptions,
    MeasuredPlan,
    Quantized,
    QuantizeOptions,
    RangeMethod,
    Verdict,
    VerdictOptions,
)
from tiue_export.proof.quantization_plan import QuantizationPlan, read_plan
from tiue_export.registry.spokes import check_quantize, make_plan, quantize, save_quantization_plots
from tiue_export.specs import TEXT_ENCODER, UNET_DECODER, VAE_DECODER
from tiue_export.system.atomic_file import write_atomically
from tiue_export.system.progress import StageReport

from .options.group import given, picked
from .options.quantize import QuantizeRequest
from .report.next_line import draw_line, print_next
from .report.stages import stage_bar
from .report.tables import console, megabytes, numbers, print_json, titled

T = TypeVar("T")
_KIND = "w8a8"
_OWNERS = {TEXT_ENCODER: "text encoder", UNET_DECODER: "UNet", VAE_DECODER: "VAE"}
# Of the times in a verdict those that are shown.
_TIMED = {TEXT_ENCODER: "text", "unet": "UNet", VAE_DECODER: "VAE"}
# What a plan decides.
_OF_A_PLAN = [
    "kind",
    "parts",
    "target_psnr",
    "ranges",
    "percentile",
    "smooth",
    "no_smooth",
    "sensitivity",
]
# Sets of layers that --plots has measured beside those the search needs: a curve, not a point.
_CURVE_SETS = 6
_NO_SENSITIVITY = "--plots needs a sensitivity, which this plan does not have"


def run(request: QuantizeRequest) -> None:
    """Plan, write, judge; print what was gained and what was lost."""
    options = _options(request)
    bundle = open_bundle(request.bundle)
    check_quantize(bundle, options)
    out = request.out or Path(f"{request.bundle.resolve().name}-{request.kind or _KIND}")
    if not request.plan_only:
        check_target(out, force=request.force)
    data = open_calibration(request.calibration, bundle)
    start = time.perf_counter()
    reports: list[StageReport] = []
    made: Quantized | None = None
    with stage_bar(quiet=request.as_json) as bar:
        observer = bar.observer(reports)
        if request.plan_only:
            measured = make_plan(bundle, data, options, observer)
        else:
            made = quantize(bundle, data, out, options, force=request.force, observer=observer)
            measured = MeasuredPlan(made.plan, made.curve)
    pictures: list[Path] = []
    if request.plots is not None:
        pictures = save_quantization_plots(measured.plan, measured.curve, request.plots)
    if request.save_plan is not None:
        write_atomically(request.save_plan, measured.plan.to_json().encode())
    seconds = round(time.perf_counter() - start, 2)
    if request.as_json:
        facts = {
            "bundle": None if made is None else str(out),
            **_plan_facts(measured),
            "plots": [str(path) for path in pictures],
            "stages": [dataclasses.asdict(report) for report in reports],
            "seconds": seconds,
        }
        if made is None:
            print_json({**facts, "plan": dataclasses.asdict(measured.plan)})
        else:
            print_json({**facts, "verdict": made.verdict.to_data()})
        return
    _print(measured.plan, made, pictures, seconds)


def _options(request: QuantizeRequest) -> QuantizeOptions:
    _refuse_beside_plan(request)
    _refuse_plots_of_nothing(request)
    if request.percentile is not None and request.ranges not in (None, "percentile"):
        raise UsageError(f"--percentile belongs to --ranges percentile, not {request.ranges}")
    if request.smooth is not None and request.no_smooth:
        raise UsageError("--smooth and --no-smooth contradict each other", "Leave one out.")
    usual = AnalysisOptions()
    smoothing = _given(request.smooth, usual.smoothing_alpha)
    analysis = picked(
        AnalysisOptions,
        request,
        kind=usual.kind,
        ranges=picked(RangeMethod, request, name=_given(request.ranges, usual.ranges.name)),
        smoothing_alpha=None if request.no_smooth else smoothing,
        target_psnr_db=_given(request.target_psnr, usual.target_psnr_db),
        probed=min(_given(request.held_out, usual.held_out), usual.probed),
        curve_sets=0 if request.plots is None else _CURVE_SETS,
    )
    runtime = request.runtime or ("openvino" if request.backend == OPENVINO else "ort")
    judged = picked(VerdictOptions, request, runtime=runtime)
    return picked(
        QuantizeOptions,
        request,
        parts=tuple(dict.fromkeys(filter(None, map(str.strip, request.parts.split(","))))),
        analysis=analysis,
        judged=judged,
        allow_loss=request.allow_parity_loss,
    )


def _given(value: T | None, usual: T) -> T:
    return usual if value is None else value


def _refuse_beside_plan(request: QuantizeRequest) -> None:
    """A plan says of each layer what it becomes, and with which range: nothing else may."""
    if request.plan is None:
        return
    # NNCF takes the layers from the plan, and from the kind what becomes of linear ones.
    usable = ("kind",) if request.backend == OPENVINO else ()
    for option in given(request, only=_OF_A_PLAN, usable=usable):
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


def _plan_facts(measured: MeasuredPlan) -> dict[str, object]:
    modes = [layer.mode for layer in measured.plan.layers]
    return {
        "layers": {mode: modes.count(mode) for mode in dict.fromkeys(modes)},
        "int8_share": round(measured.plan.int8_share, 4),
        "curve": [dataclasses.asdict(point) for point in measured.curve],
    }


def _print(
    plan: QuantizationPlan, made: Quantized | None, pictures: list[Path], seconds: float
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
        f"[bold green]{escape(str(made.bundle.root))}[/]: {verdict.speed_ratio:.2f}x the speed on "
        f"{escape(verdict.runtime)}, {verdict.latents_psnr_db:.1f} dB, in {seconds:.0f} s",
        highlight=False,
    )
    runtime = verdict.runtime.partition(" ")[0]
    print_next(draw_line(made.bundle, f"--runtime {runtime}"))


def _plan_table(plan: QuantizationPlan) -> Table:
    graphs = {layer.graph for layer in plan.layers}
    whose = ", ".join(name for graph, name in _OWNERS.items() if graph in graphs)
    title = f"{plan.int8_share:.0%} of the operations in int8 ({whose}), ranges by {plan.ranges}"
    table = titled(title, "what", *numbers("layers", "of operations"))
    groups: dict[tuple[str, str], list[int]] = {}
    for layer in plan.layers:
        groups.setdefault((layer.mode, layer.why), []).append(layer.flops)
    for (mode, why), flops in groups.items():
        share = f"{sum(flops) / plan.total_flops:.1%}"
        table.add_row(f"{mode}: {why}", str(len(flops)), share)
    return table


def _verdict_table(verdict: Verdict) -> Table:
    title = f"Side by side on {verdict.runtime}, {verdict.inputs}; {verdict.loading}"
    timed = {
        key: f"{name} ms" for key, name in _TIMED.items() if key in verdict.latency_ms[CONTENDER]
    }
    losses = [("latents", verdict.latents_psnr_db, verdict.gate_psnr_db)]
    if (pictures := verdict.pictures) is not None:
        losses.append(("pictures", pictures.psnr_db, pictures.gate_psnr_db))
    table = titled(
        title, "", *numbers(*timed.values(), "size", *(f"{what}, dB (gate)" for what, *_ in losses))
    )
    for name, times in verdict.latency_ms.items():
        own = name == CONTENDER
        size = verdict.size_bytes[name if own else "float"]
        told = [f"{psnr_db:.1f} ({gate_db:.0f})" if own else "-" for _, psnr_db, gate_db in losses]
        table.add_row(name, *(f"{times[key]:.1f}" for key in timed), megabytes(size), *told)
    return table

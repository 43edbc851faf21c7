"""How time and memory grow with K, batch, size, threads, or the rows of one decoder run.

    python -m tiue_export.benchmarks.studies.scaling --ckpt X --runtime openvino --precision bf16 \\
        --axis steps=2,4,8,16 --axis batch=1,2,4 --axis size=256,512,768 --axis threads=1,2 \\
        --out scaling.json --plot scaling.png
    python -m tiue_export.benchmarks.studies.scaling --bundle fd --axis rows=2,10,30 --out rows.json

One point differs from the others of its axis in one thing. All are measured in turn, as the
contenders of `tiue-export bench` are, and the record is one of its records: two can be compared.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from tiue_export.bundle.read import Bundle, open_bundle
from tiue_export.drawing.pipeline import replanned
from tiue_export.errors import UsageError, unknown_name
from tiue_export.proof.latency_record import (
    UNET,
    Measurement,
    Record,
    Settings,
    read_record,
    to_json,
    write_text,
)
from tiue_export.proof.latency_request import ContenderRequest, LatencyOutputs, LatencyPlan
from tiue_export.registry.spokes import run_explained
from tiue_export.sampling.plan_change import PlanChange
from tiue_export.specs import NEAREST, SUBPIXEL, UNET_DECODER, UNET_ENCODER

from ..figure import check_plot, new_figure, save_figure
from ..latency.bench import check_settings, measure_contenders
from ..latency.contenders import Contender
from ..latency.environment import describe_environment
from ..latency.loop_session import loop_runs, plan_of
from ..latency.made_bundle import MadeBundle
from ..latency.report import rich_table
from ..latency.settings import GraphSettings, LoopSettings, TorchSettings
from ..latency.summary import peak_share, spreads, summarized

_TITLES: Mapping[str, str] = {
    "steps": "decoder rows K",
    "batch": "pictures per run",
    "size": "picture side, px",
    "threads": "CPU threads",
    "rows": "rows of one decoder run at most",
}
AXES = tuple(_TITLES)
_OF_CHECKPOINTS, _OF_BUNDLES = AXES[:4], AXES[3:]
_PLANNED = "planned"  # what a bundle with a plan is called in place of a variant


@dataclass(frozen=True)
class Variant:
    """A form of the decoder, with its place in the picture."""

    hoist: str
    merge_below: float
    colour: str
    marker: str
    upsampling: str = SUBPIXEL


VARIANTS: Mapping[str, Variant] = {
    "naive": Variant("none", 0.0, "#555555", "s", NEAREST),
    "hoisted": Variant("decoder", 0.0, "#0072B2", "o"),
    "merged": Variant("decoder", 0.02, "#D55E00", "^"),
}
_DRAWN = {**VARIANTS, _PLANNED: Variant("decoder", 0.0, "#0072B2", "o")}


@dataclass(frozen=True)
class Sweep:
    """What is varied, and on what: a `checkpoint`, or a `bundle` with a plan (axis "rows")."""

    checkpoint: str | None
    base: str | None
    runtime: str
    precision: str
    axes: tuple[tuple[str, tuple[int, ...]], ...]
    variants: tuple[str, ...]
    threads: int | None = None
    bundle: Bundle | None = None


def contenders(sweep: Sweep) -> list[Contender]:
    """One for each point of each axis and each variant: "steps=4/hoisted/ort/fp32".

    Raises `UsageError` for a student's bundle, and for fewer rows than a step has.
    """
    variants = ("naive",) if sweep.runtime == "torch" else sweep.variants
    if sweep.bundle is not None:
        variants = (_PLANNED,)
    return [
        _contender(sweep, axis, value, variant)
        for axis, values in sweep.axes
        for value in values
        for variant in variants
    ]


def parse_axis(text: str) -> tuple[str, tuple[int, ...]]:
    """ "steps=2,4,8" -> ("steps", (2, 4, 8))."""
    axis, _, listed = text.partition("=")
    if axis not in AXES:
        raise unknown_name("axis", axis, AXES)
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", listed):
        raise UsageError(f"--axis is {text!r}; expected numbers, such as {axis}=1,2,4")
    return axis, tuple(int(value) for value in listed.split(","))


def _contender(sweep: Sweep, axis: str, value: int, variant: str) -> Contender:
    name = f"{axis}={value}/{variant}/{sweep.runtime}/{sweep.precision}"
    what = f"{variant} UNet at {_TITLES[axis]} = {value}"
    threads = value if axis == "threads" else sweep.threads
    alone: dict[str, Any] = {"threads": threads, "unet_only": True}
    precision = sweep.precision if sweep.runtime == "openvino" else "auto"
    on_graphs: dict[str, Any] = {"runtime": sweep.runtime, "precision": precision, **alone}
    if sweep.bundle is not None:
        rows = value if axis == "rows" else None
        plan = plan_of(replanned(sweep.bundle, PlanChange(max_decoder_rows=rows)))
        loop_runs(plan, "plan", sweep.bundle.manifest.batch or 1)  # raises for too few rows
        bundle = str(sweep.bundle.root)
        planned = LoopSettings(bundle=bundle, loop="plan", max_decoder_rows=rows, **on_graphs)
        return Contender(name, what, planned)
    shapes = {"size": {"height": value, "width": value}, "threads": {}}
    model: dict[str, Any] = {"checkpoint": sweep.checkpoint, "base": sweep.base}
    model |= shapes.get(axis, {axis: value})
    if sweep.runtime == "torch":
        return Contender(name, what, TorchSettings(precision=sweep.precision, **model, **alone))
    graphs = MadeBundle(
        hoist=VARIANTS[variant].hoist,
        upsampling=VARIANTS[variant].upsampling,
        merge_below=VARIANTS[variant].merge_below,
        unet_only=True,
        forms=("openvino",) if sweep.runtime == "openvino" else (),
        **model,
    )
    return Contender(name, what, GraphSettings(bundle=None, **on_graphs), {"bundle": graphs})


# Measured points of one axis by variant, as (value, row) in the order of the values.
_Lines = Mapping[str, Sequence[tuple[int, Measurement]]]


def plot_scaling(record: Record, path: Path) -> None:
    """Draw `path`: a column for each axis; time, memory, what hoisting and merging bring, and
    how near each graph comes to the machine's measured peak where the record has that."""
    axes = _lines_by_axis(record)
    drawings: dict[str, Callable[[Any, _Lines], None]] = {
        "UNet, seconds": _draw_time,
        "peak memory, GB": _draw_memory,
    }
    if any("naive" in lines for lines in axes.values()):
        drawings["time / naive (dotted: operations)"] = _draw_gain
    if record.ceilings:
        drawings["share of the peak (dashed: encoder)"] = partial(_draw_share, record)
    columns, rows = max(1, len(axes)), len(drawings)
    figure = new_figure((1 + 3.4 * columns, 0.5 + 2.5 * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    for column, (axis, lines) in zip(grid.T, axes.items(), strict=False):
        for panel, draw in zip(column, drawings.values(), strict=True):
            draw(panel, lines)
            _dress(panel, sorted({value for line in lines.values() for value, _ in line}))
        column[-1].set_xlabel(_TITLES[axis], fontsize=9)
    for row, title in zip(grid, drawings, strict=True):
        row[0].set_ylabel(title, fontsize=9)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    save_figure(figure, path)


def _lines_by_axis(record: Record) -> dict[str, _Lines]:
    found: dict[str, dict[str, list[tuple[int, Measurement]]]] = {}
    for entry in record.contenders:
        parts = re.match(r"(\w+)=(\d+)/(\w+)/", entry.name)
        if parts is not None and entry.measured:
            axis, value, variant = parts.groups()
            found.setdefault(axis, {}).setdefault(variant, []).append((int(value), entry))
    return {
        axis: {
            variant: sorted(found[axis][variant], key=lambda point: point[0])
            for variant in _DRAWN
            if variant in found[axis]
        }
        for axis in AXES
        if axis in found
    }


def _seconds(entry: Measurement) -> float:
    return spreads(entry)[UNET].median_ms / 1e3


def _draw_time(panel: Any, lines: _Lines) -> None:
    for name, line in lines.items():
        times = [spreads(entry)[UNET] for _, entry in line]
        low, middle, high = np.array([[s.p10_ms, s.median_ms, s.p90_ms] for s in times]).T / 1e3
        look = {"color": _DRAWN[name].colour, "marker": _DRAWN[name].marker, "capsize": 2}
        spans = [middle - low, high - middle]
        panel.errorbar([value for value, _ in line], middle, yerr=spans, label=name, **look)


def _draw_memory(panel: Any, lines: _Lines) -> None:
    for name, line in lines.items():
        sizes = [(value, (entry.peak_memory_bytes or nan) / 1e9) for value, entry in line]
        _draw_line(panel, sizes, _DRAWN[name].colour, marker=_DRAWN[name].marker)


def _draw_gain(panel: Any, lines: _Lines) -> None:
    """Time over the naive decoder's at the same value, and the operations' share below it."""
    naive = dict(lines.get("naive", ()))
    for name in [name for name in lines if name != "naive"]:
        form = _DRAWN[name]
        pairs = [(value, entry, naive[value]) for value, entry in lines[name] if value in naive]
        times = [(value, _seconds(entry) / _seconds(other)) for value, entry, other in pairs]
        work = [(v, e.flops.get(UNET, nan) / other.flops.get(UNET, nan)) for v, e, other in pairs]
        _draw_line(panel, times, form.colour, marker=form.marker)
        _draw_line(panel, work, form.colour, linestyle=":")
    panel.axhline(1, color="#999999", linewidth=0.8)


def _draw_share(record: Record, panel: Any, lines: _Lines) -> None:
    """Operations over time over the machine's peak: the decoder of each form, and the encoder,
    which all forms share, once."""
    drawn = [(_DRAWN[name].colour, "-", UNET_DECODER, line) for name, line in lines.items()]
    for colour, style, graph, line in (*drawn, ("#009E73", "--", UNET_ENCODER, drawn[-1][-1])):
        shares = [(value, peak_share(entry, record, graph)) for value, entry in line]
        _draw_line(panel, shares, colour, linestyle=style, marker=".")


def _draw_line(
    panel: Any, points: Sequence[tuple[int, float | None]], colour: str, **look: str
) -> None:
    """A line through the points; none where a value is not known (None, NaN)."""
    panel.plot(*np.array(points, float).reshape(-1, 2).T, color=colour, **look)


def _dress(panel: Any, values: Sequence[int]) -> None:
    if values[-1] > 3 * values[0]:
        panel.set_xscale("log", base=2)
    panel.set_xticks(values, [str(value) for value in values])
    panel.minorticks_off()
    panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)


def main() -> None:
    """Sweep, or draw a record that is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ckpt")
    source.add_argument("--bundle", type=Path, help="made by --method faster: for --axis rows=...")
    source.add_argument("--record", type=Path, help="draw this record instead of measuring")
    parser.add_argument("--base")
    parser.add_argument("--runtime", default="ort", choices=("ort", "openvino", "torch"))
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--axis", action="append", default=[], help="steps=2,4,8; may be repeated")
    parser.add_argument("--variants", help=f"of the decoder's graph [{','.join(VARIANTS)}]")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one turn")
    parser.add_argument("--peak", action="append", default=[], help="bf16=1.1: TFLOP/s, repeatable")
    parser.add_argument("--no-peak", action="store_true", help="do not measure the machine's peak")
    parser.add_argument("--work", type=Path, help="folder that keeps the graphs")
    parser.add_argument("--out", type=Path, help="record to write (.json)")
    parser.add_argument("--plot", type=Path, help="picture to write (.png)")
    arguments = parser.parse_args()
    run_explained(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    check_plot(arguments.plot)
    if arguments.record is not None:
        record = read_record(arguments.record)
    else:
        record = _measured(arguments)
        if arguments.out is not None:
            write_text(arguments.out, to_json(record, summarized(record, ())))
        Console(width=None if sys.stdout.isatty() else 140).print(rich_table(record, ()))
        for line in record.missing():
            print(line)
    if arguments.plot is not None:
        plot_scaling(record, arguments.plot)


def _measured(arguments: argparse.Namespace) -> Record:
    plan = LatencyPlan(
        bundles=(),
        request=ContenderRequest(),
        settings=Settings(arguments.rounds, arguments.runs, arguments.warmup, unet_only=True),
        peaks=tuple(arguments.peak),
        measure_peak=not arguments.no_peak,
        work=arguments.work,
        timeout_s=arguments.timeout,
        outputs=LatencyOutputs(record=arguments.out, plot=arguments.plot),
    )
    check_settings(plan)
    points = contenders(_sweep(arguments))
    return measure_contenders(
        points, plan, describe_environment(), lambda line: print(line, file=sys.stderr)
    )


def _sweep(arguments: argparse.Namespace) -> Sweep:
    if not arguments.axis:
        raise UsageError("no axis was given", "Add --axis steps=2,4,8,16, or another.")
    axes = tuple(parse_axis(text) for text in arguments.axis)
    source, usable = ("bundle", _OF_BUNDLES) if arguments.bundle else ("ckpt", _OF_CHECKPOINTS)
    for axis, _ in axes:
        if axis not in usable:
            raise UsageError(
                f"--axis {axis} does not go with --{source}", f"Use one of {', '.join(usable)}."
            )
    variants = tuple((arguments.variants or ",".join(VARIANTS)).split(","))
    for variant in variants:
        if variant not in VARIANTS:
            raise unknown_name("variant", variant, VARIANTS)
    if arguments.precision != "fp32" and arguments.runtime == "ort":
        raise UsageError("ONNX Runtime is swept in fp32 only", "Leave --precision out.")
    if arguments.bundle is not None:
        if arguments.runtime == "torch":
            raise UsageError("--bundle is measured on its graphs", "Use --runtime ort or openvino.")
        if arguments.variants is not None or arguments.base is not None:
            raise UsageError("--variants and --base are for --ckpt", "Leave them out.")
    return Sweep(
        checkpoint=arguments.ckpt,
        base=arguments.base,
        runtime=arguments.runtime,
        precision=arguments.precision,
        axes=axes,
        variants=variants,
        threads=arguments.threads,
        bundle=None if arguments.bundle is None else open_bundle(arguments.bundle),
    )


if __name__ == "__main__":
    main()

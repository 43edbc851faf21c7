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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from tiue_export.registry.spokes import run_explained
from tiue_export.sampling.key_step_options import PlanChange
from tiue_export.specs import UNET_DECODER, UNET_ENCODER
from tiue_export.system.disk_errors import disk_errors

from ..figure import check_file, check_plot, new_figure, save_figure
from ..latency.bench import counted, ready, work_folder
from ..latency.contenders import Contender
from ..latency.environment import describe_environment
from ..latency.faster_session import loop_runs, plan_of
from ..latency.made_bundle import MadeBundle
from ..latency.report import rich_table, standing_warnings
from ..latency.settings import FasterSettings, GraphSettings, TorchSettings
from ..latency.summary import peak_share, spreads, summarized
from ..latency.turns import measure
from .ceiling import ceilings_in_child, parse_ceilings

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


VARIANTS: Mapping[str, Variant] = {
    "naive": Variant("none", 0.0, "#555555", "s"),
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
    what = f"{variant} UNet at {_TITLES[axis]} = {value}"
    name = f"{axis}={value}/{variant}/{sweep.runtime}/{sweep.precision}"
    threads = value if axis == "threads" else sweep.threads
    precision = sweep.precision if sweep.runtime == "openvino" else "auto"
    if sweep.bundle is not None:
        settings = FasterSettings(
            bundle=str(sweep.bundle.root),
            runtime=sweep.runtime,
            loop="plan",
            precision=precision,
            max_decoder_rows=value if axis == "rows" else None,
            threads=threads,
            unet_only=True,
        )
        _check_rows(sweep.bundle, settings.max_decoder_rows)
        return Contender(name, what, settings)
    assert sweep.checkpoint is not None
    shape: dict[str, Any] = {
        "size": {"height": value, "width": value},
        "threads": {},
    }.get(axis, {axis: value})
    if sweep.runtime == "torch":
        torch = TorchSettings(
            checkpoint=sweep.checkpoint,
            base=sweep.base,
            precision=sweep.precision,
            threads=threads,
            unet_only=True,
            **shape,
        )
        return Contender(name, what, torch)
    graphs = MadeBundle(
        checkpoint=sweep.checkpoint,
        base=sweep.base,
        hoist=VARIANTS[variant].hoist,
        merge_below=VARIANTS[variant].merge_below,
        unet_only=True,
        forms=("openvino",) if sweep.runtime == "openvino" else (),
        **shape,
    )
    made = GraphSettings(
        bundle=None, runtime=sweep.runtime, precision=precision, threads=threads, unet_only=True
    )
    return Contender(name, what, made, {"bundle": graphs})


def _check_rows(bundle: Bundle, rows: int | None) -> None:
    plan = plan_of(replanned(bundle, PlanChange(max_decoder_rows=rows)))
    loop_runs(plan, "plan", bundle.manifest.batch or 1)


def run_sweep(
    points: Sequence[Contender],
    settings: Settings,
    *,
    peaks: tuple[str, ...] = (),
    measure_peak: bool = True,
    work: Path | None = None,
    timeout_s: float = 3600.0,
) -> Record:
    """Measure all points in turn; progress goes to standard error.

    `peaks` are "PRECISION=TFLOPS"; without any, the machine's are measured if `measure_peak`.
    """
    environment = describe_environment()

    def tell(line: str) -> None:
        print(line, file=sys.stderr)

    def turn_taken(number: int, row: Measurement) -> None:
        told = row.reason or f"{row.turns[-1].latency_ms[UNET][0]:.4g} ms"
        tell(f"round {number} of {settings.rounds}  {row.name}: {told}")

    ceilings = parse_ceilings(peaks)
    if measure_peak and not ceilings:
        tell("measuring the machine's ceiling")
        ceilings = ceilings_in_child(None)
    with work_folder(work) as folder:
        points = [ready(point, Path(folder), tell) for point in points]
        rows = measure(points, settings, timeout_s=timeout_s, on_turn=turn_taken)
        rows = [counted(point.settings, row) for point, row in zip(points, rows, strict=True)]
    record = Record(environment, settings, tuple(rows), ceilings)
    return replace(record, warnings=tuple(standing_warnings(record)))


@dataclass(frozen=True)
class _Point:
    """One measured contender's place."""

    axis: str
    value: int
    variant: str
    entry: Measurement

    @property
    def seconds(self) -> float:
        return spreads(self.entry)[UNET].median_ms / 1e3


# A variant's look and its points in the order of their values; the first is naive where it is.
_Lines = Sequence[tuple[str, Variant, Sequence[_Point]]]


def plot_scaling(record: Record, path: Path) -> None:
    """Draw `path`: a column for each axis; time, memory, what hoisting and merging bring, and
    how near each graph comes to the machine's measured peak where the record has that."""
    points = [point for entry in record.contenders if (point := _point(entry)) is not None]
    axes = [axis for axis in AXES if any(point.axis == axis for point in points)]
    drawings = dict(_DRAWINGS)
    if record.ceilings:
        drawings["share of the peak (dashed: encoder)"] = lambda panel, lines: _draw_share(
            panel, lines, record
        )
    if not any(point.variant == "naive" for point in points):
        del drawings[_GAIN_TITLE]
    columns, rows = max(1, len(axes)), len(drawings)
    figure = new_figure((1 + 3.4 * columns, 0.5 + 2.5 * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    for column, axis in enumerate(axes):
        own = [point for point in points if point.axis == axis]
        for panel, draw in zip(grid[:, column], drawings.values(), strict=True):
            draw(panel, _lines(own))
            _dress(panel, sorted({point.value for point in own}))
        grid[-1][column].set_xlabel(_TITLES[axis], fontsize=9)
    for row, title in zip(grid, drawings, strict=True):
        row[0].set_ylabel(title, fontsize=9)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    with disk_errors(path):
        save_figure(figure, path)


def _point(entry: Measurement) -> _Point | None:
    parts = re.match(r"(\w+)=(\d+)/(\w+)/", entry.name)
    if parts is None or not entry.measured:
        return None
    return _Point(parts[1], int(parts[2]), parts[3], entry)


def _lines(points: Sequence[_Point]) -> _Lines:
    return [
        (name, form, sorted((p for p in points if p.variant == name), key=lambda p: p.value))
        for name, form in _DRAWN.items()
        if any(point.variant == name for point in points)
    ]


def _draw_time(panel: Any, lines: _Lines) -> None:
    for name, form, line in lines:
        times = [spreads(point.entry)[UNET] for point in line]
        spans = [
            [(s.median_ms - s.p10_ms) / 1e3 for s in times],
            [(s.p90_ms - s.median_ms) / 1e3 for s in times],
        ]
        look = {"color": form.colour, "marker": form.marker, "capsize": 2, "label": name}
        panel.errorbar([p.value for p in line], [p.seconds for p in line], yerr=spans, **look)


def _draw_memory(panel: Any, lines: _Lines) -> None:
    for _, form, line in lines:
        sizes = [(p.value, p.entry.peak_memory_bytes) for p in line]
        _draw_line(panel, [(v, s and s / 1e9) for v, s in sizes], form.colour, marker=form.marker)


def _draw_gain(panel: Any, lines: _Lines) -> None:
    """Time over the naive decoder's at the same value, and the operations' share below it."""
    naive = {p.value: p for name, _, line in lines if name == "naive" for p in line}
    for name, form, line in lines:
        pairs = [(p, naive[p.value]) for p in line if p.value in naive and name != "naive"]
        times = [(p.value, p.seconds / other.seconds) for p, other in pairs]
        _draw_line(panel, times, form.colour, marker=form.marker)
        work = [(p.value, p.entry.flops.get(UNET), o.entry.flops.get(UNET)) for p, o in pairs]
        _draw_line(panel, [(v, a and b and a / b) for v, a, b in work], form.colour, linestyle=":")
    panel.axhline(1, color="#999999", linewidth=0.8)


def _draw_share(panel: Any, lines: _Lines, record: Record) -> None:
    """Operations over time over the machine's peak: the decoder of each form, and the encoder,
    which all forms share, once."""
    drawn = [(form.colour, "-", UNET_DECODER, line) for _, form, line in lines]
    drawn += [("#009E73", "--", UNET_ENCODER, line) for _, _, line in lines[-1:]]
    for colour, style, graph, line in drawn:
        shares = [(point.value, peak_share(point.entry, record, graph)) for point in line]
        _draw_line(panel, shares, colour, linestyle=style, marker=".")


def _draw_line(
    panel: Any, pairs: Sequence[tuple[int, float | None]], colour: str, **look: str
) -> None:
    """A line through the pairs that have a value; none where no pair has."""
    present = [pair for pair in pairs if pair[1] is not None]
    if present:
        panel.plot(*zip(*present, strict=True), color=colour, **look)


_GAIN_TITLE = "time / naive (dotted: operations)"
_DRAWINGS: Mapping[str, Callable[[Any, _Lines], None]] = {
    "UNet, seconds": _draw_time,
    "peak memory, GB": _draw_memory,
    _GAIN_TITLE: _draw_gain,
}


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
    check_file("--out", arguments.out)
    if arguments.record is not None:
        record = read_record(arguments.record)
    else:
        record = run_sweep(
            contenders(_sweep(arguments)),
            Settings(arguments.rounds, arguments.runs, arguments.warmup, unet_only=True),
            peaks=tuple(arguments.peak),
            measure_peak=not arguments.no_peak,
            work=arguments.work,
            timeout_s=arguments.timeout,
        )
        if arguments.out is not None:
            write_text(arguments.out, to_json(record, summarized(record, ())))
        Console(width=None if sys.stdout.isatty() else 140).print(rich_table(record, ()))
        for line in record.missing():
            print(line)
    if arguments.plot is not None:
        plot_scaling(record, arguments.plot)


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

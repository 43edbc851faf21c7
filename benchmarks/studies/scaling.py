"""How the UNet's time and memory grow with K, batch, size and threads, hoisted or not.

    python -m tiue_export.benchmarks.studies.scaling --ckpt X --runtime openvino --precision bf16 \\
        --axis steps=2,4,8,16 --axis batch=1,2,4 --axis size=256,512,768 --axis threads=1,2 \\
        --out scaling.json --plot scaling.png

One point differs from the others of its axis in one thing. All are measured in turn, as the
contenders of `tiue-export bench` are, and the record is one of its records: two can be compared.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tiue_export.bundle.folder import disk_errors
from tiue_export.errors import UsageError, unknown_name
from tiue_export.specs import UNET_DECODER, UNET_ENCODER

from ..explained import run_explained
from ..figure import check_file, check_plot
from ..latency.bench import counted, ready, work_folder
from ..latency.contenders import Contender
from ..latency.environment import describe_environment
from ..latency.made_bundle import MadeBundle
from ..latency.record import UNET, Measurement, Record, Settings, read_record, to_json, write_text
from ..latency.report import rich_table, standing_warnings
from ..latency.summary import peak_share, spreads, summarized
from ..latency.turns import measure
from .ceiling import ceilings_in_child, parse_ceilings

AXES = ("steps", "batch", "size", "threads")
_TITLES: Mapping[str, str] = {
    "steps": "decoder rows K",
    "batch": "pictures per run",
    "size": "picture side, px",
    "threads": "CPU threads",
}
_MERGE_BELOW = 0.02


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
    "merged": Variant("decoder", _MERGE_BELOW, "#D55E00", "^"),
}


@dataclass(frozen=True)
class Sweep:
    """What is varied, and on what. `peaks` are "PRECISION=TFLOPS"; without any, the machine's are
    measured if `measure_peak`.
    """

    checkpoint: str
    base: str | None
    runtime: str
    precision: str
    axes: tuple[tuple[str, tuple[int, ...]], ...]
    variants: tuple[str, ...]
    threads: int | None = None
    peaks: tuple[str, ...] = ()
    measure_peak: bool = True


def contenders(sweep: Sweep) -> list[Contender]:
    """One for each point of each axis and each variant: "steps=4/hoisted/ort/fp32"."""
    variants = ("naive",) if sweep.runtime == "torch" else sweep.variants
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
    changed = {"height": value, "width": value} if axis == "size" else {axis: value}
    threads = value if axis == "threads" else sweep.threads
    what = f"{variant} UNet at {_TITLES[axis]} = {value}"
    name = f"{axis}={value}/{variant}/{sweep.runtime}/{sweep.precision}"
    common = {"threads": threads, "unet_only": True}
    shape: dict[str, Any] = {key: side for key, side in changed.items() if key != "threads"}
    if sweep.runtime == "torch":
        settings = {"checkpoint": sweep.checkpoint, "base": sweep.base, **shape, **common}
        return Contender(name, what, "torch", {**settings, "precision": sweep.precision})
    form = VARIANTS[variant]
    graphs = MadeBundle(
        checkpoint=sweep.checkpoint,
        base=sweep.base,
        hoist=form.hoist,
        merge_below=form.merge_below,
        unet_only=True,
        openvino=("fp32",) if sweep.runtime == "openvino" else (),
    )
    graphs = replace(graphs, **shape)
    precision = sweep.precision if sweep.runtime == "openvino" else "auto"
    settings = {"bundle": None, "runtime": sweep.runtime, "precision": precision, **common}
    return Contender(name, what, "graphs", settings, made={"bundle": graphs})


def plot_scaling(record: Record, path: Path) -> None:
    """Draw `path`: a column for each axis; time, memory, what hoisting and merging bring, and
    how near each graph comes to the machine's measured peak where the record has that."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [point for entry in record.contenders if (point := _point(entry)) is not None]
    axes_found = [axis for axis in AXES if any(point.axis == axis for point in points)]
    drawings = dict(_DRAWINGS)
    if record.ceilings:
        drawings[_SHARE_TITLE] = functools.partial(_draw_share, record=record)
    columns, rows = max(1, len(axes_found)), len(drawings)
    size = (1 + 3.4 * columns, 0.5 + 2.5 * rows)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    try:
        for column, axis in enumerate(axes_found):
            own = [point for point in points if point.axis == axis]
            for row, draw in enumerate(drawings.values()):
                draw(grid[row][column], own)
                _dress(grid[row][column], own, axis if row == rows - 1 else None)
        for row, title in enumerate(drawings):
            grid[row][0].set_ylabel(title, fontsize=9)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)
    finally:
        pyplot.close(figure)


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


def _point(entry: Measurement) -> _Point | None:
    found = re.match(r"(\w+)=(\d+)/(\w+)/", entry.name)
    if found is None or not entry.measured:
        return None
    return _Point(found[1], int(found[2]), found[3], entry)


def _lines(points: Sequence[_Point]) -> list[tuple[str, Variant, list[_Point]]]:
    """The points of each variant, in the order of their values."""
    return [
        (name, form, sorted((p for p in points if p.variant == name), key=lambda p: p.value))
        for name, form in VARIANTS.items()
        if any(point.variant == name for point in points)
    ]


def _draw_time(axes: Any, points: Sequence[_Point]) -> None:
    for name, form, line in _lines(points):
        known = [spreads(point.entry)[UNET] for point in line]
        spans = [
            [(s.median_ms - s.p10_ms) / 1e3 for s in known],
            [(s.p90_ms - s.median_ms) / 1e3 for s in known],
        ]
        axes.errorbar(
            [point.value for point in line],
            [point.seconds for point in line],
            yerr=spans,
            color=form.colour,
            marker=form.marker,
            capsize=2,
            label=name,
        )


def _draw_memory(axes: Any, points: Sequence[_Point]) -> None:
    for _, form, line in _lines(points):
        known = [(p.value, p.entry.peak_memory_bytes) for p in line]
        pairs = [(value, size / 1e9) for value, size in known if size is not None]
        axes.plot(*zip(*pairs, strict=True), color=form.colour, marker=form.marker)


def _draw_gain(axes: Any, points: Sequence[_Point]) -> None:
    """Time over the naive decoder's at the same value, and the operations' share below it."""
    naive = {point.value: point for point in points if point.variant == "naive"}
    for name, form, line in _lines(points):
        paired = [point for point in line if point.value in naive and name != "naive"]
        if not paired:
            continue
        values = [point.value for point in paired]
        ratios = [point.seconds / naive[point.value].seconds for point in paired]
        axes.plot(values, ratios, color=form.colour, marker=form.marker)
        if all(UNET in p.entry.flops and UNET in naive[p.value].entry.flops for p in paired):
            work = [p.entry.flops[UNET] / naive[p.value].entry.flops[UNET] for p in paired]
            axes.plot(values, work, color=form.colour, linestyle=":")
    axes.axhline(1, color="#999999", linewidth=0.8)


def _draw_share(axes: Any, points: Sequence[_Point], record: Record) -> None:
    """Operations over time over the machine's peak: the decoder of each form, and the encoder,
    which all forms share, once."""
    lines = _lines(points)
    drawn = [(form.colour, "-", UNET_DECODER, line) for _, form, line in lines]
    if lines:
        drawn.append(("#009E73", "--", UNET_ENCODER, lines[-1][2]))
    for colour, style, graph, line in drawn:
        known = [(point.value, peak_share(point.entry, record, graph)) for point in line]
        pairs = [(value, share) for value, share in known if share is not None]
        if pairs:
            axes.plot(*zip(*pairs, strict=True), color=colour, linestyle=style, marker=".")


_DRAWINGS: Mapping[str, Callable[[Any, Sequence[_Point]], None]] = {
    "UNet, seconds": _draw_time,
    "peak memory, GB": _draw_memory,
    "time / naive (dotted: operations)": _draw_gain,
}
_SHARE_TITLE = "share of the peak (dashed: encoder)"


def _dress(axes: Any, points: Sequence[_Point], axis: str | None) -> None:
    values = sorted({point.value for point in points})
    if values[-1] > 3 * values[0]:
        axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    if axis is not None:
        axes.set_xlabel(_TITLES[axis], fontsize=9)


def main() -> None:
    """Sweep, or draw a record that is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ckpt")
    parser.add_argument("--base")
    parser.add_argument("--runtime", default="ort", choices=("ort", "openvino", "torch"))
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--axis", action="append", default=[], help="steps=2,4,8; may be repeated")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="of the decoder's graph")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one turn")
    parser.add_argument("--peak", action="append", default=[], help="bf16=1.1: TFLOP/s, repeatable")
    parser.add_argument("--no-peak", action="store_true", help="do not measure the machine's peak")
    parser.add_argument("--work", type=Path, help="folder that keeps the graphs")
    parser.add_argument("--record", type=Path, help="draw this record instead of measuring")
    parser.add_argument("--out", type=Path, help="record to write (.json)")
    parser.add_argument("--plot", type=Path, help="picture to write (.png)")
    arguments = parser.parse_args()
    if (arguments.ckpt is None) == (arguments.record is None):
        parser.error("give --ckpt or --record, one of them")
    run_explained(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    check_plot(arguments.plot)
    check_file("--out", arguments.out)
    if arguments.record is not None:
        record = read_record(arguments.record)
    else:
        sweep = _sweep(arguments)
        settings = Settings(arguments.rounds, arguments.runs, arguments.warmup, unet_only=True)
        record = run_sweep(sweep, settings, arguments.work, arguments.timeout)
        if arguments.out is not None:
            write_text(arguments.out, to_json(record, summarized(record, ())))
        _print_table(record)
    if arguments.plot is not None:
        plot_scaling(record, arguments.plot)


def run_sweep(
    sweep: Sweep, settings: Settings, work: Path | None = None, timeout_s: float = 3600.0
) -> Record:
    """Measure all points in turn; progress goes to standard error."""
    environment = describe_environment()

    def tell(line: str) -> None:
        print(line, file=sys.stderr)

    def turn_taken(number: int, row: Measurement) -> None:
        told = row.reason or f"{row.turns[-1].latency_ms[UNET][0]:.4g} ms"
        tell(f"round {number} of {settings.rounds}  {row.name}: {told}")

    ceilings = parse_ceilings(sweep.peaks)
    if sweep.measure_peak and not ceilings:
        tell("measuring the machine's ceiling")
        ceilings = ceilings_in_child(None)
    with work_folder(work) as folder:
        points = [ready(point, Path(folder), tell) for point in contenders(sweep)]
        rows = measure(points, settings, timeout_s=timeout_s, on_turn=turn_taken)
        rows = [counted(row) for row in rows]
    record = Record(environment, settings, tuple(rows), ceilings)
    return replace(record, warnings=tuple(standing_warnings(record)))


def _sweep(arguments: argparse.Namespace) -> Sweep:
    if not arguments.axis:
        raise UsageError("no axis was given", "Add --axis steps=2,4,8,16, or another.")
    variants = tuple(arguments.variants.split(","))
    for variant in variants:
        if variant not in VARIANTS:
            raise unknown_name("variant", variant, VARIANTS)
    if arguments.precision != "fp32" and arguments.runtime == "ort":
        raise UsageError("ONNX Runtime is swept in fp32 only", "Leave --precision out.")
    return Sweep(
        checkpoint=arguments.ckpt,
        base=arguments.base,
        runtime=arguments.runtime,
        precision=arguments.precision,
        axes=tuple(parse_axis(text) for text in arguments.axis),
        variants=variants,
        threads=arguments.threads,
        peaks=tuple(arguments.peak),
        measure_peak=not arguments.no_peak,
    )


def _print_table(record: Record) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 140
    Console(width=width).print(rich_table(record, ()))
    for entry in record.contenders:
        if not entry.measured:
            print(f"{entry.name}: not measured: {entry.reason}")


if __name__ == "__main__":
    main()

"""Picture of quality against time, out of records alone: what was scored, and one run of `bench`.

    python -m tiue_export.benchmarks.studies.quality_against_time POINTS.toml --plot picture.png

A point of the TOML file is one contender, with its scores by `quality --json` and its time by
`bench --out`:

    latency = "latency.json"             # all times are of this one run
    [[points]]
    series = "post hoc"                  # points of a series share a colour and are joined in order
    label = "2"
    scores = "quality.json"
    scored = "shared-2"                  # the column's name there
    timed = "shared-2/ort/fp32"          # the contender's name in the run
    share = 0.08                         # optional: 4 of the 50 steps that were timed

Files are relative to the TOML file. The time is that of the UNet: median of all timed runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomllib

from tiue_export.errors import UsageError
from tiue_export.proof.latency_record import UNET, Record, read_record
from tiue_export.registry.spokes import run_explained

from ..figure import check_plot, new_figure, save_figure
from ..latency.summary import spread
from ..markdown import table_lines

_INKS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7")  # Okabe-Ito
_KEYS = {"series", "label", "scores", "scored", "timed"}
_MEASURES = (
    ("frechet", "Fréchet distance, lower is better", 1.0),
    ("coverage", "coverage, higher is better", 1.0),
    ("top1", "right emoji of 500, top-1 %, higher is better", 100.0),
)


@dataclass(frozen=True)
class Point:
    """One contender: the UNet's time of one picture in ms, and its scores by measure."""

    series: str
    label: str
    unet_ms: float
    scores: Mapping[str, float]


def read_points(file: Path) -> list[Point]:
    """The points of a TOML file with what their records say; raises `UsageError`."""
    try:
        given = tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as points: {error}") from error
    latency, entries = given.get("latency"), given.get("points")
    if not isinstance(latency, str) or not entries:
        raise UsageError(f"{file} names no latency record or no [[points]]; expected both")
    record = read_record(file.parent / latency)
    return [_point(file, entry, record) for entry in entries]


def _point(file: Path, entry: Mapping[str, Any], record: Record) -> Point:
    if lacking := _KEYS - entry.keys():
        raise UsageError(f"{file}: a point lacks {', '.join(sorted(lacking))}; it has {entry}")
    scores = json.loads((file.parent / entry["scores"]).read_text("utf-8"))["scores"]
    columns = {column["name"]: column for column in scores}
    rows = {row.name: row for row in record.contenders}
    for name, known, kind in (
        (entry["scored"], columns, entry["scores"]),
        (entry["timed"], rows, "the latency record"),
    ):
        if name not in known:
            raise UsageError(f"{file}: {kind} has no {name!r}; it has {', '.join(known)}")
    timed = [one for turn in rows[entry["timed"]].turns for one in turn.latency_ms.get(UNET, ())]
    if not timed:
        raise UsageError(f"{file}: {entry['timed']} was not measured to the end")
    column = columns[entry["scored"]]
    return Point(
        entry["series"],
        str(entry["label"]),
        spread(timed).median_ms * float(entry.get("share", 1)),
        {measure: float(column[measure]) for measure, _, _ in _MEASURES},
    )


def save_points_plot(points: Sequence[Point], path: Path, title: str) -> None:
    """One panel a measure, over time on a logarithmic axis. Needs matplotlib."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    figure = new_figure((15.0, 5.6))
    inks = dict(zip(dict.fromkeys(point.series for point in points), _INKS * 3, strict=False))
    for panel, (measure, said, factor) in zip(
        figure.subplots(1, len(_MEASURES)), _MEASURES, strict=True
    ):
        for number, (series, ink) in enumerate(inks.items()):
            beside = (5, 5) if number % 2 else (-4, -13)  # neighbours' labels keep apart
            own = [point for point in points if point.series == series]
            heights = [factor * point.scores[measure] for point in own]
            times = [point.unet_ms for point in own]
            panel.plot(times, heights, "o-", color=ink, label=series, alpha=0.85, markersize=6)
            for point, height in zip(own, heights, strict=True):
                panel.annotate(
                    point.label,
                    (point.unet_ms, height),
                    beside,
                    textcoords="offset points",
                    fontsize=8,
                    color=ink,
                )
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.margins(x=0.12, y=0.1)
        panel.set(xlabel="UNet, ms a picture", ylabel=said)
        panel.grid(alpha=0.3, which="both")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=len(inks))
    figure.suptitle(title)
    save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the points as a table; draw them where --plot asks for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("points", type=Path, help="TOML file")
    parser.add_argument("--plot", type=Path, help=".png to write")
    parser.add_argument("--title", default="Quality against time")
    asked = parser.parse_args(arguments)
    run_explained(lambda: _show(asked))


def _show(asked: argparse.Namespace) -> None:
    check_plot(asked.plot)
    points = read_points(asked.points)
    heads = ["", "", "UNet ms", *(measure for measure, _, _ in _MEASURES)]
    rows = [
        [p.series, p.label, f"{p.unet_ms:.1f}", *(f"{p.scores[m]:.3f}" for m, _, _ in _MEASURES)]
        for p in points
    ]
    print("\n".join(table_lines(heads, rows)))
    if asked.plot is not None:
        save_points_plot(points, asked.plot, asked.title)


if __name__ == "__main__":
    main()

"""The curves of training runs, from their journals: one row a run, one panel a figure it logged.

    python -m tiue_export.benchmarks.studies.training_curves runs/student --plot curves.png

Grey is what was logged, the line its running mean. The table beside it says how long each run took.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiue_export.errors import UsageError
from tiue_export.registry.spokes import run_explained
from tiue_export.specs import Array
from tiue_export.train.run_folder import JOURNAL_FILE, RunFolder

from ..figure import check_plot, new_figure, save_figure
from ..markdown import table_lines

_WINDOW_SHARE = 0.05
_NO_CURVE = ("step", "seconds")


@dataclass(frozen=True)
class Curves:
    """One run: `steps` (N,), `hours` in all, and each figure's values (N,) by its name."""

    name: str
    steps: Array
    hours: float
    values: dict[str, Array]


def read_curves(folder: Path) -> Curves:
    """The journal of a run; figures that not every line has are left out."""
    if not (folder / JOURNAL_FILE).is_file():
        raise UsageError(
            f"{folder} has no {JOURNAL_FILE}; expected the folder of a training run",
            "Give the folder that was `out` in its configuration.",
        )
    lines = list(RunFolder.lines_of(folder))
    if len(lines) < 2:
        raise UsageError(f"{folder} logged {len(lines)} time(s); expected two or more for a curve")
    names = [
        name
        for name, value in lines[0].items()
        if name not in _NO_CURVE
        and isinstance(value, (int, float))
        and all(name in line for line in lines)
    ]
    if not names:
        raise UsageError(f"{folder} logged no figure with every line; there is no curve to draw")
    return Curves(
        folder.resolve().name,
        np.array([line["step"] for line in lines]),
        sum(float(line.get("seconds", 0)) for line in lines) / 3600,
        {name: np.array([float(line[name]) for line in lines]) for name in names},
    )


def running_mean(values: Array) -> Array:
    """Each value's mean with those of a twentieth of the run around it: (N,) -> (N,)."""
    half = max(1, round(len(values) * _WINDOW_SHARE / 2))
    ends = np.cumsum(np.concatenate([[0.0], values]))
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return np.asarray((ends[last] - ends[first]) / (last - first))


def save_curves_plot(runs: Sequence[Curves], path: Path) -> None:
    """Write the picture as PNG. Needs matplotlib; leaves its global state alone."""
    columns = max(len(run.values) for run in runs)
    figure = new_figure((3.1 * columns, 2.5 * len(runs) + 0.3))
    panels: Any = figure.subplots(len(runs), columns, squeeze=False)
    for row, run in zip(panels, runs, strict=True):
        for panel, (name, values) in zip(row, run.values.items(), strict=False):
            panel.plot(run.steps, values, color="0.8", linewidth=0.8)
            panel.plot(run.steps, running_mean(values), color="#0072B2")
            panel.set_title(name.replace("_", " "), fontsize=9)
            panel.set_xlabel("step", fontsize=8)
            panel.tick_params(labelsize=8)
            panel.grid(alpha=0.3)
            if (values > 0).all() and values.max() > 5 * values.min():
                panel.set_yscale("log")
        row[0].set_ylabel(f"{run.name}, {run.hours:.1f} h", fontsize=9)
        for panel in row[len(run.values) :]:
            panel.set_axis_off()
    save_figure(figure, path)


def _table(runs: Sequence[Curves]) -> str:
    rows = []
    for run in runs:
        last = {name: running_mean(values)[-1] for name, values in run.values.items()}
        told = ", ".join(f"{name} {value:.4g}" for name, value in last.items())
        rows.append((run.name, str(run.steps[-1]), f"{run.hours:.1f}", told))
    head = ("run", "steps", "hours", "at the end (mean of its last twentieth)")
    return "\n".join(table_lines(head, rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tiue_export.benchmarks.studies.training_curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of training runs")
    parser.add_argument("--plot", type=Path, required=True, help="the picture, a PNG file")
    asked = parser.parse_args(arguments)
    check_plot(asked.plot)
    runs = [read_curves(folder) for folder in asked.runs]
    save_curves_plot(runs, asked.plot)
    sys.stdout.write(f"{_table(runs)}\n\n{asked.plot}\n")


if __name__ == "__main__":
    run_explained(main)

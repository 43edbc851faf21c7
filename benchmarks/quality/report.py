"""What a comparison leaves behind: a table, a JSON file, a contact sheet and a picture."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tiue_export.drawing.contact_sheet import contact_sheet
from tiue_export.drawing.picture import image_from_pixels, save_png
from tiue_export.proof.gates import IDENTICAL_DB
from tiue_export.system.atomic_file import write_atomically
from tiue_export.system.disk_errors import disk_errors

from ..figure import new_figure, save_figure
from .judge import Contender, Draws, Request, Scores, mistaken
from .yardstick import QualityData

if TYPE_CHECKING:
    from PIL.Image import Image

_SHEET_ROWS = 12
_COLOURS = ("#0072B2", "#D55E00", "#000000", "#009E73", "#CC79A7")  # Okabe-Ito
_REAL_COLOUR = "#777777"
_SHAPES = "ov^DP*Xs"

# (title with the better direction, how to print it)
_ROWS: tuple[tuple[str, Callable[[Scores], str]], ...] = (
    ("pictures", lambda s: str(s.pictures)),
    ("right emoji, top-1 % ↑", lambda s: _percent(s.top1)),
    ("right emoji, top-5 % ↑", lambda s: _percent(s.top5)),
    ("right ground % ↑", lambda s: _percent(s.ground)),
    ("alignment with the prompt ↑", lambda s: _number(s.alignment)),
    ("Fréchet distance ↓", lambda s: _number(s.frechet, 2)),
    ("kernel distance x1000 ↓", lambda s: f"{s.kernel * 1e3:.1f} ± {s.kernel_deviation * 1e3:.1f}"),
    ("precision ↑", lambda s: _number(s.precision)),
    ("recall ↑", lambda s: _number(s.recall)),
    ("density ↑", lambda s: _number(s.density)),
    ("coverage ↑", lambda s: _number(s.coverage)),
    ("diversity, features ↑", lambda s: _number(s.feature_diversity)),
    ("diversity, pixels ↑", lambda s: _number(s.pixel_diversity)),
    ("ms a picture ↓", lambda s: _number(s.picture_ms, 0)),
    ("latents / first, PSNR dB", lambda s: _decibels(s.latents_psnr_db)),
    ("decoder rows' shares %", lambda s: " ".join(map(_percent, s.row_shares or (None,)))),
)
_PLOTTED: tuple[tuple[str, Callable[[Scores], float]], ...] = (
    ("Fréchet distance, lower is better", lambda s: s.frechet),
    ("right emoji %, higher is better", lambda s: 100 * s.top1),
)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return _number(share and 100 * share, 1)


def _decibels(value: float | None) -> str:
    return "identical" if value is not None and value >= IDENTICAL_DB else _number(value, 1)


def _title(request: Request) -> str:
    return f"Quality on {len(request.prompts)} prompts, {request.seeds} seed(s) each"


def quality_table(scores: Sequence[Scores], request: Request) -> Table:
    """One column per contender, one row per measure; arrows point to the better side."""
    table = Table(title=_title(request), title_justify="left", title_style="bold")
    table.add_column("measure", no_wrap=True)
    for entry in scores:
        table.add_column(escape(entry.name), justify="right", overflow="fold")
    for label, shown in _ROWS:
        table.add_row(label, *(shown(entry) for entry in scores))
    return table


def print_table(scores: Sequence[Scores], request: Request) -> None:
    """The table on standard output; piped, it is not wrapped to a narrow default."""
    Console(width=None if sys.stdout.isatty() else 160).print(quality_table(scores, request))


def write_json(
    scores: Sequence[Scores], request: Request, data: QualityData, file: Path | None
) -> None:
    """The scores with what they were measured with, where a file was asked for."""
    if file is None:
        return
    record = {
        "data": {
            "family": data.family,
            "corpus_sha256": data.corpus_sha256,
            "feature_network_held_out": dict(data.held_out),
        },
        "prompts": len(request.prompts),
        "seeds": request.seeds,
        "scores": [asdict(entry) for entry in scores],
    }
    with disk_errors(file):
        write_atomically(file, (json.dumps(record, indent=1) + "\n").encode())


def plot_quality(
    contenders: Sequence[Contender], scores: Sequence[Scores], request: Request, path: Path
) -> None:
    """Fréchet distance and retrieval against steps, or against time where not all have steps.

    `scores`: real pictures, then those of `contenders`. A series is joined by a line where some of
    its points have no mark of their own.
    """
    real, *own = scores
    by_steps = all(contender.steps is not None for contender in contenders)
    places = [
        float((contender.steps if by_steps else entry.picture_ms) or 0)
        for contender, entry in zip(contenders, own, strict=True)
    ]
    names = dict.fromkeys(contender.series for contender in contenders)
    colours = dict(zip(names, itertools.cycle(_COLOURS), strict=False))
    marks = dict.fromkeys(contender.mark for contender in contenders if contender.mark)
    shapes = {"": "o", **dict(zip(marks, itertools.cycle(_SHAPES[1:]), strict=False))}
    figure = new_figure((13.5, 4.8))
    for panel, (label, value) in zip(figure.subplots(1, 2), _PLOTTED, strict=True):
        points = list(zip(contenders, places, map(value, own), strict=True))
        for series, colour in colours.items():
            line = sorted((x, y, c.mark) for c, x, y in points if c.series == series)
            joined = "-" if any(not mark for _, _, mark in line) else "none"
            xs, ys, _ = zip(*line, strict=True)
            panel.plot(xs, ys, color=colour, linestyle=joined, marker="", alpha=0.5)
        for contender, x, y in points:
            look = {"color": colours[contender.series], "markersize": 8}
            panel.plot(x, y, shapes[contender.mark], zorder=3 if contender.mark else 2, **look)
            if not by_steps and not contender.mark:
                near = {"xytext": (5, 3), "textcoords": "offset points", "fontsize": 8}
                panel.annotate(contender.name, (x, y), **near)
        panel.axhline(value(real), color=_REAL_COLOUR, linestyle="--")
        panel.margins(x=0.14)  # the last name needs room
        panel.set(xlabel="timesteps" if by_steps else "ms a picture", ylabel=label)
        panel.grid(alpha=0.3)
        if by_steps:
            ticks = sorted(set(places))
            panel.set_xscale("log", base=2)
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.minorticks_off()
    legend = [("o-", colour, series) for series, colour in colours.items()]
    legend += [(shapes[mark], "#444444", mark) for mark in marks]
    for form, colour, label in (*legend, ("--", _REAL_COLOUR, "real pictures")):
        panel.plot([], [], form, color=colour, label=label)
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(_title(request))
    save_figure(figure, path)


class ComparisonSheet:
    """A contact sheet in the making: one row per prompt, one column per contender, equal noise."""

    def __init__(self, file: Path | None, request: Request) -> None:
        self._file = file
        self._prompts = [prompt.text for _, prompt in request.prompts[:_SHEET_ROWS]]
        self._seeds = request.seeds
        self._columns: dict[str, list[Image]] = {}

    def add(self, name: str, draws: Draws) -> None:
        """One contender's first picture of each shown prompt."""
        shown = draws.pictures[:: self._seeds][: len(self._prompts)]
        self._columns[name] = [image_from_pixels(picture) for picture in shown]

    def write(self) -> None:
        """Write the sheet where a file was asked for."""
        if self._file is None:
            return
        rows = list(zip(self._prompts, zip(*self._columns.values(), strict=True), strict=True))
        with disk_errors(self._file):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            sheet = contact_sheet(rows, list(self._columns))
            save_png(sheet, self._file, {"prompt": " | ".join(self._prompts)})


class MistakenNames:
    """What was taken for what, contender by contender; a JSON file in the making."""

    def __init__(self, file: Path | None, request: Request, data: QualityData) -> None:
        self._file, self._request, self._data = file, request, data
        self._found: dict[str, dict[str, dict[str, int]]] = {}

    def add(self, name: str, draws: Draws) -> None:
        """One contender's mistakes."""
        if self._file is not None:
            self._found[name] = mistaken(draws, self._request, self._data)

    def write(self) -> None:
        """Write the file where one was asked for."""
        if self._file is not None:
            with disk_errors(self._file):
                write_atomically(self._file, (json.dumps(self._found, indent=1) + "\n").encode())

"""Tables and numbers as people read them."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Column, Table
from rich.text import Text

from tiue_export.bundle.manifest import GraphRecord, Manifest, ParityRecord
from tiue_export.errors import printable
from tiue_export.proof.gates import IDENTICAL_DB
from tiue_export.proof.half_range import HALF_MAX, GraphAudit, lies_in
from tiue_export.specs import TensorSpec


class PipeConsole(Console):
    """A console that ends quietly when its reader (head, less) has seen enough."""

    def on_broken_pipe(self) -> None:
        """Leave without a complaint and with success, as filters do."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)


# Piped output is not wrapped to a narrow default: the reader's tools see whole lines.
console = PipeConsole(width=None if sys.stdout.isatty() else 140)


def print_json(data: object) -> None:
    """One strict JSON object on standard output."""
    print(json.dumps(data, indent=1, allow_nan=False, default=str))


def megabytes(size_bytes: float) -> str:
    """Bytes in decimal units, three significant digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            value = size_bytes / scale
            digits = max(0, 2 - int(math.log10(value)))
            return f"{value:.{digits}f} {unit}"
    return f"{size_bytes:.0f} B"


class PlainTable(Table):
    """Cells that are a `str` are shown as they are: what a file says is neither markup nor control.

    What is coloured is a `Text`.
    """

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """One row."""
        shown = (Text(printable(each)) if isinstance(each, str) else each for each in cells)
        super().add_row(*shown, **options)


def titled(title: str, *columns: Column | str, note: str = "") -> Table:
    """A table under its title; in columns that are given by name, long cells are folded."""
    made = [Column(each, overflow="fold") if isinstance(each, str) else each for each in columns]
    caption = Text(printable(note)) if note else None
    name = Text(printable(title))
    return PlainTable(*made, title=name, title_justify="left", title_style="bold", caption=caption)


def fixed(*names: str) -> list[Column]:
    """Columns whose cells are never broken."""
    return [Column(name, no_wrap=True) for name in names]


def numbers(*names: str) -> list[Column]:
    """Columns of numbers."""
    return [Column(name, justify="right", no_wrap=True) for name in names]


def facts_table(title: str, facts: Iterable[tuple[str, str]]) -> Table:
    """Pairs of name and value, without a head."""
    table = titled(title, Column(style="dim", no_wrap=True), "")
    table.show_header = False
    for name, value in facts:
        table.add_row(name, value)
    return table


def parity_table(records: Iterable[ParityRecord], title: str = "Parity") -> Table:
    """Hop, subject, PSNR, gate, verdict."""
    table = titled(title, "hop", "what", *numbers("PSNR dB", "gate", "max error"), *fixed(""))
    for record in records:
        if record.gate is None:
            gate, verdict = "-", Text("reported", "yellow")
        else:
            gate = f"{record.gate:.0f}"
            verdict = Text("passed", "green") if record.passed else Text("FAILED", "bold red")
        value = "identical" if record.value >= IDENTICAL_DB else f"{record.value:.1f}"
        error = f"{record.max_abs_error:.1e}"
        table.add_row(record.hop, record.subject, value, gate, error, verdict)
    return table


def placement_table(placement: Mapping[str, Mapping[str, int]]) -> Table:
    """By graph, how many operations run on which unit, and the share of the first."""
    share = numbers("on the first")
    table = titled("Where the operations run", *fixed("graph"), "operations", *share)
    for graph, units in placement.items():
        first, total = next(iter(units.values())), sum(units.values())
        counted = ", ".join(f"{unit} {count}" for unit, count in units.items())
        table.add_row(graph, counted, f"{first / total:.0%}")
    return table


def overflow_table(graphs: Iterable[GraphAudit], rows: int) -> Table:
    """The largest values of each graph that half precision would hold, and where they stay."""
    title = f"Largest activations (half precision ends at {HALF_MAX:.0f})"
    largest = numbers("max |x|", "of limit")
    table = titled(title, *fixed("graph"), "module", "operation", *largest, "stays in")
    for graph in graphs:
        islands = [island.module for island in graph.islands]
        for index, found in enumerate(graph.largest[:rows]):
            home = next((root for root in islands if lies_in(found.module, [root])), None)
            stays = Text("half" if home is None else "float32", "" if home is None else "yellow")
            if home is not None:
                stays.append(f": {printable(home) or 'all of it'}", "default")
            table.add_row(
                graph.graph if index == 0 else "",
                found.module,
                found.op,
                f"{found.max_abs:.4g}",
                f"{found.share:.2%}",
                stays,
            )
    return table


def island_lines(graphs: Iterable[GraphAudit]) -> list[str]:
    """One line for each graph: what stays in float32, and why."""
    lines = []
    for graph in graphs:
        for island in graph.islands:
            cause = island.cause
            place = f"{graph.graph}/{island.module}".rstrip("/")
            lines.append(
                f"{place} stays in float32: {cause.op} in {cause.module or 'the graph'} reaches "
                f"{cause.max_abs:.4g}, {cause.share:.0%} of half precision's limit"
            )
        if not graph.islands:
            lines.append(f"{graph.graph}: half precision holds all {graph.in_half} values")
    return lines


def graph_table(manifest: Manifest) -> Table:
    """Each graph with its size, precision, inputs and outputs."""
    columns = (*fixed("graph"), *numbers("size"))
    table = titled("Graphs", *columns, "precision", "inputs", "outputs")
    for name, graph in manifest.graphs.items():
        table.add_row(
            name,
            megabytes(graph.size_bytes) if graph.has_onnx else "no ONNX",
            _precision(graph),
            _tensors(graph.inputs),
            _tensors(graph.outputs),
        )
    return table


def _precision(graph: GraphRecord) -> str:
    count = len(graph.float32_modules)
    return graph.precision + (f", {count} module(s) in fp32" if count else "")


def _tensors(specs: tuple[TensorSpec, ...]) -> str:
    shown = [f"{s.name} ({', '.join(map(str, s.shape))})" for s in specs[:3]]
    if len(specs) > 3:
        shown.append(f"and {len(specs) - 3} more")
    return "\n".join(shown)

"""Tables and numbers as people read them."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tiue_export.compare import IDENTICAL_DB
from tiue_export.manifest import Manifest, ParityRecord
from tiue_export.specs import TensorSpec


class PipeConsole(Console):
    """A console that ends quietly when its reader (head, less) has seen enough."""

    def on_broken_pipe(self) -> None:
        """Leave without a complaint and with success, as filters do."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)


# Piped output is not wrapped to a narrow default: the reader's tools see whole lines.
console = PipeConsole(width=None if sys.stdout.isatty() else 140)


def print_json(data: Any) -> None:
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


def parity_table(records: Iterable[ParityRecord], title: str = "Parity") -> Table:
    """Hop, subject, PSNR, gate, verdict."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("hop", "what"):
        table.add_column(column, overflow="fold")
    for column in ("PSNR dB", "gate", "max error"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for record in records:
        if record.gate is None:
            gate, verdict = "-", "[yellow]reported[/]"
        else:
            gate = f"{record.gate:.0f}"
            verdict = "[green]passed[/]" if record.passed else "[bold red]FAILED[/]"
        value = "identical" if record.value >= IDENTICAL_DB else f"{record.value:.1f}"
        error = f"{record.max_abs_error:.1e}"
        table.add_row(escape(record.hop), escape(record.subject), value, gate, error, verdict)
    return table


def graph_table(manifest: Manifest) -> Table:
    """Each graph with its size, precision, inputs and outputs."""
    table = Table(title="Graphs", title_justify="left", title_style="bold")
    table.add_column("graph", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("precision")
    table.add_column("inputs", overflow="fold")
    table.add_column("outputs", overflow="fold")
    for name, graph in manifest.graphs.items():
        size_bytes = sum(record.size_bytes for record in graph.files.values())
        table.add_row(
            name,
            megabytes(size_bytes),
            graph.precision,
            _tensors(graph.inputs),
            _tensors(graph.outputs),
        )
    return table


def _tensors(specs: tuple[TensorSpec, ...]) -> str:
    shown = [f"{s.name} ({', '.join(map(str, s.shape))})" for s in specs[:3]]
    if len(specs) > 3:
        shown.append(f"and {len(specs) - 3} more")
    return "\n".join(shown)

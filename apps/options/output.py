"""Where results go and how they are told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .group import OptionGroup


@dataclass(frozen=True)
class JsonOptions(OptionGroup):
    """How results are told."""

    panel = "Output"
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables.")
    ] = False


@dataclass(frozen=True)
class WriteOptions(OptionGroup):
    """What of a command that writes is replaced, and how it is told."""

    panel = "Output"
    force: Annotated[bool, typer.Option("--force", help="Replace existing output.")] = False
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables.")
    ] = False


@dataclass(frozen=True)
class BundleOutput(OptionGroup):
    """A bundle to write."""

    panel = "Output"
    out: Annotated[
        Path | None, typer.Option("--out", help="Bundle to write \\[default: NAME-PRECISION].")
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = (
        False
    )
    force: Annotated[bool, typer.Option("--force", help="Replace existing output.")] = False
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables.")
    ] = False

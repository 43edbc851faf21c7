"""Where results go and how they are told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .group import OptionGroup, option


@dataclass(frozen=True)
class JsonOptions(OptionGroup):
    """How results are told."""

    panel = "Output"
    as_json: bool = option(False, "Print one JSON object instead of tables.", "--json")


@dataclass(frozen=True)
class WriteOptions(OptionGroup):
    """What of a command that writes is replaced, and how it is told."""

    panel = "Output"
    force: bool = option(False, "Replace existing output.")
    as_json: bool = option(False, "Print one JSON object instead of tables.", "--json")


@dataclass(frozen=True)
class BundleOutput(OptionGroup):
    """A bundle to write."""

    panel = "Output"
    out: Path | None = option(
        None, "Bundle to write \\[default: NAME-PRECISION, or NAME-FORM where it is all there is]."
    )
    dry_run: bool = option(False, "Print the plan, write nothing.")
    force: bool = option(False, "Replace existing output.")
    as_json: bool = option(False, "Print one JSON object instead of tables.", "--json")

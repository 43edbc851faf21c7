"""The options of `tiue-export audit`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .checkpoint import CheckpointOptions, FamilyOptions, PartOptions, StepOptions
from .graphs import HoistOptions, SizeOptions
from .group import OptionGroup, option
from .output import JsonOptions


@dataclass(frozen=True)
class AuditScope(OptionGroup):
    """What is drawn for the audit, and how much of it is told."""

    panel = "Audit"
    prompts: Path | None = option(None, "Text file, one prompt a line \\[default: two of ours].")
    top: int = option(10, "Operations to list for each graph.")


@dataclass(frozen=True)
class AuditRequest(
    JsonOptions,
    AuditScope,
    HoistOptions,
    SizeOptions,
    StepOptions,
    FamilyOptions,
    PartOptions,
    CheckpointOptions,
):
    """An audit of one student."""

"""`tiue-export audit`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..options.checkpoint import CheckpointOptions, FamilyOptions, PartOptions, StepOptions
from ..options.graphs import HoistOptions, SizeOptions
from ..options.group import OptionGroup, command, option
from ..options.output import JsonOptions


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


@command
def audit(request: AuditRequest) -> None:
    """Show how near a student's values come to half precision's limit, and what must stay float32.

    Example:  tiue-export audit --ckpt student.safetensors --base sd21-base/ --prompts prompts.txt
    """
    from ..overflow_audit import run

    run(request)

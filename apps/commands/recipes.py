"""`tiue-export recipes`."""

from __future__ import annotations

from ..options.group import command
from ..options.output import JsonOptions


@command
def recipes(output: JsonOptions) -> None:
    """List the few-step students that can be exported: SD-Turbo, LCM, Hyper-SD and others.

    Example:  tiue-export recipes"""
    from ..recipes import run

    run(output.as_json)

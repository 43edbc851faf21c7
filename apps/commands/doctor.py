"""`tiue-export doctor`."""

from __future__ import annotations

from ..options.group import command
from ..options.output import JsonOptions


@command
def doctor(output: JsonOptions) -> None:
    """Say what is installed and which runtimes can run here, and why not.

    Example:  tiue-export doctor
    """
    from ..doctor import run

    run(output.as_json)

"""How the benchmarks' own commands end: with a message, never with a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tiue_export.errors import TiueError


def run_explained(command: Callable[[], None]) -> None:
    """Run a benchmark's command; print what went wrong and what to type next, and exit."""
    try:
        command()
    except TiueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

"""From exceptions to messages and exit codes: no traceback reaches a user."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable, Collection
from typing import ParamSpec

from tiue_export.errors import ResourceError, TiueError

P = ParamSpec("P")
_INTERRUPTED = 130
_ESTIMATE = "--dry-run"
_LESS_MEMORY = ("--batch", "--height", "--width", "--vae-tile", "--workers", "--low-memory")
_DEBUG = "TIUE_EXPORT_DEBUG"


def explained(command: Callable[P, None], flags: Collection[str] = ()) -> Callable[P, None]:
    """Run a command; print what went wrong, what was expected and what to type next, and exit.

    With TIUE_EXPORT_DEBUG=1 exceptions pass through with their traceback. `flags` are the
    command's: none that it lacks is advised.
    """

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        if os.environ.get(_DEBUG):
            command(*args, **kwargs)
            return
        try:
            command(*args, **kwargs)
        except TiueError as error:
            _stop(error.message, error.next_step, error.exit_code)
        except KeyboardInterrupt as interrupt:  # a training says in it how to go on
            message = str(interrupt) or "interrupted; nothing unfinished was kept"
            _stop(message, None, _INTERRUPTED)
        except MemoryError:
            _stop("memory ran out", _less_memory(flags), ResourceError.exit_code)
        except BrokenPipeError:
            # The reader of our output (head, less) has seen enough.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - lives until exit
            sys.exit(0)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                _stop("the disk is full", "Free some space.", ResourceError.exit_code)
            where = f"{error.filename}: " if error.filename else ""
            _stop(f"{where}{error.strerror or error}", None, ResourceError.exit_code)
        except Exception as error:
            if "allocate memory" in str(error) or "out of memory" in str(error):  # torch, ORT
                _stop("memory ran out", _less_memory(flags), ResourceError.exit_code)
            _stop(
                f"internal error: {type(error).__name__}: {str(error).strip()[:300]}",
                f"This is a defect: please report it with the output of {_DEBUG}=1 and "
                "`tiue-export doctor --json`.",
                TiueError.exit_code,
            )

    return guarded


def _less_memory(flags: Collection[str]) -> str:
    less = ", ".join(flag for flag in _LESS_MEMORY if flag in flags)
    return (
        "Close other programs"
        + (f", or ask for less ({less})" if less else "")
        + ("; --dry-run estimates the need." if _ESTIMATE in flags else ".")
    )


def run_explained(command: Callable[[], None]) -> None:
    """Run a benchmark's own command line as those of the program are run."""
    explained(command)()


def _stop(message: str, next_step: str | None, exit_code: int) -> None:
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    label = "\033[1;31merror:\033[0m" if colour else "error:"
    print(f"{label} {message}", file=sys.stderr)
    if next_step:
        print(f"  next: {next_step}", file=sys.stderr)
    sys.exit(exit_code)

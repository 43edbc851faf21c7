"""Every error a user can meet, with the exit code the command line ends with.

    TiueError                      1
     +- UsageError                 2   an option or argument cannot be honoured
     +- CheckpointError            3   the weights file or folder is damaged, incomplete or not safe
     +- UnsupportedModelError      4   the weights are sound, but no SD 1.x/2.x student
     +- ScheduleError              5   the scheduler breaks the closed formula
     +- BundleError                6   a bundle is missing, damaged, unfinished or in the way
     +- ParityError                7   a conversion lost more than its gate allows
     +- MissingExtraError          8   an optional package is not installed
     +- RuntimeFailure             9   a runtime was fed wrongly, or produced non-finite numbers
     +- ResourceError             10   disk or memory ran out
     +- RegressionError           11   a benchmark is slower than it may be

A message says what was got and what was expected; `next_step` says what to type.
Exit codes are stable: scripts may rely on them. Ctrl-C ends with 130.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

_LONGEST = 4_000


def printable(text: str, length: int | None = None) -> str:
    """Text that any terminal shows and any file holds: control characters and half ones escaped.

    What a message tells of a file may be anything. `length` cuts what is longer.
    """
    if length is not None and len(text) > length:
        text = f"{text[:length]}..."
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(
        each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in text
    )


class TiueError(Exception):
    """Root of the tree; catching it catches every failure that this package explains."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, next_step: str | None = None) -> None:
        self.message = printable(message, _LONGEST)
        self.next_step = None if next_step is None else printable(next_step, _LONGEST)
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message if self.next_step is None else f"{self.message}\n{self.next_step}"


class UsageError(TiueError):
    exit_code = 2


class CheckpointError(TiueError):
    exit_code = 3


class UnsupportedModelError(TiueError):
    exit_code = 4


class ScheduleError(TiueError):
    exit_code = 5


class BundleError(TiueError):
    exit_code = 6


class ParityError(TiueError):
    """`hops` are the conversions that lost too much, as their parity records name them."""

    exit_code = 7

    def __init__(
        self, message: str, next_step: str | None = None, hops: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message, next_step)
        self.hops = hops


class MissingExtraError(TiueError):
    exit_code = 8


class RuntimeFailure(TiueError):
    exit_code = 9


class ResourceError(TiueError):
    exit_code = 10


class RegressionError(TiueError):
    exit_code = 11


class TiueWarning(UserWarning):
    """What a user should know of work that goes on all the same."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def unknown_name(kind: str, got: str, legal: Iterable[str]) -> UsageError:
    """The error for a name that is not in a closed list, with the nearest legal spelling."""
    import difflib

    names = sorted(legal)
    close = difflib.get_close_matches(got, names, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else None
    return UsageError(f"unknown {kind} {got!r}; there are: {', '.join(names)}", hint)

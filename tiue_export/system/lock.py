"""One process at a time: a lock file, gone when nobody holds it, signed by who does."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from tiue_export.errors import UsageError


def lock_beside(target: Path) -> Path:
    """The lock of a file or folder that need not be there yet."""
    return target.with_name(f".{target.name}.lock")


@contextlib.contextmanager
def sole_process(file: Path, doing: str) -> Iterator[None]:
    """Hold the lock `file` for the block; `UsageError` where another process holds it.

    `doing` says what both do: "drawing into pictures/". On systems and disks without file locks
    nobody is kept out.
    """

    def refuse(holder: str) -> None:
        raise UsageError(
            f"{holder} is {doing} at this moment",
            "Wait until it has ended, or choose another output.",
        )

    with file_lock(file, refuse):
        yield


@contextlib.contextmanager
def file_lock(file: Path, on_busy: Callable[[str], None]) -> Iterator[bool]:
    """Hold the lock `file` for the block; gives whether there are locks here.

    While another process holds it, `on_busy` is told its name, and asked again when it returns.
    The system ends the lock of a process that dies.
    """
    held = _acquire(file, on_busy)
    if held is None:
        yield False
        return
    with held:
        try:
            yield True
        finally:
            # While it is locked: whoever waits sees that its file is not this path's, and opens
            # the next one. Not so where the folder was replaced: that file is somebody else's.
            if _is_at(held, file):
                file.unlink()


def _acquire(path: Path, on_busy: Callable[[str], None]) -> IO[str] | None:
    """The lock file, locked and signed; None where the system or the disk has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                holder = _holder(file)
            on_busy(holder)
            continue
        except OSError:  # some network file systems
            file.close()
            path.unlink(missing_ok=True)
            return None
        if _is_at(file, path):
            file.truncate(0)
            file.write(f"{Path(sys.argv[0]).name}, process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            return file
        file.close()


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether the open file is still the one at `path`: its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read() or "another process"

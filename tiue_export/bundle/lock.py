"""One writer of a bundle at a time: a lock file that the manifest never lists, and who holds it."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

LOCK_FILE = ".tiue.lock"
_POLL_S = 0.1
_PATIENCE_S = 1.0


@contextlib.contextmanager
def locked(root: Path, on_note: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Hold the bundle folder `root` for the block; whoever holds it already is waited for.

    A wait longer than a second is told to `on_note` with the name of the process that holds it, and
    so is a system or disk without file locks, where the block runs unprotected. The system ends the
    lock of a process that dies; the file is gone when nobody holds it.
    """
    file = _acquire(root / LOCK_FILE, root, on_note)
    if file is None:
        on_note(f"no file locks here: let no other tiue-export add to {root} meanwhile")
        yield
        return
    with file:
        try:
            yield
        finally:
            # While it is locked: whoever waits finds that its file is not this path's, and opens
            # the next one. Not so where the folder was replaced: that file is somebody else's.
            if _is_at(file, root / LOCK_FILE):
                (root / LOCK_FILE).unlink()


def _acquire(path: Path, root: Path, on_note: Callable[[str], None]) -> IO[str] | None:
    """The lock file, locked and signed; None where the system or the disk has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    start, told = time.monotonic(), False
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not told and time.monotonic() - start > _PATIENCE_S:
                told = True
                on_note(f"waiting for {_holder(file)}, which is adding to {root}")
            file.close()
            time.sleep(_POLL_S)
            continue
        except OSError:  # some network file systems
            file.close()
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

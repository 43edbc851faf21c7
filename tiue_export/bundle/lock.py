"""One writer of a bundle at a time: whoever adds to it waits for who is adding."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tiue_export.system.lock import file_lock

LOCK_FILE = ".tiue.lock"  # which the manifest never lists
_POLL_S = 0.1
_PATIENCE_S = 1.0


@contextlib.contextmanager
def locked(root: Path, on_note: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Hold the bundle folder `root` for the block; whoever holds it already is waited for.

    A wait longer than a second is told to `on_note` with the name of the process that holds it, and
    so is a system or disk without file locks, where the block runs unprotected.
    """
    start, told = time.monotonic(), False

    def wait(holder: str) -> None:
        nonlocal told
        if not told and time.monotonic() - start > _PATIENCE_S:
            told = True
            on_note(f"waiting for {holder}, which is adding to {root}")
        time.sleep(_POLL_S)

    with file_lock(root / LOCK_FILE, wait) as has_locks:
        if not has_locks:
            on_note(f"no file locks here: let no other tiue-export add to {root} meanwhile")
        yield

"""Folders that are written whole or not at all: beside their place, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from tiue_export.system.disk_errors import disk_errors
from tiue_export.system.lock import lock_beside, sole_process
from tiue_export.system.owned_path import abandoned_paths, owned_path, remove

PARTIAL = "partial"
_REPLACED = "replaced"


@contextlib.contextmanager
def new_folder(
    target: Path,
    check: Callable[[], None],
    replacing: Callable[[Path], AbstractContextManager[None]] = lambda target: nullcontext(),
) -> Iterator[Path]:
    """A fresh folder beside `target` that becomes `target` when the block ends without an error.

    A killed or failed writing leaves `target` as it was; what killed ones left goes first. `check`
    raises where something is in the way; it is asked before the work and after it, as hours may
    have passed. `replacing(target)` is held while an earlier folder gives place. Raises
    `UsageError` while another process writes the same folder.
    """
    remove_leftovers(target)
    check()
    partial = owned_path(target, PARTIAL)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(target), sole_process(lock_beside(target), f"writing {target}"):
        try:  # before mkdir: a SIGTERM that arrives while it runs raises as it returns
            partial.mkdir()
            yield partial
            force_to_disk(partial)
            check()
            _replace(partial, target, replacing)
        finally:
            remove(partial)


def _replace(
    partial: Path, target: Path, replacing: Callable[[Path], AbstractContextManager[None]]
) -> None:
    if not target.exists():
        partial.rename(target)
        return
    # A kill between the two renames leaves the old folder under this name; the next writing of
    # the same place puts it back (`remove_leftovers`).
    old = owned_path(target, _REPLACED)
    with replacing(target):
        target.rename(old)
        try:
            partial.rename(target)
        except OSError:
            old.rename(target)
            raise
    shutil.rmtree(old)


def remove_leftovers(target: Path) -> None:
    """Delete what killed processes left beside `target`, or put the earlier folder back."""
    for path, state in abandoned_paths(target):
        if state == _REPLACED and not target.exists():
            path.rename(target)
        else:
            remove(path)


def force_to_disk(folder: Path) -> None:
    """Every file of it, so that a power cut cannot leave a folder with empty files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())

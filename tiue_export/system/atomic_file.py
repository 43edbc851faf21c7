"""Replace a file in one step, so that a kill at any moment leaves the old or the new."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tiue_export.system.owned_path import abandoned_paths, owned_path, remove


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path` that becomes it when the block ends without an error."""
    for leftover, _ in abandoned_paths(path):
        remove(leftover)
    partial = owned_path(path, "partial")  # another process may write the same file
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(file: Path, content: bytes) -> None:
    """Write beside `file` and rename, so that a reader sees the old content or the new."""
    with new_file(file) as stream:
        stream.write(content)

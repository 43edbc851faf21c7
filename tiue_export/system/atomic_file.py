"""Replace a small file in one step, so that a kill at any moment leaves the old or the new."""

from __future__ import annotations

import os
from pathlib import Path

from tiue_export.system.owned_path import abandoned_paths, owned_path, remove


def write_atomically(file: Path, content: bytes) -> None:
    """Write beside `file` and rename, so that a reader sees the old content or the new."""
    partial = owned_path(file, "partial")  # another process may write the same file
    for path, _ in abandoned_paths(file):
        remove(path)
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise

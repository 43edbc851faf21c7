"""Writing files so that a full or read-only disk ends in an error that says what to do."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from tiue_export.errors import ResourceError

_FULL = {errno.ENOSPC, errno.EDQUOT}
# numpy's `tofile`, with which weights are written, tells a short write in words and no number.
_SHORT_WRITE = ("problem writing element", "requested and")


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn a full disk or a read-only place into an error that says what to do."""
    try:
        yield
    except OSError as error:
        short = error.errno is None and any(words in str(error) for words in _SHORT_WRITE)
        if short or error.errno in _FULL:
            raise ResourceError(
                f"the disk of {target.parent} is full; nothing unfinished was kept",
                "Free some space, or choose another output.",
            ) from error
        if error.errno in {errno.EACCES, errno.EROFS, errno.EPERM}:
            raise ResourceError(f"{target} cannot be written: {error.strerror}") from error
        raise

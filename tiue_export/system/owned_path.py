"""Files and folders while they are written: hidden, beside their target, named by their process.

.NAME.STATE-HOST-PROCESS-RANDOM: what a killed process leaves is known by its name, and goes when
the next one works at the same target.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

_OWNED = re.compile(
    r"\.(?P<name>.+)\.(?P<state>[a-z]+)-(?P<host>[^-]+)-(?P<pid>\d{1,9})-[0-9a-f]{8}"
)


def owned_path(target: Path, state: str) -> Path:
    """A hidden sibling of `target`, of this process; `state` is a lower-case word."""
    owner = f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    return target.with_name(f".{target.name}.{state}-{owner}")


def is_owned(name: str, state: str) -> bool:
    """Whether a file's name is one that `owned_path` gives in this state, on any machine."""
    match = _OWNED.fullmatch(name)
    return match is not None and match["state"] == state


def abandoned_paths(target: Path) -> Iterator[tuple[Path, str]]:
    """What dead processes of this machine left beside `target`, with its state."""
    try:
        beside = list(target.parent.iterdir())
    except OSError:  # no folder, or one that may not be listed
        return
    for path in beside:
        match = _OWNED.fullmatch(path.name)
        if not match or match["name"] != target.name or match["host"] != _host():
            continue
        if not _is_alive(int(match["pid"])):
            yield path, match["state"]


def remove(path: Path) -> None:
    """Delete a file or a whole folder, as far as that is allowed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def remove_temporary_leftovers(parent: Path | None = None) -> Path:
    """Delete what killed processes left in `parent`; returns what its folders are named after."""
    target = (parent or Path(tempfile.gettempdir())) / "tiue-export"
    for path, _ in abandoned_paths(target):
        remove(path)
    return target


@contextlib.contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """An empty folder in `parent` (the system's temporary one) that is gone after the block."""
    folder = owned_path(remove_temporary_leftovers(parent), "work")
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        remove(folder)


def session_folder() -> Path:
    """An empty folder in the system's temporary one that is gone when the process ends."""
    folder = owned_path(remove_temporary_leftovers(), "work")
    folder.mkdir(mode=0o700)
    atexit.register(remove, folder)
    return folder


def _host() -> str:
    return re.sub(r"\W", "_", socket.gethostname()) or "host"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

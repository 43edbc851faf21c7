"""A file's size and SHA-256, read once, in pieces; of a large one that is unchanged, remembered.

A bundle of Stable Diffusion's size has 5 GB, and hashing them takes longer than drawing with a
prepared runtime. A file is taken to be unchanged while its device, inode, size and the times of its
last change are the same, as git and make take it. What a disk loses by itself is found by reading
alone: `anew`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from pathlib import Path

from tiue_export.system.atomic_file import write_atomically
from tiue_export.system.cache_folder import user_cache_folder

CACHE_KIND = "hashes"
_FILE = "known.json"
_PIECE_BYTES = 1 << 20
# Smaller files are read as fast as their hash is looked up.
_REMEMBERED_BYTES = 16 << 20
# Two writes within a clock's tick leave the same time: what is younger may change unseen.
_SETTLED_NS = 2_000_000_000
_MOST = 500

_lock = threading.Lock()


def size_and_sha256(path: Path, *, anew: bool = False) -> tuple[int, str]:
    """Bytes, and the hash in hexadecimal; `anew`: read whatever is remembered of the file."""
    status = path.stat()
    if status.st_size < _REMEMBERED_BYTES:
        return _read(path)
    key, state = _identity(status)
    if not anew and (known := _known().get(key)) is not None and known[:-1] == state:
        return status.st_size, str(known[-1])
    began_ns = time.time_ns()
    size_bytes, sha256 = _read(path)
    settled = began_ns - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS
    if settled and _identity(path.stat()) == (key, state):
        _remember(key, [*state, sha256])
    return size_bytes, sha256


def _read(path: Path) -> tuple[int, str]:
    digest, size_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            size_bytes += len(piece)
    return size_bytes, digest.hexdigest()


def _identity(status: os.stat_result) -> tuple[str, list[int]]:
    times = [status.st_mtime_ns, status.st_ctime_ns]
    return f"{status.st_dev}:{status.st_ino}", [status.st_size, *times]


def _known() -> dict[str, list[int | str]]:
    """What is remembered; nothing where the file is absent or damaged."""
    try:
        known = json.loads(_place().read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: value for key, value in known.items() if isinstance(value, list) and value}


def _remember(key: str, value: list[int | str]) -> None:
    # A cache that cannot be written costs time at the next start, and is never an error.
    with _lock, contextlib.suppress(OSError):
        known = _known()
        known.pop(key, None)
        newest = [*known.items(), (key, value)][-_MOST:]
        _place().parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_place(), json.dumps(dict(newest)).encode())


def _place() -> Path:
    return user_cache_folder() / CACHE_KIND / _FILE

"""A file's size and SHA-256, read once, in pieces."""

from __future__ import annotations

import hashlib
from pathlib import Path

_PIECE_BYTES = 1 << 20


def size_and_sha256(path: Path) -> tuple[int, str]:
    """Bytes, and the hash in hexadecimal."""
    digest, size_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            size_bytes += len(piece)
    return size_bytes, digest.hexdigest()

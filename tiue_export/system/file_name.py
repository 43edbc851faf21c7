"""Names of files as other files tell them: a place below a folder on every system, or refused."""

from __future__ import annotations

from pathlib import PurePosixPath

# What file systems take at most, in bytes.
_NAME_BYTES, _PATH_BYTES = 255, 1024


def is_path_below(name: object) -> bool:
    """Whether `name` is the plain spelling of a path below the folder that it is told of.

    "", ".", "..", "/a", "a//b", "a/./b" and names that cannot be printed are none; nor is a
    backslash or a colon, which mean another folder on Windows.
    """
    if not isinstance(name, str) or not name.isprintable() or any(sign in name for sign in "\\:"):
        return False
    pure, path_bytes = PurePosixPath(name), len(name.encode())
    plain = pure.as_posix() == name and not pure.is_absolute() and pure.parts != ()
    short = all(len(part.encode()) <= _NAME_BYTES for part in pure.parts)
    return plain and ".." not in pure.parts and short and path_bytes <= _PATH_BYTES


def is_file_name(name: object) -> bool:
    """Whether `name` is a file in the very folder that it is told of."""
    return is_path_below(name) and "/" not in str(name)

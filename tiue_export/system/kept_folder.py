"""What is kept for the next start: sealed by its SHA-256, thrown away when wrong, bounded in size.

An entry is a folder, user cache / KIND / NAME, that holds a list of its files with their hashes.
It is written beside its place and renamed, so that a kill leaves an entry or none; what does not
fit its list (a damaged disk, another version's files) is deleted and made again. A cache that
cannot be written costs time at the next start, and is never an error.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from tiue_export.errors import TiueWarning, UsageError
from tiue_export.system.cache_folder import user_cache_folder
from tiue_export.system.file_hash import size_and_sha256
from tiue_export.system.owned_path import abandoned_paths, is_owned, owned_path, remove

SEAL = "sha256.json"
LIMIT_VARIABLE = "TIUE_EXPORT_CACHE_GB"
_LIMIT_GB = 8.0
_PARTIAL = "partial"


class KeptFolder:
    """One entry. `place` is where it is read, or written until `save`; None: nothing is kept.

    `is_whole` says that it was there as it was sealed, and need not be made again.
    """

    def __init__(self, kind: str, name: str) -> None:
        self._entry = user_cache_folder() / kind / name
        # One that another process puts there from now on is not the damaged one.
        was_there = self._entry.exists()
        self.is_whole = _is_sealed(self._entry)
        if was_there and not self.is_whole:
            remove(self._entry)
        self.place = self._entry if self.is_whole else self._new_place()

    def save(self, files: Mapping[str, bytes] | None = None) -> None:
        """Write `files` and seal all of `place`, put it where it belongs, let the oldest go.

        What another process put there meanwhile is used instead.
        """
        if self.place is None:
            return
        try:
            for name, content in (files or {}).items():
                (self.place / name).write_bytes(content)
            if not any(_files(self.place)):  # a library that writes by itself may keep silent
                raise OSError(errno.ENOSPC, "nothing could be written")
            _seal(self.place)
            if self.place != self._entry:
                self._put()
        except OSError as error:
            self.drop()
            self._warn(error)
            return
        with contextlib.suppress(OSError):  # others make room too, and entries are gone meanwhile
            make_room(self._entry)

    def drop(self) -> None:
        """Keep nothing."""
        if self.place is not None:
            remove(self.place)
        self.place = None

    def _put(self) -> None:
        assert self.place is not None
        try:
            self.place.rename(self._entry)
        except OSError:
            if not _is_sealed(self._entry):
                raise
            remove(self.place)
        self.place = self._entry

    def _new_place(self) -> Path | None:
        place = owned_path(self._entry, _PARTIAL)
        try:
            for path, _ in abandoned_paths(self._entry):
                remove(path)
            place.mkdir(parents=True)
        except OSError as error:
            self._warn(error)
            return None
        return place

    def _warn(self, error: OSError) -> None:
        warnings.warn(
            f"{self._entry.parent} cannot be written ({error.strerror}): the next start prepares "
            "again what it needs",
            TiueWarning,
            stacklevel=4,
        )


def limit_bytes() -> int:
    """How large all entries may be together; TIUE_EXPORT_CACHE_GB says otherwise."""
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        gigabytes = float(text or _LIMIT_GB)
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < float("inf"):
        raise UsageError(
            f"{LIMIT_VARIABLE} is {text!r}; expected gigabytes, such as 20",
            f"Type: unset {LIMIT_VARIABLE}   (then it is {_LIMIT_GB:g})",
        )
    return int(gigabytes * 1e9)


def make_room(newest: Path) -> None:
    """Delete the entries that were used longest ago until the rest is within the limit.

    `newest` stays. What lies beside it and is no entry is of an earlier version, and goes too.
    """
    for path in newest.parent.iterdir():
        if not (path / SEAL).is_file() and not is_owned(path.name, _PARTIAL):
            remove(path)
    seals = sorted(user_cache_folder().glob(f"*/*/{SEAL}"), key=lambda seal: seal.stat().st_mtime)
    sizes_bytes = {seal.parent: sum(map(_size_bytes, _files(seal.parent))) for seal in seals}
    excess_bytes = sum(sizes_bytes.values()) - limit_bytes()
    for entry, size_bytes in sizes_bytes.items():
        if excess_bytes > 0 and entry != newest:
            remove(entry)
            excess_bytes -= size_bytes


def _is_sealed(entry: Path) -> bool:
    seal = entry / SEAL
    try:
        sealed = json.loads(seal.read_text("utf-8"))
        if sealed != _digests(entry):
            return False
    except (OSError, ValueError, RecursionError):
        return False
    with contextlib.suppress(OSError):  # a cache that is read-only is read all the same
        os.utime(seal)  # used now, which decides who must go
    return True


def _seal(folder: Path) -> None:
    (folder / SEAL).write_text(json.dumps(_digests(folder)), "utf-8")


def _digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): size_and_sha256(path)[1] for path in _files(folder)
    }


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL)


def _size_bytes(path: Path) -> int:
    return path.stat().st_size

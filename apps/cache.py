"""`tiue-export cache`: what is kept for the next start on this machine, and its deletion."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from tiue_export.errors import UsageError, unknown_name
from tiue_export.registry.backends import BACKENDS
from tiue_export.system.cache_folder import user_cache_folder
from tiue_export.system.disk_errors import disk_errors
from tiue_export.system.file_hash import CACHE_KIND as HASHES
from tiue_export.system.kept_folder import LIMIT_VARIABLE, limit_bytes

from .browser.npm_packages import CACHE_KIND
from .report.next_line import print_next
from .report.tables import console, fixed, megabytes, numbers, print_json, titled

# What lies where below the cache folder; files beside the folders are TensorRT's timings.
_TIMINGS = "timings"
KINDS = {
    **{kind: title for entry in BACKENDS.values() for kind, title in entry.caches.items()},
    "runtime-choice": "which runtime was fastest",
    HASHES: "SHA-256 of large files that have not changed",
    CACHE_KIND: "onnxruntime-web and what else a page of `web` loads",
}
_DAY_S = 86400.0


@dataclass(frozen=True)
class Entry:
    """One file or folder that is used, and may be deleted, as a whole."""

    kind: str
    path: Path
    size_bytes: int
    unused_days: float


def entries(folder: Path, now_s: float) -> list[Entry]:
    """Everything kept below `folder`; what is of none of the kinds above is not ours."""
    found = []
    for top in sorted(folder.iterdir()) if folder.is_dir() else ():
        if top.is_dir() and top.name in KINDS:
            found += [_entry(top.name, path, now_s) for path in sorted(top.iterdir())]
        elif top.suffix == ".timing":
            found.append(_entry(_TIMINGS, top, now_s))
    return found


def _entry(kind: str, path: Path, now_s: float) -> Entry:
    status = [path.lstat(), *(inner.lstat() for inner in path.rglob("*"))]
    # Systems that note the time of reading once a day say so within a day.
    used_s = max(max(each.st_mtime, each.st_atime) for each in status)
    size_bytes = sum(each.st_size for each in status)
    return Entry(kind, path, size_bytes, max(0.0, (now_s - used_s) / _DAY_S))


def run(clear: bool, kind: str | None, unused_days: float | None, as_json: bool) -> None:
    """List what is kept, or delete it; `kind` and `unused_days` choose a part."""
    if kind is not None and kind not in KINDS:
        raise unknown_name("kind", kind, KINDS)
    if unused_days is not None and not 0 <= unused_days < float("inf"):
        raise UsageError(f"--unused-days is {unused_days:g}; expected 0 or more")
    folder = user_cache_folder()
    chosen = [
        entry
        for entry in entries(folder, time.time())
        if kind in (None, entry.kind) and entry.unused_days >= (unused_days or 0)
    ]
    if clear:
        for entry in chosen:
            _delete(entry.path)
    size_bytes = sum(entry.size_bytes for entry in chosen)
    if as_json:
        listed = [{**asdict(entry), "unused_days": round(entry.unused_days, 2)} for entry in chosen]
        print_json(
            {
                "folder": folder,
                "size_bytes": size_bytes,
                "limit_bytes": limit_bytes(),
                "deleted": clear,
                "entries": listed,
            }
        )
    elif not chosen:
        console.print(f"nothing of the kind is kept in {folder}", highlight=False)
    elif clear:
        told = f"deleted {len(chosen)} of {folder}: {megabytes(size_bytes)}"
        console.print(told, highlight=False, markup=False)
    else:
        console.print(_table(chosen, folder))
        console.print(
            f"{megabytes(size_bytes)} of at most {megabytes(limit_bytes())}; what was used longest "
            f"ago goes first. Another limit: export {LIMIT_VARIABLE}=20",
            highlight=False,
            soft_wrap=True,
        )
        print_next("tiue-export cache --clear   (all of it can be made again)")


def _delete(path: Path) -> None:
    with disk_errors(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _table(chosen: Sequence[Entry], folder: Path) -> Table:
    counts = numbers("entries", "size", "last used, days ago")
    table = titled(str(folder), *fixed("kind"), "what", *counts)
    for kind, title in KINDS.items():
        own = [entry for entry in chosen if entry.kind == kind]
        if own:
            size = megabytes(sum(entry.size_bytes for entry in own))
            newest = min(entry.unused_days for entry in own)
            table.add_row(kind, title, str(len(own)), size, f"{newest:.0f}")
    return table

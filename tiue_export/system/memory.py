"""Resident memory of this process: its peak over all or a stretch of its work, giving it back."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import threading
from collections.abc import Iterator
from typing import Any

from tiue_export.system.machine import text_of

_INTERVAL_S = 0.02
# Below it there is nothing to be gained, and a collection beside torch takes half a second.
_WORTH_RETURNING_BYTES = 2 << 30


class PeakMemory:
    """Context manager; afterwards `peak_bytes` is the largest resident size seen.

    Resident size counts memory-mapped weights while they are in memory, so it is what the machine
    must hold, not what was allocated.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._process = _process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self.peak_bytes = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Let the garbage collector run rarely while millions of objects are made that stay alive.

    Tracing a graph is that; looking at them all again and again is a fifth of a small export.
    """
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def return_freed_memory() -> None:
    """Hand memory that is free inside the allocator back to the system.

    glibc keeps freed blocks below 32 MB for itself; after the float32 student is gone that is
    gigabytes which the next stage would come on top of. A process below 2 GiB is left alone.
    """
    if _process().memory_info().rss < _WORTH_RETURNING_BYTES:
        return
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def peak_memory_bytes() -> int:
    """The most memory this process ever held, 0 where the system does not tell.

    Not getrusage: across fork and exec it keeps the peak of the parent.
    """
    status = text_of("/proc/self/status") or ""
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _process() -> Any:
    import psutil  # comes with [export]; nothing that only draws measures memory

    return psutil.Process()

"""Pictures kept in memory for a while, for clients that want links."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable


class PictureStore:
    """PNG files under names that cannot be guessed; the oldest give way to new ones."""

    def __init__(
        self,
        capacity: int = 256,
        keep_s: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capacity, self._keep_s, self._clock = capacity, keep_s, clock
        self._files: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, png: bytes) -> str:
        """Keep a file and return its name."""
        name = f"{secrets.token_urlsafe(24)}.png"
        with self._lock:
            self._files[name] = (self._clock(), png)
            while len(self._files) > self._capacity:
                self._files.popitem(last=False)
        return name

    def get(self, name: str) -> bytes | None:
        """The file, or None when it is unknown or too old."""
        with self._lock:
            kept_s, png = self._files.get(name, (float("-inf"), b""))
            if self._clock() - kept_s > self._keep_s:
                self._files.pop(name, None)
                return None
        return png

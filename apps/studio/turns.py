"""Which request of a browser window is the newest: the older ones have become stale."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

_WINDOWS = 256


class Turns:
    """Counts the requests of each window. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest: OrderedDict[str, int] = OrderedDict()
        self._count = 0

    def take(self, window: str) -> Callable[[], bool]:
        """Begin a request; the answer says whether a newer one of the same window has begun."""
        with self._lock:
            self._count += 1
            mine = self._newest[window] = self._count
            self._newest.move_to_end(window)
            while len(self._newest) > _WINDOWS:
                self._newest.popitem(last=False)
        return lambda: self._newest.get(window) != mine


def still_wanted(is_stale: Callable[[], bool], pause_s: float) -> bool:
    """Wait for a pause in the typing; False when another key was pressed meanwhile."""
    end = time.monotonic() + pause_s
    while not is_stale():
        left_s = end - time.monotonic()
        if left_s <= 0:
            return True
        time.sleep(min(left_s, 0.02))
    return False

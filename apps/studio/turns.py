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
        self._newest: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self._count = 0

    def take(self, window: str, sent: float = 0) -> Callable[[], bool]:
        """Begin a request; the answer says whether a newer one of the same window has begun.

        `sent` is the window's own count of its requests: they may arrive in another order, and the
        one that arrives last need not hold what was typed last. Equal counts: the order of arrival.
        """
        with self._lock:
            self._count += 1
            mine = (sent, self._count)
            self._newest[window] = max(mine, self._newest.get(window, mine))
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

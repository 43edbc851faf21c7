"""How far a bulk run is: a bar with images/s and time left, or a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 10.0


class Pace:
    """Pictures drawn by this run, and the time it took."""

    def __init__(self, total: int, found: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.found, self.drawn = total, found, 0
        self._clock, self._start = clock, clock()

    def add(self, pictures: int) -> None:
        """Count pictures that were drawn and written."""
        self.drawn += pictures

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._start

    @property
    def pictures_per_s(self) -> float:
        """Of this run alone: what was found took no time."""
        return self.drawn / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def remaining_s(self) -> float | None:
        """Time left at this pace, None before there is one."""
        left = self.total - self.found - self.drawn
        return left / self.pictures_per_s if self.drawn else None

    def line(self) -> str:
        """One plain line."""
        left = self.remaining_s
        eta = "" if left is None else f", {duration(left)} left"
        done = self.found + self.drawn
        return f"{done}/{self.total} pictures, {self.pictures_per_s:.2f} images/s{eta}"


@contextmanager
def shown(pace: Pace, *, quiet: bool) -> Iterator[Callable[[], None]]:
    """Yields what to call after each chunk."""
    if quiet:
        yield lambda: None
        return
    stderr = Console(stderr=True)
    if not sys.stderr.isatty():
        last_s = pace.elapsed_s

        def tell() -> None:
            nonlocal last_s
            if pace.elapsed_s - last_s >= _LINE_EVERY_S:
                last_s = pace.elapsed_s
                stderr.print(pace.line(), markup=False, highlight=False)

        yield tell
        return
    columns = (
        TextColumn("drawing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.2f} images/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True, speed_estimate_period=300) as bar:
        task = bar.add_task("", total=pace.total, completed=pace.found, rate=0.0)
        yield lambda: bar.update(task, completed=pace.found + pace.drawn, rate=pace.pictures_per_s)


def duration(seconds: float) -> str:
    """Seconds as people say them: 41 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

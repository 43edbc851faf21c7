"""Progress of long work, in one vocabulary: stages with their time, peak memory and output size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tiue_export.system.memory import PeakMemory, return_freed_memory


@dataclass(frozen=True)
class StageReport:
    """One finished stage ("export NAME", "verify NAME"): what it wrote, the memory it needed."""

    stage: str
    seconds: float
    peak_memory_bytes: int
    size_bytes: int = 0


@dataclass(frozen=True)
class Observer:
    """How long work tells of its progress; the default tells nobody.

    `on_progress` hears how far a long stage is, 0 to 1, and what it is at; `on_note` what the user
    should know and keep, such as settings that had to give way.
    """

    on_start: Callable[[str], None] = lambda stage: None
    on_done: Callable[[StageReport], None] = lambda report: None
    on_progress: Callable[[float, str], None] = lambda fraction, detail: None
    on_note: Callable[[str], None] = lambda text: None

    def steps_of(self, stage: str) -> Callable[[int, int], None]:
        """A listener for a sampler's steps that tells of them as the stage's progress."""
        return lambda done, total: self.on_progress(done / total, f"{stage}: {done} of {total}")


@dataclass
class Stage:
    """A stage while it runs: its work fills in `size_bytes`; time and memory are there at its end.

    Where a child process does the work, the memory is the child's, and the work fills it in too.
    """

    name: str
    size_bytes: int = 0
    peak_memory_bytes: int = 0
    seconds: float = 0.0


@contextmanager
def stage(observer: Observer, name: str, *, in_child: bool = False) -> Iterator[Stage]:
    """Tell `observer` of the block, with its time and peak memory; an error tells no end.

    `in_child`: a child process does the work, and this one's memory is not measured (which needs
    psutil, that a Jetson does without).
    """
    observer.on_start(name)
    running, start = Stage(name), time.perf_counter()
    if in_child:
        yield running
    else:
        return_freed_memory()
        with PeakMemory() as memory:
            yield running
        running.peak_memory_bytes = memory.peak_bytes
    running.seconds = time.perf_counter() - start
    observer.on_done(
        StageReport(name, running.seconds, running.peak_memory_bytes, running.size_bytes)
    )

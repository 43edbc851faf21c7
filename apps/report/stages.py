"""The stages of a long command as they pass: a moving line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from tiue_export.system.progress import Observer, StageReport

from .tables import megabytes

_DETAIL_LETTERS = 60
# Where no bar moves, long work says after so long that it goes on.
_SILENCE_S = 60.0


class StageBar:
    """Tells on standard error which stage runs, what each took and the memory it needed."""

    def __init__(self, progress: Progress, stderr: Console) -> None:
        self._progress, self._stderr = progress, stderr
        self._task = progress.add_task("starting", total=None)
        self._finished = 0
        self._told_s = time.monotonic()

    def expect(self, stages: int) -> None:
        """The number of stages in all, once it is known."""
        self._progress.update(self._task, total=stages)

    def begin(self, stage: str) -> None:
        """A stage starts."""
        self._progress.update(self._task, description=stage)

    def within(self, fraction: float, detail: str) -> None:
        """How far the running stage is, from 0 to 1, and what it is at."""
        done = self._finished + fraction
        self._progress.update(self._task, completed=done, description=detail[:_DETAIL_LETTERS])
        if self._progress.disable and time.monotonic() - self._told_s >= _SILENCE_S:
            self.note(f"{detail[:_DETAIL_LETTERS]} ({fraction:.0%})")

    def note(self, text: str) -> None:
        """A line that stays."""
        self._stderr.print(f"  {text}", markup=False, highlight=False)
        self._told_s = time.monotonic()

    def done(self, report: StageReport) -> None:
        """A stage ended."""
        size = megabytes(report.size_bytes) if report.size_bytes else ""
        self._stderr.print(
            f"  {report.stage:<24}{report.seconds:7.1f} s   {size:>8}   "
            f"peak memory {megabytes(report.peak_memory_bytes)}",
            highlight=False,
        )
        self._finished += 1
        self._progress.update(self._task, completed=self._finished)

    def observer(self, reports: list[StageReport] | None = None) -> Observer:
        """What long work tells, shown here; its finished stages are added to `reports` too."""

        def on_done(report: StageReport) -> None:
            if reports is not None:
                reports.append(report)
            self.done(report)

        return Observer(self.begin, on_done, self.within, self.note)


@contextmanager
def step_bar(*, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar for the steps of a loop: call it with steps done and steps in all."""
    columns = (TextColumn("{task.completed} of {task.total} steps"), BarColumn())
    with _progress(Console(stderr=True, quiet=not shown), *columns) as progress:
        task = progress.add_task("steps", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def stage_bar(*, quiet: bool) -> Iterator[StageBar]:
    """A bar for the length of a command; `quiet` shows nothing."""
    stderr = Console(stderr=True, quiet=quiet)
    name = TextColumn("{task.description:<24}")
    with _progress(stderr, SpinnerColumn(), name, BarColumn(), TimeElapsedColumn()) as progress:
        yield StageBar(progress, stderr)


def _progress(stderr: Console, *columns: ProgressColumn) -> Progress:
    """A bar that moves on a terminal and goes when it is done; elsewhere nothing is shown."""
    hidden = stderr.quiet or not sys.stderr.isatty()
    return Progress(*columns, console=stderr, transient=True, disable=hidden)

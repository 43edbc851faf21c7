"""The loop all our trainings share: resume, step, journal, save, progress.

A training is a function of the step number: `one_step(step)` draws its randomness from (seed, step)
alone. A run that was killed and resumed therefore ends with the same bits as an unbroken one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tiue_export.errors import CheckpointError, RuntimeFailure, first_line

from .run_folder import STATE_FILE, RunFolder


class Stateful(Protocol):
    """What can be saved and restored: modules, optimizers, averages."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state_dict: Any) -> Any: ...


def train(
    run: RunFolder,
    parts: Mapping[str, Stateful],
    steps: int,
    one_step: Callable[[int], Mapping[str, float]],
    *,
    title: str,
    log_every: int = 20,
    save_every: int = 200,
    after_save: Callable[[int], None] = lambda step: None,
    on_log: Callable[[int, Mapping[str, float]], None] = lambda step, figures: None,
    on_start: Callable[[int], None] = lambda done: None,
    writes: bool = True,
) -> None:
    """Run `one_step` for every step that `run` has not done yet.

    `one_step(step)` trains one step (0-based) and returns its figures; their means over
    `log_every` steps go to the journal, with the seconds those took. `parts` is saved every
    `save_every` steps and at the end.

    Callbacks get the number of steps done: `on_start` once, after a state was restored; `on_log`
    with each line; `after_save` after each save and, as a kill may have come between the two, once
    more when a run is resumed. `writes` is False in all but one of several processes: it neither
    writes nor calls back.

    Raises `RuntimeFailure` when a figure is not finite, `UsageError` when another process trains
    here, `CheckpointError` for a state that does not fit, and `KeyboardInterrupt` with a message
    that says how to go on.
    """
    if save_every % log_every:
        raise ValueError(f"save_every {save_every} is not a multiple of log_every {log_every}")
    with run.lock() if writes else nullcontext():
        done = _restore(run, parts, truncate=writes)
        if writes:
            on_start(done)
            if done:
                after_save(done)
        window = _Window()
        try:
            with Reporter(title, done, steps, visible=writes) as report:
                for step in range(done, steps):
                    figures = one_step(step)
                    _refuse_non_finite(figures, step, run)
                    window.add(figures)
                    done = step + 1
                    if done % log_every == 0 or done == steps:
                        means, seconds = window.close()
                        if writes:
                            run.log(done, **means, seconds=round(seconds, 3))
                            on_log(done, means)
                        report(done, means)
                    if (done % save_every == 0 or done == steps) and writes:
                        run.save(done, **{name: part.state_dict() for name, part in parts.items()})
                        after_save(done)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_how_to_go_on(run, done, steps)) from None


def _restore(run: RunFolder, parts: Mapping[str, Stateful], *, truncate: bool) -> int:
    """Bring `parts` to the last saved state; returns its number of steps, 0 for a new run."""
    state = run.load(truncate=truncate)
    if state is None:
        return 0
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (LookupError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"the state in {run.path} does not fit this run: {first_line(error)}",
            "It was saved by another version of this program: choose another output folder.",
        ) from error
    return int(state["step"])


def _how_to_go_on(run: RunFolder, done: int, steps: int) -> str:
    saved = (run.path / STATE_FILE).is_file()
    kept = f"the last save is in {run.path}" if saved else "nothing was saved yet"
    return f"interrupted after step {done} of {steps}; {kept}: run the same command again to go on"


def _refuse_non_finite(figures: Mapping[str, float], step: int, run: RunFolder) -> None:
    for name, value in figures.items():
        if value != value or value in (float("inf"), float("-inf")):
            raise RuntimeFailure(
                f"{name} became {value} at step {step + 1}",
                f"The last good state is in {run.path}; lower the learning rate or train in fp32, "
                "in another output folder.",
            )


class _Window:
    """The figures of the steps since the last line of the journal."""

    def __init__(self) -> None:
        self._figures: list[Mapping[str, float]] = []
        self._began = time.perf_counter()

    def add(self, figures: Mapping[str, float]) -> None:
        """The figures of one more step."""
        self._figures.append(figures)

    def close(self) -> tuple[dict[str, float], float]:
        """Their means and the seconds they took; a new window begins."""
        figures, began = self._figures, self._began
        self._figures, self._began = [], time.perf_counter()
        means = {name: sum(f[name] for f in figures) / len(figures) for name in figures[0]}
        return means, self._began - began


class Reporter:
    """A progress bar with ETA on a terminal, a line now and then in a log file."""

    def __init__(self, title: str, done: int, steps: int, *, visible: bool) -> None:
        console = Console(stderr=True)
        self._lines = visible and not console.is_terminal
        self._began, self._first, self._steps, self._title = time.perf_counter(), done, steps, title
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not (visible and console.is_terminal),
        )
        self._task = self._progress.add_task(title, total=steps, completed=done, figures="")

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._progress.stop()

    def __call__(self, done: int, means: Mapping[str, float]) -> None:
        figures = "  ".join(f"{key} {value:.4g}" for key, value in means.items())
        self._progress.update(self._task, completed=done, figures=figures)
        if self._lines:
            seconds = time.perf_counter() - self._began
            left_min = seconds / max(done - self._first, 1) * (self._steps - done) / 60
            line = f"{self._title} {done}/{self._steps}  {figures}  {left_min:.0f} min left"
            print(line, file=sys.stderr, flush=True)

"""How quality depends on the number of timesteps: the student's decoder rows, the teacher's steps.

    python -m tiue_export.benchmarks.quality.steps --teacher T --student S --plot steps.png

A student's weights belong to the K it was distilled with. Here they run at other K too, without any
training: what a K that differs from the trained one costs. The teacher with as many DDIM steps
stands beside it, as in TiUE's figure (a). All from the same noise, in PyTorch on the CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiue_export.errors import UsageError
from tiue_export.sampling.schedule import schedule_from_config

from ..explained import run_explained
from ..figure import check_plot, new_figure, save_figure
from .checkpoints import Checkpoint, open_checkpoint, student_contender, teacher_contender
from .judge import (
    Contender,
    Scores,
    add_request_arguments,
    asked_for,
    judge,
)

STUDENT_ROWS = (2, 3, 4, 6, 8, 16)
TEACHER_STEPS = (2, 4, 8, 16, 50)
_STUDENT, _TEACHER, _REAL = "#D55E00", "#0072B2", "#777777"  # Okabe-Ito


@dataclass(frozen=True)
class Stepped:
    """A contender and where it stands on the horizontal axis."""

    contender: Contender
    steps: int
    is_student: bool
    is_trained_k: bool = False


def students(checkpoint: Checkpoint, rows: Sequence[int]) -> list[Stepped]:
    """The same weights at each K of `rows`; the K they were trained at says so in its name."""
    trained = checkpoint.student.schedule.steps
    found = []
    for steps in rows:
        schedule = schedule_from_config(checkpoint.student.scheduler_config, steps)
        name = f"student, K={steps}" + (", as trained" if steps == trained else "")
        contender = student_contender(checkpoint, name, schedule)
        found.append(Stepped(contender, steps, True, steps == trained))
    return found


def plot_steps(stepped: Sequence[Stepped], scores: Sequence[Scores], path: Path) -> None:
    """Fréchet distance and retrieval against steps; `scores`: real pictures, then `stepped`."""
    figure = new_figure((12.5, 4.6))
    measures: tuple[tuple[str, Callable[[Scores], float]], ...] = (
        ("Fréchet distance, lower is better", lambda s: s.frechet),
        ("right emoji %, higher is better", lambda s: 100 * s.top1),
    )
    ticks = sorted({entry.steps for entry in stepped})
    for panel, (label, value) in zip(figure.subplots(1, 2), measures, strict=True):
        points = [
            (entry, (entry.steps, value(score)))
            for entry, score in zip(stepped, scores[1:], strict=True)
        ]
        for is_student, name, colour in (
            (True, "student, K decoder rows, one encoder pass", _STUDENT),
            (False, "teacher, T steps of DDIM", _TEACHER),
        ):
            line = [at for entry, at in points if entry.is_student is is_student]
            if line:
                panel.plot(*zip(*line, strict=True), "o-", color=colour, label=name)
        for entry, at in points:
            if entry.is_trained_k:
                ring = {"markersize": 12, "fillstyle": "none", "linestyle": "none"}
                panel.plot(*at, "o", color=_STUDENT, label="the K it was trained with", **ring)
        panel.axhline(value(scores[0]), color=_REAL, linestyle="--", label="real pictures")
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.set(xlabel="timesteps", ylabel=label)
        panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.suptitle(f"Quality against timesteps, {scores[1].pictures} pictures each")
    save_figure(figure, path)


def main() -> None:
    """Draw at each number of steps; print a table, write JSON, sheet and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--teacher", type=Path, help="pipeline folder")
    parser.add_argument("--teacher-steps", type=int, nargs="+", default=list(TEACHER_STEPS))
    parser.add_argument("--guidance", type=float, default=2.0, help="of the teacher [2]")
    parser.add_argument("--student", type=Path, help="pipeline folder of the TiUE student")
    parser.add_argument("--student-rows", type=int, nargs="+", default=list(STUDENT_ROWS))
    parser.add_argument("--plot", type=Path, help=".png to write")
    add_request_arguments(parser)
    arguments = parser.parse_args()
    run_explained(lambda: _compare_steps(arguments))


def _compare_steps(arguments: Any) -> None:
    check_plot(arguments.plot)
    data, request = asked_for(arguments)
    stepped: list[Stepped] = []
    if arguments.student is not None:
        stepped += students(open_checkpoint(arguments.student), arguments.student_rows)
    if arguments.teacher is not None:
        teacher = open_checkpoint(arguments.teacher)
        stepped += [
            Stepped(teacher_contender(teacher, steps, arguments.guidance), steps, False)
            for steps in arguments.teacher_steps
        ]
    if not stepped:
        raise UsageError("nothing to compare", "Give --student, --teacher or both.")
    scores = judge([entry.contender for entry in stepped], request, data, arguments)
    if arguments.plot is not None:
        plot_steps(stepped, scores, arguments.plot)


if __name__ == "__main__":
    main()

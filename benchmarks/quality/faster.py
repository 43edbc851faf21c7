"""What Faster Diffusion costs in quality and saves in time: plans on the same graphs.

    tiue-export onnx --ckpt T --method faster --guidance 3 --batch 8 --out fd
    python -m tiue_export.benchmarks.quality.faster --bundle fd --json q.json --plot q.png

The graphs take any timesteps, so each contender is only another plan for the same bundle: ordinary
sampling in 50, 25 and 9 steps, uniform, published and further key steps, with and without the
injection of prior noise. Time is a picture's, from tokens to pixels, while it is drawn.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tiue_export.bundle.folder import Bundle, open_bundle
from tiue_export.drawing.pipeline import Pipeline
from tiue_export.errors import UsageError
from tiue_export.methods.scheduler import plan_from_config
from tiue_export.sampling.plan_options import FasterOptions
from tiue_export.specs import RuntimeOptions

from ..explained import run_explained
from ..figure import check_plot, new_figure, save_figure
from .judge import (
    Contender,
    Scores,
    add_request_arguments,
    asked_for,
    judge,
    pipeline_contender,
    require_family,
)

PLAIN_STEPS = (50, 25, 9)
UNIFORM = (2, 4, 6)
_STEPS = PLAIN_STEPS[0]
_PLAIN, _ON, _OFF = "#000000", "#0072B2", "#D55E00"  # Okabe-Ito
_SHAPES = "ov^DP*X"
_NO_INJECTION = ", no injection"


@dataclass(frozen=True)
class Planned:
    """One plan: its name in the table, and what it is made of."""

    name: str
    options: FasterOptions

    @property
    def is_plain(self) -> bool:
        """Whether every step runs the encoder."""
        return self.options.key_steps == "uniform:1"


def plans(guidance: float, further: Sequence[tuple[str, tuple[int, ...]]]) -> list[Planned]:
    """The contenders in the order of the table, the reference first.

    `further` are (name, key steps) beside the usual ones, such as those of `analyze`.
    """
    found = [
        Planned(
            f"DDIM {steps}",
            FasterOptions(steps=steps, key_steps="uniform:1", inject="off", guidance=guidance),
        )
        for steps in PLAIN_STEPS
    ]
    chosen: list[tuple[str, str | tuple[int, ...]]] = [
        *((f"uniform {n}", f"uniform:{n}") for n in UNIFORM),
        ("published", "nonuniform"),
        *further,
    ]
    for inject in ("on", "off"):
        found += [
            Planned(
                name if inject == "on" else f"{name}{_NO_INJECTION}",
                FasterOptions(steps=_STEPS, key_steps=keys, inject=inject, guidance=guidance),
            )
            for name, keys in chosen
        ]
    return found


def planned_contender(planned: Planned, pipeline: Pipeline) -> Contender:
    """The pipeline's own graphs and runtime under another plan."""
    bundle = pipeline.bundle
    config = json.loads(bundle.file("scheduler/scheduler_config.json").read_text("utf-8"))
    schedule, plan = plan_from_config(config, planned.options)
    manifest = replace(bundle.manifest, schedule=schedule, faster=plan)
    return pipeline_contender(planned.name, replace(pipeline, bundle=Bundle(bundle.root, manifest)))


def _listed(planned: Planned) -> str:
    """The name of its key steps, whether noise is injected or not."""
    return planned.name.removesuffix(_NO_INJECTION)


def plot_quality(
    chosen: Sequence[Planned], scores: Sequence[Scores], path: Path, title: str
) -> None:
    """Fréchet distance and retrieval against time; `scores` are those of `chosen`, in order."""
    figure = new_figure((12.5, 4.8))
    distance, retrieval = figure.subplots(1, 2)
    lists = dict.fromkeys(_listed(planned) for planned in chosen if not planned.is_plain)
    shapes = dict(zip(lists, itertools.cycle(_SHAPES), strict=False))
    measures: tuple[tuple[Any, str, Callable[[Scores], float]], ...] = (
        (distance, "Fréchet distance, lower is better", lambda s: s.frechet),
        (retrieval, "right emoji %, higher is better", lambda s: 100 * s.top1),
    )
    for panel, label, value in measures:
        points = [
            (planned, (entry.picture_ms, value(entry)))
            for planned, entry in zip(chosen, scores, strict=True)
        ]
        plain = sorted(at for planned, at in points if planned.is_plain)
        panel.plot(*zip(*plain, strict=True), color=_PLAIN, linewidth=0.8, alpha=0.5)
        for planned, at in points:
            if planned.is_plain:
                panel.plot(*at, "s", color=_PLAIN)
                panel.annotate(
                    planned.name, at, xytext=(5, 3), textcoords="offset points", fontsize=8
                )
            else:
                colour = _ON if planned.options.inject == "on" else _OFF
                panel.plot(*at, shapes[_listed(planned)], color=colour, markersize=8, alpha=0.8)
        panel.margins(x=0.14)  # the last name needs room
        panel.set(xlabel="ms a picture", ylabel=label)
        panel.grid(alpha=0.3)
    entries = [("ordinary sampling", "s", _PLAIN)]
    entries += [(name, shape, _ON) for name, shape in shapes.items()]
    entries.append(("no injection", "o", _OFF))
    for name, mark, colour in entries:
        retrieval.plot([], [], mark, color=colour, label=name)
    retrieval.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title)
    save_figure(figure, path)


def main() -> None:
    """Compare the plans; print a table, write JSON, sheet and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bundle", type=Path, required=True, help="made by --method faster")
    parser.add_argument("--guidance", type=float, help="default: the bundle's")
    parser.add_argument(
        "--key-steps",
        action="append",
        default=[],
        metavar="NAME=LIST",
        help="a further plan, such as auto=0,1,2,4,7; repeatable",
    )
    parser.add_argument("--runtime", default="ort")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--plot", type=Path, help=".png to write")
    add_request_arguments(parser)
    arguments = parser.parse_args()
    run_explained(lambda: _compare_plans(arguments))


def _compare_plans(arguments: Any) -> None:
    check_plot(arguments.plot)
    data, request = asked_for(arguments)
    bundle = open_bundle(arguments.bundle)
    require_family(bundle, data)
    if bundle.manifest.faster is None:
        raise UsageError(
            f"{bundle.root} is a distilled student: it has no key steps",
            "Give a bundle made by: tiue-export onnx --ckpt TEACHER --method faster",
        )
    guidance = arguments.guidance
    chosen = plans(
        bundle.manifest.faster.guidance if guidance is None else guidance,
        [_named_list(text) for text in arguments.key_steps],
    )
    options = RuntimeOptions(threads=arguments.threads)
    with Pipeline.open(bundle, arguments.runtime, options) as pipeline:
        contenders = [planned_contender(planned, pipeline) for planned in chosen]
        scores = judge(contenders, request, data, arguments)
    if arguments.plot is not None:
        title = f"{bundle.manifest.source.name}: {len(request.jobs)} pictures, {arguments.runtime}"
        plot_quality(chosen, scores[1:], arguments.plot, title)  # the first are real pictures


def _named_list(text: str) -> tuple[str, tuple[int, ...]]:
    name, equals, listed = text.partition("=")
    try:
        steps = tuple(int(part) for part in listed.split(","))
    except ValueError:
        steps = ()
    if not (name and equals and steps):
        raise UsageError(f"--key-steps is {text!r}; expected NAME=LIST, such as auto=0,1,2,4,7")
    return name, steps


if __name__ == "__main__":
    main()

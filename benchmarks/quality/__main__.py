"""How good are the pictures? One front for everything that can be judged.

    python -m tiue_export.benchmarks.quality bundles fp32/ int8/ --json quality.json
    python -m tiue_export.benchmarks.quality checkpoints --teacher T --student S --one-step B
    python -m tiue_export.benchmarks.quality plans fd/ --key-steps auto=0,1,4 --plot quality.png

All contenders draw the same prompts from the same noise and are scored beside real pictures
(judge.py says by what). The first one's latents are what the others' are held against.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tiue_export.bundle.read import open_bundle
from tiue_export.drawing.pipeline import Pipeline
from tiue_export.errors import UsageError
from tiue_export.registry.spokes import run_explained
from tiue_export.specs import RuntimeOptions

from ..figure import check_file, check_plot
from .bundles import pipeline_contender, plan_contenders, require_family
from .judge import Contender, Draws, choose_prompts, compare
from .report import ComparisonSheet, MistakenNames, plot_quality, print_table, write_json
from .yardstick import QualityData, load_quality_data


def _bundles(asked: Any, data: QualityData, opened: ExitStack) -> list[Contender]:
    return [
        pipeline_contender(path.name, _pipeline(path, asked, data, opened))
        for path in asked.bundles
    ]


def _plans(asked: Any, data: QualityData, opened: ExitStack) -> list[Contender]:
    pipeline = _pipeline(asked.bundle, asked, data, opened)
    return plan_contenders(pipeline, asked.guidance, asked.key_steps)


def _pipeline(path: Path, asked: Any, data: QualityData, opened: ExitStack) -> Pipeline:
    bundle = open_bundle(path)
    require_family(bundle, data)
    options = RuntimeOptions(threads=asked.threads)
    return opened.enter_context(Pipeline.open(bundle, asked.runtime, options))


def _checkpoints(asked: Any, data: QualityData, opened: ExitStack) -> list[Contender]:
    # torch and diffusers are not needed to judge bundles.
    from . import checkpoints

    contenders: list[Contender] = []
    if asked.teacher is not None:
        teacher = checkpoints.open_checkpoint(asked.teacher, asked.precision)
        contenders += [
            checkpoints.teacher_contender(teacher, steps, guidance)
            for steps in asked.teacher_steps
            for guidance in asked.guidance
        ]
    if asked.one_step is not None:
        # K=1 on the scheduler that a baseline's folder may carry is refused; its own is set below.
        baseline = checkpoints.open_checkpoint(asked.one_step, asked.precision, steps=2)
        contenders.append(checkpoints.one_step_contender(baseline))
    if asked.few_step is not None:
        named = [checkpoints.sampler_from(text)[0].name for text in asked.few_step_sampler]
        few_step = checkpoints.open_few_step(
            asked.few_step, asked.precision, recipe=named[0] if named else None
        )
        contenders += checkpoints.few_step_contenders(
            few_step, asked.few_step_steps, asked.few_step_key_steps, asked.few_step_sampler
        )
    if asked.student is not None:
        student = checkpoints.open_checkpoint(asked.student, asked.precision)
        contenders += (
            checkpoints.student_contenders(student)
            if asked.student_rows is None
            else checkpoints.other_rows(student, asked.student_rows)
        )
    if not contenders:
        raise UsageError(
            "nothing to compare", "Give --teacher, --one-step, --few-step or --student."
        )
    return contenders


def _parser() -> argparse.ArgumentParser:
    asking = argparse.ArgumentParser(add_help=False)
    asking.add_argument("--data", type=Path, help="quality data folder; default: the package's")
    asking.add_argument("--prompts", type=int, default=400, help="how many of the fixed prompts")
    asking.add_argument("--seeds", type=int, default=1, help="pictures per prompt")
    asking.add_argument("--keep", type=Path, help="folder for draws, to resume or to score again")
    asking.add_argument("--json", type=Path, help="file to write")
    asking.add_argument("--mistaken", type=Path, help=".json to write: what was taken for what")
    asking.add_argument("--sheet", type=Path, help=".png to write: prompts by contenders")
    asking.add_argument("--plot", type=Path, help=".png to write: quality against steps or time")
    running = argparse.ArgumentParser(add_help=False)
    running.add_argument("--runtime", default="ort")
    running.add_argument("--threads", type=int)
    parser = argparse.ArgumentParser(
        prog="python -m tiue_export.benchmarks.quality",
        description=__doc__.splitlines()[0] if __doc__ else None,
    )
    verbs = parser.add_subparsers(required=True, metavar="{bundles,checkpoints,plans}")

    verb = verbs.add_parser("bundles", parents=[asking, running], help="bundles on a runtime")
    verb.set_defaults(contenders=_bundles)
    verb.add_argument("bundles", type=Path, nargs="+", help="latents are held against the first's")

    verb = verbs.add_parser("checkpoints", parents=[asking], help="pipeline folders in PyTorch")
    verb.set_defaults(contenders=_checkpoints)
    verb.add_argument("--teacher", type=Path, help="pipeline folder")
    verb.add_argument("--teacher-steps", type=int, nargs="+", default=[50, 4])
    verb.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0])
    verb.add_argument("--one-step", type=Path, help="pipeline folder of the one-step baseline")
    verb.add_argument("--few-step", type=Path, help="pipeline folder of an LCM or its like")
    verb.add_argument("--few-step-steps", type=int, nargs="+", default=[4, 1])
    verb.add_argument(
        "--few-step-sampler",
        action="append",
        default=[],
        metavar="RECIPE[:ETA]",
        help="another recipe than its own, such as tcd:0; repeatable",
    )
    verb.add_argument(
        "--few-step-key-steps",
        action="append",
        default=[],
        metavar="LIST",
        help="also with the encoder at these steps alone, such as 0,2; repeatable",
    )
    verb.add_argument("--student", type=Path, help="pipeline folder of the TiUE student")
    verb.add_argument("--student-rows", type=int, nargs="+", help="its weights at these K instead")
    verb.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")

    verb = verbs.add_parser("plans", parents=[asking, running], help="plans of Faster Diffusion")
    verb.set_defaults(contenders=_plans)
    verb.add_argument("bundle", type=Path, help="made by --method faster")
    verb.add_argument("--guidance", type=float, help="default: the bundle's")
    verb.add_argument(
        "--key-steps",
        action="append",
        default=[],
        metavar="NAME=LIST",
        help="a further plan, such as auto=0,1,2,4,7; repeatable",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge; print a table, write JSON, sheet and picture where they are asked for."""
    asked = _parser().parse_args(arguments)
    run_explained(lambda: _judge(asked))


def _judge(asked: argparse.Namespace) -> None:
    check_file("--json", asked.json)
    check_file("--mistaken", asked.mistaken)
    check_file("--sheet", asked.sheet)
    check_plot(asked.plot)
    data = load_quality_data(asked.data)
    request = choose_prompts(data, asked.prompts, asked.seeds)
    sheet = ComparisonSheet(asked.sheet, request)
    names = MistakenNames(asked.mistaken, request, data)

    def on_draws(name: str, draws: Draws) -> None:
        sheet.add(name, draws)
        names.add(name, draws)

    with ExitStack() as opened:
        contenders = asked.contenders(asked, data, opened)
        scores = compare(contenders, request, data, keep=asked.keep, on_draws=on_draws)
    sheet.write()
    names.write()
    print_table(scores, request)
    write_json(scores, request, data, asked.json)
    if asked.plot is not None:
        plot_quality(contenders, scores, request, asked.plot)


if __name__ == "__main__":
    main()

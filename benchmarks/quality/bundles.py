"""Bundles on their runtimes as contenders, and a bundle of Faster Diffusion under other plans."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from tiue_export.bundle.read import Bundle
from tiue_export.drawing.pipeline import Pipeline
from tiue_export.errors import UsageError
from tiue_export.methods.scheduler import plan_from_config
from tiue_export.sampling.key_step_options import FasterOptions

from .judge import Contender, Draws
from .yardstick import PICTURE_SIZE_PX, QualityData, require_size

PLAIN_STEPS = (50, 25, 9)
UNIFORM = (2, 4, 6)
_STEPS = PLAIN_STEPS[0]


def pipeline_contender(name: str, pipeline: Pipeline) -> Contender:
    """An opened bundle; one with a plan is drawn with the plan's guidance."""

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Draws:
        drawn = pipeline.draw(list(zip(prompts, seeds, strict=True))).pictures
        pictures = np.stack([np.asarray(picture.image) for picture in drawn])
        return Draws(pictures, np.stack([picture.latents for picture in drawn]).astype(np.float32))

    manifest = asdict(pipeline.bundle.manifest)
    decisive = json.dumps([manifest[part] for part in ("graphs", "plan")])
    runtime = f"{pipeline.runtime.name} {pipeline.runtime.device}"
    identity = f"bundle {hashlib.sha256(decisive.encode()).hexdigest()} on {runtime}"
    _, batch = pipeline.batch_range()
    return Contender(name, draw, identity, batch, series="bundles", mark=name)


def require_family(bundle: Bundle, data: QualityData) -> None:
    """Refuse a bundle of another family: its pictures are of other things."""
    manifest = bundle.manifest
    if manifest.source.family != data.family:
        raise UsageError(
            f"{bundle.root} is of the family {manifest.source.family!r}; this quality data judges "
            f"pictures of the family {data.family!r}",
            "Give a bundle of the demo student, or --data with quality data of its own family.",
        )
    size = f"--height {PICTURE_SIZE_PX} --width {PICTURE_SIZE_PX}"
    require_size(bundle.root, manifest.height_px, manifest.width_px, f"Export it with {size}.")


@dataclass(frozen=True)
class Planned:
    """One plan: its name in the table, its place in the picture, and what it is made of."""

    name: str
    series: str
    mark: str
    options: FasterOptions


def plans(guidance: float, further: Sequence[tuple[str, tuple[int, ...]]]) -> list[Planned]:
    """The contenders in the order of the table, the reference first: ordinary sampling, then
    uniform, published and further key steps, with and without the injection of prior noise.

    `further` are (name, key steps) beside the usual ones, such as those of `analyze`.
    """

    def planned(
        name: str, series: str, mark: str, steps: int, keys: str | tuple[int, ...], inject: str
    ) -> Planned:
        options = FasterOptions(steps=steps, key_steps=keys, inject=inject, guidance=guidance)
        return Planned(name, series, mark, options)

    plain = [
        planned(f"DDIM {steps}", "ordinary sampling", "", steps, "uniform:1", "off")
        for steps in PLAIN_STEPS
    ]
    lists: list[tuple[str, str | tuple[int, ...]]] = [
        *((f"uniform {n}", f"uniform:{n}") for n in UNIFORM),
        ("published", "nonuniform"),
        *further,
    ]
    with_injection = [planned(name, "with injection", name, _STEPS, k, "on") for name, k in lists]
    without = [
        planned(f"{name}, no injection", "no injection", name, _STEPS, keys, "off")
        for name, keys in lists
    ]
    return [*plain, *with_injection, *without]


def planned_contender(planned: Planned, pipeline: Pipeline) -> Contender:
    """The pipeline's own graphs and runtime under another plan."""
    bundle = pipeline.bundle
    config = bundle.json_object("scheduler/scheduler_config.json")
    manifest = replace(bundle.manifest, plan=plan_from_config(config, planned.options))
    changed = replace(pipeline, bundle=Bundle(bundle.root, manifest))
    contender = pipeline_contender(planned.name, changed)
    return replace(contender, series=planned.series, mark=planned.mark)


def plan_contenders(
    pipeline: Pipeline, guidance: float | None, further: Sequence[str]
) -> list[Contender]:
    """Every plan on one bundle, guidance the bundle's own where None; `further` are "NAME=LIST".

    Raises `UsageError` for a bundle that has no plan.
    """
    own_guidance = pipeline.bundle.manifest.plan.guidance
    if own_guidance is None:
        raise UsageError(
            f"{pipeline.bundle.root} is a distilled student: it has no key steps",
            "Give a bundle made by: tiue-export onnx --ckpt TEACHER --method faster",
        )
    listed = [named_list(text) for text in further]
    chosen = plans(own_guidance if guidance is None else guidance, listed)
    return [planned_contender(planned, pipeline) for planned in chosen]


def named_list(text: str) -> tuple[str, tuple[int, ...]]:
    """ "auto=0,1,4" -> ("auto", (0, 1, 4))."""
    name, equals, listed = text.partition("=")
    try:
        steps = tuple(int(part) for part in listed.split(","))
    except ValueError:
        steps = ()
    if not (name and equals and steps):
        raise UsageError(f"--key-steps is {text!r}; expected NAME=LIST, such as auto=0,1,2,4,7")
    return name, steps

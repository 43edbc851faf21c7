"""Bundles on their runtimes as contenders, and a bundle of Faster Diffusion under other plans."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from tiue_export.bundle.read import Bundle
from tiue_export.drawing.picture import pixels_from_sample
from tiue_export.drawing.pipeline import Pipeline
from tiue_export.errors import UsageError
from tiue_export.methods.scheduler import plan_from_config
from tiue_export.sampling.key_step_options import FasterOptions
from tiue_export.sampling.noise import noises_from_seed

from .judge import Contender, Draws
from .yardstick import PICTURE_SIZE_PX, QualityData

PLAIN_STEPS = (50, 25, 9)
UNIFORM = (2, 4, 6)
_STEPS = PLAIN_STEPS[0]
_DYNAMIC_BATCH = 8


def pipeline_contender(name: str, pipeline: Pipeline) -> Contender:
    """An opened bundle; one with a plan is drawn with the plan's guidance."""
    bundle = pipeline.bundle
    shape = tuple(int(side) for side in bundle.manifest.latent_shape[1:])
    size = bundle.manifest.batch or _DYNAMIC_BATCH

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Draws:
        count = len(prompts)
        missing = size - count if bundle.manifest.batch else 0
        filled = [*prompts, *[prompts[-1]] * missing]
        plan, rows = bundle.manifest.plan, [*seeds, *[seeds[-1]] * missing]
        noises = [noises_from_seed(seed, plan.noises, (1, *shape)) for seed in rows]
        text = pipeline.embed(filled)
        if plan.guidance is not None:
            text = np.concatenate([pipeline.embed([""] * len(filled)), text])  # (2B, L, D)
        latents = pipeline.latents_from_noise(np.concatenate(noises, axis=1), text)
        pictures = pixels_from_sample(pipeline.decode(latents))
        return Draws(pictures[:count], latents[:count].astype(np.float32))

    manifest = asdict(bundle.manifest)
    decisive = json.dumps([manifest[part] for part in ("graphs", "plan")])
    runtime = f"{pipeline.runtime.name} {pipeline.runtime.device}"
    identity = f"bundle {hashlib.sha256(decisive.encode()).hexdigest()} on {runtime}"
    return Contender(name, draw, identity, size, series="bundles", mark=name)


def require_family(bundle: Bundle, data: QualityData) -> None:
    """Refuse a bundle of another family: its pictures are of other things."""
    manifest = bundle.manifest
    if manifest.source.family != data.family:
        raise UsageError(
            f"{bundle.root} is of the family {manifest.source.family!r}; this quality data judges "
            f"pictures of the family {data.family!r}",
            "Give a bundle of the demo student, or --data with quality data of its own family.",
        )
    if (manifest.height_px, manifest.width_px) != (PICTURE_SIZE_PX, PICTURE_SIZE_PX):
        raise UsageError(
            f"{bundle.root} draws {manifest.width_px}x{manifest.height_px} px; the quality data "
            f"judges {PICTURE_SIZE_PX}x{PICTURE_SIZE_PX} px",
            f"Export it with --height {PICTURE_SIZE_PX} --width {PICTURE_SIZE_PX}.",
        )


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
    plain = [
        Planned(
            f"DDIM {steps}",
            "ordinary sampling",
            "",
            FasterOptions(steps=steps, key_steps="uniform:1", inject="off", guidance=guidance),
        )
        for steps in PLAIN_STEPS
    ]
    lists: list[tuple[str, str | tuple[int, ...]]] = [
        *((f"uniform {n}", f"uniform:{n}") for n in UNIFORM),
        ("published", "nonuniform"),
        *further,
    ]
    shared = [
        Planned(
            name + ("" if inject == "on" else f", {series}"),
            series,
            name,
            FasterOptions(steps=_STEPS, key_steps=keys, inject=inject, guidance=guidance),
        )
        for inject, series in (("on", "with injection"), ("off", "no injection"))
        for name, keys in lists
    ]
    return [*plain, *shared]


def planned_contender(planned: Planned, pipeline: Pipeline) -> Contender:
    """The pipeline's own graphs and runtime under another plan."""
    bundle = pipeline.bundle
    config = json.loads(bundle.file("scheduler/scheduler_config.json").read_text("utf-8"))
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

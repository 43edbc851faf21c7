"""Teacher, baselines and student as contenders, straight from their pipeline folders.

The student is drawn exactly and with small decoder rows merged, or at other K than the one it was
distilled with, without any training; the teacher with as many DDIM steps stands beside it, as in
TiUE's figure (a). A few-step student is drawn in any number of steps, the encoder in all of them or
in some. All from the same noise, in PyTorch on the CPU.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiue_export.checkpoint.tokenizer_files import tokenizer_of
from tiue_export.drawing.picture import pixels_from_sample
from tiue_export.errors import UsageError
from tiue_export.graphs.build import Graph, build_graphs, run_graph
from tiue_export.graphs.options import ExportOptions
from tiue_export.graphs.shapes import shapes_of
from tiue_export.methods.load import CheckpointRequest, load_for_method, load_student
from tiue_export.methods.method import SamplingOptions
from tiue_export.methods.scheduler import diffusers_scheduler
from tiue_export.sampling.ddim import one_pass_plan
from tiue_export.sampling.few_step import ALL_STEPS, FewStepOptions, few_step_plan
from tiue_export.sampling.few_step import METHOD as FEW_STEP
from tiue_export.sampling.noise import noises_from_seed
from tiue_export.sampling.plan import Plan
from tiue_export.sampling.recipes import Recipe, recipe_named
from tiue_export.sampling.sampler import sample
from tiue_export.specs import UNET_GRAPHS, Array, Feeds, check_finite
from tiue_export.student.model import Student

from ..torch_pipeline import TorchPipeline
from .judge import Contender, Draws
from .yardstick import require_size

MERGE_BELOW = 0.02
_BATCH = 16
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Noises (n, B, 4, H, W), text (B, L, D) -> latents, norms of the decoder rows (B, K) or None
Sampler = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Checkpoint(TorchPipeline):
    """A whole pipeline; its UNet computes in `dtype` (autocast), everything else in float32."""

    dtype: torch.dtype

    def contender(
        self, name: str, settings: str, sample: Sampler, noises: int = 1, **place: Any
    ) -> Contender:
        """A contender that draws with `sample`; `settings` tells it from others of this model.

        A picture takes `noises` from the stream of its seed. `place` is where it stands in the
        picture: `series`, `mark` and `steps` of `Contender`.
        """
        vae: Any = self.student.vae
        shapes = shapes_of(self.student)
        half = self.dtype != torch.float32

        @torch.no_grad()
        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Draws:
            drawn = [noises_from_seed(seed, noises, shapes.latents) for seed in seeds]
            noise = np.concatenate(drawn, axis=1)  # (noises, B, 4, h, w)
            text = self.embed(prompts)
            with torch.autocast("cpu", self.dtype, enabled=half):
                latents, norms = sample(torch.from_numpy(noise), text)
            check_finite(name, {"latents": latents.numpy()})
            pictures = vae.decode(latents / shapes.vae_scaling_factor).sample.numpy()
            row_norms = None if norms is None else norms.numpy()
            return Draws(pixels_from_sample(pictures), latents.numpy(), row_norms)

        source = self.student.source
        parts = "".join([source.sha256, *source.part_sha256.values()])
        return Contender(name, draw, f"{parts} {self.dtype} {settings}", _BATCH, **place)


def open_checkpoint(
    folder: Path, precision: str = "fp32", *, steps: int | None = None
) -> Checkpoint:
    """Read a pipeline folder; `steps` overrides the K that it records."""
    student = load_student(folder, steps=steps, allow_other_steps=True)
    return _opened(student, folder, precision)


def _opened(student: Student, folder: Path, precision: str) -> Checkpoint:
    if student.text_encoder is None or student.vae is None or student.tokenizer_folder is None:
        raise UsageError(
            f"{folder} lacks a text encoder, a tokenizer or a VAE",
            "Give a whole diffusers pipeline folder.",
        )
    shapes = shapes_of(student)
    height, width = (side * shapes.vae_scale for side in shapes.latents[2:])
    require_size(folder, height, width, "Give a pipeline of the demo family.")
    tokenizer = tokenizer_of(student.tokenizer_folder, shapes.tokens)
    return Checkpoint(student.float().requires_grad_(False), tokenizer, _PRECISIONS[precision])


def teacher_contender(checkpoint: Checkpoint, steps: int, guidance: float) -> Contender:
    """`steps` of DDIM with classifier-free guidance; 1.0 runs without the null prompt."""
    if steps < 1:
        raise UsageError(f"--teacher-steps is {steps}; expected 1 or more")
    scheduler = diffusers_scheduler(checkpoint.student.scheduler_config, "ddim", steps)
    null = checkpoint.embed([""])

    def sample(noise: Tensor, text: Tensor) -> tuple[Tensor, None]:
        if guidance != 1:
            text = torch.cat([null.expand_as(text), text])  # (2*B, L, D)
        return checkpoint.sample(scheduler, noise[0], text, guidance), None

    return checkpoint.contender(
        f"teacher, {steps} steps, guidance {guidance:g}",
        f"DDIM {steps} {guidance}",
        sample,
        series=f"teacher, guidance {guidance:g}, T DDIM steps",
        steps=steps,
    )


def student_contender(
    checkpoint: Checkpoint,
    name: str,
    plan: Plan,
    series: str = "student, K decoder rows",
    mark: str = "",
) -> Contender:
    """One encoder pass, one batched decoder pass over `plan`'s rows, the closed formula."""
    student = checkpoint.student.by_plan(plan)
    weights = torch.tensor(plan.latents.outputs).abs()

    def sample(noise: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        latents, outputs = student.predict(noise[0], text)
        rows = outputs.float().reshape(plan.rows, len(text), -1)  # (K, B, C*H*W)
        return latents, (weights[:, None] * rows.norm(dim=2)).T

    settings = str(dataclasses.astuple(plan))
    return checkpoint.contender(name, settings, sample, series=series, mark=mark, steps=plan.rows)


def student_contenders(checkpoint: Checkpoint) -> list[Contender]:
    """The student exactly, and with the rows merged whose weight is below 0.02."""
    plan = checkpoint.student.plan
    name, merged = f"TiUE K={plan.steps}", plan.merged(MERGE_BELOW)
    contenders = [student_contender(checkpoint, name, plan)]
    if merged.rows < plan.rows:
        name = f"{name}, {merged.rows} rows"
        contenders.append(student_contender(checkpoint, name, merged, mark="rows merged"))
    return contenders


def other_rows(checkpoint: Checkpoint, rows: Sequence[int]) -> list[Contender]:
    """The same weights at each K of `rows`; the K they were trained at says so in its name."""
    contenders = []
    for steps in rows:
        plan = one_pass_plan(checkpoint.student.scheduler_config, steps)
        name, mark = f"student, K={steps}", ""
        if steps == checkpoint.student.plan.steps:
            name, mark = f"{name}, as trained", "the K it was trained with"
        contenders.append(student_contender(checkpoint, name, plan, mark=mark))
    return contenders


def open_few_step(
    folder: Path, precision: str = "fp32", *, recipe: str | None = None
) -> Checkpoint:
    """Read a few-step student's pipeline folder; its marks tell the recipe where none is given."""
    options = SamplingOptions(recipe=recipe)
    student = load_for_method(CheckpointRequest(str(folder)), FEW_STEP, options)
    return _opened(student, folder, precision)


def few_step_contenders(
    checkpoint: Checkpoint,
    steps: Sequence[int],
    key_steps: Sequence[str] = (),
    samplers: Sequence[str] = (),
) -> list[Contender]:
    """In each number of `steps`, and in the usual number with the encoder at `key_steps` alone.

    `samplers` are RECIPE or RECIPE:ETA, such as tcd:0; the student's own recipe where there are
    none.
    """
    contenders = []
    for text in samplers or (checkpoint.student.plan.recipe,):
        recipe, eta = sampler_from(text)
        listed = [FewStepOptions(eta=eta, steps=number) for number in steps]
        listed += [FewStepOptions(eta=eta, key_steps=given) for given in key_steps]
        contenders += [_few_step_contender(checkpoint, recipe, options, text) for options in listed]
    return contenders


def sampler_from(text: str) -> tuple[Recipe, float | None]:
    """ "tcd:0" -> the recipe tcd, 0.0; None where nothing follows the recipe's name."""
    name, colon, eta = text.partition(":")
    try:
        return recipe_named(name), float(eta) if colon else None
    except ValueError as error:
        raise UsageError(
            f"--few-step-sampler is {text}; expected RECIPE or RECIPE:ETA, such as tcd:0"
        ) from error


def _few_step_contender(
    checkpoint: Checkpoint, recipe: Recipe, asked: FewStepOptions, sampler: str
) -> Contender:
    """Pass by pass through the graphs that are exported, run by torch."""
    own = checkpoint.student.plan
    plan = replace(
        few_step_plan(checkpoint.student.scheduler_config, recipe, asked),
        guidance=own.guidance,
        embedded_guidance=own.embedded_guidance,
    )
    student = checkpoint.student.by_plan(plan)
    name, mark = f"{sampler}, {plan.steps} step" + "s" * (plan.steps > 1), ""
    if asked.key_steps != ALL_STEPS:
        mark = f"encoder at {asked.key_steps}"
        name = f"{name}, {mark}"

    @functools.cache  # the last batch may be a smaller one
    def graphs(batch: int) -> dict[str, Graph]:
        built = build_graphs(student, ExportOptions(batch=batch), UNET_GRAPHS)
        return {graph.spec.name: graph for graph in built}

    def sample_plan(noise: Tensor, text: Tensor) -> tuple[Tensor, None]:
        def run(graph: str, pool: Feeds) -> Mapping[str, Array]:
            return run_graph(graphs(len(text))[graph], pool)[1]

        return torch.from_numpy(sample(plan, run, noise.numpy(), text.numpy())), None

    return checkpoint.contender(
        name,
        str(dataclasses.astuple(plan)),
        sample_plan,
        plan.noises,
        series=f"{sampler}, steps",
        mark=mark,
        steps=plan.steps,
    )


def one_step_contender(checkpoint: Checkpoint) -> Contender:
    """A one-step student as SwiftBrush draws: x0 = (z - sqrt(1-a) e) / sqrt(a) at the last t."""
    schedule = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    plan = one_pass_plan({**checkpoint.student.scheduler_config, **schedule}, 1)
    return student_contender(checkpoint, "one step", plan, series="one step")

"""Teacher, one-step baseline and student as contenders, straight from their pipeline folders.

The student is drawn exactly and with small decoder rows merged, or at other K than the one it was
distilled with, without any training; the teacher with as many DDIM steps stands beside it, as in
TiUE's figure (a). All from the same noise, in PyTorch on the CPU.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiue_export.checkpoint.tokenizer_files import tokenizer_of
from tiue_export.drawing.picture import pixels_from_sample
from tiue_export.errors import UsageError
from tiue_export.graphs.shapes import shapes_of
from tiue_export.methods.load import load_student
from tiue_export.methods.scheduler import diffusers_scheduler
from tiue_export.sampling.ddim import one_pass_plan
from tiue_export.sampling.noise import noise_from_seed
from tiue_export.sampling.plan import Plan
from tiue_export.specs import check_finite

from ..torch_pipeline import TorchPipeline
from .judge import Contender, Draws
from .yardstick import require_size

MERGE_BELOW = 0.02
_BATCH = 16
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Noise (B, 4, H, W), text (B, L, D) -> latents, norms of the decoder rows (B, K) or None
Sampler = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Checkpoint(TorchPipeline):
    """A whole pipeline; its UNet computes in `dtype` (autocast), everything else in float32."""

    dtype: torch.dtype

    def contender(self, name: str, settings: str, sample: Sampler, **place: Any) -> Contender:
        """A contender that draws with `sample`; `settings` tells it from others of this model.

        `place` is where it stands in the picture: `series`, `mark` and `steps` of `Contender`.
        """
        vae: Any = self.student.vae
        shapes = shapes_of(self.student)
        half = self.dtype != torch.float32

        @torch.no_grad()
        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Draws:
            noise = np.concatenate([noise_from_seed(seed, shapes.latents) for seed in seeds])
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
    if student.text_encoder is None or student.vae is None or student.tokenizer_folder is None:
        raise UsageError(
            f"{folder} lacks a text encoder, a tokenizer or a VAE",
            "Give a whole diffusers pipeline folder.",
        )
    shapes = shapes_of(student)
    height, width = (side * shapes.vae_scale for side in shapes.latents[2:])
    require_size(folder, height, width, "Give a pipeline of the demo family.")
    tokenizer = tokenizer_of(student.tokenizer_folder, shapes.text[1])
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
        return checkpoint.sample(scheduler, noise, text, guidance), None

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
    student = copy.copy(checkpoint.student)  # the same modules
    student.plan = plan
    weights = torch.tensor(plan.latents.outputs).abs()

    def sample(noise: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        latents, outputs = student.predict(noise, text)
        rows = outputs.float().reshape(plan.rows, len(noise), -1)  # (K, B, C*H*W)
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


def one_step_contender(checkpoint: Checkpoint) -> Contender:
    """A one-step student as SwiftBrush draws: x0 = (z - sqrt(1-a) e) / sqrt(a) at the last t."""
    schedule = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    plan = one_pass_plan({**checkpoint.student.scheduler_config, **schedule}, 1)
    return student_contender(checkpoint, "one step", plan, series="one step")

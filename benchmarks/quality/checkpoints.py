"""Teacher, one-step baseline and student as contenders, straight from their pipeline folders.

The student is drawn exactly and with small decoder rows merged, or at other K than the one it was
distilled with, without any training; the teacher with as many DDIM steps stands beside it, as in
TiUE's figure (a). All from the same noise, in PyTorch on the CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from tiue_export.checkpoint.tokenizer_files import tokenizer_of
from tiue_export.drawing.picture import pixels_from_sample
from tiue_export.drawing.tokenizer import Tokenizer
from tiue_export.errors import UsageError
from tiue_export.graphs.shapes import shapes_of
from tiue_export.methods.load import load_student
from tiue_export.sampling.ddim import one_pass_plan
from tiue_export.sampling.noise import noise_from_seed
from tiue_export.sampling.plan import Plan
from tiue_export.specs import Array, check_finite
from tiue_export.student.model import Student

from ..ddim import ddim_arguments
from .judge import Contender, Draws
from .yardstick import PICTURE_SIZE_PX

MERGE_BELOW = 0.02
_BATCH = 16
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# (latents, norms of the decoder rows (N, K) or None)
Sampler = Callable[[Tensor, Sequence[str]], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Checkpoint:
    """A whole pipeline in memory: `student` holds UNet, text encoder and VAE in float32.

    The UNet computes in `dtype` (autocast); text, combination and VAE in float32.
    """

    student: Student
    tokenizer: Tokenizer
    latent_shape: tuple[int, ...]
    dtype: torch.dtype

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> text embedding (B, L, D)."""
        ids = torch.from_numpy(self.tokenizer(prompts))
        embedded: Tensor = self.student.text_encoder(ids).last_hidden_state  # type: ignore[misc]
        return embedded

    def contender(self, name: str, settings: str, sample: Sampler) -> Contender:
        """A contender that draws with `sample`; `settings` tells it from others of this model."""

        @torch.no_grad()
        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Draws:
            noise = np.concatenate(
                [noise_from_seed(seed, (1, *self.latent_shape)) for seed in seeds]
            )
            latents, norms = sample(torch.from_numpy(noise), prompts)
            check_finite(name, {"latents": latents.numpy()})
            return Draws(
                self._pictures(latents), latents.numpy(), None if norms is None else norms.numpy()
            )

        source = self.student.source
        parts = "".join([source.sha256, *source.part_sha256.values()])
        return Contender(name, draw, f"{parts} {self.dtype} {settings}", _BATCH)

    def autocast(self) -> Any:
        """The UNet's precision."""
        return torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32)

    def _pictures(self, latents: Tensor) -> Array:
        vae: Any = self.student.vae
        sample = vae.decode(latents / shapes_of(self.student).vae_scaling_factor).sample
        return pixels_from_sample(sample.numpy())


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
    length = int(student.text_encoder.config.max_position_embeddings)
    tokenizer = tokenizer_of(student.tokenizer_folder, length)
    student = student.float().requires_grad_(False)
    shape = shapes_of(student).latents[1:]
    sides_px = tuple(side * shapes_of(student).vae_scale for side in shape[1:])
    if sides_px != (PICTURE_SIZE_PX, PICTURE_SIZE_PX):
        raise UsageError(
            f"{folder} draws {sides_px[1]}x{sides_px[0]} px; the quality data judges "
            f"{PICTURE_SIZE_PX}x{PICTURE_SIZE_PX} px",
            "Give a pipeline of the demo family.",
        )
    return Checkpoint(student, tokenizer, shape, _PRECISIONS[precision])


def teacher_contender(checkpoint: Checkpoint, steps: int, guidance: float) -> Contender:
    """`steps` of DDIM with classifier-free guidance; 1.0 runs without the null prompt."""
    if steps < 1:
        raise UsageError(f"--teacher-steps is {steps}; expected 1 or more")
    scheduler: Any = DDIMScheduler(**ddim_arguments(checkpoint.student.scheduler_config))
    scheduler.set_timesteps(steps)

    def sample(noise: Tensor, prompts: Sequence[str]) -> tuple[Tensor, None]:
        text = checkpoint.embed(prompts)
        if guidance != 1:
            text = torch.cat([checkpoint.embed([""]).expand_as(text), text])  # (2*B, L, D)
        latents = noise
        for timestep in scheduler.timesteps:
            copies = latents.repeat(len(text) // len(noise), 1, 1, 1)
            with checkpoint.autocast():
                output = checkpoint.student.unet(copies, timestep, text).sample.float()
            if guidance != 1:
                null, conditioned = output.chunk(2)
                output = null + guidance * (conditioned - null)
            latents = scheduler.step(output, timestep, latents).prev_sample
        return latents, None

    name = f"teacher, {steps} steps, guidance {guidance:g}"
    contender = checkpoint.contender(name, f"DDIM {steps} {guidance}", sample)
    return replace(contender, series=f"teacher, guidance {guidance:g}, T DDIM steps", steps=steps)


def student_contender(checkpoint: Checkpoint, name: str, plan: Plan) -> Contender:
    """One encoder pass, one batched decoder pass over `plan`'s rows, the closed formula."""
    student = _with_plan(checkpoint.student, plan)
    weights = torch.tensor(plan.latents.outputs).abs()

    def sample(noise: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        text = checkpoint.embed(prompts)
        with checkpoint.autocast():
            outputs = student.decode(student.encode(noise, text), text).float()
        rows = outputs.reshape(plan.rows, len(noise), -1)  # (K, B, C*H*W)
        norms = weights[:, None] * rows.norm(dim=2)
        return student.combine(noise, outputs), norms.T

    contender = checkpoint.contender(name, str(dataclasses.astuple(plan)), sample)
    return replace(contender, series="student, K decoder rows", steps=plan.rows)


def student_contenders(checkpoint: Checkpoint) -> list[Contender]:
    """The student exactly, and with the rows merged whose weight is below 0.02."""
    plan = checkpoint.student.plan
    merged = plan.merged(MERGE_BELOW)
    name = f"TiUE K={plan.steps}"
    contenders = [student_contender(checkpoint, name, plan)]
    if merged.rows < plan.rows:
        name = f"{name}, {merged.rows} rows"
        contender = student_contender(checkpoint, name, merged)
        contenders.append(replace(contender, mark="rows merged"))
    return contenders


def other_rows(checkpoint: Checkpoint, rows: Sequence[int]) -> list[Contender]:
    """The same weights at each K of `rows`; the K they were trained at says so in its name."""
    trained = checkpoint.student.plan.steps
    contenders = []
    for steps in rows:
        plan = one_pass_plan(checkpoint.student.scheduler_config, steps)
        as_trained = steps == trained
        name = f"student, K={steps}" + (", as trained" if as_trained else "")
        contender = student_contender(checkpoint, name, plan)
        mark = "the K it was trained with" if as_trained else ""
        contenders.append(replace(contender, mark=mark))
    return contenders


def one_step_contender(checkpoint: Checkpoint) -> Contender:
    """A one-step student as SwiftBrush draws: x0 = (z - sqrt(1-a) e) / sqrt(a) at the last t."""
    config = {
        **checkpoint.student.scheduler_config,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
    }
    contender = student_contender(checkpoint, "one step", one_pass_plan(config, 1))
    return replace(contender, series="one step")


def _with_plan(student: Student, plan: Plan) -> Student:
    """The same modules under another plan."""
    return Student(
        student.unet,
        plan,
        source=student.source,
        scheduler_config=student.scheduler_config,
        text_encoder=student.text_encoder,
        vae=student.vae,
        tokenizer_folder=student.tokenizer_folder,
    ).eval()

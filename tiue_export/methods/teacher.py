"""Undistilled checkpoint -> the same `Student` type with a plan: what Faster Diffusion exports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tiue_export.checkpoint.parts import WEIGHTS_STEM, load_controlnet
from tiue_export.checkpoint.tensors import sha256_of_files, weight_files
from tiue_export.errors import CheckpointError, UnsupportedModelError
from tiue_export.methods.scheduler import plan_from_config
from tiue_export.sampling.plan_options import FasterOptions
from tiue_export.student.load import load_student
from tiue_export.student.model import Student


def load_teacher(
    path: str | Path,
    base: str | Path | None = None,
    options: FasterOptions | None = None,
    *,
    family: str | None = None,
    vae: str | Path | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Student:
    """Load an ordinary Stable Diffusion 1.x/2.x model and give it a plan.

    Arguments and errors are those of `load_student`; a distilled student raises `ScheduleError`.
    """
    options = options or FasterOptions()
    loaded = load_student(
        path,
        base,
        family=family,
        steps=options.asked_steps,
        vae=vae,
        distilled=False,
        on_stage=on_stage,
    )
    return with_plan(loaded, options)


def with_plan(teacher: Student, options: FasterOptions) -> Student:
    """Set `schedule` and `plan` of a loaded model; returns it."""
    activation = teacher.unet.config.act_fn
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(
            f"the UNet's activation is {activation}; Faster Diffusion's decoder expects silu",
            "Stable Diffusion 1.x and 2.x have silu.",
        )
    teacher.schedule, teacher.plan = plan_from_config(teacher.scheduler_config, options)
    return teacher


def with_controlnet(teacher: Student, folder: Path) -> Student:
    """Add a ControlNet from a diffusers folder; returns the same model.

    Raises `CheckpointError` for no such folder, `UnsupportedModelError` for another family.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"--controlnet {folder}: no ControlNet folder, it has no config.json",
            "Give a folder with config.json and diffusion_pytorch_model.safetensors.",
        )
    teacher.controlnet = load_controlnet(folder, dict(teacher.unet.config))
    digest = sha256_of_files(weight_files(folder, WEIGHTS_STEM), folder)
    source = teacher.source
    teacher.source = replace(
        source,
        part_sha256={**source.part_sha256, "controlnet": digest},
        parts={**source.parts, "controlnet": f"--controlnet {folder.name}"},
    )
    return teacher

"""Faster Diffusion: an ordinary model in a loop, its encoder run at key steps only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tiue_export.checkpoint.parts import WEIGHTS_STEM, load_controlnet
from tiue_export.checkpoint.tensors import sha256_of_files, weight_files
from tiue_export.errors import CheckpointError, ScheduleError, UnsupportedModelError, UsageError
from tiue_export.methods.method import MethodOptions
from tiue_export.methods.scheduler import plan_from_config
from tiue_export.sampling.key_step_options import FasterOptions
from tiue_export.sampling.key_step_plan import check_scheduler
from tiue_export.sampling.plan import Plan
from tiue_export.student.load import CheckpointFacts, load_model
from tiue_export.student.model import Student

AUTO = "auto"


@dataclass(frozen=True)
class FasterDiffusion:
    """A checkpoint that records a K is distilled, and refused."""

    name: str = "faster"
    summary: str = "Faster Diffusion, for ordinary models in a loop"
    takes: tuple[str, ...] = (
        "steps",
        "scheduler",
        "key_steps",
        "inject",
        "guidance",
        "max_decoder_rows",
        "budget",
    )
    features: frozenset[str] = frozenset({"passes", "guidance"})
    takes_controlnet: bool = True

    def check(self, options: MethodOptions) -> None:
        """Refuse an unknown sampler, and a budget that nothing keeps."""
        if options.scheduler is not None:
            check_scheduler(options.scheduler)
        if options.budget is not None and options.key_steps != AUTO:
            raise UsageError(
                "--budget is for --key-steps auto, which chooses within it",
                "Add --key-steps auto, or leave --budget out.",
            )

    def plan(self, checkpoint: CheckpointFacts, options: MethodOptions) -> Plan:
        """With key steps "auto" the published ones, until they are measured."""
        if checkpoint.recorded_steps is not None:
            raise ScheduleError(
                f"{checkpoint.name} is a distilled student (it records "
                f"K={checkpoint.recorded_steps}), which draws in one pass; Faster Diffusion speeds "
                "up models that are not distilled",
                "Leave --method out, or give the teacher as --ckpt.",
            )
        activation = checkpoint.unet_config.get("act_fn", "silu")
        if activation not in ("silu", "swish"):
            raise UnsupportedModelError(
                f"the UNet's activation is {activation}; Faster Diffusion's decoder expects silu",
                "Stable Diffusion 1.x and 2.x have silu.",
            )
        return plan_from_config(checkpoint.scheduler_config, faster_options(options))


def faster_options(options: MethodOptions) -> FasterOptions:
    """What was given, over this method's defaults."""
    values = {
        "scheduler": options.scheduler,
        "steps": options.steps,
        "key_steps": None if options.key_steps == AUTO else options.key_steps,
        "inject": options.inject,
        "guidance": options.guidance,
        "max_decoder_rows": options.max_decoder_rows,
    }
    return FasterOptions(**{k: v for k, v in values.items() if v is not None})  # type: ignore[arg-type]


def load_teacher(
    path: str | Path,
    base: str | Path | None = None,
    options: FasterOptions | None = None,
    *,
    family: str | None = None,
    vae: str | Path | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Student:
    """Load an ordinary Stable Diffusion 1.x/2.x model with a plan of Faster Diffusion.

    Arguments and errors are those of `load_student`; a distilled student raises `ScheduleError`.
    """
    chosen = options or FasterOptions()
    given = MethodOptions(
        steps=chosen.steps,
        scheduler=chosen.scheduler,
        key_steps=chosen.key_steps,
        inject=chosen.inject,
        guidance=chosen.guidance,
        max_decoder_rows=chosen.max_decoder_rows,
    )
    method = FasterDiffusion()
    return load_model(
        path,
        base,
        lambda checkpoint: method.plan(checkpoint, given),
        family=family,
        vae=vae,
        on_stage=on_stage,
    )


def with_plan(teacher: Student, options: FasterOptions) -> Student:
    """Give a loaded model another plan; returns it."""
    teacher.plan = plan_from_config(teacher.scheduler_config, options)
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

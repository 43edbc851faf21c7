"""Faster Diffusion: an ordinary model in a loop, its encoder run at key steps only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tiue_export.checkpoint.parts import WEIGHTS_STEM, load_controlnet
from tiue_export.checkpoint.tensors import sha256_of_folder
from tiue_export.errors import CheckpointError, ScheduleError, UnsupportedModelError, UsageError
from tiue_export.methods.method import AUTO, SamplingOptions
from tiue_export.methods.scheduler import plan_from_config
from tiue_export.sampling.key_step_options import FasterOptions
from tiue_export.sampling.key_step_plan import check_scheduler
from tiue_export.sampling.plan import Plan
from tiue_export.student.load import CheckpointFacts
from tiue_export.student.model import Student


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

    def check(self, options: SamplingOptions) -> None:
        """Refuse an unknown sampler, and a budget that nothing keeps."""
        if options.scheduler is not None:
            check_scheduler(options.scheduler)
        if options.budget is not None and options.key_steps != AUTO:
            raise UsageError(
                "--budget is for --key-steps auto, which chooses within it",
                "Add --key-steps auto, or leave --budget out.",
            )

    def plan(self, checkpoint: CheckpointFacts, options: SamplingOptions) -> Plan:
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


def faster_options(options: SamplingOptions) -> FasterOptions:
    """What was given, over this method's defaults."""
    given = {name: getattr(options, name) for name in options.given() if name != "budget"}
    if options.key_steps == AUTO:
        del given["key_steps"]
    return FasterOptions(**given)


def with_plan(teacher: Student, options: FasterOptions) -> Student:
    """Give a loaded model another plan; returns it."""
    teacher.plan = plan_from_config(teacher.scheduler_config, options)
    return teacher


def check_controlnet(folder: Path) -> None:
    """Raise `CheckpointError` for a folder that holds no ControlNet."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"--controlnet {folder}: no ControlNet folder, it has no config.json",
            "Give a folder with config.json and diffusion_pytorch_model.safetensors.",
        )


def with_controlnet(teacher: Student, folder: Path) -> Student:
    """Add a ControlNet from a diffusers folder; returns the same model.

    Raises `CheckpointError` for no such folder, `UnsupportedModelError` for another family.
    """
    check_controlnet(folder)
    teacher.controlnet = load_controlnet(folder, dict(teacher.unet.config))
    digest = sha256_of_folder(folder, WEIGHTS_STEM)
    source = teacher.source
    teacher.source = replace(
        source,
        part_sha256={**source.part_sha256, "controlnet": digest},
        parts={**source.parts, "controlnet": f"--controlnet {folder.name}"},
    )
    return teacher

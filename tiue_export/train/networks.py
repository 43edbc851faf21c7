"""Everything a distillation computes with, loaded from the teacher's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from tiue_export.checkpoint.parts import quiet_libraries
from tiue_export.checkpoint.tokenizer_files import tokenizer_of
from tiue_export.drawing.tokenizer import Tokenizer
from tiue_export.errors import UnsupportedModelError, UsageError
from tiue_export.graphs.options import ExportOptions
from tiue_export.graphs.shapes import Shapes, shapes_of
from tiue_export.methods.load import load_student
from tiue_export.sampling.ddim import DEFAULT_STEPS, alphas_cumprod, ddim_settings, one_pass_plan
from tiue_export.sampling.fan_out import FanOut
from tiue_export.sampling.few_step import FewStepOptions, few_step_plan
from tiue_export.sampling.recipes import recipe_named
from tiue_export.student.load import CheckpointFacts, PlanChoice, load_model
from tiue_export.student.model import Student

from .backbone import reduced_config, reduced_unet
from .config import DistillConfig
from .consistency_losses import TIMESTEP_SCALING
from .score_networks import add_adapters

_TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# A single step from pure noise to the picture: t = 999, and alpha 1 behind it, so that the closed
# formula becomes SwiftBrush's (z - sqrt(1 - a) e) / sqrt(a).
_ONE_STEP_SCHEDULER = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
# What a student that is given must have in common with what its teacher would start.
_SHAPE_KEYS = ("cross_attention_dim", "block_out_channels", "layers_per_block", "mid_block_type")
_NOISE_SETTINGS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
)


@dataclass(frozen=True)
class Networks:
    """`student` is trained; `teacher` is frozen, and bears the fake score's adapters if it has one.

    `text_encoder`, `vae` are frozen. `alphas` (1000,) float32 are cumulative products of 1 - beta.
    `latent_shape` is (4, h, w), `size_px` the height and width of pictures. `sha256` names the
    weights that decide a run's outcome. `fresh_tensors` are those of the student that no teacher's
    could start.
    """

    student: Student
    teacher: Any
    text_encoder: Any
    vae: Any
    tokenizer: Tokenizer
    tokenizer_folder: Path
    alphas: Tensor
    latent_shape: tuple[int, int, int]
    size_px: tuple[int, int]
    sha256: dict[str, str]
    fresh_tensors: int

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> text embedding (B, L, D) float32, padded as the tokenizer says."""
        ids = torch.from_numpy(self.tokenizer(prompts))  # (B, L)
        embedded: Tensor = self.text_encoder(ids.to(self.text_encoder.device)).last_hidden_state
        return embedded.float()


def load_networks(config: DistillConfig, device: torch.device) -> Networks:
    """Teacher folder -> networks on `device`; the student starts as the teacher, as a smaller copy
    of it (`backbone`), or as `student`.

    Raises `UnsupportedModelError` for a teacher or student that does not predict epsilon or that do
    not fit together, `UsageError` for a teacher without text encoder or VAE and for a size the UNet
    cannot halve evenly.
    """
    teacher = load_student(config.teacher, steps=DEFAULT_STEPS, allow_other_steps=True)
    if teacher.text_encoder is None or teacher.vae is None or teacher.tokenizer_folder is None:
        raise UsageError(
            f"{config.teacher} lacks a text encoder, a tokenizer or a VAE",
            "Distillation needs a whole pipeline folder.",
        )
    settings = ddim_settings(teacher.scheduler_config)
    _check_epsilon(config.teacher, teacher)
    shapes = _shapes(config, teacher)
    student, started_from, fresh_tensors = _new_student(config, teacher)
    _, _, rows, columns = shapes.latents
    # What it was trained at is what it is exported at.
    student.unet.register_to_config(sample_size=rows if rows == columns else [rows, columns])
    # Half a text encoder or VAE is for GPUs: on a CPU it is slow, and some of its operations fail.
    frozen: dict[str, Any] = {"dtype": torch.float32} if device.type == "cpu" else {}
    with quiet_libraries():
        text_encoder = teacher.text_encoder.to(device, **frozen).requires_grad_(False)
        vae = teacher.vae.to(device, **frozen).requires_grad_(False)
        base = teacher.unet.to(dtype=_TORCH_DTYPES[config.precision])
    base.requires_grad_(False)
    if config.has_fake_score:
        add_adapters(
            base,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            targets=config.lora_targets,
            seed=config.seed,
        )
    for unet in (student.unet, base):
        _apply_speed_settings(config, unet)
    return Networks(
        student=student.to(device).train(),
        teacher=base.to(device).train(),
        text_encoder=text_encoder,
        vae=vae,
        tokenizer=tokenizer_of(
            teacher.tokenizer_folder, text_encoder.config.max_position_embeddings
        ),
        tokenizer_folder=teacher.tokenizer_folder,
        alphas=torch.from_numpy(alphas_cumprod(settings)).float().to(device),
        latent_shape=shapes.latents[1:],
        size_px=(rows * shapes.vae_scale, columns * shapes.vae_scale),
        sha256={
            "teacher": teacher.source.sha256,
            "text_encoder": teacher.source.part_sha256["text_encoder"],
            "student": started_from,
        },
        fresh_tensors=fresh_tensors,
    )


def _lcm_scheduler(teacher: Mapping[str, Any], solver_steps: int) -> dict[str, Any]:
    """LCMScheduler's configuration over the teacher's noise, on the timesteps of the training."""
    settings = ddim_settings(teacher)
    return {
        "_class_name": "LCMScheduler",
        **{name: settings[name] for name in _NOISE_SETTINGS if settings[name] is not None},
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "clip_sample": False,
        "original_inference_steps": solver_steps,
        "timestep_scaling": TIMESTEP_SCALING,
    }


def _prediction_type(checkpoint: CheckpointFacts) -> str:
    return str(checkpoint.scheduler_config.get("prediction_type", "epsilon"))


def _fan_out(config: DistillConfig, checkpoint: CheckpointFacts) -> FanOut:
    """Where rows part: as configured, else as the student that training goes on from."""
    if config.method != "tiue":
        return FanOut()
    chosen = checkpoint.recorded_fan_out if config.fan_out is None else config.fan_out
    return FanOut() if chosen is None else FanOut.parse(str(chosen), "fan_out")


def _check_epsilon(name: str, model: Student) -> None:
    if model.plan.prediction_type != "epsilon":
        raise UnsupportedModelError(
            f"{name} predicts {model.plan.prediction_type}; the losses are defined on epsilon",
            "Use an epsilon model, such as stable-diffusion-2-1-base.",
        )


def _shapes(config: DistillConfig, teacher: Student) -> Shapes:
    options = ExportOptions(precision="fp32", height=config.height, width=config.width)
    try:
        return shapes_of(teacher, options)
    except UsageError as error:
        # The same rule as for exporting, whose options carry dashes.
        hint = None if error.next_step is None else error.next_step.replace("--", "")
        raise UsageError(error.message.replace("--", ""), hint) from error


def _apply_speed_settings(config: DistillConfig, unet: Any) -> None:
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.channels_last:
        unet.to(memory_format=torch.channels_last)
    if config.plain_attention:
        unet.set_attn_processor(AttnProcessor())


def _new_student(config: DistillConfig, teacher: Student) -> tuple[Student, str, int]:
    """UNet in float32 with all weights trainable, the SHA-256 of the weights it starts from, and
    how many of its tensors they could not start.

    Text encoder and VAE stay outside.
    """
    scheduler = dict(teacher.scheduler_config)
    if config.method == "one-step":
        scheduler |= _ONE_STEP_SCHEDULER
    if config.method == "lcm":
        scheduler = _lcm_scheduler(scheduler, config.solver_steps)
        options = FewStepOptions(steps=config.steps, allow_other_steps=True)
        plan = few_step_plan(scheduler, recipe_named("lcm"), options)
    else:
        plan = one_pass_plan(scheduler, config.steps)
    # The teacher's UNet gets adapters; the student's weights are read again.
    start = load_model(
        config.teacher if config.student is None else config.student,
        config.teacher,
        # Whatever it was drawn by: from here on it is the plan of its new training.
        lambda checkpoint: PlanChoice(
            replace(
                plan,
                prediction_type=_prediction_type(checkpoint),
                fan_out=_fan_out(config, checkpoint),
            )
        ),
        without=("text_encoder", "vae"),
    )
    _check_epsilon(config.student or config.teacher, start)
    unet, wanted, fresh = start.unet, dict(teacher.unet.config), 0
    if config.backbone is not None:
        wanted = reduced_config(wanted, config.backbone)
        if config.student is None:
            unet, fresh = reduced_unet(unet, config.backbone, config.seed)
    for key in _SHAPE_KEYS:
        got, of_teacher = unet.config[key], wanted[key]
        if got != of_teacher:
            raise UnsupportedModelError(
                f"{config.student} has {key} {got}, its teacher {config.teacher} {of_teacher}"
                + (f" as {config.backbone}" if config.backbone else ""),
                "Student and teacher must be of one family; backbone says how much smaller the "
                "student is.",
            )
    student = Student(
        unet.float().requires_grad_(True),
        replace(plan, fan_out=start.plan.fan_out),
        source=teacher.source,
        scheduler_config=scheduler,
    )
    return student, start.source.sha256, fresh

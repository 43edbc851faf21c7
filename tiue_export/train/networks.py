"""Everything a distillation computes with, loaded from the teacher's checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTokenizer

from tiue_export.checkpoint import load_student
from tiue_export.components import quiet_libraries
from tiue_export.errors import UnsupportedModelError, UsageError
from tiue_export.graphs import ExportOptions, latent_shape
from tiue_export.schedule import alphas_cumprod, ddim_settings, schedule_from_config
from tiue_export.student import Student

from .config import DistillConfig
from .score_networks import add_adapters

_TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# A single step from pure noise to the picture: t = 999, and alpha 1 behind it, so that the closed
# formula becomes SwiftBrush's (z - sqrt(1 - a) e) / sqrt(a).
_ONE_STEP_SCHEDULER = {"timestep_spacing": "trailing", "set_alpha_to_one": True}


@dataclass(frozen=True)
class Networks:
    """`student` is trained; `scores` is the frozen teacher with the fake score's adapters.

    `text_encoder`, `vae` are frozen. `alphas` (1000,) float32 are cumulative products of 1 - beta.
    """

    student: Student
    scores: Any
    text_encoder: Any
    vae: Any
    tokenizer: CLIPTokenizer
    tokenizer_folder: Path
    alphas: Tensor
    latent_shape: tuple[int, int, int]

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> text embedding (B, L, D) float32, padded as the tokenizer says."""
        encoded = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, return_tensors="pt"
        )
        ids = encoded.input_ids.to(self.text_encoder.device)
        embedded: Tensor = self.text_encoder(ids).last_hidden_state
        return embedded.float()


def load_networks(config: DistillConfig, device: torch.device) -> Networks:
    """Teacher folder -> networks on `device`; the student starts as the teacher, or as `student`.

    Raises `UnsupportedModelError` for a teacher that does not predict epsilon, `UsageError` for one
    without text encoder or VAE and for a size the UNet
    cannot halve evenly.
    """
    teacher = load_student(config.teacher, steps=4, allow_other_steps=True)
    if teacher.text_encoder is None or teacher.vae is None or teacher.tokenizer_folder is None:
        raise UsageError(
            f"{config.teacher} lacks a text encoder, a tokenizer or a VAE",
            "Distillation needs a whole pipeline folder.",
        )
    settings = ddim_settings(teacher.scheduler_config)
    if settings["prediction_type"] != "epsilon":
        raise UnsupportedModelError(
            f"the teacher predicts {settings['prediction_type']}; the losses are defined on epsilon",
            "Use an epsilon model, such as stable-diffusion-2-1-base.",
        )
    tokenizer = CLIPTokenizer.from_pretrained(teacher.tokenizer_folder)
    with quiet_libraries():
        frozen = teacher.unet.to(dtype=_TORCH_DTYPES[config.precision])
    scores = add_adapters(
        frozen,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        targets=config.lora_targets,
        seed=config.seed,
    )
    shape = latent_shape(
        teacher, ExportOptions(precision="fp32", height=config.height, width=config.width)
    )
    student = _new_student(config, teacher)
    if config.gradient_checkpointing:
        student.unet.enable_gradient_checkpointing()
        scores.enable_gradient_checkpointing()
    for unet in (student.unet, scores):
        if config.channels_last:
            unet.to(memory_format=torch.channels_last)
        if config.plain_attention:
            unet.set_attn_processor(AttnProcessor())
    return Networks(
        student=student.to(device).train(),
        scores=scores.to(device).train(),
        text_encoder=teacher.text_encoder.to(device).requires_grad_(False),
        vae=teacher.vae.to(device).requires_grad_(False),
        tokenizer=tokenizer,
        tokenizer_folder=teacher.tokenizer_folder,
        alphas=torch.from_numpy(alphas_cumprod(settings)).float().to(device),
        latent_shape=shape[1:],
    )


def _new_student(config: DistillConfig, teacher: Student) -> Student:
    """UNet in float32 with all weights trainable; text encoder and VAE stay outside."""
    scheduler = dict(teacher.scheduler_config)
    if config.method == "one-step":
        scheduler |= _ONE_STEP_SCHEDULER
    unet = _unet_to_start_from(config, teacher)
    return Student(
        unet.float().requires_grad_(True),
        schedule_from_config(scheduler, config.steps),
        source=teacher.source,
        scheduler_config=scheduler,
    )


def _unet_to_start_from(config: DistillConfig, teacher: Student) -> Any:
    if config.student is not None:
        loaded = load_student(
            config.student, base=config.teacher, steps=config.steps, allow_other_steps=True
        )
        return loaded.unet
    # The adapters are already in the teacher's UNet; its own weights, read again, are the start.
    return load_student(
        config.teacher, steps=4, allow_other_steps=True, without=("text_encoder", "vae")
    ).unet


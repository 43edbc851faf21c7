"""Models of one level: what converts and loads quickly."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tiue_export.benchmarks.synthetic import fill
from tiue_export.checkpoint.family import load_family
from tiue_export.sampling.ddim import DEFAULT_STEPS
from tiue_export.student.pipeline_folder import write_model_index, write_scheduler


def micro_unet(**changes: Any) -> UNet2DConditionModel:
    """A UNet of one level, seeded."""
    shape = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (32,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "use_linear_projection": True,
    }
    unet = UNet2DConditionModel(**(shape | changes))
    fill(unet, torch.Generator().manual_seed(0))
    return unet


def write_micro_unet(folder: Path, **changes: Any) -> Path:
    """That UNet with K=2; returns `folder`."""
    unet = micro_unet(**changes)
    unet.save_pretrained(folder / "unet")
    write_scheduler(folder, load_family("tiny").scheduler, 2)
    return folder


def write_micro_pipeline(folder: Path, unet: Path, tokenizer: Path) -> Path:
    """That UNet with K=4, a tokenizer, and the other parts as small; returns `folder`."""
    shutil.copytree(unet, folder)
    shutil.copytree(tokenizer, folder / "tokenizer")
    tiny = load_family("tiny")
    text = CLIPTextModel(CLIPTextConfig(**{**tiny.text_encoder, "num_hidden_layers": 1}))
    # Three halvings, as every Stable Diffusion VAE has.
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    for number, (part, model) in enumerate((("text_encoder", text), ("vae", vae))):
        fill(model, torch.Generator().manual_seed(number))
        model.save_pretrained(folder / part)
    write_scheduler(folder, tiny.scheduler, DEFAULT_STEPS)
    write_model_index(folder, tiny.scheduler, "AutoencoderTiny")
    return folder

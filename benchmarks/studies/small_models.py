"""Small models of random weights and Stable Diffusion's structures, which studies draw with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ..synthetic import SMALL_SDXL_SHAPES, fill, write_synthetic_pipeline

SIDE = 16  # latents
_ATTENDING = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
# What differs from the tiny family's UNet, of three levels and one resnet a level.
_SHAPES: dict[str, dict[str, Any]] = {
    "SD": {},
    "LCM": {"time_cond_proj_dim": 32},
    "SDXS": {
        "mid_block_type": None,
        "down_block_types": _ATTENDING,
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "tiny-sd": {
        "mid_block_type": None,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    },
}
# The same of the tiny SDXL.
_SDXL_SHAPES: dict[str, Mapping[str, Any]] = {
    "SDXL": SMALL_SDXL_SHAPES["sdxl"],
    "LCM-SDXL": {"time_cond_proj_dim": 32},
    "SSD-1B": SMALL_SDXL_SHAPES["ssd-1b"],
    "Vega": SMALL_SDXL_SHAPES["vega"],
}


def small_model(shape: str, models: Path) -> Path:
    """An ordinary model with random weights and SD 1.5's kind of scheduler, made once."""
    folder = models / shape
    if folder.exists():
        return folder
    of_sdxl = shape in _SDXL_SHAPES
    write_synthetic_pipeline(folder, "tiny-sdxl" if of_sdxl else "tiny", steps=None)
    config = UNet2DConditionModel.load_config(folder / "unet")
    changes = _SDXL_SHAPES[shape] if of_sdxl else _SHAPES[shape]
    unet = UNet2DConditionModel.from_config({**config, "sample_size": SIDE, **changes})
    fill(unet, torch.Generator().manual_seed(3))
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "clip_sample": False}))
    return folder

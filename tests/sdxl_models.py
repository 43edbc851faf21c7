"""Small models of SDXL's three shapes: SDXL's own, SSD-1B's and Vega's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from tiue_export.benchmarks.synthetic import SMALL_SDXL_SHAPES, fill
from tiue_export.checkpoint.family import load_family


def sdxl_unet(shape: str = "sdxl", **changes: Any) -> UNet2DConditionModel:
    """A small UNet of one of the shapes, seeded."""
    config = load_family("tiny-sdxl").unet | SMALL_SDXL_SHAPES[shape] | changes
    unet = UNet2DConditionModel.from_config(config)
    fill(unet, torch.Generator().manual_seed(0))
    return unet.eval()


def with_unet(pipeline: Path, folder: Path, unet: UNet2DConditionModel) -> Path:
    """A copy of a pipeline folder with another UNet."""
    shutil.copytree(pipeline, folder, ignore=lambda path, names: {"unet"} & set(names))
    unet.save_pretrained(folder / "unet")
    return folder

"""Pictures of a student in training: prompts down, seeds across, one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tiue_export.drawing.picture import image_from_pixels, pixels_from_sample, save_png
from tiue_export.sampling.noise import noise_from_seed

from .networks import Networks


@torch.no_grad()
def draw_grid(networks: Networks, prompts: Sequence[str], seeds: int, batch: int) -> Tensor:
    """(len(prompts), seeds, H, W, 3) uint8; seed s draws from noise s whatever the prompt.

    At most `batch` pictures are drawn at once.
    """
    device = networks.alphas.device
    noise = torch.from_numpy(noise_from_seed(0, (seeds, *networks.latent_shape))).to(device)
    rows = []
    for prompt in prompts:
        text = networks.embed([prompt])  # (1, L, D)
        pictures = []
        for first in range(0, seeds, batch):
            part = noise[first : first + batch]
            pictures.append(_draw(networks, part, text.expand(len(part), -1, -1)))
        rows.append(torch.cat(pictures))
    return torch.stack(rows)


def _draw(networks: Networks, noise: Tensor, text: Tensor) -> Tensor:
    """Noise (B, 4, h, w) and text (B, L, D) -> pictures (B, H, W, 3) uint8."""
    latents = networks.student.sample(noise, text)  # (B, 4, h, w)
    scaled = latents / networks.vae.config.scaling_factor
    pictures = networks.vae.decode(scaled.to(networks.vae.dtype), return_dict=False)[0]
    return torch.from_numpy(pixels_from_sample(pictures.float().cpu().numpy()))


def save_grid(grid: Tensor, prompts: Sequence[str], file: Path) -> None:
    """Write the grid as one PNG; the prompts go into its metadata."""
    rows, columns, height, width, _ = grid.shape
    joined = grid.permute(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
    file.parent.mkdir(parents=True, exist_ok=True)
    for leftover in file.parent.glob(f".{file.name}.*"):  # of a killed process
        leftover.unlink()
    save_png(
        image_from_pixels(np.ascontiguousarray(joined.numpy())),
        file,
        {"prompt": " | ".join(prompts)},
    )

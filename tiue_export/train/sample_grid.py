"""Pictures of a student in training: prompts down, seeds across, one PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tiue_export.drawing.picture import image_from_pixels, pixels_from_sample, save_png
from tiue_export.sampling.noise import noises_from_seed

from .networks import Networks

# Noises (n, B, 4, h, w) and text (B, L, D) -> latents (B, 4, h, w).
Sample = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def draw_grid(
    networks: Networks,
    sample: Sample,
    prompts: Sequence[str],
    seeds: int,
    batch: int,
) -> Tensor:
    """(len(prompts), seeds, H, W, 3) uint8; seed s draws from its noises whatever the prompt.

    `sample` takes as many as the student's plan. At most `batch` pictures are drawn at once.
    """
    shape = (seeds, *networks.latent_shape)
    noise = torch.from_numpy(noises_from_seed(0, networks.student.plan.noises, shape)).to(
        networks.alphas.device
    )
    rows = []
    for prompt in prompts:
        text = networks.embed([prompt])  # (1, L, D)
        pictures = []
        for first in range(0, seeds, batch):
            part = noise[:, first : first + batch]
            latents = sample(part, text.expand(part.shape[1], -1, -1))
            pictures.append(_decode(networks, latents))
        rows.append(torch.cat(pictures))
    return torch.stack(rows)


def _decode(networks: Networks, latents: Tensor) -> Tensor:
    """Latents (B, 4, h, w) -> pictures (B, H, W, 3) uint8."""
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

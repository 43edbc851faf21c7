"""LCM's guidance embedding, folded into the time embedding: the UNet is then a plain one.

A full LCM (Luo et al. 2023, arXiv 2310.04378, section 4.3) is told its guidance scale w by a second
sinusoid, whose projection is added to the timestep's before the time MLP. At one scale that is a
constant, and the first layer takes it into its bias: W (s + c) + b = W s + (W c + b).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiue_export.errors import UnsupportedModelError

GUIDANCE_WEIGHT = "time_embedding.cond_proj.weight"


def with_guidance(unet: Any, scale: float | None) -> Any:
    """Fold the scale into a UNet that takes a guidance embedding; others come back as they are.

    A half-precision UNet becomes float32: its bias could not hold the sum. Raises
    `UnsupportedModelError` where the UNet takes an embedding and there is no scale.
    """
    projection = unet.time_embedding.cond_proj
    if projection is None:
        return unet
    if scale is None:
        raise UnsupportedModelError(
            "the UNet takes a guidance embedding, as LCM has; this method gives it none",
            "Type --recipe lcm.",
        )
    unet = unet.float()
    first = unet.time_embedding.linear_1
    with torch.no_grad():
        condition = projection.weight.double() @ guidance_embedding(scale, projection.in_features)
        first.bias = torch.nn.Parameter(
            (first.bias.double() + first.weight.double() @ condition).float(), requires_grad=False
        )
    unet.time_embedding.cond_proj = None
    unet.register_to_config(time_cond_proj_dim=None)
    return unet


def guidance_embedding(scale: float, width: int) -> Tensor:
    """The sinusoid of w = scale - 1, (width,) float64; diffusers' LatentConsistencyModelPipeline
    has it as get_guidance_scale_embedding."""
    half = width // 2
    rates = torch.exp(
        torch.arange(half, dtype=torch.float64) * -(torch.tensor(1e4).double().log() / (half - 1))
    )
    angles = (scale - 1) * 1000 * rates
    embedding = torch.cat([angles.sin(), angles.cos()])
    return torch.nn.functional.pad(embedding, (0, width % 2))

"""A smaller UNet out of a bigger one, by leaving blocks out and copying what stays.

After BK-SDM (Kim et al. 2023, arXiv 2305.15798), whose students start from what their teacher has
in the same place: the outermost levels, the first resnets of a down block, the first and the last
of an up block.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from tiue_export.errors import UsageError

from .config import BACKBONES

Config = dict[str, Any]
# A value a level, from the outermost in, where they are lists.
_BY_LEVEL = (
    "block_out_channels",
    "down_block_types",
    "attention_head_dim",
    "only_cross_attention",
    "transformer_layers_per_block",
)
_UP = re.compile(r"up_blocks\.(\d+)\.(.+)")
_LAYER = re.compile(r"(resnets|attentions)\.(\d+)\.(.+)")


def reduced_config(config: Config, backbone: str) -> Config:
    """The configuration that `backbone` leaves of a UNet's.

    Raises `UsageError` where it would leave no level, or all as it is.
    """
    shape = BACKBONES[backbone]
    levels = len(config["block_out_channels"]) - shape.levels_less
    if levels < 1:
        raise UsageError(
            f"backbone {backbone} leaves no level of a UNet with {levels + shape.levels_less}",
            'Set backbone = "bk-sdm-small", or leave it out.',
        )
    reduced = {
        key: value[:levels] if key in _BY_LEVEL and isinstance(value, (list, tuple)) else value
        for key, value in config.items()
    }
    # Up blocks run from the innermost level out.
    reduced |= {
        "up_block_types": config["up_block_types"][shape.levels_less :],
        "layers_per_block": 1,
        "mid_block_type": config["mid_block_type"] if shape.mid_block else None,
    }
    if reduced == config:
        raise UsageError(
            f"backbone {backbone} leaves the teacher's UNet as it is",
            'Set backbone = "bk-sdm-small" or "bk-sdm-tiny", or leave it out.',
        )
    return reduced


def reduced_unet(unet: Any, backbone: str, seed: int) -> tuple[Any, int]:
    """A float32 UNet of that shape, and how many of its tensors could not be copied from `unet`.

    Those have another shape in `unet`, as where the innermost level is left out and the next has
    another width; they start as diffusers initialises them, from `seed`.
    """
    config = dict(unet.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        small = type(unet).from_config(reduced_config(config, backbone))
    levels_less = BACKBONES[backbone].levels_less
    source, state = unet.state_dict(), small.state_dict()
    origins = {name: _origin(name, levels_less, config["layers_per_block"]) for name in state}
    copied = {
        name: source[origin]
        for name, origin in origins.items()
        if source[origin].shape == state[name].shape
    }
    small.load_state_dict(copied, strict=False)
    return small, len(state) - len(copied)


def _origin(name: str, levels_less: int, layers: int) -> str:
    """Where a tensor of the smaller UNet stands in one with `layers` resnets a level."""
    up = _UP.fullmatch(name)
    if up is None:
        return name
    block, rest = int(up[1]) + levels_less, up[2]
    layer = _LAYER.fullmatch(rest)
    if layer is not None and layer[2] == "1":  # the last of two
        rest = f"{layer[1]}.{layers}.{layer[3]}"
    return f"up_blocks.{block}.{rest}"

"""The UNet's two graphs for plans of several passes: timesteps are inputs, not constants.

Every module takes and returns plain tensors in the order of its graph's spec. N is the rows of one
step: B, or with guidance 2B, the rows without the prompt first; decoder rows are step-major.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tiue_export.graphs.conditions import Size, TextConditions
from tiue_export.graphs.folded import OutputHead, encoder_features, mid_and_skips
from tiue_export.graphs.hoisting import RowBody, Shared, SharedDecoder, activated_time
from tiue_export.graphs.lowering import (
    NO_PATHS,
    ModulePaths,
    below,
    copied,
    lowered,
    with_plain_attention,
)
from tiue_export.student.up_path import run_up_blocks, skip_count


class TimeEmbedding(nn.Module):
    """timesteps (g,) float32 -> (g, D_t) in `dtype`, computed in float32."""

    def __init__(self, unet: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.time_proj = unet.time_proj
        self.time_embedding = copied(unet.time_embedding, torch.float32)
        self.dtype = dtype

    def forward(self, timesteps: Tensor) -> Tensor:
        embedded: Tensor = self.time_embedding(self.time_proj(timesteps))
        return embedded.to(self.dtype)


class TimedEncoder(nn.Module):
    """sample (N, 4, H, W), timestep (1,), encoder_hidden_states (N, L, D) -> mid, if any, skips."""

    def __init__(
        self,
        unet: Any,
        picture_px: Size,
        dtype: torch.dtype,
        float32: ModulePaths = NO_PATHS,
    ) -> None:
        super().__init__()
        self.conditions = TextConditions(unet, picture_px, dtype)
        body = nn.ModuleDict(
            {"conv_in": unet.conv_in, "down_blocks": unet.down_blocks, "mid_block": unet.mid_block}
        )
        self.unet: Any = lowered(body, dtype, below(float32, "unet"))
        with_plain_attention(self.unet, bool(unet.config.upcast_attention))
        self.time = TimeEmbedding(unet, dtype)
        self.dtype = dtype

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor
    ) -> tuple[Tensor, ...]:
        text, added = self.conditions(encoder_hidden_states)
        time = self.time(timestep)
        # (N, D_t)
        time = time.expand(sample.shape[0], -1) if added is None else time + added
        hidden = self.unet["conv_in"](sample.to(self.dtype))
        return encoder_features(self.unet, hidden, time, text)


class ControlNet(nn.Module):
    """What a ControlNet adds to the encoder's mid and skips, in the encoder's order.

    sample (N, 4, H, W), timestep (1,), encoder_hidden_states (N, L, D), controlnet_cond
    (B, 3, 8H, 8W) in [0, 1], conditioning_scale (1,). After Zhang et al. 2023 (arXiv 2302.05543).
    """

    def __init__(
        self, controlnet: Any, dtype: torch.dtype, float32: ModulePaths = NO_PATHS
    ) -> None:
        super().__init__()
        parts = ("conv_in", "controlnet_cond_embedding", "down_blocks", "mid_block")
        zeros = ("controlnet_down_blocks", "controlnet_mid_block")
        body = nn.ModuleDict({name: getattr(controlnet, name) for name in (*parts, *zeros)})
        self.net: Any = lowered(body, dtype, below(float32, "net"))
        with_plain_attention(self.net, bool(controlnet.config.upcast_attention))
        self.time = TimeEmbedding(controlnet, dtype)
        self.dtype = dtype

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: Tensor,
    ) -> tuple[Tensor, ...]:
        net = self.net
        time = self.time(timestep).expand(sample.shape[0], -1)  # (N, D_t)
        condition = net["controlnet_cond_embedding"](controlnet_cond.to(self.dtype))
        hidden = net["conv_in"](sample.to(self.dtype)) + torch.cat([condition, condition])
        mid, *skips = encoder_features(net, hidden, time, encoder_hidden_states)
        scale = conditioning_scale.to(self.dtype)
        ends = zip(net["controlnet_down_blocks"], skips, strict=True)
        return (net["controlnet_mid_block"](mid) * scale, *(end(x) * scale for end, x in ends))


class TimedNaiveDecoder(nn.Module):
    """timesteps (g,), encoder_hidden_states, mid, skips -> outputs (g*N, 4, H, W) float32.

    As the published code batches it: every feature is repeated g times (`--no-hoist`).
    """

    def __init__(
        self,
        unet: Any,
        picture_px: Size,
        dtype: torch.dtype,
        float32: ModulePaths = NO_PATHS,
    ) -> None:
        super().__init__()
        self.conditions = TextConditions(unet, picture_px, dtype)
        body = nn.ModuleDict({"up_blocks": unet.up_blocks, "head": OutputHead(unet)})
        self.unet: Any = lowered(body, dtype, below(float32, "unet"))
        with_plain_attention(self.unet, bool(unet.config.upcast_attention))
        self.time = TimeEmbedding(unet, dtype)

    def forward(
        self, timesteps: Tensor, encoder_hidden_states: Tensor, *features: Tensor
    ) -> tuple[Tensor, ...]:
        steps, batch = timesteps.shape[0], encoder_hidden_states.shape[0]
        text, added = self.conditions(encoder_hidden_states)
        time = self.time(timesteps).unsqueeze(1)  # (g, 1, D_t)
        time = time.expand(steps, batch, time.shape[2]) if added is None else time + added
        time = time.flatten(0, 1)  # (g*N, D_t)
        text = text.repeat(steps, 1, 1)  # (g*N, L, D)
        repeated = [feature.repeat(steps, 1, 1, 1) for feature in features]
        hidden, skips = mid_and_skips(repeated, skip_count(self.unet["up_blocks"]))
        hidden = run_up_blocks(self.unet["up_blocks"], hidden, skips, time, text)
        return (self.unet["head"](hidden).float(),)


class TimedDecoder(nn.Module):
    """timesteps (g,), encoder_hidden_states, mid, skips -> outputs (g*N, 4, H, W) float32.

    The part without time in it is computed once for the group, at batch N.
    """

    def __init__(self, shared: SharedDecoder, rows: RowBody, time: TimeEmbedding) -> None:
        super().__init__()
        self.shared, self.rows, self.time = shared, rows, time

    def forward(
        self, timesteps: Tensor, encoder_hidden_states: Tensor, *features: Tensor
    ) -> tuple[Tensor, ...]:
        shared = self.shared(encoder_hidden_states, *features)
        return (self.rows(with_time(shared, self.time, timesteps)),)


class TimedSharedRows(nn.Module):
    """timesteps (g,) and the encoder's shared tensors -> outputs (g*N, 4, H, W) float32."""

    def __init__(self, rows: RowBody, names: list[str], time: TimeEmbedding) -> None:
        super().__init__()
        self.rows, self.names, self.time = rows, names, time

    def forward(self, timesteps: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.names, shared, strict=True))
        return (self.rows(with_time(named, self.time, timesteps)),)


class TimedSharingEncoder(nn.Module):
    """The encoder that also computes the decoder's time-independent part."""

    def __init__(self, encoder: TimedEncoder, shared: SharedDecoder) -> None:
        super().__init__()
        self.encoder, self.shared = encoder, shared

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor
    ) -> tuple[Tensor, ...]:
        features = self.encoder(sample, timestep, encoder_hidden_states)
        return tuple(self.shared(encoder_hidden_states, *features).values())


def with_time(shared: Shared, time: TimeEmbedding, timesteps: Tensor) -> Shared:
    """The shared tensors and the activated embedding of the rows' timesteps."""
    return activated_time(shared, time(timesteps))

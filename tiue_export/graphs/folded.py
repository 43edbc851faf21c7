"""The four graphs' modules: the UNet cut before its up blocks, as official.

Every module takes and returns plain tensors in the order of its graph's spec. Noise, latents and
pictures are float32 at every precision; what travels between graphs has the graph's precision.
`float32` names the submodules that stay in float32 in a half-precision graph, by their paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tiue_export.graphs.conditions import FixedTime, Size, TextConditions, fixed_time
from tiue_export.graphs.lowering import (
    NO_PATHS,
    ModulePaths,
    below,
    copied,
    in_precision,
    is_single,
    lowered,
    with_plain_attention,
)
from tiue_export.sampling.fan_out import FanOut
from tiue_export.sampling.plan import Combination, Plan, Timestep
from tiue_export.student.model import output_head, text_embedding
from tiue_export.student.up_path import UpPath, cut_up_path, run_up_blocks, skip_count, text_for


class TextEncoder(nn.Module):
    """input_ids (B, L) -> last_hidden_state (B, L, D), of SDXL's (B, L + 1, D)."""

    def __init__(
        self, text_encoder: Any, dtype: torch.dtype, float32: ModulePaths = NO_PATHS
    ) -> None:
        super().__init__()
        self.text_encoder = lowered(text_encoder, dtype, below(float32, "text_encoder"))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        return (text_embedding(self.text_encoder, input_ids),)


class VaeDecoder(nn.Module):
    """latent_sample (B, 4, H, W), divided by the scaling factor -> sample (B, 3, 8H, 8W)."""

    def __init__(self, vae: Any, dtype: torch.dtype, float32: ModulePaths = NO_PATHS) -> None:
        super().__init__()
        self.vae: Any = copied(vae)
        self.dtype = dtype
        # Decoding needs no encoder: its weights would only sit in memory.
        self.vae.encoder = None
        if hasattr(self.vae, "quant_conv"):
            self.vae.quant_conv = None
        in_precision(self.vae, dtype, below(float32, "vae"))

    def forward(self, latent_sample: Tensor) -> tuple[Tensor, ...]:
        image = self.vae.decode(latent_sample.to(self.dtype), return_dict=False)[0]
        return (image.float(),)


class VaeEncoder(nn.Module):
    """sample (B, 3, 8H, 8W) in [-1, 1] -> latents before scaling, or what they are drawn from.

    Of AutoencoderKL `latent_parameters` (B, 8, H, W), mean and logarithm of the variance; of
    AutoencoderTiny `latent_sample` (B, 4, H, W). Names and meaning are optimum's.
    """

    def __init__(self, vae: Any, dtype: torch.dtype, float32: ModulePaths = NO_PATHS) -> None:
        super().__init__()
        self.vae: Any = copied(vae)
        self.dtype = dtype
        self.vae.decoder = None
        if hasattr(self.vae, "post_quant_conv"):
            self.vae.post_quant_conv = None
        in_precision(self.vae, dtype, below(float32, "vae"))

    def forward(self, sample: Tensor) -> tuple[Tensor, ...]:
        encoded = self.vae.encode(sample.to(self.dtype), return_dict=False)[0]
        # AutoencoderKL's is a distribution, AutoencoderTiny's the latents themselves.
        return (getattr(encoded, "parameters", encoded).float(),)


class UNetEncoder(nn.Module):
    """sample (B, 4, H, W), encoder_hidden_states (B, L, D) -> mid, if any, and all skips.

    conv_in, down blocks and mid block, if any, at the first timestep, whose embedding is folded in.
    """

    def __init__(
        self,
        unet: Any,
        plan: Plan,
        picture_px: Size,
        dtype: torch.dtype,
        float32: ModulePaths = NO_PATHS,
    ) -> None:
        super().__init__()
        body = nn.ModuleDict(
            {"conv_in": unet.conv_in, "down_blocks": unet.down_blocks, "mid_block": unet.mid_block}
        )
        first = plan.timesteps[:1]
        self.conditions = TextConditions(unet, picture_px, dtype)
        self.unet: Any
        self.unet, self.time = folded(unet, body, first, dtype, below(float32, "unet"))
        with_plain_attention(self.unet, bool(unet.config.upcast_attention))
        fold_input_scale(self.unet["conv_in"], plan.passes[0].input.noise)
        self.dtype = dtype

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        text, added = self.conditions(encoder_hidden_states)
        hidden = self.unet["conv_in"](sample.to(self.dtype))
        return encoder_features(self.unet, hidden, self.time(text, added), text)


def fold_input_scale(conv_in: Any, scale: float) -> None:
    """Let a convolution take x where it took `scale` * x: Euler's samplers scale their input."""
    if scale != 1:  # the weights are the student's own: they are replaced, not changed
        weight = (conv_in.weight.double() * scale).to(conv_in.weight.dtype)
        conv_in.weight = nn.Parameter(weight, requires_grad=False)


def encoder_features(unet: Any, hidden: Tensor, time: Tensor, text: Tensor) -> tuple[Tensor, ...]:
    """Mid block's output, if there is one, then every skip, from what conv_in made.

    `unet` holds "down_blocks" and "mid_block"; `time` is what resnets take, embedded or folded.
    """
    skips = [hidden]
    for block in unet["down_blocks"]:
        hidden, more = block(hidden, time, **text_for(block, text))
        skips.extend(more)
    if unet["mid_block"] is None:
        return tuple(skips)  # the last block's output is the last skip
    return (unet["mid_block"](hidden, time, **text_for(unet["mid_block"], text)), *skips)


def mid_and_skips(features: Sequence[Tensor], skip_count: int) -> tuple[Tensor, list[Tensor]]:
    """What enters the first up block, and the skips, of what `encoder_features` handed on."""
    skips = list(features[-skip_count:])
    return features[0] if len(features) > skip_count else skips[-1], skips


def folded(
    unet: Any,
    body: nn.Module,
    timesteps: tuple[Timestep, ...],
    dtype: torch.dtype,
    float32: ModulePaths = NO_PATHS,
) -> tuple[Any, FixedTime]:
    """A copy of a UNet's part in `dtype` at fixed timesteps, and what its resnets take as time."""
    body, time = fixed_time(unet, copied(body), timesteps)
    return in_precision(body, dtype, float32), time.to(dtype)


def parted(unet: Any, plan: Plan) -> UpPath:
    """The up path cut where the plan's rows part; of a single row there is nothing to part."""
    return cut_up_path(unet.up_blocks, plan.fan_out if plan.rows > 1 else FanOut())


class NaiveDecoder(nn.Module):
    """sample, encoder_hidden_states, mid, skips -> latents, as the official code batches it.

    Every feature is repeated K times and every layer runs on K*B rows: the baseline that hoisting
    is measured against (`--no-hoist`).
    """

    def __init__(
        self,
        unet: Any,
        plan: Plan,
        picture_px: Size,
        dtype: torch.dtype,
        float32: ModulePaths = NO_PATHS,
    ) -> None:
        super().__init__()
        trunk, rows = parted(unet, plan)
        timesteps = plan.timesteps
        self.conditions = TextConditions(unet, picture_px, dtype)
        body = nn.ModuleDict({"up_blocks": nn.ModuleList(rows), "head": OutputHead(unet)})
        self.unet: Any
        self.unet, self.time = folded(unet, body, timesteps, dtype, below(float32, "unet"))
        self.trunk: Any
        self.trunk, self.trunk_time = folded(
            unet, nn.ModuleList(trunk), timesteps[:1], dtype, below(float32, "trunk")
        )
        with_plain_attention(self, bool(unet.config.upcast_attention))
        self.combine = Combine(plan.latents)
        self.steps = plan.rows

    def forward(
        self, sample: Tensor, encoder_hidden_states: Tensor, *features: Tensor
    ) -> tuple[Tensor, ...]:
        left = skip_count(self.unet["up_blocks"])
        hidden, skips = mid_and_skips(features, left + skip_count(self.trunk))
        text, added = self.conditions(encoder_hidden_states)
        time = self.trunk_time(text, added)
        hidden = run_up_blocks(self.trunk, hidden, skips[left:], time, text)
        hidden = hidden.repeat(self.steps, 1, 1, 1)  # (K*B, C, h, w)
        skips = [skip.repeat(self.steps, 1, 1, 1) for skip in skips[:left]]
        time = self.time(text, added)
        text = text.repeat(self.steps, 1, 1)  # (K*B, L, D)
        hidden = run_up_blocks(self.unet["up_blocks"], hidden, skips, time, text)
        return (self.combine(sample, self.unet["head"](hidden)),)


class OutputHead(nn.Module):
    """conv_norm_out, SiLU, conv_out under their own names."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.conv_norm_out, self.conv_act, self.conv_out = (
            unet.conv_norm_out,
            unet.conv_act,
            unet.conv_out,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return output_head(self, hidden)


class Combine(nn.Module):
    """Eq. 11 with its constants baked in, float32: sample (B, ..), outputs (K*B, ..) -> latents."""

    output_coefficients: Tensor

    def __init__(self, terms: Combination) -> None:
        super().__init__()
        self.noise_coefficient = terms.noise
        weights = torch.tensor(terms.outputs, dtype=torch.float32)
        self.register_buffer("output_coefficients", weights.view(-1, 1, 1, 1))

    def forward(self, sample: Tensor, outputs: Tensor) -> Tensor:
        weights, outputs = self.output_coefficients, outputs.float()
        if is_single(sample):
            total = (weights * outputs).sum(0, keepdim=True)  # (1, 4, H, W)
        else:
            rows = outputs.reshape(len(weights), *sample.shape)  # (K, B, 4, H, W)
            total = (weights.unsqueeze(1) * rows).sum(0)
        return self.noise_coefficient * sample + total

"""Private copies of diffusers' modules, prepared for export: precision, attention, folded time.

A copy shares the student's weights where the dtype allows (no memory is spent), so the student
itself is never changed. What is replaced in the copy: norms by ones that work in float32, time
projections by their constant values, attention processors by plain ones.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from tiue_export.student import time_embedding

M = TypeVar("M", bound=nn.Module)
_NORMS = (nn.GroupNorm, nn.LayerNorm)


def lowered(module: M, dtype: torch.dtype) -> M:
    """A frozen eval-mode copy in `dtype`; normalisation stays in float32, statistics included."""
    twin = copied(module, dtype)
    return cast(M, with_float32_norms(twin)) if dtype == torch.float16 else twin


def copied(module: M, dtype: torch.dtype, *, plain: bool = True) -> M:
    """A frozen eval-mode copy: weights in `dtype`, those of norms in float32.

    With `plain`, upsampling is replaced by its branch-free form.
    """
    in_norms = {
        id(parameter)
        for norm in module.modules()
        if isinstance(norm, _NORMS)
        for parameter in norm.parameters()
    }
    shared: dict[int, Any] = {}
    for parameter in module.parameters():
        kind = torch.float32 if id(parameter) in in_norms else dtype
        shared[id(parameter)] = nn.Parameter(parameter.detach().to(kind), requires_grad=False)
    for buffer in module.buffers():
        shared[id(buffer)] = buffer.to(dtype) if buffer.is_floating_point() else buffer
    # deepcopy takes whatever the memo holds instead of copying it: the weights stay shared.
    twin = copy.deepcopy(module, shared).eval()
    return with_plain_upsampling(twin) if plain else twin


def with_float32_norms(module: nn.Module) -> nn.Module:
    """Wrap every norm below `module` so that it computes in float32 and returns its input dtype."""
    if isinstance(module, _NORMS):
        return Float32Norm(module)
    for name, child in module.named_children():
        if not isinstance(child, Float32Norm):
            setattr(module, name, with_float32_norms(child))
    return module


class Float32Norm(nn.Module):
    """A norm whose statistics cannot overflow half precision (65504)."""

    def __init__(self, norm: nn.GroupNorm | nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm.float()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.float()).to(x.dtype)
        return y


class Attention:
    """Attention processor (diffusers' extension point) for self-attention and text attention.

    Without masks, added projections or rescaling, which Stable Diffusion's attentions lack. With
    `upcast`, scores and softmax are computed in float32 (`upcast_attention` of SD 2.x).
    """

    def __init__(self, upcast: bool) -> None:
        self.upcast = upcast

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **ignored: object,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        key = split_heads(attn.to_k(context), attn.heads)
        value = split_heads(attn.to_v(context), attn.heads)
        mixed = attend(query, key, value, self.upcast)  # (N, heads, T, d)
        return project_out(attn, mixed.transpose(1, 2).flatten(2))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(N, T, heads * d) -> (N, heads, T, d)."""
    batch, length, width = x.shape
    return x.reshape(batch, length, heads, width // heads).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, upcast: bool) -> Tensor:
    """Scaled dot-product attention over (N, heads, T, d); in float32 if `upcast`."""
    if not upcast or query.dtype == torch.float32:
        return F.scaled_dot_product_attention(query, key, value)
    mixed = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    return mixed.to(query.dtype)


def project_out(attn: Any, x: Tensor) -> Tensor:
    """The output projection of a diffusers Attention; its dropout is inactive in eval mode."""
    y: Tensor = attn.to_out[0](x)
    return y


def with_plain_attention(module: M, upcast: bool) -> M:
    """Set the plain processor on every diffusers Attention below `module`."""
    processor = Attention(upcast)
    for child in module.modules():
        if isinstance(child, DiffusersAttention):
            child.set_processor(processor)
    return module


def time_embedding_float64(unet: Any, timesteps: tuple[int, ...]) -> Tensor:
    """Time embeddings (K, D_t) in float64 whatever the UNet's dtype.

    What is folded must not depend on where the weights lie in memory: float32 products differ in
    their last bit between a memory-mapped file and another, and the graphs would differ with them.
    """
    stem = nn.ModuleDict({"conv_in": unet.conv_in, "time_embedding": unet.time_embedding})
    twin = lowered(stem, torch.float64)
    twin.add_module("time_proj", unet.time_proj)
    with torch.no_grad():
        return time_embedding(twin, timesteps)


def time_bias(resnet: Any, embedding: Tensor) -> Tensor:
    """What a resnet adds for each timestep: (K, D_t) float64 -> (K, C) float32."""
    projection = resnet.time_emb_proj
    with torch.no_grad():
        active = resnet.nonlinearity(embedding)
        return F.linear(active, projection.weight.double(), projection.bias.double()).float()


def fold_time(module: M, embedding: Tensor, dtype: torch.dtype) -> M:
    """Replace each resnet's time projection below `module` by its values at the fixed timesteps."""
    for resnet in module.modules():
        if getattr(resnet, "time_emb_proj", None) is not None:
            resnet.time_emb_proj = FoldedTime(time_bias(resnet, embedding).to(dtype))
    return module


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a convolution: diffusers' Upsample2D without its branches on
    the batch size, which torch.export would turn into a limit of 15 images."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, hidden_states: Tensor, output_size: None = None) -> Tensor:
        doubled = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        convolved: Tensor = self.conv(doubled)
        return convolved


def with_plain_upsampling(module: M) -> M:
    """Replace every diffusers Upsample2D below `module`."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, Upsample2D):
                setattr(parent, name, Upsample(child.conv))
    return module


class FoldedTime(nn.Module):
    """Stands where a resnet's time projection was: constants (K, C) spread over K*B rows."""

    bias: Tensor

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("bias", bias)

    def forward(self, rows: Tensor) -> Tensor:
        steps, channels = self.bias.shape
        spread = self.bias.unsqueeze(1).expand(steps, rows.shape[0] // steps, channels)
        return spread.reshape(-1, channels)  # (K*B, C)

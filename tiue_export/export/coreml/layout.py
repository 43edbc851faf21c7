"""A graph's module in the form that a Core ML device computes fastest; exact, and contract kept.

Three choices, each the same mathematics in another order:
- attention: fused; one head after the other; or so with 512 queries at a time;
- linear layers as 1x1 convolutions over (N, C, 1, T), the layout of the Neural Engine
  (apple/ml-ane-transformers; "Deploying Transformers on the Apple Neural Engine", 2022);
- the decoder's K rows in groups, one after the other, which divides its activations.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from tiue_export.export.coreml.profiles import check_whole_decoder
from tiue_export.graphs.build import Graph, HoistedDecoder, SharedRows
from tiue_export.graphs.hoisting import RowDecoder, Shared, SharedDecoder, SharedTextAttention
from tiue_export.graphs.lowering import Attention

# Apple's SPLIT_EINSUM_V2 uses the same number.
CHUNK = 512
_WHOLE = 1 << 30


def with_layout(graph: Graph, attention: str, linear: str, decoder_batch: int) -> nn.Module:
    """Change the graph's own module, which it shares with nobody, and return it.

    Text encoder and VAE have attentions of their own kind and stay as they are.
    """
    module = graph.module
    if linear == "conv":
        _channels_first(module, attention)
    elif attention != "sdpa":
        split = functools.partial(attend_by_head, chunk=_chunk(attention))
        for child in module.modules():
            if isinstance(child, DiffusersAttention) and isinstance(child.processor, Attention):
                child.processor.attend = split
    if decoder_batch < _rows(module):
        _group_rows(module, decoder_batch)
    return module


def attend_by_head(query: Tensor, key: Tensor, value: Tensor, chunk: int) -> Tensor:
    """Attention over (N, heads, T, d), one head and `chunk` queries at a time."""
    query = query * query.shape[-1] ** -0.5
    chunk = _useful(chunk, key.shape[2])
    heads = []
    for q, k, v in zip(*(torch.split(x, 1, 1) for x in (query, key, value)), strict=True):
        turned = k.transpose(2, 3)  # (N, 1, d, S)
        parts = [(part @ turned).softmax(-1) @ v for part in _pieces(q, chunk, 2)]
        heads.append(_joined(parts, 2))
    return _joined(heads, 1)


def attend_channels(
    query: Tensor, key: Tensor, value: Tensor, heads: int, attention: str
) -> Tensor:
    """Attention over channels-first (N, C, 1, T); key and value (N, C, 1, S)."""
    width = query.shape[1] // heads
    if attention == "sdpa":
        rows, channels, _, length = query.shape
        q, k, v = (
            x.reshape(rows, heads, width, -1).transpose(2, 3) for x in (query, key, value)
        )  # (N, heads, T, d)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(2, 3).reshape(rows, channels, 1, length)
    query, chunk = query * width**-0.5, _useful(_chunk(attention), key.shape[3])
    turned = key.transpose(1, 3)  # (N, S, 1, C)
    outputs = []
    for q, k, v in zip(
        torch.split(query, width, 1),
        torch.split(turned, width, 3),
        torch.split(value, width, 1),
        strict=True,
    ):
        parts = []
        for part in _pieces(q, chunk, 3):
            # These two equations become single operations of Core ML, without transpositions.
            scores = torch.einsum("bchq,bkhc->bkhq", part, k)
            parts.append(torch.einsum("bkhq,bchk->bchq", scores.softmax(1), v))
        outputs.append(_joined(parts, 3))
    return _joined(outputs, 1)


def _chunk(attention: str) -> int:
    return CHUNK if attention == "split-chunked" else _WHOLE


def _useful(chunk: int, keys: int) -> int:
    """Few keys, as those of a text, make small scores: pieces would only add operations."""
    return chunk if keys > chunk else _WHOLE


def _pieces(x: Tensor, size: int, axis: int) -> tuple[Tensor, ...]:
    # coremltools 9.0 cannot convert a split into pieces longer than the whole.
    return (x,) if x.shape[axis] <= size else torch.split(x, size, axis)


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


# ---- rows in groups


def _rows(module: nn.Module) -> int:
    sums: Any = (child for child in module.modules() if hasattr(child, "output_coefficients"))
    return max((len(child.output_coefficients) for child in sums), default=0)


def _group_rows(module: nn.Module, size: int) -> None:
    if not isinstance(module, HoistedDecoder | SharedRows):
        check_whole_decoder(size, _rows(module))
    assert isinstance(module, HoistedDecoder | SharedRows)
    grouped: Any = GroupedRows(module.rows, size)
    module.rows = grouped


class GroupedRows(nn.Module):
    """The row decoder run on `size` rows at a time; all groups use the same weights."""

    def __init__(self, rows: RowDecoder, size: int) -> None:
        super().__init__()
        self.combine = rows.combine
        steps = len(self.combine.output_coefficients)  # type: ignore[arg-type]
        starts = range(0, steps, size)
        self.groups = nn.ModuleList(_group(rows, slice(i, min(i + size, steps))) for i in starts)

    def forward(self, sample: Tensor, shared: Shared) -> Tensor:
        groups: Any = self.groups
        outputs = [group.outputs(shared) for group in groups]  # (size*B, 4, H, W)
        latents: Tensor = self.combine(sample, torch.cat(outputs))
        return latents


def _group(rows: RowDecoder, part: slice) -> RowDecoder:
    """A twin with the same weights and some of the rows' time biases."""
    # deepcopy takes what the memo holds: every group must have the very same parameters, or each
    # would be stored once for each group.
    twin = copy.deepcopy(rows, {id(tensor): tensor for tensor in rows.parameters()})
    twin.combine = nn.Identity()
    child: Any
    for child in twin.modules():
        if "bias" in child._buffers:
            child.bias = child.bias[part]  # (size, C, 1, 1)
        for processor in (getattr(child, "processor", None), getattr(child, "shared", None)):
            if isinstance(processor, SharedTextAttention):
                processor.steps = part.stop - part.start
    return twin


# ---- channels first


def _channels_first(module: nn.Module, attention: str) -> None:
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Transformer2DModel):
                setattr(parent, name, ChannelsFirst(child, attention))
            elif isinstance(parent, SharedDecoder) and child is parent.text:
                projections = {key: TextProjection(layer) for key, layer in child.named_children()}
                parent.text = nn.ModuleDict(projections)


def as_convolution(linear: Any) -> nn.Conv2d:
    """A 1x1 convolution with a linear layer's own weights; convolutions are handed through."""
    if isinstance(linear, nn.Conv2d):
        return linear
    outputs, inputs = linear.weight.shape
    with torch.device("meta"):
        conv = nn.Conv2d(inputs, outputs, 1, bias=linear.bias is not None)
    conv.weight = nn.Parameter(linear.weight.detach()[:, :, None, None], requires_grad=False)
    if linear.bias is not None:
        conv.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return conv


class TextProjection(nn.Module):
    """A key or value projection of the text, (B, L, D) -> (B, L, C), as a convolution."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.conv = as_convolution(linear)

    def forward(self, text: Tensor) -> Tensor:
        projected: Tensor = self.conv(to_channels(text))  # (B, C, 1, L)
        return projected.squeeze(2).transpose(1, 2)


def to_channels(tokens: Tensor) -> Tensor:
    """(B, L, D) -> (B, D, 1, L)."""
    return tokens.transpose(1, 2).unsqueeze(2)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (N, C, 1, T)."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach()[None, :, None, None], requires_grad=False)
        self.bias = nn.Parameter(norm.bias.detach()[None, :, None, None], requires_grad=False)
        self.eps = float(norm.eps)

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        variance = (centred * centred).mean(1, keepdim=True)
        scaled: Tensor = centred * (variance + self.eps).rsqrt() * self.weight + self.bias
        return scaled


class ChannelsFirst(nn.Module):
    """diffusers' Transformer2DModel of the Stable Diffusion kind over (N, C, 1, H*W)."""

    def __init__(self, transformer: Any, attention: str) -> None:
        super().__init__()
        self.norm = transformer.norm
        self.proj_in = as_convolution(transformer.proj_in)
        self.blocks = nn.ModuleList(
            ChannelsBlock(block, attention) for block in transformer.transformer_blocks
        )
        self.proj_out = as_convolution(transformer.proj_out)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Any = None, **ignored: object
    ) -> tuple[Tensor]:
        rows, channels, height, width = hidden_states.shape
        x = self.norm(hidden_states).reshape(rows, channels, 1, height * width)
        x = self.proj_in(x)
        for block in self.blocks:
            x = block(x, encoder_hidden_states)
        x = self.proj_out(x).reshape(rows, channels, height, width)
        return (x + hidden_states,)


class ChannelsBlock(nn.Module):
    """diffusers' BasicTransformerBlock: self-attention, text attention, gated feed-forward.

    With `only_cross_attention` the first attention reads the text too.
    """

    def __init__(self, block: Any, attention: str) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = map(
            ChannelNorm, (block.norm1, block.norm2, block.norm3)
        )
        self.text_alone = bool(block.only_cross_attention)
        self.attn1 = ChannelsAttention(block.attn1, attention)
        self.attn2 = ChannelsAttention(block.attn2, attention)
        self.value = as_convolution(block.ff.net[0].value)
        self.gate = as_convolution(block.ff.net[0].gate)
        self.out = as_convolution(block.ff.net[2])

    def forward(self, x: Tensor, text: Any) -> Tensor:
        x = x + self.attn1(self.norm1(x), text if self.text_alone else None)
        x = x + self.attn2(self.norm2(x), text)
        normed = self.norm3(x)
        fed: Tensor = x + self.out(self.value(normed) * F.gelu(self.gate(normed)))
        return fed


class ChannelsAttention(nn.Module):
    """One attention; `text` is None (self), (N, L, D), or the decoder's shared tensors by name."""

    def __init__(self, attn: Any, attention: str) -> None:
        super().__init__()
        self.heads, self.attention = int(attn.heads), attention
        self.to_q, self.to_out = as_convolution(attn.to_q), as_convolution(attn.to_out[0])
        processor = attn.processor
        self.shared = processor if isinstance(processor, SharedTextAttention) else None
        if self.shared is None:
            self.to_k, self.to_v = as_convolution(attn.to_k), as_convolution(attn.to_v)

    def forward(self, x: Tensor, text: Any) -> Tensor:
        if self.shared is not None:
            steps = self.shared.steps_in(text)
            # 77 tokens: repeating them for each row costs less than turning the queries.
            key, value = (
                to_channels(text[f"{self.shared.name}_{kind}"]).repeat(steps, 1, 1, 1)
                for kind in ("key", "value")
            )
        else:
            context = x if text is None else to_channels(text)
            key, value = self.to_k(context), self.to_v(context)
        mixed = attend_channels(self.to_q(x), key, value, self.heads, self.attention)
        out: Tensor = self.to_out(mixed)
        return out

"""The decoder with everything that does not depend on the timestep computed once. Exact.

The K decoder rows differ in their timestep alone; skips, the mid feature and the text are the same
for all of them. In each resnet of the up blocks, of conv1(silu(norm1(cat(hidden, skip)))):
- GroupNorm groups that lie wholly inside the skip channels, their SiLU and their share of conv1
  are the same for every row (a convolution is linear in its input channels);
- so is the skip's share of the 1x1 shortcut;
- the first resnet sees only the mid feature and a skip: all of its norm1, conv1 and shortcut;
- the time projection at fixed timesteps is a constant per row and channel.
In each text attention the keys and values are computed for B rows, and the K rows of queries
attend to them as one longer sequence: no copy of the keys is made.
With a fan-out the up path before it is shared whole: it runs on B rows, at the first timestep, and
the first resnet behind it sees what the first resnet of all sees otherwise.

`SharedDecoder` computes the time-independent part; `RowDecoder` the rest. Either graph can hold the
first: in the decoder it keeps the boundary small, in the encoder it moves weights out of the
decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tiue_export.checkpoint.family import pooled_width
from tiue_export.graphs.conditions import FixedTime, Size, TextConditions, fixed_time
from tiue_export.graphs.folded import (
    Combine,
    OutputHead,
    mid_and_skips,
    parted,
)
from tiue_export.graphs.lowering import (
    NO_PATHS,
    Attention,
    ModulePaths,
    below,
    copied,
    in_precision,
    is_single,
    project_out,
    split_heads,
    time_bias,
    time_embedding_float64,
    with_plain_attention,
)
from tiue_export.sampling.fan_out import FanOut
from tiue_export.sampling.plan import Plan
from tiue_export.student.up_path import run_up_blocks, skip_count

Shared = dict[str, Tensor]
R = TypeVar("R", bound="RowBody")
# Among the shared tensors: what SDXL adds to the time embedding, (B, D_t); and for rows whose time
# is not folded the activated sum, (K, D_t), or (K, B, D_t) with what is added.
ADDED = "added_embedding"
TIME = "time"


def hoist(
    unet: Any,
    plan: Plan,
    picture_px: Size,
    dtype: torch.dtype,
    float32: ModulePaths = NO_PATHS,
    rows_dtype: torch.dtype | None = None,
) -> tuple[SharedDecoder, RowDecoder]:
    """Cut the decoder in two: what all rows share, and the rows. Weights are the student's own.

    `float32` names the submodules that stay in float32 in half precision: "shared...", "rows...";
    `picture_px` (height, width) is told to SDXL's UNets alone; `rows_dtype` is for rows that lie in
    another graph of another precision.
    """
    embedding = time_embedding_float64(unet, plan.timesteps)
    added = bool(pooled_width(unet.config))  # time then depends on the text: it is not folded
    trunk, blocks = parted(unet, plan)
    first, first_time = fixed_time(unet, copied(nn.ModuleList(trunk)), plan.timesteps[:1])
    path = _Path(
        first,
        first_time,
        copied(nn.ModuleList(blocks)),
        plan.fan_out if trunk else FanOut(),
        [[None if added else time_bias(resnet, embedding) for resnet in b.resnets] for b in blocks],
        plan.rows,
        embedding.float() if added else None,
    )
    precision = _CutPrecision(dtype, rows_dtype or dtype, float32)
    shared, rows = _cut(unet, RowDecoder, path, picture_px, precision)
    rows.combine = Combine(plan.latents)
    return shared, rows.eval()


def hoist_any_time(
    unet: Any,
    picture_px: Size,
    dtype: torch.dtype,
    float32: ModulePaths = NO_PATHS,
    rows_dtype: torch.dtype | None = None,
) -> tuple[SharedDecoder, RowBody]:
    """The same cut for timesteps that are an input: the rows find their embedding under `TIME`.

    The rows return their outputs (g*B, 4, H, W) float32, without the closed formula.
    """
    biases = [[None for _ in block.resnets] for block in unet.up_blocks]
    path = _Path(nn.ModuleList(), None, copied(unet.up_blocks), FanOut(), biases, None, None)
    precision = _CutPrecision(dtype, rows_dtype or dtype, float32)
    return _cut(unet, RowBody, path, picture_px, precision)


class _CutPrecision(NamedTuple):
    """The dtypes of the two parts, and the paths in both that stay in float32."""

    shared: torch.dtype
    rows: torch.dtype
    float32: ModulePaths


class _Path(NamedTuple):
    """The up path that is cut, in copies: its trunk at the first timestep, and the blocks that rows
    run, which begin at `start`.

    `biases` are what the rows' resnets add for their timesteps, None where they are not folded;
    `steps` is K, None where timesteps are an input; `time` their embeddings (K, D_t) where they are
    neither folded nor an input.
    """

    trunk: nn.ModuleList
    trunk_time: FixedTime | None
    blocks: nn.ModuleList
    start: FanOut
    biases: Sequence[Sequence[Tensor | None]]
    steps: int | None
    time: Tensor | None

    def numbered(self) -> Iterator[tuple[int, int, Any]]:
        """Each block of the rows with its own number and its first resnet's in the up path."""
        for i, block in enumerate(self.blocks):
            yield self.start.blocks + i, 0 if i else self.start.resnets, block


def _cut(
    unet: Any, kind: type[R], path: _Path, picture_px: Size, precision: _CutPrecision
) -> tuple[SharedDecoder, R]:
    upcast = bool(unet.config.upcast_attention)
    channels = int(unet.config.block_out_channels[-1])
    block: Any
    for block in path.trunk:
        channels = block.resnets[-1].out_channels
    islands = precision.float32
    shared = SharedDecoder(path, channels, upcast)
    in_precision(shared, precision.shared, below(islands, "shared"))
    shared.conditions = TextConditions(unet, picture_px, precision.shared)
    rows = kind(path, channels, upcast)
    rows.head = copied(OutputHead(unet))
    in_precision(rows, precision.rows, below(islands, "rows"), border=torch.float32)
    return shared.eval(), rows.eval()


class SharedDecoder(nn.Module):
    """text (B, L, D), mid and skips -> named tensors that every row uses, batch B."""

    conditions: nn.Module

    def __init__(self, path: _Path, channels: int, upcast: bool) -> None:
        super().__init__()
        self.trunk = with_plain_attention(path.trunk, upcast)
        self.trunk_time = path.trunk_time
        self.resnets = nn.ModuleDict()
        self.text = nn.ModuleDict()
        for i, first, block in path.numbered():
            for j, resnet in enumerate(block.resnets, first):
                share = SkipShare(resnet, channels) if self.resnets else FirstShare(resnet)
                self.resnets[f"up{i}_resnet{j}"] = share
                channels = resnet.out_channels
            for name, attention in _text_attentions(block, i, first):
                self.text[f"{name}_key"] = attention.to_k
                self.text[f"{name}_value"] = attention.to_v

    def forward(self, text: Tensor, *features: Tensor) -> Shared:
        left = len(self.resnets)
        mid, skips = mid_and_skips(features, left + skip_count(self.trunk))
        text, added = self.conditions(text)
        shared: Shared = {} if added is None else {ADDED: added}
        hidden = mid
        if self.trunk_time is not None:
            time = self.trunk_time(text, added)
            hidden = run_up_blocks(self.trunk, mid, skips[left:], time, text)
        for (name, share), skip in zip(self.resnets.items(), reversed(skips[:left]), strict=True):
            parts = share(hidden, skip) if isinstance(share, FirstShare) else share(skip)
            shared.update({f"{name}_{part}": value for part, value in parts.items()})
        for name, projection in self.text.items():
            shared[name] = projection(text)  # (B, L, heads * d)
        return shared


class RowBody(nn.Module):
    """The shared tensors -> outputs (K*B, 4, H, W): what differs between the K rows."""

    head: nn.Module

    def __init__(self, path: _Path, channels: int, upcast: bool) -> None:
        super().__init__()
        with_plain_attention(path.blocks, upcast)
        self.time: Tensor | None
        self.register_buffer("time", path.time)
        self.up_blocks = nn.ModuleList()
        for (i, first, block), biases in zip(path.numbered(), path.biases, strict=True):
            resnets: list[nn.Module] = []
            for j, (resnet, bias) in enumerate(zip(block.resnets, biases, strict=True), first):
                name = f"up{i}_resnet{j}"
                resnets.append(
                    Rows(name, resnet, channels, bias)
                    if resnets or self.up_blocks
                    else FirstRows(name, resnet, bias)
                )
                channels = resnet.out_channels
            for name, attention in _text_attentions(block, i, first):
                attention.set_processor(
                    TimedTextAttention(name, upcast)
                    if path.steps is None
                    else SharedTextAttention(name, path.steps, upcast)
                )
                attention.to_k = attention.to_v = None
            self.up_blocks.append(RowBlock(block, resnets))

    def outputs(self, shared: Shared) -> Tensor:
        """The K*B noise predictions, step-major."""
        if self.time is not None:
            shared = activated_time(shared, self.time)
        hidden: Tensor | None = None
        for block in self.up_blocks:
            hidden = block(hidden, shared)
        rows: Tensor = self.head(hidden)
        return rows

    def forward(self, shared: Shared) -> Tensor:
        return self.outputs(shared).float()


class RowDecoder(RowBody):
    """sample (B, 4, H, W) and the shared tensors -> latents, by the rows and Eq. 11."""

    combine: nn.Module

    def forward(self, sample: Tensor, shared: Shared) -> Tensor:  # type: ignore[override]
        latents: Tensor = self.combine(sample, self.outputs(shared))
        return latents


class RowBlock(nn.Module):
    """One up block over K*B rows: hoisted resnets, diffusers' own attentions and upsampler."""

    def __init__(self, block: Any, resnets: list[nn.Module]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = getattr(block, "attentions", None)
        self.upsamplers = block.upsamplers

    def forward(self, hidden: Tensor | None, shared: Shared) -> Tensor | None:
        for j, resnet in enumerate(self.resnets):
            hidden = resnet(hidden, shared)
            if self.attentions is not None:
                # diffusers hands encoder_hidden_states on untouched, down to our processor.
                hidden = self.attentions[j](
                    hidden, encoder_hidden_states=shared, return_dict=False
                )[0]
        for upsampler in self.upsamplers or ():
            hidden = upsampler(hidden)
        return hidden


class FirstShare(nn.Module):
    """The rows' first resnet up to conv1, and its shortcut: its input is the same for all rows."""

    def __init__(self, resnet: Any) -> None:
        super().__init__()
        self.norm1, self.act, self.conv1 = resnet.norm1, resnet.nonlinearity, resnet.conv1
        self.conv_shortcut = resnet.conv_shortcut

    def forward(self, mid: Tensor, skip: Tensor) -> Shared:
        joined = torch.cat([mid, skip], 1)
        shortcut = joined if self.conv_shortcut is None else self.conv_shortcut(joined)
        return {"conv": self.conv1(self.act(self.norm1(joined))), "shortcut": shortcut}


class TimeBias(NamedTuple):
    """(K, C, 1, 1), or `of_rows` (K*B, C, 1, 1) where the time embedding depends on the text."""

    values: Tensor
    steps: int
    of_rows: bool


_OF_STEPS = 2  # dimensions of a time embedding that is the same for all B


class TimedRows(nn.Module):
    """What the rows of a resnet add for their timesteps: constants, or projected as they run."""

    bias: Tensor

    def __init__(self, name: str, resnet: Any, bias: Tensor | None) -> None:
        super().__init__()
        self.name = name
        self.time_emb_proj: nn.Module | None = None
        if bias is None:
            self.time_emb_proj = resnet.time_emb_proj
        else:
            self.register_buffer("bias", bias[:, :, None, None])  # (K, C, 1, 1)

    def time_bias(self, shared: Shared) -> TimeBias:
        """What is added, and for how many steps."""
        if self.time_emb_proj is None:
            return TimeBias(self.bias, self.bias.shape[0], of_rows=False)
        projected: Tensor = self.time_emb_proj(shared[TIME])
        steps, of_rows = projected.shape[0], projected.ndim > _OF_STEPS
        if of_rows:
            projected = projected.flatten(0, 1)
        return TimeBias(projected[:, :, None, None], steps, of_rows)


class FirstRows(TimedRows):
    """The rest of the first resnet: K rows appear when the time bias is added."""

    def __init__(self, name: str, resnet: Any, bias: Tensor | None) -> None:
        super().__init__(name, resnet, bias)
        self.norm2, self.act, self.conv2 = resnet.norm2, resnet.nonlinearity, resnet.conv2

    def forward(self, hidden: None, shared: Shared) -> Tensor:
        conv, bias = shared[f"{self.name}_conv"], self.time_bias(shared)
        steps = bias.steps
        spread = spreads_itself(conv, steps)
        repeated = conv if spread else conv.repeat(steps, 1, 1, 1)
        # (K*B, C, h, w)
        x = repeated + bias.values if spread else add_bias(repeated, bias)
        x = self.conv2(self.act(self.norm2(x)))
        return add_to_rows(x, shared[f"{self.name}_shortcut"], steps)


class SkipShare(nn.Module):
    """The skip's part of a resnet: its own norm groups through conv1, and its shortcut."""

    def __init__(self, resnet: Any, hidden_channels: int) -> None:
        super().__init__()
        cut = _GroupCut(resnet, hidden_channels)
        self.straddle = cut.mixed_channels - hidden_channels
        self.norm1 = cut.norm(skip=True)
        self.act = resnet.nonlinearity
        self.conv1 = None if self.norm1 is None else _conv_part(resnet.conv1, cut.skip, bias=False)
        shortcut, skip = resnet.conv_shortcut, slice(hidden_channels, None)
        self.conv_shortcut = None if shortcut is None else _conv_part(shortcut, skip, bias=False)

    def forward(self, skip: Tensor) -> Shared:
        parts = {"shortcut": skip if self.conv_shortcut is None else self.conv_shortcut(skip)}
        if self.straddle:
            parts["straddle"] = skip[:, : self.straddle]
        if self.norm1 is not None and self.conv1 is not None:
            parts["conv"] = self.conv1(self.act(self.norm1(skip[:, self.straddle :])))
        return parts


class Rows(TimedRows):
    """The hidden state's part of a resnet, with the norm groups that straddle the border."""

    def __init__(self, name: str, resnet: Any, hidden_channels: int, bias: Tensor | None) -> None:
        super().__init__(name, resnet, bias)
        cut = _GroupCut(resnet, hidden_channels)
        self.straddles = cut.mixed_channels > hidden_channels
        self.norm1: Any = cut.norm(skip=False)  # never None: hidden channels always fill a group
        self.act = resnet.nonlinearity
        self.conv1 = _conv_part(resnet.conv1, cut.mixed, bias=True)
        self.norm2, self.conv2 = resnet.norm2, resnet.conv2
        shortcut, hidden = resnet.conv_shortcut, slice(None, hidden_channels)
        self.conv_shortcut = None if shortcut is None else _conv_part(shortcut, hidden, bias=True)

    def forward(self, hidden: Tensor, shared: Shared) -> Tensor:
        bias = self.time_bias(shared)
        steps = bias.steps
        x = hidden
        if self.straddles:
            straddle = shared[f"{self.name}_straddle"]
            x = torch.cat([hidden, straddle.repeat(steps, 1, 1, 1)], 1)
        x = add_bias(self.conv1(self.act(self.norm1(x))), bias)
        if f"{self.name}_conv" in shared:
            x = add_to_rows(x, shared[f"{self.name}_conv"], steps)
        x = self.conv2(self.act(self.norm2(x)))
        shortcut: Tensor = shared[f"{self.name}_shortcut"]
        if self.conv_shortcut is None:
            return torch.cat([hidden, shortcut.repeat(steps, 1, 1, 1)], 1).add(x)
        return add_to_rows(self.conv_shortcut(hidden).add(x), shortcut, steps)


class SharedTextAttention(Attention):
    """Text attention of K*B rows of queries over keys and values of batch B, found by name."""

    def __init__(self, name: str, steps: int, upcast: bool) -> None:
        super().__init__(upcast)
        self.name = name
        self.steps = steps

    def steps_in(self, shared: Shared) -> int:
        """K."""
        return self.steps

    def batch_of(self, key: Tensor, rows: int) -> int:
        """B, of K*B `rows`."""
        return rows // self.steps

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        **ignored: object,
    ) -> Tensor:
        key = split_heads(encoder_hidden_states[f"{self.name}_key"], attn.heads)
        value = split_heads(encoder_hidden_states[f"{self.name}_value"], attn.heads)
        query = attn.to_q(hidden_states)
        rows, length, width = query.shape
        heads, steps = attn.heads, self.steps_in(encoder_hidden_states)
        batch = self.batch_of(key, rows)
        if is_single(key):
            query = split_heads(query.reshape(1, steps * length, width), heads)
            mixed = self.attend(query, key, value)  # (1, heads, K*T, d)
            mixed = mixed.transpose(1, 2).reshape(steps, length, width)
        elif heads == 1:
            # TensorRT-RTX 1.7's builder fails on the permutation below where it moves an axis of
            # one (Myelin, "new_stride_order[i1] != new_stride_order[i2]").
            query = query.reshape(steps, batch, length, width).transpose(0, 1)
            query = split_heads(query.reshape(batch, steps * length, width), heads)
            mixed = self.attend(query, key, value)  # (B, 1, K*T, d)
            mixed = mixed.reshape(batch, steps, length, width).transpose(0, 1)
            mixed = mixed.reshape(rows, length, width)
        else:
            query = query.reshape(steps, batch, length, heads, width // heads)
            query = query.permute(1, 3, 0, 2, 4).flatten(2, 3)  # (B, heads, K*T, d)
            mixed = self.attend(query, key, value)
            mixed = mixed.reshape(batch, heads, steps, length, width // heads)
            mixed = mixed.permute(2, 0, 3, 1, 4).reshape(rows, length, width)
        return project_out(attn, mixed)


class TimedTextAttention(SharedTextAttention):
    """The same where timesteps are an input: their number is the embedding's."""

    def __init__(self, name: str, upcast: bool) -> None:
        super().__init__(name, 0, upcast)

    def steps_in(self, shared: Shared) -> int:
        return shared[TIME].shape[0]

    def batch_of(self, key: Tensor, rows: int) -> int:
        return key.shape[0]


def activated_time(shared: Shared, embedding: Tensor) -> Shared:
    """The shared tensors, and the activated time of embeddings (K, D_t) and what is added."""
    if ADDED in shared:
        added = shared[ADDED]
        # (K, D_t) of one picture, else (K, B, D_t)
        embedding = embedding + added if is_single(added) else embedding.unsqueeze(1) + added
    # Every resnet of Stable Diffusion activates the embedding by SiLU before projecting it.
    return {**shared, TIME: nn.functional.silu(embedding)}


def add_to_rows(rows: Tensor, shared: Tensor, steps: int) -> Tensor:
    """Add a (B, C, h, w) tensor to each of the K steps of (K*B, C, h, w) rows."""
    # A five-dimensional broadcast would save the copy, but torch.export cannot prove its strides
    # for a dynamic batch; at batch 1 no copy is made either way.
    return rows + (shared if spreads_itself(shared, steps) else shared.repeat(steps, 1, 1, 1))


def spreads_itself(x: Tensor, steps: int) -> bool:
    """Whether a tensor of one sample is left to broadcasting over its rows.

    Not over an open number of rows: OpenVINO 2026.4 fuses the sum into the convolution that made
    the one sample, and then fails at any other number ("Can not clone with new dims").
    """
    return is_single(x) and isinstance(steps, int)


def add_bias(rows: Tensor, bias: TimeBias) -> Tensor:
    """Add a bias to (K*B, C, h, w) rows."""
    values, steps = bias.values, bias.steps
    if bias.of_rows or (isinstance(rows.shape[0], int) and rows.shape[0] == steps):
        return rows + values
    channels = values.shape[1]
    spread = values.unsqueeze(1).expand(steps, rows.shape[0] // steps, channels, 1, 1)
    return rows + spread.reshape(rows.shape[0], channels, 1, 1)


class _GroupCut:
    """Where norm1's groups fall: those with any hidden channel are mixed, the rest all skip."""

    def __init__(self, resnet: Any, hidden_channels: int) -> None:
        self.norm1 = resnet.norm1
        size = self.norm1.num_channels // self.norm1.num_groups
        self.mixed_groups = -(-hidden_channels // size)
        self.skip_groups = self.norm1.num_groups - self.mixed_groups
        self.mixed_channels = self.mixed_groups * size
        self.mixed, self.skip = slice(None, self.mixed_channels), slice(self.mixed_channels, None)

    def norm(self, skip: bool) -> nn.GroupNorm | None:
        """The GroupNorm over one side's channels, or None when that side has no group."""
        groups = self.skip_groups if skip else self.mixed_groups
        if groups == 0:
            return None
        part = self.skip if skip else self.mixed
        weight, bias = self.norm1.weight[part], self.norm1.bias[part]
        with torch.device("meta"):
            norm = nn.GroupNorm(groups, len(weight), eps=self.norm1.eps)
        norm.weight, norm.bias = _frozen(weight), _frozen(bias)
        return norm


def _conv_part(conv: nn.Conv2d, channels: slice, bias: bool) -> nn.Conv2d:
    """The convolution over some of its input channels; only one part may keep the bias."""
    weight = conv.weight[:, channels]
    outputs, inputs, height, width = weight.shape
    with torch.device("meta"):
        part = nn.Conv2d(inputs, outputs, (height, width), padding=height // 2, bias=False)
    part.weight = _frozen(weight)
    if bias and conv.bias is not None:
        part.bias = _frozen(conv.bias)
    return part


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _text_attentions(block: Any, i: int, first: int) -> list[tuple[str, Any]]:
    """The text attentions of up block `i` from attention `first` on, with their names.

    With diffusers' `only_cross_attention` what is self-attention elsewhere reads the text too.
    """
    return [
        (f"up{i}_{kind}{j}_{layer}", part)
        for j, attention in enumerate(getattr(block, "attentions", ()), first)
        for layer, transformer in enumerate(attention.transformer_blocks)
        for kind, part in (("first", transformer.attn1), ("text", transformer.attn2))
        if kind == "text" or transformer.only_cross_attention
    ]

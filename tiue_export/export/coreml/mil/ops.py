"""What each MIL op means, in torch: one function per op, its parameters named like the op's inputs.

Semantics: coremltools, converters/mil/mil/ops/defs/ (iOS15/elementwise_unary.py, iOS15/conv.py and
so on; later folders hold what changed since). An input that is absent takes the default given
there; the epsilons are part of the meaning.

Functions get float tensors in single precision, whatever they are stored in. Those of `MOVES`
compute nothing and get them as they are stored. Constants come as tensors too, texts as `str`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Semantics:
    """One op: its function, the inputs that it understands, and whether it only moves values."""

    function: Function
    inputs: frozenset[str]
    moves: bool


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    dilations: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Convolution over the last 1 to 3 axes: (B, C, *D), weight (C_out, C / groups, *K)."""
    rank = x.dim() - 2
    steps = _ints(strides) or [1] * rank
    spread = _ints(dilations) or [1] * rank
    sides = _padding(x.shape[2:], weight.shape[2:], steps, spread, pad_type, _ints(pad))
    before, after = sides[::2], sides[1::2]
    padding: Any = before
    if before != after:
        # torch pads the last axis first.
        pairs = [side for pair in zip(before, after, strict=True) for side in pair[::-1]]
        x, padding = F.pad(x, pairs[::-1]), [0] * rank
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    many = 1 if groups is None else int(groups)
    result: Tensor = function(x, weight, bias, steps, padding, spread, many)
    return result


def _padding(
    sides: Sequence[int],
    kernel: Sequence[int],
    steps: list[int],
    spread: list[int],
    pad_type: str,
    pad: list[int],
) -> list[int]:
    """Before and after each axis, as MIL orders them: before 0, after 0, before 1..."""
    if pad_type == "valid":
        return [0] * (2 * len(sides))
    if pad_type == "custom":
        return pad
    if pad_type not in ("same", "same_lower"):
        raise ValueError(f"pad_type {pad_type!r}")
    found = []
    for side, size, step, gap in zip(sides, kernel, steps, spread, strict=True):
        total = max(0, (math.ceil(side / step) - 1) * step + (size - 1) * gap + 1 - side)
        less, more = total // 2, total - total // 2
        found += [less, more] if pad_type == "same" else [more, less]
    return found


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (*, In) times the transpose of weight (Out, In)."""
    return F.linear(x, weight, bias)


def matmul(
    x: Tensor, y: Tensor, transpose_x: Tensor | None = None, transpose_y: Tensor | None = None
) -> Tensor:
    """Matrix product over the last two axes, the others broadcast."""
    left = x.transpose(-1, -2) if _flag(transpose_x) else x
    return left @ (y.transpose(-1, -2) if _flag(transpose_y) else y)


def einsum(values: list[Tensor], equation: str) -> Tensor:
    """Products summed over an axis, in Einstein's notation."""
    return torch.einsum(equation, values)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """softmax(Q K^T / sqrt(E) + mask) V; the scale is fixed. (*, L, E), (*, S, E), (*, S, V)."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


def layer_norm(
    x: Tensor,
    axes: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | None = None,
) -> Tensor:
    """Normalized over `axes`, all by default; gamma and beta have the sides of these axes."""
    where = sorted(axis % x.dim() for axis in _ints(axes)) or list(range(x.dim()))
    last = list(range(x.dim() - len(where), x.dim()))
    moved = x.movedim(where, last)
    normalized = F.layer_norm(moved, moved.shape[last[0] :], gamma, beta, _number(epsilon, 1e-5))
    return normalized.movedim(last, where)


def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | None = None,
) -> Tensor:
    """Normalized by given statistics per channel; (B, C, *D)."""
    return F.batch_norm(x, mean, variance, gamma, beta, eps=_number(epsilon, 1e-5))


def instance_norm(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | None = None,
) -> Tensor:
    """Normalized over *D alone; (B, C, *D)."""
    return F.instance_norm(x, weight=gamma, bias=beta, eps=_number(epsilon, 1e-5))


def real_div(x: Tensor, y: Tensor) -> Tensor:
    """x / y; of integers the part before the point."""
    mode = None if x.is_floating_point() else "trunc"
    return torch.div(x, y, rounding_mode=mode)


def rsqrt(x: Tensor, epsilon: Tensor | None = None) -> Tensor:
    """1 / sqrt(x + epsilon)."""
    return torch.rsqrt(x + _number(epsilon, 1e-12))


def inverse(x: Tensor, epsilon: Tensor | None = None) -> Tensor:
    """1 / (x + epsilon)."""
    return 1 / (x + _number(epsilon, 1e-4))


def log(x: Tensor, epsilon: Tensor | None = None) -> Tensor:
    """Natural logarithm of x + epsilon."""
    return torch.log(x + _number(epsilon, 1e-45))


def clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Held between alpha and beta."""
    return x.clamp(alpha, beta)


def leaky_relu(x: Tensor, alpha: Tensor) -> Tensor:
    """x, or alpha x where that is below zero."""
    return torch.where(x >= 0, x, alpha * x)


def elu(x: Tensor, alpha: Tensor) -> Tensor:
    """x, or alpha (exp(x) - 1) below zero."""
    return torch.where(x > 0, x, alpha * torch.expm1(x))


def scaled_tanh(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """alpha tanh(beta x)."""
    return alpha * torch.tanh(beta * x)


def sigmoid_hard(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """alpha x + beta, held between 0 and 1."""
    return (alpha * x + beta).clamp(0, 1)


def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    """Gaussian error linear unit in one of three forms."""
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[mode])


def softmax(x: Tensor, axis: Tensor | None = None) -> Tensor:
    """Softmax over one axis, the last by default."""
    return torch.softmax(x, int(_number(axis, -1)))


def cast(x: Tensor, dtype: str) -> Tensor:
    """To another type; to integers towards zero. The evaluator narrows to fp16 itself."""
    return x.to(_CAST[dtype])


_CAST = {
    "fp16": torch.float32, "fp32": torch.float32, "bool": torch.bool, "int8": torch.int8,
    "uint8": torch.uint8, "int16": torch.int16, "uint16": torch.int32, "int32": torch.int32,
    "int64": torch.int64,
}  # fmt: skip


def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where cond holds, else b."""
    return torch.where(cond, a, b)


def quantize(
    input: Tensor,
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: Tensor | None = None,
) -> Tensor:
    """round(x / scale) + zero point to 8 bits: halves go to the even number, then it is held."""
    low, high = {"int8": (-128, 127), "uint8": (0, 255)}[output_dtype]
    steps = torch.round(input / _along(scale, axis, input))
    if zero_point is not None:
        steps = steps + _along(zero_point, axis, input)
    return steps.clamp(low, high).to(_CAST[output_dtype])


def dequantize(
    input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: Tensor | None = None
) -> Tensor:
    """scale * (x - zero point)."""
    steps = input.float()
    if zero_point is not None:
        steps = steps - _along(zero_point, axis, input).float()
    return steps * _along(scale, axis, input)


def _along(values: Tensor, axis: Tensor | None, like: Tensor) -> Tensor:
    if values.dim() == 0 or axis is None:
        return values
    sides = [1] * like.dim()
    sides[int(axis)] = values.numel()
    return values.reshape(sides)


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Function:
    """An op that folds `axes`, all by default, into one number each."""

    def reduce(x: Tensor, axes: Tensor | None = None, keep_dims: Tensor | None = None) -> Tensor:
        return function(x, _ints(axes) or list(range(x.dim())), _flag(keep_dims))

    return reduce


def reduce_argmax(
    x: Tensor,
    axis: Tensor | None = None,
    keep_dims: Tensor | None = None,
    output_dtype: str = "int32",
) -> Tensor:
    """Index of the first largest value on one axis, the last by default."""
    return x.argmax(int(_number(axis, -1)), keepdim=_flag(keep_dims)).to(_CAST[output_dtype])


def cumsum(
    x: Tensor,
    axis: Tensor | None = None,
    exclusive: Tensor | None = None,
    reverse: Tensor | None = None,
) -> Tensor:
    """Running sum on one axis; exclusive: without the place itself; reverse: from the end."""
    where = int(_number(axis, 0))
    turned = x.flip(where) if _flag(reverse) else x
    total = turned.cumsum(where) - (turned if _flag(exclusive) else 0)
    return total.flip(where) if _flag(reverse) else total


def upsample_nearest_neighbor(
    x: Tensor,
    scale_factor_height: Tensor | None = None,
    scale_factor_width: Tensor | None = None,
) -> Tensor:
    """The last two axes, longer by whole factors or by fractions rounded down."""
    return resize_nearest_neighbor(x, *_scaled(x, scale_factor_height, scale_factor_width))


def resize_nearest_neighbor(
    x: Tensor, target_size_height: Tensor, target_size_width: Tensor
) -> Tensor:
    """The last two axes to a size; each place takes the nearest one before it."""
    return _resize(x, target_size_height, target_size_width, mode="nearest")


def upsample_bilinear(
    x: Tensor,
    scale_factor_height: Tensor | None = None,
    scale_factor_width: Tensor | None = None,
    align_corners: Tensor | None = None,
) -> Tensor:
    """The last two axes, longer by factors, blended between places."""
    aligned = align_corners is None or _flag(align_corners)
    size = _scaled(x, scale_factor_height, scale_factor_width)
    return _resize(x, *size, mode="bilinear", align_corners=aligned)


def _scaled(x: Tensor, height: Tensor | None, width: Tensor | None) -> tuple[Tensor, Tensor]:
    factors = (_number(height, 1), _number(width, 1))
    sizes = [math.floor(side * f) for side, f in zip(x.shape[-2:], factors, strict=True)]
    return torch.tensor(sizes[0]), torch.tensor(sizes[1])


def _resize(x: Tensor, height: Tensor, width: Tensor, **how: Any) -> Tensor:
    size = (int(height), int(width))
    flat = x.reshape(-1, 1, *x.shape[-2:])  # any leading axes
    return F.interpolate(flat, size=size, **how).reshape(*x.shape[:-2], *size)


def pad(
    x: Tensor, pad: Tensor, mode: str = "constant", constant_val: Tensor | None = None
) -> Tensor:
    """Longer by `pad`, pairs for the last axes: with a constant, mirrored, or with the edge."""
    pairs = _ints(pad)
    ordered = [side for index in range(len(pairs) - 2, -1, -2) for side in pairs[index : index + 2]]
    if mode == "constant":
        return F.pad(x, ordered, value=_number(constant_val, 0.0))
    while len(ordered) > 2 and ordered[-2:] == [0, 0]:
        ordered = ordered[:-2]
    return F.pad(x, ordered, mode=mode)


def identity(x: Tensor) -> Tensor:
    """x itself."""
    return x


def reshape(x: Tensor, shape: Tensor) -> Tensor:
    """Row-major; -1 is what remains, 0 is the input's side counted from the last, or 1 beyond."""
    asked = _ints(shape)
    # Up to iOS16 zeros need equal ranks, where it makes no difference which end is counted from.
    inherited = [1] * len(asked) + list(x.shape)
    inherited = inherited[len(inherited) - len(asked) :]
    return x.reshape([side or own for side, own in zip(asked, inherited, strict=True)])


def transpose(x: Tensor, perm: Tensor) -> Tensor:
    """Axes in a new order."""
    return x.permute(_ints(perm))


def expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    """Sides of 1 at places of the result."""
    rank = x.dim() + axes.numel()
    for axis in sorted(axis % rank for axis in _ints(axes)):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Without sides of 1: those named, or all."""
    return x.squeeze() if axes is None else x.squeeze(tuple(_ints(axes)))


def split(
    x: Tensor,
    axis: Tensor,
    num_splits: Tensor | None = None,
    split_sizes: Tensor | None = None,
) -> Sequence[Tensor]:
    """Parts of given sizes, or equal ones."""
    if split_sizes is not None:
        return torch.split_with_sizes(x, _ints(split_sizes), int(axis))
    return x.chunk(int(_number(num_splits, 1)), int(axis))


def concat(values: list[Tensor], axis: Tensor, interleave: Tensor | None = None) -> Tensor:
    """One behind the other on an axis; interleaved: their places in turn."""
    if not _flag(interleave):
        return torch.cat(values, int(axis))
    where = int(axis) % values[0].dim()
    return torch.stack(values, where + 1).flatten(where, where + 1)


def stack(values: list[Tensor], axis: Tensor) -> Tensor:
    """Along a new axis."""
    return torch.stack(values, int(axis))


def tile(x: Tensor, reps: Tensor) -> Tensor:
    """Each axis repeated as a whole."""
    return x.repeat(_ints(reps))


def reverse(x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Backwards on the axes named, or on all."""
    return x.flip(_ints(axes) or list(range(x.dim())))


def slice_by_index(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    """x[begin:end:stride] on each axis. A mask opens an end, or takes one index and the axis."""
    masks = [_ints(mask) or [0] * x.dim() for mask in (begin_mask, end_mask, squeeze_mask)]
    steps = _ints(stride) or [1] * x.dim()
    for axis, (first, last, step) in enumerate(zip(_ints(begin), _ints(end), steps, strict=True)):
        open_first, open_last, single = (bool(mask[axis]) for mask in masks)
        if single:
            x = x.narrow(axis, first % x.shape[axis], 1)
            continue
        places = range(x.shape[axis])[
            slice(None if open_first else first, None if open_last else last, step)
        ]
        if step > 0:
            x = x[(slice(None),) * axis + (slice(places.start, places.stop, step),)]
        else:  # torch has no negative steps
            x = x.index_select(axis, torch.tensor(places))
    return x.squeeze(tuple(axis for axis, single in enumerate(masks[2]) if single))


def slice_by_size(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    """Runs of given sizes; -1 is all that is left."""
    for axis, (first, length) in enumerate(zip(_ints(begin), _ints(size), strict=True)):
        x = x.narrow(axis, first, x.shape[axis] - first if length == -1 else length)
    return x


def gather(
    x: Tensor,
    indices: Tensor,
    axis: Tensor | None = None,
    batch_dims: Tensor | None = None,
    validate_indices: Tensor | None = None,
) -> Tensor:
    """Slices of x on one axis, laid out as `indices`; negative indices count from the end."""
    if _number(batch_dims, 0) != 0:
        raise ValueError(f"batch_dims {int(_number(batch_dims, 0))}")
    where = int(_number(axis, 0)) % x.dim()
    places = indices.long()
    flat = torch.where(places < 0, places + x.shape[where], places).reshape(-1)
    taken = x.index_select(where, flat)
    return taken.reshape(*x.shape[:where], *indices.shape, *x.shape[where + 1 :])


def gather_along_axis(
    x: Tensor,
    indices: Tensor,
    axis: Tensor | None = None,
    validate_indices: Tensor | None = None,
) -> Tensor:
    """On one axis, the value at the index that stands at the same place."""
    where = int(_number(axis, 0))
    places = indices.long()
    return x.gather(where, torch.where(places < 0, places + x.shape[where], places))


def depth_to_space(x: Tensor, block_size: Tensor) -> Tensor:
    """(B, C b b, H, W) -> (B, C, H b, W b); the block's places are the slowest of the channels."""
    batch, channels, height, width = x.shape
    b = int(block_size)
    blocks = x.reshape(batch, b, b, channels // (b * b), height, width)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(batch, -1, height * b, width * b)


def pixel_shuffle(x: Tensor, upscale_factor: Tensor) -> Tensor:
    """(B, C f f, H, W) -> (B, C, H f, W f); the block's places are the fastest of the channels."""
    return F.pixel_shuffle(x, int(upscale_factor))


def shape(x: Tensor) -> Tensor:
    """The sides of x."""
    return torch.tensor(x.shape, dtype=torch.int32)


def fill(shape: Tensor, value: Tensor | None = None) -> Tensor:
    """One value everywhere, 0.0 by default."""
    return (torch.tensor(0.0) if value is None else value).expand(_ints(shape))


def fill_like(ref_tensor: Tensor, value: Tensor | None = None) -> Tensor:
    """One value everywhere, in the shape of another tensor."""
    return (torch.tensor(0.0) if value is None else value).expand(ref_tensor.shape)


def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    """start, start + step... below end."""
    return torch.arange(start.item(), end.item(), step.item())


def band_part(x: Tensor, lower: Tensor | None = None, upper: Tensor | None = None) -> Tensor:
    """Zeros outside a band round the diagonal of the last two axes; -1 keeps a side whole."""
    below, above = int(_number(lower, -1)), int(_number(upper, -1))
    kept = x if below < 0 else x.triu(-below)
    return kept if above < 0 else kept.tril(above)


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Function:
    def apply(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    return apply


def _unary(function: Callable[[Tensor], Tensor]) -> Function:
    def apply(x: Tensor) -> Tensor:
        return function(x)

    return apply


_BINARY: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "pow": torch.pow,
    "floor_div": torch.floor_divide, "mod": torch.remainder,
    "maximum": torch.maximum, "minimum": torch.minimum,
    "equal": torch.eq, "not_equal": torch.ne, "greater": torch.gt, "greater_equal": torch.ge,
    "less": torch.lt, "less_equal": torch.le,
    "logical_and": torch.logical_and, "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
}  # fmt: skip
_UNARY: Mapping[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs, "ceil": torch.ceil, "cos": torch.cos, "erf": torch.erf, "exp": torch.exp,
    "exp2": torch.exp2, "floor": torch.floor, "logical_not": torch.logical_not,
    "relu": torch.relu, "relu6": F.relu6, "round": torch.round, "sigmoid": torch.sigmoid,
    "sign": torch.sign, "silu": F.silu, "sin": torch.sin, "softplus": F.softplus,
    "softsign": F.softsign, "sqrt": torch.sqrt, "square": torch.square, "tanh": torch.tanh,
}  # fmt: skip
_REDUCTIONS: Mapping[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "reduce_mean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "reduce_sum": lambda x, axes, keep: x.sum(axes, keepdim=keep),
    "reduce_max": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "reduce_min": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "reduce_sum_square": lambda x, axes, keep: x.square().sum(axes, keepdim=keep),
    "reduce_l2_norm": lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt(),
    "reduce_log_sum_exp": lambda x, axes, keep: x.logsumexp(axes, keepdim=keep),
}
_COMPUTE: tuple[Function, ...] = (
    batch_norm, cast, clip, conv, cumsum, dequantize, einsum, elu, gelu, instance_norm, inverse,
    layer_norm, leaky_relu, linear, log, matmul, pad, quantize, real_div, reduce_argmax,
    resize_nearest_neighbor, rsqrt, scaled_dot_product_attention, scaled_tanh, sigmoid_hard,
    softmax, upsample_bilinear, upsample_nearest_neighbor,
)  # fmt: skip
_MOVE: tuple[Function, ...] = (
    band_part, concat, depth_to_space, expand_dims, fill, fill_like, gather, gather_along_axis,
    identity, pixel_shuffle, range_1d, reshape, reverse, select, shape, slice_by_index,
    slice_by_size, split, squeeze, stack, tile, transpose,
)  # fmt: skip


def _table() -> dict[str, Semantics]:
    functions: dict[str, Function] = {
        **{name: _binary(function) for name, function in _BINARY.items()},
        **{name: _unary(function) for name, function in _UNARY.items()},
        **{name: _reduction(function) for name, function in _REDUCTIONS.items()},
        **{function.__name__: function for function in (*_COMPUTE, *_MOVE)},
    }
    moves = {function.__name__ for function in _MOVE}
    return {
        name: Semantics(function, frozenset(inspect.signature(function).parameters), name in moves)
        for name, function in functions.items()
    }


OPS: Mapping[str, Semantics] = _table()


def _ints(values: Tensor | None) -> list[int]:
    return [] if values is None else [int(value) for value in values.reshape(-1).tolist()]


def _number(value: Tensor | None, default: float) -> float:
    return default if value is None else float(value)


def _flag(value: Tensor | None) -> bool:
    return value is not None and bool(value)

"""What the constexpr_* ops of MIL mean: compressed weights to dense ones, in NumPy.

Semantics: coremltools, converters/mil/mil/ops/defs/iOS16/constexpr_ops.py (packed in bytes) and
iOS18/compression.py (blocks, vectors, sparse). Parameters have the names of the ops' inputs.
Half-precision results are rounded once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tiue_export.export.coreml.mil.package import unpack_bits
from tiue_export.specs import Array


def lut_to_dense(
    indices: Array, lut: Array, vector_axis: Array | None = None, shape: Array | None = None
) -> Array:
    """Palettized weights.

    Up to iOS17 `indices` are packed in bytes and `lut` is one table (P,) for all. From iOS18 the
    table has a shape of groups per axis of `indices`, then P entries, then the length V of a vector
    that is laid out along `vector_axis`.
    """
    if shape is not None:
        sides = tuple(int(side) for side in shape)
        bits = int(math.log2(lut.size))
        return np.take(lut, unpack_bits(indices, bits, math.prod(sides))).reshape(sides)
    groups, (entries, length) = lut.shape[:-2], lut.shape[-2:]
    group = np.arange(math.prod(groups), dtype=np.int32).reshape(groups) * np.int32(entries)
    flat = _per_block(lambda index, start: index + start, indices.astype(np.int32), group)
    dense = np.take(lut.reshape(-1, length), flat, axis=0)  # (*indices.shape, V)
    if length == 1 or vector_axis is None:
        return dense.reshape(indices.shape)
    axis = int(vector_axis) % indices.ndim
    sides = tuple(n * length if i == axis else n for i, n in enumerate(indices.shape))
    return np.moveaxis(dense, -1, axis + 1).reshape(sides)


def blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """scale * (data - offset), one scale per block; blocks are given by the shapes' ratios."""
    wide = data.astype(np.float32)
    if offset is not None:
        wide = _per_block(np.subtract, wide, offset.astype(np.float32))
    return _per_block(np.multiply, wide, scale.astype(np.float32)).astype(scale.dtype)


def affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Array) -> Array:
    """scale * (data - zero point), one pair for all or one for each place on `axis`."""

    def along_axis(values: Array) -> Array:
        sides = [1] * quantized_data.ndim
        if values.ndim:
            sides[int(axis)] = values.size
        return values.astype(np.float32).reshape(sides)

    wide = quantized_data.astype(np.float32) - along_axis(zero_point)
    return (wide * along_axis(scale)).astype(scale.dtype)


def sparse_to_dense(nonzero_data: Array, mask: Array, shape: Array | None = None) -> Array:
    """Zeros but for `nonzero_data`, which fill the places that `mask` marks, in row-major order."""
    if shape is not None:
        sides = tuple(int(side) for side in shape)
        mask = unpack_bits(mask, 1, math.prod(sides)).reshape(sides)
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[mask != 0] = nonzero_data
    return dense


def lut_to_sparse(
    indices_mask: Array,
    indices_nonzero_data: Array,
    lut: Array,
    vector_axis: Array | None = None,
) -> tuple[Array, Array]:
    """Sparse indices to sparse weights: the mask and its nonzero data."""
    dense = lut_to_dense(sparse_to_dense(indices_nonzero_data, indices_mask), lut, vector_axis)
    mask = indices_mask
    if lut.shape[-1] > 1 and vector_axis is not None:
        mask = np.repeat(mask, lut.shape[-1], axis=int(vector_axis))
    return mask, dense[mask != 0]


def sparse_blockwise_shift_scale(
    data_mask: Array, nonzero_data: Array, scale: Array, offset: Array | None = None
) -> tuple[Array, Array]:
    """Sparse integers to sparse weights: the mask and its nonzero data."""
    dense = blockwise_shift_scale(sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]


def cast(source_val: Array, output_dtype: str) -> Array:
    """Half to single precision, the only cast that MIL has for constants."""
    return source_val.astype({"fp32": np.float32, "fp16": np.float16}[output_dtype])


CONSTEXPR_OPS: Mapping[str, Callable[..., Any]] = {
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_cast": cast,
    "constexpr_lut_to_dense": lut_to_dense,
    "constexpr_lut_to_sparse": lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": sparse_blockwise_shift_scale,
    "constexpr_sparse_to_dense": sparse_to_dense,
}


def _per_block(function: Callable[[Array, Array], Array], data: Array, blocks: Array) -> Array:
    """`function` of data and its block's value; axis i of `data` is blocks.shape[i] equal runs."""
    split = [s for n, b in zip(data.shape, blocks.shape, strict=True) for s in (b, n // b)]
    spread = [s for b in blocks.shape for s in (b, 1)]
    return function(data.reshape(split), blocks.reshape(spread)).reshape(data.shape)

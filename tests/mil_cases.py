"""Small ML Programs for tests: every op that the evaluator knows, with inputs, and the way to disk.

Import it after `pytest.importorskip("coremltools")`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
import torch.nn.functional as F
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program

TARGET = ct.target.iOS18
RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return (np.abs(RNG.standard_normal(shape)) + 0.1).astype(np.float32)


def ints(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


def save_function(function: Function, path: Path) -> Path:
    """Write a program as it stands: no pass may fold or fuse what is to be tested."""
    program = Program()
    program.add_function("main", function)
    model = ct.convert(
        program,
        convert_to="mlprogram",
        pass_pipeline=ct.PassPipeline.EMPTY,
        minimum_deployment_target=TARGET,
        skip_model_load=True,
    )
    model.save(str(path))
    return path


@dataclass(frozen=True)
class Case:
    """One op: `live` are the program's inputs, `fixed` its constants, `torch` the expected result.

    Without `torch` the result is what coremltools folds the op to when all its inputs are constant.
    """

    op: str
    live: dict[str, np.ndarray]
    fixed: dict[str, Any] = field(default_factory=dict)
    torch: Callable[..., Any] | None = None

    def build(self, live: dict[str, Any]) -> list[Any]:
        parts = {name: value for name, value in self.fixed.items() if value is not None} | live
        if self.op in ("concat", "stack", "einsum"):
            parts["values"] = tuple(parts.pop(name) for name in self.live)
        result = getattr(mb, self.op)(**parts)
        return list(result) if isinstance(result, (list, tuple)) else [result]


X, Y = floats(2, 3, 4), floats(2, 3, 4)
LOGICAL = {"x": X > 0, "y": Y > 0}
IMAGE = floats(2, 4, 6, 5)
KERNEL = floats(8, 4, 3, 3)


def t(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def attention(query, key, value, mask=None):
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    return torch.softmax(scores, -1) @ value


def normalized(x, axes, gamma=None, beta=None):
    mean, variance = x.mean(axes, keepdim=True), x.var(axes, keepdim=True, correction=0)
    sides = [side if axis in axes else 1 for axis, side in enumerate(x.shape)]
    y = (x - mean) / torch.sqrt(variance + 1e-5)
    y = y if gamma is None else y * t(gamma).reshape(sides)
    return y if beta is None else y + t(beta).reshape(sides)


GAMMA, BETA = floats(4), floats(4)
BINARY = (
    "add", "sub", "mul", "real_div", "floor_div", "mod", "maximum", "minimum", "equal",
    "not_equal", "greater", "greater_equal", "less", "less_equal",
)  # fmt: skip
ON_INTEGERS = (
    "add", "sub", "mul", "floor_div", "mod", "maximum", "minimum", "equal", "less",
)  # fmt: skip
LOGIC = ("logical_and", "logical_or", "logical_xor")
UNARY = (
    "abs", "ceil", "cos", "erf", "exp", "exp2", "floor", "relu", "relu6", "round", "sigmoid",
    "sign", "sin", "softplus", "softsign", "square", "tanh",
)  # fmt: skip
ROOTS = ("sqrt", "rsqrt", "inverse", "log")
WITH_EPSILON = ("rsqrt", "inverse", "log")
REDUCTIONS = (
    "reduce_mean", "reduce_sum", "reduce_max", "reduce_min", "reduce_sum_square",
    "reduce_l2_norm", "reduce_log_sum_exp",
)  # fmt: skip

CASES = [
    *(Case(op, {"x": X, "y": y}) for op in BINARY for y in (Y, X, floats(3, 1))),
    *(Case(op, {"x": ints(7, -7, 3), "y": ints(2, 2, -5)}) for op in ON_INTEGERS),
    Case(
        "real_div",
        {"x": ints(7, -7, 6), "y": ints(2, 2, 3)},
        torch=lambda x, y: torch.tensor([3, -3, 2]),
    ),
    Case("pow", {"x": positive(2, 3), "y": floats(3)}),
    *(Case(op, LOGICAL) for op in LOGIC),
    Case("logical_not", {"x": X > 0}),
    *(Case(op, {"x": 3 * X}) for op in UNARY),
    Case("silu", {"x": 3 * X}, torch=F.silu),
    Case("round", {"x": np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32)}),
    *(Case(op, {"x": positive(2, 3)}) for op in ROOTS),
    *(
        Case(op, {"x": np.array([0.0, 1e-3, 2.0], np.float32)}, {"epsilon": 0.25})
        for op in WITH_EPSILON
    ),
    Case("inverse", {"x": np.array([1e-5, 0.0], np.float32)}),
    Case("clip", {"x": X}, {"alpha": -0.5, "beta": 0.25}),
    Case("leaky_relu", {"x": X}, {"alpha": 0.2}),
    Case("elu", {"x": X}, {"alpha": 0.7}),
    Case("scaled_tanh", {"x": X}, {"alpha": 0.7, "beta": 1.5}),
    Case("sigmoid_hard", {"x": X}, {"alpha": 0.4, "beta": 0.3}),
    *(
        Case("gelu", {"x": X}, {"mode": mode})
        for mode in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")
    ),
    *(Case("softmax", {"x": X}, {"axis": axis}) for axis in (-1, 1)),
    *(Case("cast", {"x": 3 * X}, {"dtype": dtype}) for dtype in ("int32", "bool", "fp32", "int8")),
    Case("cast", {"x": ints(3, -1, 0)}, {"dtype": "fp32"}),
    Case("select", {"cond": X > 0, "a": X, "b": Y}),
    Case("matmul", {"x": floats(2, 3, 4), "y": floats(2, 4, 5)}, torch=torch.matmul),
    Case(
        "matmul",
        {"x": floats(2, 4, 3), "y": floats(1, 5, 4)},
        {"transpose_x": True, "transpose_y": True},
        torch=lambda x, y: x.mT @ y.mT,
    ),
    Case(
        "linear",
        {"x": X},
        {"weight": KERNEL[:, :, 0, 0], "bias": KERNEL[:, 0, 0, 0]},
        torch=lambda x: F.linear(x, t(KERNEL[:, :, 0, 0]), t(KERNEL[:, 0, 0, 0])),
    ),
    Case(
        "einsum",
        {"a": floats(2, 3, 4, 5), "b": floats(2, 5, 4, 6)},
        {"equation": "bchq,bqhk->bchk"},
        torch=lambda a, b: torch.einsum("bchq,bqhk->bchk", a, b),
    ),
    *(
        Case("conv", {"x": IMAGE}, {"weight": KERNEL, **settings}, torch=expected)
        for settings, expected in (
            ({}, lambda x: F.conv2d(x, t(KERNEL))),
            (
                {
                    "strides": [2, 2],
                    "pad_type": "custom",
                    "pad": [1, 1, 1, 1],
                    "bias": KERNEL[:, 0, 0, 0],
                },
                lambda x: F.conv2d(x, t(KERNEL), t(KERNEL[:, 0, 0, 0]), 2, 1),
            ),
            (
                {"pad_type": "custom", "pad": [0, 1, 2, 0]},
                lambda x: F.conv2d(F.pad(x, (2, 0, 0, 1)), t(KERNEL)),
            ),
            ({"pad_type": "same"}, lambda x: F.conv2d(x, t(KERNEL), padding="same")),
            (
                {"pad_type": "same", "strides": [2, 2]},
                lambda x: F.conv2d(F.pad(x, (1, 1, 0, 1)), t(KERNEL), stride=2),
            ),
            (
                {"pad_type": "same_lower", "strides": [2, 2]},
                lambda x: F.conv2d(F.pad(x, (1, 1, 1, 0)), t(KERNEL), stride=2),
            ),
            ({"dilations": [2, 1]}, lambda x: F.conv2d(x, t(KERNEL), dilation=(2, 1))),
        )
    ),
    Case(
        "conv",
        {"x": IMAGE},
        {"weight": KERNEL[:, :2], "groups": 2},
        torch=lambda x: F.conv2d(x, t(KERNEL[:, :2]), groups=2),
    ),
    Case(
        "conv",
        {"x": floats(2, 4, 9)},
        {"weight": KERNEL[:, :, 0], "pad_type": "custom", "pad": [2, 1]},
        torch=lambda x: F.conv1d(F.pad(x, (2, 1)), t(KERNEL[:, :, 0])),
    ),
    Case(
        "scaled_dot_product_attention",
        {"query": floats(2, 3, 5, 4), "key": floats(2, 3, 7, 4), "value": floats(2, 3, 7, 6)},
        torch=attention,
    ),
    Case(
        "scaled_dot_product_attention",
        {
            "query": floats(1, 5, 4),
            "key": floats(1, 7, 4),
            "value": floats(1, 7, 4),
            "attn_mask": floats(5, 7),
        },
        torch=attention,
    ),
    Case(
        "scaled_dot_product_attention",
        {
            "query": floats(1, 5, 4),
            "key": floats(1, 7, 4),
            "value": floats(1, 7, 4),
            "attn_mask": floats(5, 7) > -1,
        },
        torch=attention,
    ),
    Case(
        "layer_norm",
        {"x": X},
        {"axes": [2], "gamma": GAMMA, "beta": BETA},
        torch=lambda x: normalized(x, [2], GAMMA, BETA),
    ),
    Case("layer_norm", {"x": X}, {"axes": [-2, -1]}, torch=lambda x: normalized(x, [1, 2])),
    Case(
        "layer_norm",
        {"x": IMAGE},
        {"axes": [1], "gamma": GAMMA, "beta": BETA},
        torch=lambda x: normalized(x, [1], GAMMA, BETA),
    ),
    Case(
        "batch_norm",
        {"x": IMAGE},
        {"mean": GAMMA, "variance": BETA**2, "gamma": BETA, "beta": GAMMA, "epsilon": 1e-3},
        torch=lambda x: F.batch_norm(x, *map(t, (GAMMA, BETA**2, BETA, GAMMA)), eps=1e-3),
    ),
    Case(
        "instance_norm",
        {"x": IMAGE},
        {"gamma": GAMMA, "beta": BETA, "epsilon": 1e-3},
        torch=lambda x: F.instance_norm(x, weight=t(GAMMA), bias=t(BETA), eps=1e-3),
    ),
    *(
        Case(op, {"x": X}, settings)
        for op in REDUCTIONS
        for settings in ({"axes": [1], "keep_dims": True}, {"axes": [0, -1]}, {})
    ),
    Case("reduce_argmax", {"x": X}, {"axis": 1, "keep_dims": True}),
    *(Case("cumsum", {"x": X}, {"axis": 1, "reverse": reverse}) for reverse in (False, True)),
    # coremltools 9.0 fails to fold an exclusive one.
    Case(
        "cumsum",
        {"x": X},
        {"axis": 1, "exclusive": True},
        torch=lambda x: F.pad(x.cumsum(1), (0, 0, 1, 0))[:, :-1],
    ),
    Case(
        "cumsum",
        {"x": X},
        {"axis": 1, "exclusive": True, "reverse": True},
        torch=lambda x: torch.stack((x[:, 1] + x[:, 2], x[:, 2], 0 * x[:, 2]), 1),
    ),
    Case(
        "quantize",
        {"input": 3 * X},
        {"scale": 0.05, "zero_point": np.int8(3), "output_dtype": "int8"},
    ),
    Case(
        "quantize",
        {"input": 3 * X},
        {
            "scale": positive(3),
            "axis": 1,
            "output_dtype": "uint8",
            "zero_point": np.array([1, 2, 3], np.uint8),
        },
    ),
    *(
        Case(
            "dequantize",
            {"input": np.array([[-128, 3, 127], [0, 5, -7]], np.int8)},
            {"scale": scale, "zero_point": zero, "axis": axis},
            torch=lambda x, scale=scale, zero=zero: (x.float() - t(zero)) * t(scale),
        )
        for scale, zero, axis in (
            (np.array(0.05, np.float32), np.array(3, np.int8), None),
            (positive(3), np.array([1, -2, 3], np.int8), 1),
        )
    ),
    Case(
        "upsample_nearest_neighbor",
        {"x": IMAGE},
        {"scale_factor_height": 2.0, "scale_factor_width": 3.0},
        torch=lambda x: x.repeat_interleave(2, -2).repeat_interleave(3, -1),
    ),
    Case(
        "resize_nearest_neighbor",
        {"x": IMAGE},
        {"target_size_height": 9, "target_size_width": 15},
        torch=lambda x: F.interpolate(x, size=(9, 15), mode="nearest"),
    ),
    *(
        Case(
            "upsample_bilinear",
            {"x": IMAGE},
            {"scale_factor_height": 2.0, "scale_factor_width": 2.0, "align_corners": aligned},
            torch=lambda x, aligned=aligned: F.interpolate(
                x, scale_factor=2, mode="bilinear", align_corners=aligned
            ),
        )
        for aligned in (False, True)
    ),
    Case(
        "pad",
        {"x": X},
        {"pad": [1, 0, 0, 2], "constant_val": 0.5},
        torch=lambda x: F.pad(x, (0, 2, 1, 0), value=0.5),
    ),
    *(
        Case(
            "pad",
            {"x": X},
            {"pad": [0, 0, 2, 1], "mode": mode},
            torch=lambda x, mode=mode: F.pad(x, (2, 1), mode=mode),
        )
        for mode in ("reflect", "replicate")
    ),
    Case("identity", {"x": X}, torch=lambda x: x),
    *(Case("reshape", {"x": X}, {"shape": to}) for to in ([2, 12], [0, -1], [-1, 12], [0, 4, 3])),
    Case("reshape", {"x": X[0]}, {"shape": [1, 0, -1, 0]}),
    Case("transpose", {"x": X}, {"perm": [2, 0, 1]}),
    Case("expand_dims", {"x": X[0]}, {"axes": [0, -1, 2]}),
    Case("squeeze", {"x": floats(1, 3, 1, 2)}, {"axes": [-2]}),
    Case("squeeze", {"x": floats(1, 3, 1, 2)}),
    Case("split", {"x": X}, {"axis": -1, "num_splits": 2}),
    Case("split", {"x": X}, {"axis": 1, "split_sizes": [1, 2]}),
    Case("concat", {"a": X, "b": Y}, {"axis": -2}),
    Case(
        "concat",
        {"a": X, "b": Y},
        {"axis": 1, "interleave": True},
        torch=lambda a, b: torch.stack((a[:, 0], b[:, 0], a[:, 1], b[:, 1], a[:, 2], b[:, 2]), 1),
    ),
    Case("stack", {"a": X, "b": Y}, {"axis": 1}),
    Case("tile", {"x": X}, {"reps": [2, 1, 3]}),
    Case("reverse", {"x": X}, {"axes": [0, 2]}),
    Case("slice_by_index", {"x": X}, {"begin": [0, 1, -3], "end": [1, 3, -1]}),
    Case(
        "slice_by_index",
        {"x": X},
        {
            "begin": [1, 2, 3],
            "end": [0, 0, 0],
            "stride": [1, -1, -2],
            "begin_mask": [True, False, True],
            "end_mask": [True, False, True],
        },
    ),
    Case(
        "slice_by_index",
        {"x": X},
        {
            "begin": [0, -1, 1],
            "end": [0, 0, 4],
            "end_mask": [True, False, False],
            "squeeze_mask": [False, True, False],
        },
    ),
    Case(
        "slice_by_size",
        {"x": X},
        {"begin": [0, 1, 1], "size": [1, -1, 2]},
        torch=lambda x: x[:1, 1:, 1:3],
    ),
    Case("gather", {"x": X, "indices": ints([0, 2], [1, 0])}, {"axis": 1}),
    Case(
        "gather",
        {"x": X, "indices": np.array([3, 0], np.int16)},
        {"axis": -1},
        torch=lambda x, indices: x[..., [3, 0]],
    ),
    Case("gather_along_axis", {"x": X, "indices": np.zeros((2, 1, 4), np.int32) + 2}, {"axis": 1}),
    Case(
        "depth_to_space",
        {"x": floats(1, 8, 2, 3)},
        {"block_size": 2},
        torch=lambda x: (
            torch.stack([x[:, i * 2 : i * 2 + 2] for i in range(4)], -1)
            .reshape(1, 2, 2, 3, 2, 2)
            .permute(0, 1, 2, 4, 3, 5)
            .reshape(1, 2, 4, 6)
        ),
    ),
    Case(
        "pixel_shuffle",
        {"x": floats(1, 8, 2, 3)},
        {"upscale_factor": 2},
        torch=lambda x: F.pixel_shuffle(x, 2),
    ),
    Case("shape", {"x": X}),
    Case(
        "fill_like",
        {"ref_tensor": X},
        {"value": 2.5},
        torch=lambda ref_tensor: torch.full((2, 3, 4), 2.5),
    ),
    Case("fill", {}, {"shape": [2, 3], "value": 1.5}),
    Case("range_1d", {}, {"start": 1.0, "end": 6.0, "step": 2.0}),
    *(
        Case("band_part", {"x": floats(4, 5)}, {"lower": lower, "upper": upper})
        for lower, upper in ((1, 0), (-1, 1), (0, -1))
    ),
]

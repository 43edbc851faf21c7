"""Floating-point operations of ONNX graphs, counted from their shapes; attention included.

Counted are convolutions and matrix products, at 2 operations per multiply-add: attention is two
matrix products in these graphs. Norms, activations and additions are left out: at SD 2.1-base size
they are below 1 % of the operations, though not of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiue_export.errors import UsageError
from tiue_export.specs import BATCH, STEPS

Shape = tuple[int, ...]
_DEFAULT_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class GraphFlops:
    """Operations of one graph by kind of operator; `batch` rows of input."""

    by_operator: Mapping[str, int]
    batch: int

    @property
    def total(self) -> int:
        """Of all kinds."""
        return sum(self.by_operator.values())


def count_flops(path: Path | str, batch: int = 1, steps: int = 1) -> GraphFlops:
    """Count one ONNX file; `batch` and `steps` are taken for open axes. Weights are not read.

    Raises `UsageError` for a graph whose shapes stay unknown, or with operators that hide work.
    """
    model, batch = shaped_model(path, batch, steps)
    shapes = known_shapes(model.graph)
    counts: dict[str, int] = {}
    for node in model.graph.node:
        if _hides_work(node) or model.functions:
            raise UsageError(
                f"{path} has the operator {node.domain}.{node.op_type}, whose work cannot be "
                "counted",
                "Count a graph as the bundle holds it, before it was compiled or optimised.",
            )
        flops = node_flops(node, shapes, path)
        if flops is not None:
            counts[node.op_type] = counts.get(node.op_type, 0) + flops
    return GraphFlops(counts, batch)


def shaped_model(path: Path | str, batch: int = 1, steps: int = 1) -> tuple[Any, int]:
    """The ONNX model of a file, without its weights but with the shape of every value, and its
    batch: `batch` where the axis is open. `steps` is taken for the open axis of timesteps.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    batch = _fix_open_axes(model.graph, {BATCH: batch, STEPS: steps})
    _fold_repeats(model)
    # What the exporter noted may name the open batch axis: all shapes are inferred again.
    del model.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(model, check_type=True, data_prop=True), batch


def node_flops(node: Any, shapes: Mapping[str, Shape], path: Path | str) -> int | None:
    """Operations of one node; None for a kind that is not counted."""
    counter = _COUNTERS.get(node.op_type)
    return None if counter is None else counter(node, _known(node, shapes, path))


def _conv(node: Any, shapes: Sequence[Shape]) -> int:
    """2 * outputs * (inputs per group * kernel): weights are (out, in / groups, *kernel)."""
    _, weights, output = shapes
    return 2 * math.prod(output) * math.prod(weights[1:])


def _conv_transpose(node: Any, shapes: Sequence[Shape]) -> int:
    """As a convolution, but each input value meets (outputs per group * kernel) weights."""
    inputs, weights, _ = shapes
    return 2 * math.prod(inputs) * math.prod(weights[1:])


def _matmul(node: Any, shapes: Sequence[Shape]) -> int:
    """2 * outputs * the length that is summed over."""
    left, _, output = shapes
    return 2 * math.prod(output) * left[-1]


def _gemm(node: Any, shapes: Sequence[Shape]) -> int:
    """As a matrix product; transA says which axis is summed over."""
    left, _, output = shapes
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return 2 * math.prod(output) * (left[0] if transposed else left[1])


_COUNTERS: Mapping[str, Callable[[Any, Sequence[Shape]], int]] = {
    "Conv": _conv,
    "ConvInteger": _conv,
    "ConvTranspose": _conv_transpose,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "Gemm": _gemm,
}
_OPAQUE = {"Attention", "Einsum", "LSTM", "GRU", "RNN", "QLinearConv", "QLinearMatMul"}


def _hides_work(node: Any) -> bool:
    bodies = any(a.HasField("g") or a.graphs for a in node.attribute)
    return bodies or node.domain not in _DEFAULT_DOMAINS or node.op_type in _OPAQUE


def _fold_repeats(model: Any) -> None:
    """Write how often each Tile repeats, where that is computed from the size of an input.

    Shape inference takes a Tile's repeats from a constant alone.
    """
    import onnx
    from onnx.reference import ReferenceEvaluator

    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    tiles = [n for n in graph.node if n.op_type == "Tile" and n.input[1] not in constants]
    if not tiles:
        return
    maker = {output: node for node in graph.node for output in node.output}
    needed: dict[str, Any] = {}
    waiting = [tile.input[1] for tile in tiles]
    while waiting:
        node = maker.get(waiting.pop())
        if node is not None and node.output[0] not in needed:
            needed[node.output[0]] = node
            waiting += node.input
    read = {name for node in needed.values() for name in node.input}
    inputs = [value for value in graph.input if value.name in read]
    part = onnx.helper.make_graph(
        [node for node in graph.node if node.output[0] in needed],
        "repeats",
        inputs,
        [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None)
            for name in {tile.input[1]: None for tile in tiles}
        ],
        [tensor for tensor in graph.initializer if tensor.name in read],
    )
    run = ReferenceEvaluator(onnx.helper.make_model(part, opset_imports=model.opset_import)).run
    feeds = {
        value.name: np.zeros([side.dim_value for side in value.type.tensor_type.shape.dim])
        for value in inputs
    }
    repeats = dict(zip([output.name for output in part.output], run(None, feeds), strict=True))
    for name, values in repeats.items():
        folded = onnx.numpy_helper.from_array(np.asarray(values, np.int64), f"{name}/folded")
        graph.initializer.append(folded)
    for tile in tiles:
        tile.input[1] = f"{tile.input[1]}/folded"


def _fix_open_axes(graph: Any, sides: Mapping[str, int]) -> int:
    """Write a number where the inputs leave an axis open; returns the batch of the first input."""
    for value in graph.input:
        for side in value.type.tensor_type.shape.dim:
            if side.dim_param in sides:
                side.dim_value = sides[side.dim_param]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    return int(graph.input[0].type.tensor_type.shape.dim[0].dim_value)


def known_shapes(graph: Any) -> dict[str, Shape]:
    """Of every value whose sides are all known."""
    found: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        sides = value.type.tensor_type.shape.dim
        if all(side.HasField("dim_value") for side in sides):
            found[value.name] = tuple(side.dim_value for side in sides)
    return found


def _known(node: Any, shapes: Mapping[str, Shape], path: Path | str) -> list[Shape]:
    names = [*node.input[:2], node.output[0]]
    unknown = [name for name in names if name not in shapes]
    if unknown:
        raise UsageError(
            f"{path}: the shape of {', '.join(unknown)} at {node.name or node.op_type} is unknown",
            "Count a graph with static sizes; only the batch axis may be open.",
        )
    return [shapes[name] for name in names]

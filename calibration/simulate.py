"""A float graph in which single layers compute as if quantized: Q/DQ at the input, rounded weights.

What a fold would do is simulated by rescaling around the pair, which is exact; nothing else of the
graph changes and no weight is stored anew but those of the layers asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiue_export.specs import Array

from .onnx_layers import Layer, Weights, along
from .qdq_onnx import quantize_weight, scale_in


@dataclass(frozen=True)
class Simulated:
    """One layer in w8a8. `scale` is that of x / `channels`; `channels` (C,) is moved into the
    weights.
    """

    layer: Layer
    scale: float
    channels: Array | None = None


def simulated_model(path: Path, changes: Sequence[Simulated]) -> Any:
    """The model at `path` with its external data unloaded and some layers quantized."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    weights = Weights(model, path.parent)
    wanted = {change.layer.name: change for change in changes}
    nodes: list[Any] = []
    for node in model.graph.node:
        if node.name in wanted:
            change = wanted[node.name]
            node.input[0] = _rounded_input(model.graph, change, weights, nodes)
            node.input[1] = _rounded_weight(model.graph, change, weights)
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _rounded_input(graph: Any, change: Simulated, weights: Weights, nodes: list[Any]) -> str:
    from onnx import helper, numpy_helper

    layer, name = change.layer, f"{change.layer.name}/simulated"
    dtype = weights.read(layer.weight).dtype.type

    def add(op: str, inputs: list[str], part: str) -> str:
        nodes.append(helper.make_node(op, inputs, [f"{name}/{part}"], name=f"{name}/{part}"))
        return f"{name}/{part}"

    def constant(part: str, array: Array) -> str:
        graph.initializer.append(numpy_helper.from_array(array, f"{name}.{part}"))
        return f"{name}.{part}"

    source, factor = layer.activation, None
    if change.channels is not None:
        factor = along(change.channels, layer.channel_axis, len(layer.activation_shape))
    if factor is not None:
        source = add("Mul", [source, constant("down", (1 / factor).astype(dtype))], "down")
    scale = constant("scale", scale_in(np.array(change.scale), dtype))
    zero = constant("zero", np.array(0, np.int8))
    source = add("QuantizeLinear", [source, scale, zero], "quantize")
    source = add("DequantizeLinear", [source, scale, zero], "dequantize")
    if factor is not None:
        source = add("Mul", [source, constant("up", factor.astype(dtype))], "up")
    return source


def _rounded_weight(graph: Any, change: Simulated, weights: Weights) -> str:
    from onnx import numpy_helper

    layer = change.layer
    weight = weights.read(layer.weight)
    wide = weight.astype(np.float32)
    channels = change.channels
    grown = 1 if channels is None else along(channels, layer.input_axis, wide.ndim)
    rounded = quantize_weight(wide * grown, layer.output_axis).dequantized() / grown
    name = f"{layer.name}/simulated.weight"
    graph.initializer.append(numpy_helper.from_array(rounded.astype(weight.dtype), name))
    return name

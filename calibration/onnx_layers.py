"""The convolutions and linear layers of an ONNX graph, and where their inputs can be rescaled.

Attention's own products have no weights and are none of them. A fold is a place where a factor per
channel can be taken out of a tensor exactly: into the affine part of the LayerNorm that makes it,
or into the half of a linear layer that a gated GELU leaves linear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tiue_export.graphs.flops import known_shapes, node_flops, shaped_model
from tiue_export.specs import Array

CONV, LINEAR = "Conv", "MatMul"


@dataclass(frozen=True)
class Layer:
    """One layer: `weight` is an initializer, (O, I/groups, h, w) or (I, O); `activation` its input
    tensor, (R, C, H, W) or (R, ..., C).
    """

    graph: str
    name: str
    op: str
    activation: str
    weight: str
    shape: tuple[int, ...]
    activation_shape: tuple[int, ...]
    flops: int

    @property
    def key(self) -> tuple[str, str]:
        """(graph, name): names are unique within a graph."""
        return self.graph, self.name

    @property
    def module(self) -> str:
        """The module path that the node is named after."""
        return self.name.rsplit("/", 1)[0]

    @property
    def output_axis(self) -> int:
        """The weight's axis of output channels: its scales lie along it."""
        return 0 if self.op == CONV else 1

    @property
    def input_axis(self) -> int:
        """The weight's axis of input channels."""
        return 1 - self.output_axis

    @property
    def channel_axis(self) -> int:
        """The activation's axis of channels."""
        return 1 if self.op == CONV else len(self.activation_shape) - 1


@dataclass(frozen=True)
class Slice:
    """A stretch of an initializer along one axis."""

    initializer: str
    axis: int
    start: int
    length: int


@dataclass(frozen=True)
class Fold:
    """`activation` can be divided per channel by dividing `producers`, if the weights of `layers`,
    which are all that read it, are multiplied along their input axis.
    """

    graph: str
    activation: str
    layers: tuple[str, ...]
    producers: tuple[Slice, ...]


def find_layers(path: Path, graph: str, batch: int = 1, steps: int = 1) -> list[Layer]:
    """Every `Conv` and every `MatMul` with a stored weight of rank 2, in running order.

    `batch` and `steps` are taken for open axes.
    """
    model, _ = shaped_model(path, batch, steps)
    shapes = known_shapes(model.graph)
    stored = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    layers = []
    for node in model.graph.node:
        if node.op_type not in (CONV, LINEAR) or node.input[1] not in stored:
            continue
        if node.op_type == LINEAR and len(stored[node.input[1]]) != 2:
            continue
        layers.append(
            Layer(
                graph,
                node.name,
                node.op_type,
                node.input[0],
                node.input[1],
                stored[node.input[1]],
                shapes[node.input[0]],
                node_flops(node, shapes, path) or 0,
            )
        )
    return layers


def find_folds(path: Path, layers: Sequence[Layer]) -> list[Fold]:
    """The places where the input of linear layers can be rescaled exactly."""
    model = onnx.load(str(path), load_external_data=False)
    wiring = _Wiring(model.graph)
    linear: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.op == LINEAR:
            linear.setdefault(layer.activation, []).append(layer)
    folds = []
    for activation, readers in linear.items():
        if len(wiring.readers.get(activation, ())) != len(readers) or activation in wiring.outputs:
            continue
        producers = _producers(wiring, activation, readers[0].shape[0])
        if producers:
            names = tuple(layer.name for layer in readers)
            folds.append(Fold(readers[0].graph, activation, names, producers))
    return folds


class _Wiring:
    """Who makes and who reads each value of a graph."""

    def __init__(self, graph: Any) -> None:
        self.maker = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.stored = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}

    def single(self, name: str) -> bool:
        """Whether one node alone reads the value."""
        return len(self.readers.get(name, ())) == 1 and name not in self.outputs


def _producers(wiring: _Wiring, activation: str, channels: int) -> tuple[Slice, ...]:
    node = wiring.maker.get(activation)
    while node is not None and node.op_type == "Cast" and wiring.single(node.input[0]):
        node = wiring.maker.get(node.input[0])
    if node is None:
        return ()
    if node.op_type == "LayerNormalization":
        affine = list(node.input[1:3])
        own = all(wiring.stored.get(n) == (channels,) and wiring.single(n) for n in affine)
        return tuple(Slice(n, 0, 0, channels) for n in affine) if own else ()
    if node.op_type == "Mul":
        return next(filter(None, (_gate(wiring, name, channels) for name in node.input)), ())
    return ()


def _gate(wiring: _Wiring, factor: str, channels: int) -> tuple[Slice, ...]:
    """GEGLU: `factor` is MatMul(x, W) + b, or one half of it, and only the product reads it."""
    if not wiring.single(factor):
        return ()
    start, width, maker = 0, channels, wiring.maker.get(factor)
    if maker is not None and maker.op_type == "Split" and len(maker.output) == 2:
        start, width = channels * list(maker.output).index(factor), 2 * channels
        whole = maker.input[0]
        maker = wiring.maker.get(whole) if wiring.single(whole) else None
    if maker is None or maker.op_type != "Add":
        return ()
    products = [name for name in maker.input if name not in wiring.stored]
    biases = [name for name in maker.input if name in wiring.stored]
    product = wiring.maker.get(products[0]) if len(products) == 1 else None
    if product is None or product.op_type != LINEAR or not wiring.single(products[0]):
        return ()
    weight, bias = product.input[1], biases[0]
    if wiring.stored.get(weight, ())[1:] != (width,) or wiring.stored[bias] != (width,):
        return ()
    if not (wiring.single(weight) and wiring.single(bias)):
        return ()
    return (Slice(weight, 1, start, channels), Slice(bias, 0, start, channels))


def along(values: Array, axis: int, rank: int) -> Array:
    """Values (C,) in a shape that broadcasts along one axis of a tensor with `rank` axes."""
    return values.reshape([-1 if i == axis else 1 for i in range(rank)])


class Weights:
    """The initializers of a model whose external data was not loaded; big ones stay on disk."""

    def __init__(self, model: Any, folder: Path) -> None:
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._folder = folder

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def read(self, name: str) -> Array:
        """One initializer; memory-mapped, read-only, when it lies in external data."""
        tensor = self._tensors[name]
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            array: Array = onnx.numpy_helper.to_array(tensor)
            return array
        where: Mapping[str, str] = {entry.key: entry.value for entry in tensor.external_data}
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return np.memmap(
            self._folder / where["location"],
            dtype,
            "r",
            int(where.get("offset", 0)),
            tuple(tensor.dims),
        )

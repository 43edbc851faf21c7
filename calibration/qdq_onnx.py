"""ONNX -> the same graph with explicit Q/DQ pairs around planned layers, written in one stream.

Symmetric int8 with zero point 0, one scale for an activation and one per output channel for a
weight; biases and everything else stay as they are. That is what TensorRT reads as explicit
quantization (docs.nvidia.com, "Working with Quantized Types"), ONNX Runtime and OpenVINO read the
same file. Weights are stored as int8; at no time is more than one of them in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx

from tiue_export.errors import UsageError
from tiue_export.proof.quantization_plan import (
    W8A8,
    FoldPlan,
    LayerPlan,
    QuantizationPlan,
    exponents_of,
)
from tiue_export.specs import Array

from .onnx_layers import Fold, Layer, Weights, along

LEVELS = 127
SCALES = ("auto", "fp32")
_MODEL_FILE, _DATA_FILE = "model.onnx", "model.onnx.data"
_ALIGNMENT_BYTES = 64
_INLINE_BYTES = 1024


@dataclass(frozen=True)
class QuantizedWeight:
    """`values` int8 in the weight's shape, `scales` (O,) in the dtype they are stored in."""

    values: Array
    scales: Array
    axis: int

    def dequantized(self) -> Array:
        """What the graph will compute with, float32."""
        scales = along(self.scales.astype(np.float32), self.axis, self.values.ndim)
        wide: Array = self.values.astype(np.float32) * scales
        return wide


def quantize_weight(weight: Array, axis: int, dtype: Any = np.float32) -> QuantizedWeight:
    """Symmetric int8 with one scale for each index of `axis`: max|w| over the rest / 127.

    Scales are rounded up to `dtype`, so that no value is clipped; rounding uses the rounded scale.
    """
    wide = np.asarray(weight, np.float32)
    others = tuple(i for i in range(wide.ndim) if i != axis)
    scales = scale_in(np.abs(wide).max(axis=others) / LEVELS, dtype)
    steps = np.rint(wide / along(scales.astype(np.float32), axis, wide.ndim))
    return QuantizedWeight(np.clip(steps, -LEVELS, LEVELS).astype(np.int8), scales, axis)


def scale_in(scales: Array, dtype: Any) -> Array:
    """Scales in `dtype`, none below the value asked for and none 0 (a channel of zeros)."""
    wide = np.asarray(scales, np.float64)
    narrow = wide.astype(dtype)
    narrow = np.where(narrow.astype(np.float64) < wide, np.nextafter(narrow, dtype(np.inf)), narrow)
    tiny = np.finfo(dtype).tiny
    result: Array = np.maximum(narrow, tiny).astype(dtype)
    return result


def write_qdq(
    source: Path,
    folder: Path,
    layers: Sequence[Layer],
    plans: Mapping[str, LayerPlan],
    folds: Iterable[tuple[Fold, FoldPlan]] = (),
    scales: str = "auto",
) -> Path:
    """Write `folder`/model.onnx and model.onnx.data from the ONNX file `source`.

    `plans` maps layer names to what they become; layers without one stay. `scales` "auto" has the
    dtype of the layer (half in a half graph, which opset 19 allows); "fp32" puts casts around the
    pairs, for readers that take float scales only. Raises `UsageError` for a plan that names
    layers the graph does not have.
    """
    known = {layer.name: layer for layer in layers}
    unknown = sorted(set(plans) - set(known))
    if unknown:
        raise UsageError(
            f"the plan names {unknown[0]}, which {source.parent.name} does not have",
            "Plans fit bundles of the same student with the same hoisting.",
        )
    model = onnx.load(str(source), load_external_data=False)
    weights = Weights(model, source.parent)
    editor = _Editor(model, weights, fold_factors(layers, folds), scales)
    chosen = {name: (known[name], plans[name]) for name in plans}
    editor.insert(chosen)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _DATA_FILE).open("wb") as file:
        editor.store(file)
    onnx.save(model, str(folder / _MODEL_FILE))
    onnx.checker.check_model(str(folder / _MODEL_FILE), full_check=False)
    return folder / _MODEL_FILE


def matched_folds(
    plan: QuantizationPlan, graph: str, folds: Sequence[Fold]
) -> list[tuple[Fold, FoldPlan]]:
    """The plan's folds with their places in a graph; raises `UsageError` where there is none."""
    by_reader = {name: fold for fold in folds for name in fold.layers}
    found = []
    for fold_plan in plan.folds:
        if fold_plan.graph != graph or not any(exponents_of(fold_plan)):
            continue
        if fold_plan.reader not in by_reader:
            raise UsageError(
                f"the plan rescales the input of {fold_plan.reader}, which {graph} does not allow",
                "Remove that fold from the plan, or make the plan again.",
            )
        found.append((by_reader[fold_plan.reader], fold_plan))
    return found


def fold_factors(
    layers: Sequence[Layer], folds: Iterable[tuple[Fold, FoldPlan]]
) -> dict[str, list[tuple[int, int, Array]]]:
    """Initializer -> [(axis, start, factors)]: what smoothing multiplies it by."""
    known = {layer.name: layer for layer in layers}
    factors: dict[str, list[tuple[int, int, Array]]] = {}
    for fold, plan in folds:
        exponents = np.array(exponents_of(plan))
        length = fold.producers[0].length
        if len(exponents) != length:
            raise UsageError(
                f"the plan has {len(exponents)} exponents for {plan.reader}, whose input has "
                f"{length} channels"
            )
        grown = np.ldexp(np.float32(1), exponents)
        for part in fold.producers:
            factors.setdefault(part.initializer, []).append((part.axis, part.start, 1 / grown))
        for name in fold.layers:
            layer = known[name]
            factors.setdefault(layer.weight, []).append((layer.input_axis, 0, grown))
    return factors


def rescaled(array: Array, factors: Sequence[tuple[int, int, Array]]) -> Array:
    """A copy with stretches multiplied by powers of two, in its own dtype."""
    result = np.array(array)
    for axis, start, factor in factors:
        place = [slice(None)] * result.ndim
        place[axis] = slice(start, start + len(factor))
        result[tuple(place)] *= along(factor.astype(result.dtype), axis, result.ndim)
    return result


class _Editor:
    """Puts pairs into a model and stores its initializers, each read once."""

    def __init__(
        self,
        model: Any,
        weights: Weights,
        factors: Mapping[str, Sequence[tuple[int, int, Array]]],
        scales: str,
    ) -> None:
        self._graph = model.graph
        self._weights, self._factors, self._scales = weights, factors, scales
        self._types = {t.name: t.data_type for t in model.graph.initializer}
        self._small: dict[str, Array] = {}
        self._planned: dict[str, int] = {}  # weight -> axis of output channels
        self._pairs: dict[tuple[str, float], str] = {}

    def insert(self, chosen: Mapping[str, tuple[Layer, LayerPlan]]) -> None:
        """Rewire the planned nodes; a tensor that several layers read gets one pair."""
        nodes: list[Any] = []
        for node in self._graph.node:
            if node.name in chosen:
                layer, plan = chosen[node.name]
                if plan.mode == W8A8:
                    assert plan.activation_scale is not None
                    node.input[0] = self._activation(layer, plan.activation_scale, nodes)
                node.input[1] = self._weight(layer, nodes)
            nodes.append(node)
        del self._graph.node[:]
        self._graph.node.extend(nodes)

    def store(self, file: BinaryIO) -> None:
        """Write every initializer to `file`, replacing the records in the model."""
        stored: list[Any] = []
        for name in self._weights:
            array = self._weights.read(name)
            if name in self._factors:
                array = rescaled(array, self._factors[name])
            if name in self._planned:
                dtype = self._scale_dtype(name)
                quantized = quantize_weight(array, self._planned[name], dtype)
                stored.append(_record(f"{name}.scale", quantized.scales, file))
                array = quantized.values
            stored.append(_record(name, array, file))
        stored += [_record(name, array, file) for name, array in self._small.items()]
        del self._graph.initializer[:]
        self._graph.initializer.extend(stored)

    def _scale_dtype(self, weight: str) -> Any:
        half = self._types[weight] == onnx.TensorProto.FLOAT16 and self._scales == "auto"
        return np.float16 if half else np.float32

    def _casts(self, weight: str) -> bool:
        return self._types[weight] == onnx.TensorProto.FLOAT16 and self._scales == "fp32"

    def _activation(self, layer: Layer, scale: float, nodes: list[Any]) -> str:
        """Add the pair of an activation; the name of what comes out of it."""
        key = (layer.activation, scale)
        if key in self._pairs:
            return self._pairs[key]
        base, source = f"{layer.name}/input", layer.activation
        dtype = self._scale_dtype(layer.weight)
        self._small[f"{base}.scale"] = scale_in(np.array(scale), dtype)
        self._small.setdefault("int8.zero", np.array(0, np.int8))
        if self._casts(layer.weight):
            nodes.append(_node("Cast", [source], f"{base}/Cast", to=onnx.TensorProto.FLOAT))
            source = f"{base}/Cast"
        pair = [source, f"{base}.scale", "int8.zero"]
        nodes.append(_node("QuantizeLinear", pair, f"{base}/QuantizeLinear"))
        pair[0] = f"{base}/QuantizeLinear"
        nodes.append(_node("DequantizeLinear", pair, f"{base}/DequantizeLinear"))
        self._pairs[key] = self._back(f"{base}/DequantizeLinear", layer.weight, nodes)
        return self._pairs[key]

    def _weight(self, layer: Layer, nodes: list[Any]) -> str:
        """Add the dequantization of a weight; the name of what comes out of it."""
        name = f"{layer.name}/weight/DequantizeLinear"
        self._planned[layer.weight] = layer.output_axis
        inputs = [layer.weight, f"{layer.weight}.scale"]
        nodes.append(_node("DequantizeLinear", inputs, name, axis=layer.output_axis))
        return self._back(name, layer.weight, nodes)

    def _back(self, name: str, weight: str, nodes: list[Any]) -> str:
        if not self._casts(weight):
            return name
        nodes.append(_node("Cast", [name], f"{name}/Cast", to=self._types[weight]))
        return f"{name}/Cast"


def _node(op: str, inputs: list[str], name: str, **attributes: int) -> Any:
    return onnx.helper.make_node(op, inputs, [name], name=name, **attributes)


def _record(name: str, array: Array, file: BinaryIO) -> Any:
    """The record of one initializer, inline or at the end of `file`."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=array.shape)
    if array.nbytes < _INLINE_BYTES:
        tensor.raw_data = np.ascontiguousarray(array).tobytes()
        return tensor
    file.write(b"\0" * (-file.tell() % _ALIGNMENT_BYTES))
    where = {"location": _DATA_FILE, "offset": file.tell(), "length": array.nbytes}
    file.write(np.ascontiguousarray(array).data)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in where.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor

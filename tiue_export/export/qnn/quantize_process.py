"""The child process that quantizes ONE graph for an HTP: `python -m` this module, see child.py.

Placement, ranges and number formats are those of ONNX Runtime's own configuration for QNN
(onnxruntime.quantization.execution_providers.qnn), with what is measured here to be needed too:
linear layers with a scale for each output channel, which it says QNN cannot and SDK 2.51 can, and
masks that stay in half.
"""

from __future__ import annotations

import logging
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tiue_export.system.memory import peak_memory_bytes
from tiue_export.system.onnx_runtime import import_onnx_runtime, onnx_runtime_part

from .child import Answer, answer
from .number_formats import FORMATS, HALF, LAYERS

_FOR_QNN = "quantization.execution_providers.qnn"
# Beyond it a constant is a mask (-65504 or -3.4e38 to forget a token), and no weight: 16 bits over
# such a range left 21 dB of a text encoder, which has 67 with it in half.
_MASK = 1e4
_SIXTEEN_BITS = 21  # the first opset of ONNX that quantizes to them


@dataclass(frozen=True)
class QuantizeRequest:
    """Quantize `onnx` into `quantized`, by what `feeds` holds: files of the graph's inputs.

    `precision` names a `NumberFormat`; the nodes named in `half`, and what they were
    folded into, stay in half.
    """

    onnx: str
    quantized: str
    feeds: Sequence[str]
    precision: str
    half: Sequence[str] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)


def quantize_graph(request: QuantizeRequest) -> Answer:
    """Write the quantized graph; what the parent puts into its report."""
    import onnx

    tool = onnx_runtime_part("quantization")
    types = tool.QuantType
    start = time.perf_counter()
    target = Path(request.quantized)
    source = _prepared(request, target.with_name("prepared.onnx"))
    model = onnx.load(source, load_external_data=False)
    numbers = FORMATS[request.precision]
    activations = types.QUInt16 if numbers.activation_bits == 16 else types.QUInt8
    half = half_nodes(model, source.parent, whole=numbers.whole, names=request.half)
    config = onnx_runtime_part(_FOR_QNN).get_qnn_qdq_config(
        source,
        _reader(request.feeds),
        activation_type=activations,
        weight_type=types.QInt8,
        per_channel=True,
        init_overrides=_overrides(model, types),
        nodes_to_exclude=half,
    )
    ranges = target.with_name("ranges.json")
    _save_ranges(source, config, ranges)
    tool.quantize_static(
        source,
        target,
        None,
        activation_type=config.activation_type,
        weight_type=config.weight_type,
        op_types_to_quantize=config.op_types_to_quantize,
        nodes_to_exclude=config.nodes_to_exclude,
        per_channel=config.per_channel,
        use_external_data_format=config.use_external_data_format,
        extra_options=config.extra_options,
        calibration_cache_path=ranges,
    )
    nodes = [node for node in model.graph.node if node.op_type in LAYERS]
    kept = set(half)
    return {
        "quantize_s": round(time.perf_counter() - start, 2),
        "layers": len(nodes),
        "layers_in_half": sum(node.name in kept for node in nodes),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _save_ranges(source: Path, config: Any, ranges: Path) -> None:
    """Measure the ranges of all values into a file. Quantization could, and would hold the graph
    once more meanwhile.
    """
    part, ort = "quantization.calibrate", import_onnx_runtime()
    augmented = str(source.with_name("augmented.onnx"))

    class Calibrator(onnx_runtime_part(part).MinMaxCalibrater):  # type: ignore[misc]
        """In an order that measures each value when it is made. In the usual one all are kept to
        the end: 21 GB of a VAE of 512 px.
        """

        def create_inference_session(self) -> None:
            options = ort.SessionOptions()
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
            options.enable_cpu_mem_arena = False
            self.infer_session = ort.InferenceSession(
                augmented, options, providers=["CPUExecutionProvider"]
            )

    calibrator = Calibrator(
        source,
        config.op_types_to_quantize,
        augmented,
        use_external_data_format=config.use_external_data_format,
    )
    calibrator.augment_graph()
    calibrator.create_inference_session()
    calibrator.collect_data(config.calibration_data_reader)
    onnx_runtime_part(part).save_tensors_data(calibrator.compute_data(), ranges)


def half_nodes(model: Any, folder: Path, *, whole: bool, names: Sequence[str] = ()) -> list[str]:
    """The nodes that stay in half: by `names`, by their operation, and those around a mask.

    `folder` has the model's weights.
    """
    masked = _masked_values(model, folder)
    weights = {each.name for each in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        layer = node.op_type in LAYERS and any(name in weights for name in node.input)
        by_kind = node.op_type in HALF if whole else not layer
        named = node.name in names or node.name.startswith(tuple(f"{name}/" for name in names))
        if by_kind or named or masked & {*node.input, *node.output}:
            kept.append(node.name)
    return kept


def _masked_values(model: Any, folder: Path) -> set[str]:
    """Masks, and what comes of adding or choosing them."""
    from onnx import TensorProto, numpy_helper

    floats = {
        each.name: each
        for each in model.graph.initializer
        if each.data_type == TensorProto.FLOAT and math.prod(each.dims) > 0
    }
    found: set[str] = set()
    for node in model.graph.node:
        if node.op_type not in ("Add", "Where"):
            continue
        for name in floats.keys() & set(node.input):
            if np.abs(numpy_helper.to_array(floats[name], str(folder))).max() > _MASK:
                found |= {name, *node.output}
    return found


def _overrides(model: Any, types: Any) -> dict[str, list[dict[str, Any]]]:
    """What ONNX Runtime's configuration for QNN would choose otherwise, by weight."""
    shapes = {each.name: each.dims for each in model.graph.initializer}
    overrides: dict[str, list[dict[str, Any]]] = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in shapes:
            axis = len(shapes[node.input[1]]) - 1
            channels = {"quant_type": types.QInt8, "axis": axis, "symmetric": True}
            overrides[node.input[1]] = [channels]
        elif node.op_type == "LayerNormalization":
            # A signed scale, or one for each channel, would fall to the CPU.
            overrides[node.input[1]] = [{"quant_type": types.QUInt8, "symmetric": False}]
    return overrides


def _prepared(request: QuantizeRequest, target: Path) -> Path:
    """The graph with its sizes fixed, shapes folded, and GELU as one operation."""
    import onnx

    data = f"{target.name}.data"
    external = {"save_as_external_data": True, "all_tensors_to_one_file": True}
    if not onnx_runtime_part(_FOR_QNN).qnn_preprocess_model(
        _with_sizes(request), target, **external, external_data_location=data
    ):  # nothing to change; what it was given now refers to a file that is gone
        onnx.save(_with_sizes(request), target, **external, location=data)
    return target


def _with_sizes(request: QuantizeRequest) -> Any:
    import onnx

    tools, file = onnx_runtime_part("tools.onnx_model_utils"), Path(request.onnx)
    model = _at_opset(onnx.load(file, load_external_data=False), _SIXTEEN_BITS)
    for tensor in model.graph.initializer:
        _read_weight(tensor, file.parent)
    for axis, size in request.sizes.items():
        tools.make_dim_param_fixed(model.graph, axis, size)
    return model


def _at_opset(model: Any, opset: int) -> Any:
    """The model in a newer ONNX, converted without its weights: onnx holds them six times else, and
    cannot above 2 GB.
    """
    from onnx import TensorProto, helper, version_converter

    graph = model.graph
    weights = [each for each in graph.initializer if each.data_location == TensorProto.EXTERNAL]
    own_inputs = len(graph.input)
    graph.input.extend(
        helper.make_tensor_value_info(each.name, each.data_type, each.dims) for each in weights
    )
    for weight in weights:
        graph.initializer.remove(weight)
    model = version_converter.convert_version(model, opset)
    del model.graph.input[own_inputs:]
    model.graph.initializer.extend(weights)
    return model


def _read_weight(tensor: Any, folder: Path) -> None:
    """Bring a tensor's bytes into the model; onnx itself refuses files with several hard links, as
    those of bundles may be.
    """
    from onnx import TensorProto
    from onnx.external_data_helper import ExternalDataInfo

    if tensor.data_location != TensorProto.EXTERNAL:
        return
    place = ExternalDataInfo(tensor)
    with (folder / place.location).open("rb") as data:
        data.seek(place.offset or 0)
        tensor.raw_data = data.read(-1 if place.length is None else place.length)
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def _reader(files: Sequence[str]) -> Any:
    from safetensors.numpy import load_file

    class Reader(onnx_runtime_part("quantization").CalibrationDataReader):  # type: ignore[misc]
        """One run's inputs after the other, each read when it is asked for."""

        def __init__(self) -> None:
            self._files: Iterator[str] = iter(files)

        def get_next(self) -> dict[str, Any] | None:
            file = next(self._files, None)
            return None if file is None else dict(load_file(file))

    return Reader()


def _in_child(request: QuantizeRequest) -> Answer:
    """With what holds for a whole process."""
    logging.disable(logging.WARNING)  # the tool recommends preparing the graph, which is done
    # Where a full disk shows, and what is removed in the end.
    tempfile.tempdir = str(Path(request.quantized).parent)
    return quantize_graph(request)


if __name__ == "__main__":
    sys.exit(answer(QuantizeRequest, _in_child))

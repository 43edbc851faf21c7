"""Sines and cosines of the timestep as a table: an HTP would compute them in half precision.

Time enters a diffusion network as sin(t f) and cos(t f) of many frequencies f (Vaswani et al.
2017). In half precision t f is rounded by up to a quarter of a radian at t = 751; a table is not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper, utils

from tiue_export.system.onnx_runtime import import_onnx_runtime

_INPUTS = ("timestep", "timesteps")


def put_time_table(model: Any, timesteps: int) -> int:
    """Replace the sines and cosines of `model`'s timesteps, in place; how many nodes were.

    The table has rows for 0, 1, ... `timesteps` - 1.

    The input stays what it is, (g,) float32. Weights may lie in files beside the model; they are
    not read.
    """
    graph = model.graph
    name = next((each.name for each in graph.input if each.name in _INPUTS), None)
    nodes = [node for node in graph.node if node.op_type in ("Sin", "Cos")]
    if name is None or not nodes:
        return 0
    tables = _values(model, name, timesteps, [node.output[0] for node in nodes])
    graph.node.insert(
        0,
        helper.make_node("Cast", [name], ["time_row"], name="time_row", to=onnx.TensorProto.INT32),
    )
    for node in nodes:
        output = node.output[0]
        table = numpy_helper.from_array(tables[output], f"{output}_table")
        graph.initializer.append(table)
        place = list(graph.node).index(node)
        graph.node.remove(node)
        lookup = helper.make_node(
            "Gather", [table.name, "time_row"], [output], name=f"{output}_row", axis=0
        )
        graph.node.insert(place, lookup)
    return len(nodes)


def _values(model: Any, name: str, timesteps: int, outputs: list[str]) -> dict[str, Any]:
    """What `outputs` are at each timestep, (timesteps, half) float32, by ONNX Runtime."""
    part = utils.Extractor(model).extract_model([name], outputs)
    (given,) = part.graph.input
    del given.type.tensor_type.shape.dim[:]
    given.type.tensor_type.shape.dim.add().dim_value = 1
    for each in part.graph.output:
        each.type.tensor_type.ClearField("shape")
    del part.graph.value_info[:]
    ort = import_onnx_runtime()
    session = ort.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
    rows = [
        session.run(outputs, {name: np.array([timestep], np.float32)})
        for timestep in range(timesteps)
    ]
    return {
        output: np.concatenate([row[number] for row in rows]).astype(np.float32)
        for number, output in enumerate(outputs)
    }

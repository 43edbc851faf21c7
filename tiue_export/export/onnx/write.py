"""Graph -> ONNX file with external data, readable names and nothing of this machine in it."""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from tiue_export.errors import TiueError
from tiue_export.graphs.build import Graph
from tiue_export.proof.half_range import node_path
from tiue_export.system.memory import rare_collections
from tiue_export.system.quiet import errors_only

# 19 is the newest opset TensorRT 10.3 (JetPack 6) reads in full and the first with half-precision
# Q/DQ scales; from 21 on torch emits GroupNormalization, which TensorRT reads since 10.9 only.
OPSET = 19
MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"


def onnx_from_graph(graph: Graph, folder: Path) -> None:
    """Write `folder`/model.onnx and model.onnx.data at opset 19, and check both against the spec.

    Node names carry the module path ("down_blocks.0.resnets.0.conv1/Conv"), initializers the
    parameter's name, so later steps can address layers; equal weights give equal files.
    """
    with _quiet_exporter(), rare_collections():
        program = torch.export.export(
            graph.module, graph.example, dynamic_shapes=_dynamic_shapes(graph), strict=False
        )
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in graph.spec.inputs],
            output_names=[spec.name for spec in graph.spec.outputs],
            verbose=False,
        )
    if exported is None:
        raise TiueError(f"torch.onnx.export returned nothing for {graph.spec.name}")
    model = exported.model
    name_after_modules(model, graph.spec.name)
    open_axes = {s.shape[0] for s in graph.spec.inputs if isinstance(s.shape[0], str)}
    for axis in open_axes:  # at most one: the batch, or the decoder's steps
        _name_open_axis(model, axis)
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(model, folder / MODEL_FILE, external_data=DATA_FILE, size_threshold_bytes=1024)
    del exported, program, model
    _check_file(graph, folder / MODEL_FILE)


def _dynamic_shapes(graph: Graph) -> tuple[Any, ...] | None:
    names = {spec.shape[0] for spec in graph.spec.inputs if isinstance(spec.shape[0], str)}
    if not names:
        return None
    axes: dict[int | str, Any] = {name: torch.export.Dim(name, min=2) for name in names}
    shapes = [
        {0: axes[spec.shape[0]]} if spec.shape[0] in axes else None for spec in graph.spec.inputs
    ]
    named = _named_parameter_count(graph)
    if named == len(shapes):
        return tuple(shapes)
    return (*shapes[:named], tuple(shapes[named:]))


def _named_parameter_count(graph: Graph) -> int:
    """How many inputs `forward` takes by name; the rest travel in its *args."""
    code = graph.module.forward.__code__
    return min(int(code.co_argcount) - 1, len(graph.spec.inputs))


def name_after_modules(model: ir.Model, graph_name: str) -> None:
    """Rename nodes, values and initializers after the modules they come from; drop metadata."""
    graph = model.graph
    counts: Counter[str] = Counter()
    keep = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for node in graph:
        name = f"{_module_path(node)}/{node.op_type}".lstrip("/")
        counts[name] += 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"
        for index, value in enumerate(node.outputs):
            if id(value) not in keep:
                value.name = node.name + (f":{index}" if index else "")
            value.metadata_props.clear()
        node.metadata_props.clear()
        node.doc_string = None
    taken: set[str] = set()
    for value in list(graph.initializers.values()):
        name = _initializer_name(value) or f"constants.{len(taken)}"
        if name in taken:
            name = f"{name}.{len(taken)}"
        taken.add(name)
        value.name = name
        value.metadata_props.clear()
    for value in (*graph.inputs, *graph.outputs):
        value.metadata_props.clear()
    graph.name = graph_name
    graph.doc_string = None
    graph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "tiue-export", None
    model.doc_string = None


def _name_open_axis(model: ir.Model, name: str) -> None:
    """torch calls a dynamic axis s72 or the like; readers look for `name`."""
    firsts = [value.shape[0] for value in model.graph.inputs if value.shape]
    symbol = next((first for first in firsts if isinstance(first, ir.SymbolicDim)), None)
    if symbol is None or symbol.value is None:
        return
    old = re.compile(rf"\b{re.escape(symbol.value)}\b")
    produced = [value for node in model.graph for value in node.outputs]
    for value in (*model.graph.inputs, *produced):
        if value.shape is not None:
            value.shape = ir.Shape(
                old.sub(name, side.value)
                if isinstance(side, ir.SymbolicDim) and side.value
                else side
                for side in value.shape
            )


def _module_path(node: ir.Node) -> str:
    """The innermost module a node was traced in, without wrappers; "" for the graph itself."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    # The last entry is the operation itself, the entries before it are modules, outermost first.
    return node_path(next((scope for scope in reversed(scopes[:-1]) if scope), ""))


def _initializer_name(value: ir.Value) -> str:
    """The parameter's path, or for a folded constant its consumer's name and input number.

    "" for a constant that several layers share, such as the shape of a reshape.
    """
    name = value.name or ""
    if "." in name:
        return node_path(name)
    uses = [(use.node.name or "", use.idx) for use in value.uses()]
    if len(uses) != 1:
        return ""
    consumer, index = uses[0]
    rank = len(value.shape) if value.shape is not None else 0
    if consumer.rsplit("/", 1)[-1].startswith("MatMul") and rank == 2:
        # torch.nn.Linear weights are stored transposed, ready for MatMul.
        return consumer.rsplit("/", 1)[0] + ".weight_transposed"
    return f"{consumer}.input{index}"


def _check_file(graph: Graph, path: Path) -> None:
    """onnx.checker by path (2 GB safe), and the file's inputs and outputs against the spec."""
    onnx.checker.check_model(str(path), full_check=False)
    model = onnx.load(str(path), load_external_data=False)
    for side, values, specs in (
        ("inputs", model.graph.input, graph.spec.inputs),
        ("outputs", model.graph.output, graph.spec.outputs),
    ):
        got = [_described(value) for value in values]
        kinds = [onnx.helper.np_dtype_to_tensor_dtype(np.dtype(s.dtype)) for s in specs]
        expected = [(s.name, k, tuple(s.shape)) for s, k in zip(specs, kinds, strict=True)]
        if got != expected:
            raise TiueError(
                f"{graph.spec.name}: the exported {side} are {got}; the contract says {expected}",
                "This is a defect of tiue-export with this torch version: please report it.",
            )


def _described(value: Any) -> tuple[str, int, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    shape = tuple(d.dim_param if d.dim_param else d.dim_value for d in tensor.shape.dim)
    return value.name, tensor.elem_type, shape


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what torch prints about itself while exporting (absent torchvision, old pytrees)."""
    with errors_only("torch.onnx"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        yield

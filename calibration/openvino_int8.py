"""Bundle + plan + captured data -> a new bundle with int8 graphs in OpenVINO's form, by NNCF.

NNCF places and calibrates its own fake-quantize operations, for the layers that the plan names and
no others; float layers of the plan are its ignored scope. The new bundle leaves the ONNX files out:
it is for the openvino runtime alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tiue_export.bundle.manifest import Compiled, CompiledGraph
from tiue_export.bundle.read import Bundle, file_records
from tiue_export.errors import BundleError, RuntimeFailure, first_line
from tiue_export.export.openvino import FOLDER
from tiue_export.proof.quantization_plan import (
    W8A8,
    WEIGHTS,
    QuantizationPlan,
)
from tiue_export.registry.packages import require
from tiue_export.specs import Feeds
from tiue_export.system.command_line import command_line
from tiue_export.system.openvino_core import import_openvino, openvino_core
from tiue_export.system.progress import Observer, stage
from tiue_export.system.quiet import errors_only

from .quantized_bundle import finish, link_files

INT4 = "4-bit"
_LAYERS = ("Convolution", "GroupConvolution", "MatMul")
_WITHOUT_INPUT = ("Constant", "Parameter", "Result", "Convert")
# One scale for so many values of a row: what NNCF's own recipes use for 4-bit weights.
_GROUP = 64


@dataclass(frozen=True)
class NncfOptions:
    """`feeds` gives a graph's inputs on the drawings that ranges are from, all of them."""

    kind: str
    feeds: Callable[[str], Iterable[Feeds]]


def require_nncf(bundle: Bundle) -> Compiled:
    """The bundle's float OpenVINO graphs, if all that is needed is there."""
    require("quantizing for OpenVINO", ("openvino", "nncf"), "int8")
    compiled = bundle.manifest.compiled.get(FOLDER)
    if compiled is None:
        raise BundleError(
            f"{bundle.root} has no OpenVINO graphs to quantize and to compare with",
            "Make them first: " + command_line("openvino", "--bundle", bundle.root),
        )
    return compiled


def write_nncf_graphs(
    bundle: Bundle,
    plan: QuantizationPlan,
    options: NncfOptions,
    folder: Path,
    observer: Observer | None = None,
) -> Bundle:
    """Write a bundle into the empty `folder` of `new_bundle`; it opens once that is in place."""
    compiled = require_nncf(bundle)
    observer = observer or Observer()
    forms: dict[str, CompiledGraph] = {}
    graphs = {
        name: replace(record, omitted=True) for name, record in bundle.manifest.graphs.items()
    }
    (folder / FOLDER).mkdir()
    for name, form in compiled.graphs.items():
        if (kind := plan.kind(name)) is not None:
            forms[name] = _quantize_graph(bundle, name, form, plan, options, folder, observer)
            precision = INT4 if options.kind == INT4 else kind
            graphs[name] = replace(graphs[name], precision=precision)
        else:
            link_files(bundle.root, folder, form.files)
            forms[name] = form
    flags = {**compiled.flags, "quantized": options.kind, "nncf": _nncf().__version__}
    quantized = replace(compiled, graphs=forms, flags=flags, parity=())
    manifest = replace(bundle.manifest, graphs=graphs, compiled={FOLDER: quantized})
    return finish(bundle, folder, plan, manifest)


def _quantize_graph(
    bundle: Bundle,
    name: str,
    form: CompiledGraph,
    plan: QuantizationPlan,
    options: NncfOptions,
    folder: Path,
    observer: Observer,
) -> CompiledGraph:
    openvino = import_openvino()

    with stage(observer, f"quantize {name}") as running, _quiet():
        try:
            model = openvino_core().read_model(bundle.root / form.path)
            model = _quantized(model, name, plan, options)
            path = folder / FOLDER / f"{name}.xml"
            openvino.save_model(model, path, compress_to_fp16=False)
        except (RuntimeError, ValueError, TypeError) as error:
            raise RuntimeFailure(f"NNCF cannot quantize {name}: {first_line(error)}") from error
        fakes = sum(op.get_type_name() == "FakeQuantize" for op in model.get_ops())
        del model
        files = file_records(folder, [f"{FOLDER}/{name}.xml", f"{FOLDER}/{name}.bin"])
        running.size_bytes = sum(record.size_bytes for record in files.values())
    return CompiledGraph(
        path=f"{FOLDER}/{name}.xml",
        identity=form.identity,
        files=files,
        report={
            "convert_s": round(running.seconds, 2),
            "peak_memory_bytes": running.peak_memory_bytes,
            "fake_quantize": fakes,
        },
    )


def _quantized(model: Any, graph: str, plan: QuantizationPlan, options: NncfOptions) -> Any:
    nncf = _nncf()
    chosen = {name for name, layer in plan.of(graph).items() if layer.mode == W8A8}
    weights = {name for name, layer in plan.of(graph).items() if layer.mode == WEIGHTS}
    if options.kind == INT4:
        modes = nncf.CompressWeightsMode
        ignored = _scope(model, lambda name: name in chosen | weights)
        return nncf.compress_weights(
            model, mode=modes.INT4_SYM, group_size=_group_size(model), ignored_scope=ignored,
            all_layers=True,
        )  # fmt: skip
    if weights:
        ignored = _scope(model, lambda name: name in weights)
        model = nncf.compress_weights(
            model, mode=nncf.CompressWeightsMode.INT8_SYM, ignored_scope=ignored
        )
    if chosen:
        runs = list(options.feeds(graph))
        model = nncf.quantize(
            model,
            nncf.Dataset(runs),
            preset=nncf.QuantizationPreset.PERFORMANCE,
            subset_size=len(runs),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=_scope(model, lambda name: name in chosen, others=True),
            advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
        )
    return model


def _scope(model: Any, keep: Callable[[str], bool], *, others: bool = False) -> Any:
    """All layers but those to keep; with `others` every other kind of operation too."""
    names, types = [], set()
    for op in model.get_ordered_ops():
        kind, name = op.get_type_name(), op.get_friendly_name()
        if kind in _LAYERS:
            if not keep(layer_name(name)):
                names.append(name)
        elif others and kind not in _WITHOUT_INPUT:
            types.add(kind)
    return _nncf().IgnoredScope(names=names, types=sorted(types), validate=False)


def layer_name(friendly_name: str) -> str:
    """OpenVINO's name of an operation -> the ONNX node's."""
    return friendly_name.removesuffix("/WithoutBiases")


def _group_size(model: Any) -> int:
    """64 where every linear layer can be cut so, else whole rows."""
    rows = [
        op.input_value(1).get_partial_shape().get_min_shape()
        for op in model.get_ordered_ops()
        if op.get_type_name() == "MatMul" and len(op.input_value(1).get_partial_shape()) == 2
    ]
    return _GROUP if all(min(shape) % _GROUP == 0 for shape in rows) else -1


def _nncf() -> Any:
    # NNCF reports its use to its makers unless it takes the machine for one of theirs.
    os.environ.setdefault("NNCF_CI", "1")
    import nncf

    return nncf


@contextmanager
def _quiet() -> Iterator[None]:
    """NNCF logs and draws progress bars on standard output, where --json must stand alone."""
    nncf = _nncf()
    with errors_only("nncf"), open(os.devnull, "w") as sink, redirect_stdout(sink):
        nncf.set_log_level(logging.ERROR)
        yield

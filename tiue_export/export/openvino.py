"""Bundle -> the same bundle with OpenVINO IR: openvino/GRAPH.xml and .bin, proven by running them.

The IR keeps the ONNX graph's tensor names. Weights are stored in float32, or in float16 with
`weights="fp16"`, which halves the files; what precision they compute in is the runtime's choice
(`--precision`), never a default of OpenVINO: on CPUs with bf16 that default would be bf16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tiue_export.bundle.manifest import Compiled, CompiledGraph, ParityRecord
from tiue_export.bundle.read import Bundle, file_records
from tiue_export.bundle.write import add_compiled, compiled_folder, form_identity, trial_of
from tiue_export.errors import BundleError, RuntimeFailure, first_line, unknown_name
from tiue_export.proof.parity import load_reference, measure_runtime, require_passed
from tiue_export.registry.packages import require
from tiue_export.registry.runtimes import open_runtime
from tiue_export.specs import RuntimeOptions
from tiue_export.system.openvino_core import import_openvino
from tiue_export.system.progress import Observer, stage

FOLDER = "openvino"
WEIGHTS = ("fp32", "fp16")


@dataclass(frozen=True)
class OpenvinoOptions:
    """`weights` is how the IR stores them; `precisions` are the arithmetics to prove."""

    weights: str = "fp32"
    precisions: tuple[str, ...] = ("fp32",)


def compile_openvino(
    bundle: Bundle,
    options: OpenvinoOptions | None = None,
    *,
    force: bool = False,
    allow_parity_loss: bool = False,
    observer: Observer | None = None,
) -> Bundle:
    """Convert every graph and prove it on the bundle's reference; returns the bundle with both.

    Raises `BundleError` when the bundle has OpenVINO graphs already (unless `force`), `ParityError`
    when a gate fails (unless `allow_parity_loss`); then the bundle stays as it was.
    """
    options, observer = options or OpenvinoOptions(), observer or Observer()
    require("OpenVINO", ("openvino",), "openvino")
    if options.weights not in WEIGHTS:
        raise unknown_name("weights", options.weights, WEIGHTS)
    if FOLDER in bundle.manifest.compiled and not force:
        raise BundleError(
            f"{bundle.root} has OpenVINO graphs already", "Pass --force to make them again."
        )
    openvino = import_openvino()

    version = str(openvino.__version__)
    with compiled_folder(bundle, FOLDER) as folder:
        graphs = {
            graph: _convert(bundle, graph, folder, options, version, observer)
            for graph in bundle.manifest.graphs
        }
        compiled = Compiled(
            backend="openvino",
            version=version,
            target={"device": "any"},
            flags={"weights": options.weights},
            graphs=graphs,
        )
        records = _prove(bundle, folder, compiled, options, observer)
        if not allow_parity_loss:
            require_passed(records, "Try --weights fp32, or accept it: --allow-parity-loss.")
        return add_compiled(bundle, FOLDER, folder, replace(compiled, parity=tuple(records)))


def _convert(
    bundle: Bundle,
    graph: str,
    folder: Path,
    options: OpenvinoOptions,
    version: str,
    observer: Observer,
) -> CompiledGraph:
    openvino = import_openvino()

    file = folder / f"{graph}.xml"
    with stage(observer, f"convert {graph}") as running:
        try:
            model = openvino.convert_model(bundle.graph_path(graph))
            openvino.save_model(model, file, compress_to_fp16=options.weights == "fp16")
        except Exception as error:  # OpenVINO raises RuntimeError and its own kinds
            raise RuntimeFailure(
                f"OpenVINO {version} cannot convert {graph}: {first_line(error)}",
                "Check `tiue-export doctor`; bundles need OpenVINO 2025.1 or newer.",
            ) from error
        del model
        records = file_records(folder, [f"{graph}.xml", f"{graph}.bin"])
        running.size_bytes = sum(record.size_bytes for record in records.values())
    return CompiledGraph(
        path=f"{FOLDER}/{graph}.xml",
        identity=form_identity(bundle, graph, weights=options.weights, version=version),
        files={f"{FOLDER}/{name}": record for name, record in records.items()},
        report={
            "convert_s": round(running.seconds, 2),
            "peak_memory_bytes": running.peak_memory_bytes,
        },
    )


def _prove(
    bundle: Bundle, folder: Path, compiled: Compiled, options: OpenvinoOptions, observer: Observer
) -> list[ParityRecord]:
    """Run the new graphs where they lie, in each precision, on captured inputs."""
    trial = trial_of(bundle, FOLDER, folder, compiled)
    reference = load_reference(bundle)
    records: list[ParityRecord] = []
    for precision in options.precisions:
        name = f"verify in {precision}"
        with stage(observer, name):
            runtime = open_runtime(
                "openvino", trial, RuntimeOptions(device="cpu", precision=precision)
            )
            try:
                on_step = observer.steps_of(name)
                records += measure_runtime(trial, runtime, reference, on_step)
            finally:
                runtime.close()
    return records

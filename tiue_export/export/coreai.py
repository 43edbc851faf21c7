"""Bundle and its checkpoint -> the same bundle with Core AI assets, proven by running them.

Core AI follows Core ML on macOS and iOS 27; an asset is made from an exported program
(`coreai_torch`, in beta: 0.4.3), and Apple's package for Linux runs it on the CPU. What is proven
here is Apple's own runtime then, though not on Apple's units.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tiue_export._version import __version__
from tiue_export.bundle.manifest import Compiled, CompiledGraph, ParityRecord
from tiue_export.bundle.read import Bundle, file_records
from tiue_export.bundle.write import add_compiled, compiled_folder, form_identity, trial_of
from tiue_export.errors import (
    BundleError,
    RuntimeFailure,
    UsageError,
    first_line,
    unknown_name,
)
from tiue_export.export.own_student import StudentPlace, fp32_options, open_student
from tiue_export.graphs.build import Graph, build_graphs
from tiue_export.proof.parity import load_reference, measure_runtime, require_passed
from tiue_export.registry.packages import require
from tiue_export.registry.runtimes import open_runtime
from tiue_export.registry.support import require_support
from tiue_export.specs import UNET_GRAPHS, RuntimeOptions
from tiue_export.system.memory import return_freed_memory
from tiue_export.system.progress import Observer, stage

FOLDER = "coreai"
PRECISIONS = ("fp16", "fp32")


@dataclass(frozen=True)
class CoreaiOptions:
    """`precision` of weights and arithmetic; statistics and Eq. 11 are float32 in both."""

    precision: str = "fp16"


def compile_coreai(
    bundle: Bundle,
    place: StudentPlace,
    options: CoreaiOptions | None = None,
    *,
    force: bool = False,
    allow_parity_loss: bool = False,
    observer: Observer | None = None,
) -> Bundle:
    """Make an asset of every graph and run all of them; returns the bundle with both.

    `place` is the checkpoint that the bundle was made from. Raises `UsageError` for options or a
    bundle that this cannot do, `BundleError` when there are assets already (unless `force`),
    `CheckpointError` for another student's checkpoint, `RuntimeFailure` for a graph that Core AI
    cannot convert, `ParityError` when a gate fails (unless `allow_parity_loss`); then the bundle
    stays as it was.
    """
    options, observer = options or CoreaiOptions(), observer or Observer()
    require("Core AI export", ("coreai", "coreai_torch"), "coreai")
    check_precision(options.precision)
    require_support("coreai", bundle)
    _refuse_islands(bundle, options)
    if FOLDER in bundle.manifest.compiled and not force:
        raise BundleError(
            f"{bundle.root} has Core AI assets already", "Pass --force to make them again."
        )
    version = importlib.metadata.version("coreai-core")
    with compiled_folder(bundle, FOLDER) as folder:
        graphs = {
            graph: _convert(bundle, place, graph, folder, options, version, observer)
            for graph in bundle.manifest.graphs
        }
        compiled = Compiled(
            backend="coreai",
            version=version,
            target={"system": "macOS 27, iOS 27"},
            flags={"precision": options.precision},
            graphs=graphs,
        )
        records = _prove(bundle, folder, compiled, observer)
        if not allow_parity_loss:
            require_passed(records, "Try --precision fp32, or accept it: --allow-parity-loss.")
        return add_compiled(bundle, FOLDER, folder, replace(compiled, parity=tuple(records)))


def check_precision(precision: str) -> None:
    """Refuse a word that is none; the command asks before it exports anything."""
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)


def _refuse_islands(bundle: Bundle, options: CoreaiOptions) -> None:
    """An audit that kept modules in float32 is not overruled in silence."""
    kept = sum(len(record.float32_modules) for record in bundle.manifest.graphs.values())
    if options.precision == "fp16" and kept:
        raise UsageError(
            f"the audit of {bundle.root} keeps {kept} module(s) in float32, which half precision "
            "cannot hold; Core AI assets are of one precision here",
            "Pass --precision fp32.",
        )


def _convert(
    bundle: Bundle,
    place: StudentPlace,
    name: str,
    folder: Path,
    options: CoreaiOptions,
    version: str,
    observer: Observer,
) -> CompiledGraph:
    asset = folder / f"{name}.aimodel"
    with stage(observer, f"convert {name}") as running:
        _write(_graph(bundle, place, name, options), asset)
        return_freed_memory()
        inside = [p.relative_to(folder).as_posix() for p in asset.rglob("*") if p.is_file()]
        records = file_records(folder, sorted(inside))
        running.size_bytes = sum(record.size_bytes for record in records.values())
    return CompiledGraph(
        path=f"{FOLDER}/{name}.aimodel/metadata.json",
        identity=form_identity(
            bundle,
            name,
            precision=options.precision,
            versions=[version, importlib.metadata.version("coreai-torch"), __version__],
        ),
        files={f"{FOLDER}/{file}": record for file, record in records.items()},
        report={
            "convert_s": round(running.seconds, 2),
            "peak_memory_bytes": running.peak_memory_bytes,
        },
    )


def _graph(bundle: Bundle, place: StudentPlace, name: str, options: CoreaiOptions) -> Graph:
    manifest = bundle.manifest
    student = open_student(place, manifest, name)
    asked = fp32_options(manifest, (manifest.height_px, manifest.width_px))
    only = UNET_GRAPHS if name in UNET_GRAPHS else (name,)
    graphs = build_graphs(student, replace(asked, precision=options.precision), only=only)
    return next(graph for graph in graphs if graph.spec.name == name)


def _write(graph: Graph, asset: Path) -> None:
    """One graph's asset; inputs and outputs keep the names of the contract."""
    with quiet_coreai() as coreai_torch:
        try:
            with torch.no_grad():
                exported: Any = torch.export.export(graph.module, graph.example, strict=False)
                program = exported.run_decompositions(coreai_torch.get_decomp_table())
                converter = coreai_torch.TorchConverter()
                converter.add_exported_program(
                    program,
                    input_names=[spec.name for spec in graph.spec.inputs],
                    output_names=[spec.name for spec in graph.spec.outputs],
                )
                converter.to_coreai().save_asset(asset)
        except Exception as error:  # a beta: it raises whatever its layers raise
            raise RuntimeFailure(
                f"coreai-torch {importlib.metadata.version('coreai-torch')} cannot convert "
                f"{graph.spec.name}: {first_line(error)}",
                f"Tested with 0.4.3 and torch 2.13; this is torch {torch.__version__}.",
            ) from error


@contextlib.contextmanager
def quiet_coreai() -> Iterator[Any]:
    """coreai_torch, without its greeting and its warning of a torch that it was validated with."""
    level = logging.getLogger("coreai_torch").level
    logging.getLogger("coreai_torch").setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield importlib.import_module("coreai_torch")
    finally:
        logging.getLogger("coreai_torch").setLevel(level)


def _prove(
    bundle: Bundle, folder: Path, compiled: Compiled, observer: Observer
) -> list[ParityRecord]:
    """Run the new assets where they lie, on captured inputs."""
    trial = trial_of(bundle, FOLDER, folder, compiled)
    with stage(observer, "verify"):
        runtime = open_runtime("coreai", trial, RuntimeOptions(low_memory=True))
        try:
            records = measure_runtime(trial, runtime, load_reference(bundle))
        finally:
            runtime.close()
    return records

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
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from tiue_export._version import __version__
from tiue_export.bundle.manifest import Compiled, ParityRecord
from tiue_export.bundle.read import Bundle, files_below
from tiue_export.errors import RuntimeFailure, UsageError, first_line, unknown_name
from tiue_export.export.backend import (
    Backend,
    Convert,
    GraphForm,
    Workshop,
    compile_form,
    form_identity,
)
from tiue_export.export.own_student import as_exported, fp32_options
from tiue_export.graphs.build import Graph, build_graphs
from tiue_export.proof.gates import accept_loss
from tiue_export.registry.packages import require
from tiue_export.specs import UNET_GRAPHS, RuntimeOptions
from tiue_export.student.model import Student
from tiue_export.system.memory import return_freed_memory
from tiue_export.system.progress import Observer
from tiue_export.system.quiet import errors_only

FOLDER = "coreai"
PRECISIONS = ("fp16", "fp32")


@dataclass(frozen=True)
class CoreaiOptions:
    """`precision` of weights and arithmetic; statistics and Eq. 11 are float32 in both."""

    precision: str = "fp16"


def compile_coreai(
    bundle: Bundle,
    student: Student,
    options: CoreaiOptions | None = None,
    *,
    force: bool = False,
    allow_parity_loss: bool = False,
    observer: Observer | None = None,
) -> Bundle:
    """Make an asset of every graph and run all of them; see `compile_form`.

    `student` is the one that the bundle was made from: `CheckpointError` for another one.
    """
    return compile_form(
        bundle,
        CoreaiBackend(as_exported(student, bundle.manifest), options or CoreaiOptions()),
        force=force,
        allow_parity_loss=allow_parity_loss,
        observer=observer,
    )


@dataclass(frozen=True)
class CoreaiBackend(Backend):
    """Assets from the student, through torch.export; Core AI reads no ONNX."""

    student: Student
    options: CoreaiOptions
    runtime: ClassVar[str] = "coreai"
    title: ClassVar[str] = "Core AI assets"
    reads_onnx: ClassVar[bool] = False
    folder: ClassVar[str] = FOLDER

    def if_lost(self, failed: ParityRecord) -> str:
        """Whole precision, where it was halved."""
        return accept_loss("--precision fp32" if self.options.precision != "fp32" else "")

    def check(self, bundle: Bundle) -> None:
        """Apple's packages must be there, and the precision be one they compute in."""
        require("Core AI export", ("coreai", "coreai_torch"), "coreai")
        check_precision(self.options.precision)
        _refuse_islands(bundle, self.options)

    def form(self, bundle: Bundle) -> Compiled:
        """Assets for the systems of 2026."""
        version = importlib.metadata.version("coreai-core")
        target, flags = {"system": "macOS 27, iOS 27"}, {"precision": self.options.precision}
        return Compiled("coreai", version, target, flags, {})

    def identity(self, bundle: Bundle, graph: str) -> str:
        """By precision, and the versions of the compiler, its front end and this program."""
        versions = [importlib.metadata.version(name) for name in ("coreai-core", "coreai-torch")]
        precision = self.options.precision
        return form_identity(bundle, graph, precision=precision, versions=[*versions, __version__])

    @contextlib.contextmanager
    def converter(self, workshop: Workshop) -> Iterator[Convert]:
        """Each graph from the student, whose other parts it leaves unbuilt."""
        yield lambda graph: self._convert(workshop, graph)

    def trials(self) -> tuple[RuntimeOptions, ...]:
        """One run, one graph in memory at a time."""
        return (RuntimeOptions(low_memory=True),)

    def _convert(self, workshop: Workshop, name: str) -> GraphForm:
        manifest = workshop.bundle.manifest
        exported = fp32_options(manifest, (manifest.height_px, manifest.width_px))
        only = UNET_GRAPHS if name in UNET_GRAPHS else (name,)
        options = replace(exported, precision=self.options.precision)
        graphs = build_graphs(self.student, options, only=only)
        asset = f"{name}.aimodel"
        graph = next(graph for graph in graphs if graph.spec.name == name)
        _write(graph if manifest.plan.one_pass else graph.at_steps(1), workshop.folder / asset)
        return_freed_memory()
        return GraphForm(f"{asset}/metadata.json", files_below(workshop.folder, asset))


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
    with (
        errors_only("coreai_torch"),
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield importlib.import_module("coreai_torch")

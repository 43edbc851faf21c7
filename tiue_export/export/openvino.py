"""Bundle -> the same bundle with OpenVINO IR: openvino/GRAPH.xml and .bin, proven by running them.

The IR keeps the ONNX graph's tensor names. Weights are stored in float32, or in float16 with
`weights="fp16"`, which halves the files; what precision they compute in is the runtime's choice
(`--precision`), never a default of OpenVINO: on CPUs with bf16 that default would be bf16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from tiue_export.bundle.manifest import Compiled, ParityRecord
from tiue_export.bundle.read import Bundle
from tiue_export.errors import RuntimeFailure, first_line, unknown_name
from tiue_export.export.backend import (
    Backend,
    Convert,
    GraphForm,
    Workshop,
    compile_form,
    form_identity,
)
from tiue_export.proof.gates import accept_loss
from tiue_export.registry.packages import require
from tiue_export.specs import RuntimeOptions
from tiue_export.system.openvino_core import import_openvino
from tiue_export.system.progress import Observer

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
    """Convert every graph and prove it on the bundle's reference; see `compile_form`."""
    return compile_form(
        bundle,
        OpenvinoBackend(options or OpenvinoOptions()),
        force=force,
        allow_parity_loss=allow_parity_loss,
        observer=observer,
    )


@dataclass(frozen=True)
class OpenvinoBackend(Backend):
    """Conversion in this process, proof in every precision that was asked for."""

    options: OpenvinoOptions
    runtime: ClassVar[str] = "openvino"
    title: ClassVar[str] = "OpenVINO graphs"
    folder: ClassVar[str] = FOLDER

    def if_lost(self, failed: ParityRecord) -> str:
        """Whole weights, where they were halved."""
        return accept_loss("--weights fp32" if self.options.weights != "fp32" else "")

    def check(self, bundle: Bundle) -> None:
        """OpenVINO must be there, and the weights one of `WEIGHTS`."""
        require("OpenVINO", ("openvino",), "openvino")
        if self.options.weights not in WEIGHTS:
            raise unknown_name("weights", self.options.weights, WEIGHTS)

    def form(self, bundle: Bundle) -> Compiled:
        """IR for any of OpenVINO's devices."""
        flags = {"weights": self.options.weights}
        return Compiled("openvino", _version(), {"device": "any"}, flags, {})

    def identity(self, bundle: Bundle, graph: str) -> str:
        """By the ONNX files, how weights are stored, and OpenVINO's version."""
        return form_identity(bundle, graph, weights=self.options.weights, version=_version())

    @contextlib.contextmanager
    def converter(self, workshop: Workshop) -> Iterator[Convert]:
        """OpenVINO's own conversion of an ONNX file."""
        yield lambda graph: self._convert(workshop, graph)

    def trials(self) -> tuple[RuntimeOptions, ...]:
        """The CPU, in each arithmetic."""
        return tuple(
            RuntimeOptions(device="cpu", precision=precision)
            for precision in self.options.precisions
        )

    def _convert(self, workshop: Workshop, graph: str) -> GraphForm:
        openvino = import_openvino()
        half = self.options.weights == "fp16"
        try:
            model = openvino.convert_model(workshop.bundle.graph_path(graph))
            openvino.save_model(model, workshop.folder / f"{graph}.xml", compress_to_fp16=half)
        except Exception as error:  # OpenVINO raises RuntimeError and its own kinds
            raise RuntimeFailure(
                f"OpenVINO {_version()} cannot convert {graph}: {first_line(error)}",
                "Check `tiue-export doctor`; bundles need OpenVINO 2025.1 or newer.",
            ) from error
        return GraphForm(f"{graph}.xml", (f"{graph}.xml", f"{graph}.bin"))


def _version() -> str:
    return str(import_openvino().__version__)

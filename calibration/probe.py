"""The latents that a changed graph of the UNet leads to, held against the unchanged ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tiue_export.bundle.read import Bundle
from tiue_export.proof.calibration import CalibrationData
from tiue_export.proof.gates import psnr_db
from tiue_export.proof.parity import with_dtypes
from tiue_export.sampling.sampler import Run, sample
from tiue_export.specs import UNET_ENCODER, Array, Feeds

from .onnx_session import OnnxSession


class Probe:
    """Captured drawings with a changed encoder or decoder, on ONNX Runtime's CPU provider.

    Unchanged graphs stay in memory while they are needed, and with them what the unchanged encoder
    makes in each drawing's first pass (27 MB a picture at SD 2.1 size), which no change alters.
    """

    def __init__(
        self,
        bundle: Bundle,
        data: CalibrationData,
        numbers: Sequence[int],
        threads: int | None = None,
    ) -> None:
        self._bundle, self._threads = bundle, threads
        self._drawings = list(data.drawings(bundle, numbers))
        self._unchanged: dict[str, OnnxSession] = {}
        # The bundle's own features: captured ones may come from another precision of it.
        self._first_features: dict[int, dict[str, Array]] = {}
        self.reference = self._latents({})
        self._unchanged.pop(UNET_ENCODER)

    def of_model(self, graph: str, model: Any) -> float:
        """PSNR in dB of the latents with one graph replaced by a model over the same weights."""
        self._unchanged.pop(graph, None)
        folder = self._bundle.graph_path(graph).parent
        return self._of({graph: OnnxSession(model, folder, self._threads)})

    def of_files(self, paths: dict[str, Path]) -> float:
        """PSNR in dB of the latents with graphs replaced by ONNX files."""
        self._unchanged.clear()
        return self._of({graph: self._load(path) for graph, path in paths.items()})

    def _of(self, changed: Mapping[str, OnnxSession]) -> float:
        return psnr_db(self.reference, self._latents(changed))

    def _latents(self, changed: Mapping[str, OnnxSession]) -> Array:
        plan = self._bundle.manifest.plan
        return np.concatenate(
            [
                sample(plan, self._runner(number, changed), noises, text)
                for number, (noises, text) in enumerate(self._drawings)
            ]
        )

    def _runner(self, number: int, changed: Mapping[str, OnnxSession]) -> Run:
        """Runs the graphs of one drawing."""
        first = True

        def run(graph: str, pool: Feeds) -> dict[str, Array]:
            nonlocal first
            if graph in changed or graph != UNET_ENCODER or not first:
                return self._run(changed, graph, pool)
            first = False
            if number not in self._first_features:
                self._first_features[number] = self._run(changed, graph, pool)
            return self._first_features[number]

        return run

    def _run(self, changed: Mapping[str, OnnxSession], graph: str, pool: Feeds) -> dict[str, Array]:
        session = changed.get(graph) or self._unchanged.get(graph)
        if session is None:
            session = self._unchanged[graph] = self._load(self._bundle.graph_path(graph))
        return session.run(with_dtypes(self._bundle.spec(graph), pool))

    def _load(self, path: Path) -> OnnxSession:
        model = onnx.load(str(path), load_external_data=False)
        return OnnxSession(model, path.parent, self._threads)

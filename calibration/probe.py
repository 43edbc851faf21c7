"""The latents that a changed graph of the UNet leads to, held against the unchanged ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tiue_export.bundle.read import Bundle
from tiue_export.proof.calibration import CalibrationData
from tiue_export.proof.gates import psnr_db
from tiue_export.proof.parity import with_dtypes
from tiue_export.specs import UNET_DECODER, UNET_ENCODER, Array

from .onnx_session import OnnxSession


class Probe:
    """Runs of captured data with a changed encoder or decoder, on ONNX Runtime's CPU provider.

    The runs' tensors stay in memory (27 MB a picture at SD 2.1 size), and one unchanged decoder as
    long as encoders are looked at.
    """

    def __init__(
        self,
        bundle: Bundle,
        data: CalibrationData,
        numbers: Sequence[int],
        threads: int | None = None,
    ) -> None:
        self._bundle, self._threads = bundle, threads
        self._runs = list(data.runs(numbers))
        self._decoder: OnnxSession | None = None
        # The bundle's own features: captured ones may come from another precision of it.
        encoder = self._load(bundle.graph_path(UNET_ENCODER))
        self._features = [self._feed(encoder, UNET_ENCODER, run) for run in self._runs]
        del encoder
        self.reference = self._latents(self._float_decoder(), self._features)

    def of_model(self, graph: str, model: Any) -> float:
        """PSNR in dB of the latents with one graph replaced by a model over the same weights."""
        folder = self._bundle.graph_path(graph).parent
        if graph == UNET_DECODER:
            self._decoder = None
        return self._of({graph: OnnxSession(model, folder, self._threads)})

    def of_files(self, paths: dict[str, Path]) -> float:
        """PSNR in dB of the latents with graphs replaced by ONNX files."""
        self._decoder = None
        return self._of({graph: self._load(path) for graph, path in paths.items()})

    def _of(self, sessions: dict[str, OnnxSession]) -> float:
        features = self._features
        if UNET_ENCODER in sessions:
            encoder = sessions.pop(UNET_ENCODER)
            features = [self._feed(encoder, UNET_ENCODER, run) for run in self._runs]
            del encoder
        decoder = sessions.get(UNET_DECODER) or self._float_decoder()
        return psnr_db(self.reference, self._latents(decoder, features))

    def _latents(self, decoder: OnnxSession, features: Iterable[dict[str, Array]]) -> Array:
        pools = zip(self._runs, features, strict=True)
        return np.concatenate(
            [self._feed(decoder, UNET_DECODER, {**run, **own})["latents"] for run, own in pools]
        )

    def _feed(self, session: OnnxSession, graph: str, pool: dict[str, Array]) -> dict[str, Array]:
        return session.run(with_dtypes(self._bundle.spec(graph), pool))

    def _float_decoder(self) -> OnnxSession:
        if self._decoder is None:
            self._decoder = self._load(self._bundle.graph_path(UNET_DECODER))
        return self._decoder

    def _load(self, path: Path) -> OnnxSession:
        model = onnx.load(str(path), load_external_data=False)
        return OnnxSession(model, path.parent, self._threads)

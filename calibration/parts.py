"""What is made int8 together, and what each part is judged by: latents, or pictures.

The UNet's graphs lead to latents; the VAE decoder's graph makes a picture of them, and is fed what
the float graphs draw for the captured prompts.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx

from tiue_export.bundle.chain import scaled_latents
from tiue_export.bundle.read import Bundle
from tiue_export.drawing.vae_tiles import tile_size, tiles_of
from tiue_export.proof.calibration import CalibrationData, graphs_sha256
from tiue_export.proof.gates import psnr_db
from tiue_export.proof.parity import with_dtypes
from tiue_export.proof.quantization import PARTS, UNET, VAE
from tiue_export.sampling.sampler import sample
from tiue_export.specs import VAE_DECODER, Array, Feeds
from tiue_export.system.atomic_file import write_atomically
from tiue_export.system.progress import Observer

from .onnx_session import OnnxSession
from .probe import Probe


class Judge(Protocol):
    """PSNR in dB of what drawings come to with changed graphs, against the unchanged ones."""

    def of_model(self, graph: str, model: Any) -> float:
        """With one graph replaced by a model over the same weights."""

    def of_files(self, paths: dict[str, Path]) -> float:
        """With graphs replaced by ONNX files."""


class Part:
    """One entry of `PARTS` of a bundle, with captured drawings to run it on."""

    def __init__(
        self, name: str, bundle: Bundle, data: CalibrationData, threads: int | None = None
    ) -> None:
        self.name, self.graphs = name, PARTS[name]
        self._bundle, self._data, self._threads = bundle, data, threads

    def runs(self, graph: str, drawings: Sequence[int]) -> Iterator[Feeds]:
        """What the graph is fed in each run of some drawings, in the dtypes of its contract."""
        spec = self._bundle.spec(graph)
        if self.name == VAE:
            for latents in drawn_latents(self._bundle, self._data, drawings, self._threads):
                yield from vae_feeds(self._bundle, latents)
            return
        for drawing in drawings:
            for run in self._data.runs(self._data.drawing_runs(drawing)):
                yield with_dtypes(spec, run)

    def prepare(self, drawings: Sequence[int], observer: Observer) -> None:
        """Make what `runs` needs beside the captured data, with its progress."""
        if self.name != VAE:
            return
        observer.on_start("draw latents")

        def on_drawing(done: int, missing: int) -> None:
            observer.on_progress(done / missing, f"latents of drawing {done}/{missing}")

        drawn_latents(self._bundle, self._data, drawings, self._threads, on_drawing)

    def run_count(self, graph: str, drawings: Sequence[int]) -> int:
        """How many runs those are."""
        if self.name == UNET:
            return len(drawings) * self._data.index.passes
        height, width = (int(side) for side in self._bundle.manifest.latent_shape[2:])
        tile = tile_size(self._bundle.spec(graph))
        return len(drawings) * len(list(tiles_of(np.empty((1, 1, height, width)), tile)))

    def judge(self, drawings: Sequence[int]) -> Judge:
        """What measures changed graphs on some drawings."""
        if self.name == UNET:
            return Probe(self._bundle, self._data, drawings, self._threads)
        return PictureProbe(self._bundle, list(self.runs(VAE_DECODER, drawings)), self._threads)

    @property
    def identity(self) -> Mapping[str, str]:
        """What decides its measurements beside the bundle's other graphs and the data."""
        if self.name != VAE:
            return {}
        files = self._bundle.manifest.graphs[VAE_DECODER].files
        return {"vae": json.dumps({name: file.sha256 for name, file in files.items()})}


def part_named(graph: str) -> str:
    """The part that a graph belongs to."""
    return next(name for name, graphs in PARTS.items() if graph in graphs)


def vae_feeds(bundle: Bundle, latents: Array) -> Iterator[Feeds]:
    """Latents (B, 4, H, W) float32 -> what the VAE decoder's graph is fed, tile by tile."""
    spec = bundle.spec(VAE_DECODER)
    scaled = scaled_latents(latents, bundle.manifest.vae_scaling_factor)
    for rows, columns in tiles_of(scaled, tile_size(spec)):
        tile = np.ascontiguousarray(scaled[:, :, rows, columns])
        yield with_dtypes(spec, {spec.inputs[0].name: tile})


def drawn_latents(
    bundle: Bundle,
    data: CalibrationData,
    drawings: Sequence[int],
    threads: int | None = None,
    on_drawing: Callable[[int, int], None] = lambda done, missing: None,
) -> Iterator[Array]:
    """The latents (B, 4, H, W) float32 of captured drawings, by the bundle's float graphs.

    Each is kept in the calibration folder once it is drawn, so that no drawing is drawn twice. All
    that are missing are drawn before the first is given, and the UNet's memory given back.
    """
    decides = [data.sha256, graphs_sha256(bundle)]
    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    folder = data.root / "analysis" / f"latents-{digest[:16]}"
    places = {drawing: folder / f"{drawing:05d}.npy" for drawing in drawings}
    missing = {drawing: path for drawing, path in places.items() if not path.is_file()}
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        _draw_latents(bundle, data, missing, threads, on_drawing)
    return map(np.load, places.values())


def _draw_latents(
    bundle: Bundle,
    data: CalibrationData,
    places: Mapping[int, Path],
    threads: int | None,
    on_drawing: Callable[[int, int], None],
) -> None:
    sessions: dict[str, OnnxSession] = {}

    def run(graph: str, pool: Feeds) -> dict[str, Array]:
        if graph not in sessions:
            path = bundle.graph_path(graph)
            model = onnx.load(str(path), load_external_data=False)
            sessions[graph] = OnnxSession(model, path.parent, threads)
        return sessions[graph].run(with_dtypes(bundle.spec(graph), pool))

    for done, (drawing, place) in enumerate(places.items(), 1):
        ((noises, text),) = data.drawings(bundle, [drawing])
        latents = sample(bundle.manifest.plan, run, noises, text).astype(np.float32)
        file = io.BytesIO()
        np.save(file, latents)
        write_atomically(place, file.getvalue())
        on_drawing(done, len(places))


class PictureProbe:
    """The VAE decoder's pictures of some latents, its graph changed, against the unchanged one's.

    `runs` are what the graph is fed, tile by tile.
    """

    def __init__(self, bundle: Bundle, runs: Sequence[Feeds], threads: int | None = None) -> None:
        self._folder, self._runs = bundle.graph_path(VAE_DECODER).parent, runs
        self._threads = threads
        self.reference = self._pictures(self._session(bundle.graph_path(VAE_DECODER)))

    def of_model(self, graph: str, model: Any) -> float:
        """PSNR in dB of the pictures by a model over the same weights."""
        session = OnnxSession(model, self._folder, self._threads)
        return psnr_db(self.reference, self._pictures(session))

    def of_files(self, paths: dict[str, Path]) -> float:
        """PSNR in dB of the pictures by an ONNX file; by the graph itself where there is none."""
        path = paths.get(VAE_DECODER)
        changed = self.reference if path is None else self._pictures(self._session(path))
        return psnr_db(self.reference, changed)

    def _session(self, path: Path) -> OnnxSession:
        model = onnx.load(str(path), load_external_data=False)
        return OnnxSession(model, path.parent, self._threads)

    def _pictures(self, session: OnnxSession) -> Array:
        return np.concatenate([next(iter(session.run(run).values())) for run in self._runs])

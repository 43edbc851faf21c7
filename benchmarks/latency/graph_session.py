"""A bundle on one of its runtimes, stage by stage, as a contender.

Needs what the runtime needs and no torch. Inputs are the bundle's own reference: real prompts.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from tiue_export.bundle.read import Bundle, open_bundle
from tiue_export.drawing.vae_tiles import decode_in_tiles, is_tiled, tile_size
from tiue_export.errors import BundleError
from tiue_export.proof.latency_record import END_TO_END, Facts
from tiue_export.proof.parity import load_reference
from tiue_export.registry.backends import BACKENDS, open_runtime
from tiue_export.specs import (
    TEXT_ENCODER,
    UNET_DECODER,
    UNET_ENCODER,
    VAE_DECODER,
    Array,
    ChainRuntime,
    Runtime,
    RuntimeOptions,
    check_finite,
)

from .session import StageClock
from .settings import GraphSettings


class GraphSession:
    """Opened runtimes and ready inputs; `run` is one drawing."""

    def __init__(self, settings: GraphSettings) -> None:
        assert settings.bundle is not None, "bench.ready makes it and fills it in"
        self._settings = settings
        self._bundle = open_bundle(settings.bundle)
        options = RuntimeOptions(
            device=settings.device,
            threads=settings.threads,
            precision=settings.precision,
            checkpoint=settings.checkpoint,
            base=settings.base,
            vae=settings.vae,
        )
        self._runtime = open_runtime(settings.runtime, self._bundle, options)
        self._unet, self._unet_runtime = self._bundle, self._runtime
        if settings.unet_bundle is not None:
            self._unet = open_bundle(settings.unet_bundle)
            self._unet_runtime = open_runtime(settings.runtime, self._unet, options)
        self._batch = self._bundle.manifest.batch or 1
        self._known = self._inputs(self._bundle, self._batch)
        self._unet_known = self._known
        if settings.unet_bundle is not None:
            self._unet_known = self._inputs(self._unet, 2 * self._batch)
        if not settings.unet_only:
            check_parts(self._bundle)

    @property
    def facts(self) -> Facts:
        """Known once everything has run: devices may be chosen late."""
        manifest = self._bundle.manifest
        precision = self._settings.precision
        return Facts(
            device=self._runtime.device,
            # The precision of the arithmetic where it was chosen, else that of the graphs.
            precision=self._runtime.precision if precision == "auto" else precision,
            versions=runtime_versions(self._settings.runtime),
            size_px=(manifest.width_px, manifest.height_px),
            batch=self._batch,
            threads=self._settings.threads,
            weights_sha256=manifest.source.sha256,
            text_tokens=manifest.text_tokens,
        )

    def run(self) -> dict[str, float]:
        """One drawing; milliseconds by stage."""
        clock = StageClock(self._settings.timed_passes, self._settings.passes)
        chained = self._chained(clock)
        outputs = self._drawn(clock) if chained is None else chained
        check_finite("the drawing", outputs)
        return clock.latency_ms(whole=None if self._settings.unet_only else END_TO_END)

    def count(self) -> dict[str, float]:
        """Nothing: graphs are counted from their files (`flops.py`), not by running them."""
        return {}

    def close(self) -> None:
        """Free everything."""
        self._runtime.close()
        self._unet_runtime.close()

    def _chained(self, clock: StageClock) -> dict[str, Array] | None:
        """All graphs in one go, where the runtime has that and nothing is left out or repeated."""
        settings, runtime = self._settings, self._runtime
        plain = settings.passes == 1 and not settings.unet_only
        if not plain or not isinstance(runtime, ChainRuntime):
            return None
        if is_tiled(self._bundle.spec(VAE_DECODER), self._known["sample"]):
            return None
        start = time.perf_counter()
        result = runtime.run_chain(self._known["input_ids"], self._known["sample"])
        if result is None:
            return None
        clock.whole_s = time.perf_counter() - start
        for stage, latency_ms in result.stage_latency_ms.items():
            clock.add(stage, latency_ms / 1e3)
        return {"sample": result.picture}

    def _drawn(self, clock: StageClock) -> dict[str, Array]:
        settings = self._settings
        pool: dict[str, Array] = dict(self._unet_known)
        start = time.perf_counter()
        if not settings.unet_only:
            text = self._text(clock)
            pool["encoder_hidden_states"] = text
        for _ in range(settings.timed_passes):
            features = dict(pool)
            with clock.stage(UNET_ENCODER, scaled=True):
                features.update(self._run(self._unet_runtime, self._unet, UNET_ENCODER, features))
            with clock.stage(UNET_DECODER, scaled=True):
                outputs = self._run(self._unet_runtime, self._unet, UNET_DECODER, features)
        if not settings.unet_only:
            latents = outputs["latents"][: self._batch]
            scaled = (latents / self._bundle.manifest.vae_scaling_factor).astype(np.float32)
            with clock.stage(VAE_DECODER):
                size = tile_size(self._bundle.spec(VAE_DECODER))
                outputs = {"sample": decode_in_tiles(self._decode, scaled, size)}
        clock.whole_s = time.perf_counter() - start
        return outputs

    def _text(self, clock: StageClock) -> Array:
        """The prompt's embedding; beside it the empty prompt's, as long to compute, if guided."""
        embeddings = []
        for _ in range(2 if self._settings.guided else 1):
            with clock.stage(TEXT_ENCODER):
                outputs = self._run(self._runtime, self._bundle, TEXT_ENCODER, self._known)
            embeddings.append(outputs["last_hidden_state"])
        return embeddings[0] if len(embeddings) == 1 else np.concatenate(embeddings)

    def _decode(self, latents: Array) -> Array:
        """The VAE decoder on what its graph takes: the whole picture, or a tile of it."""
        feeds = {"latent_sample": latents}
        return self._run(self._runtime, self._bundle, VAE_DECODER, feeds)["sample"]

    @staticmethod
    def _run(
        runtime: Runtime, bundle: Bundle, graph: str, pool: dict[str, Array]
    ) -> dict[str, Array]:
        return runtime.run(graph, bundle.spec(graph).select(pool))

    @staticmethod
    def _inputs(bundle: Bundle, batch: int) -> dict[str, Array]:
        """The reference's inputs in the dtypes that the graphs take, cut or repeated to `batch`."""
        known = load_reference(bundle).arrays
        specs = [
            tensor
            for graph in bundle.manifest.graphs
            for tensor in bundle.spec(graph).inputs
            if tensor.name in known
        ]
        return {
            spec.name: np.resize(known[spec.name], (batch, *known[spec.name].shape[1:])).astype(
                spec.dtype
            )
            for spec in specs
        }


def check_parts(bundle: Bundle) -> None:
    """Refuse a bundle that cannot draw from a prompt to a picture."""
    missing = [g for g in (TEXT_ENCODER, VAE_DECODER) if g not in bundle.manifest.graphs]
    if missing:
        raise BundleError(
            f"{bundle.root} has no {' and no '.join(missing)}",
            "Measure its UNet alone: --unet-only.",
        )


def runtime_versions(runtime: str) -> dict[str, str]:
    """Of the packages that the runtime has imported."""
    modules = {name: sys.modules.get(name) for name in BACKENDS[runtime].needs}
    return {
        name: str(module.__version__)
        for name, module in modules.items()
        if module is not None and hasattr(module, "__version__")
    }

"""ONNX Runtime with every tensor bound to one place: features stay where the encoder wrote them.

Each tensor of a run is one OrtValue on the device (buffers.py says which graphs share it),
bound once. The only things that cross to the host are tokens, noise, latents and picture; the
latents anyway, as they are part of the result, so they are divided by the VAE's factor there.
Addresses that never change are also what ONNX Runtime's CUDA graphs need.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tiue_export.bundle.chain import LATENTS, NOISE, PICTURE, SCALED_LATENTS, TOKENS
from tiue_export.bundle.read import Bundle
from tiue_export.errors import RuntimeFailure, first_line
from tiue_export.specs import GRAPH_NAMES, VAE_DECODER, Array, ChainResult, Feeds, check_finite
from tiue_export.system.onnx_runtime import import_onnx_runtime

from ..buffers import checked_feeds, plan_memory

ort = import_onnx_runtime()


class OrtChain:
    """The graphs of a bundle at one batch, on ONNX Runtime's device "cpu" or "cuda"."""

    def __init__(
        self, bundle: Bundle, batch: int, device: str, session_of: Callable[[str], Any]
    ) -> None:
        """`session_of` opens the session of a graph, or gives the one already open."""
        self._bundle = bundle
        self._session_of = session_of
        specs = [bundle.spec(graph) for graph in GRAPH_NAMES if graph in bundle.manifest.graphs]
        self._plan = plan_memory(specs, batch)
        self._values = {
            name: _place(tensor.shape, tensor.dtype, device)
            for name, tensor in self._plan.tensors.items()
        }
        self._bindings: dict[str, Any] = {}

    @property
    def batch(self) -> int:
        return self._plan.size

    def run_graph(self, graph: str, feeds: Feeds) -> dict[str, Array]:
        """Run one graph of the batch this was made for; outputs are fresh arrays."""
        chosen, _ = checked_feeds(self._bundle.spec(graph), feeds)
        places = self._plan.places[graph]
        for name, array in chosen.items():
            self._values[places[name]].update_inplace(array)
        self._run(graph)
        return self._outputs(graph)

    def run_chain(self, feeds: Feeds) -> ChainResult:
        """Run all graphs on tokens (B, L) and noise (B, 4, H, W), both checked and contiguous.

        Raises `RuntimeFailure` naming the first graph with a non-finite output.
        """
        for value in (TOKENS, NOISE):
            self._values[value].update_inplace(feeds[value])
        latency_ms: dict[str, float] = {}
        for graph in GRAPH_NAMES:
            start = time.perf_counter()
            if graph == VAE_DECODER:
                factor = self._bundle.manifest.vae_scaling_factor
                scaled = (self._values[LATENTS].numpy() / factor).astype(np.float32)
                self._values[SCALED_LATENTS].update_inplace(scaled)
            self._run(graph)
            latency_ms[graph] = (time.perf_counter() - start) * 1e3
        latents, picture = self._read(LATENTS), self._read(PICTURE)
        if not (np.isfinite(latents).all() and np.isfinite(picture).all()):
            for graph in GRAPH_NAMES:
                check_finite(graph, self._outputs(graph))
        return ChainResult(latents, picture, latency_ms)

    def _run(self, graph: str) -> None:
        session = self._session_of(graph)
        if graph not in self._bindings:
            self._bindings[graph] = self._bind(graph, session)
        try:
            session.run_with_iobinding(self._bindings[graph])
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise RuntimeFailure(f"ONNX Runtime failed in {graph}: {first_line(error)}") from error

    def _bind(self, graph: str, session: Any) -> Any:
        binding, spec = session.io_binding(), self._bundle.spec(graph)
        places = self._plan.places[graph]
        for tensor in spec.inputs:
            binding.bind_ortvalue_input(tensor.name, self._values[places[tensor.name]])
        for tensor in spec.outputs:
            binding.bind_ortvalue_output(tensor.name, self._values[places[tensor.name]])
        return binding

    def _outputs(self, graph: str) -> dict[str, Array]:
        places = self._plan.places[graph]
        spec = self._bundle.spec(graph)
        return {tensor.name: self._read(places[tensor.name]) for tensor in spec.outputs}

    def _read(self, value: str) -> Array:
        # On the CPU `numpy()` is a view of memory that the next run writes.
        return np.array(self._values[value].numpy())


def _place(shape: tuple[int, ...], dtype: str, device: str) -> Any:
    """An empty tensor on a device."""
    kind = np.dtype(dtype).type
    try:
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, kind, device, 0)
    except Exception as error:  # onnxruntime's exceptions share no public base class
        raise RuntimeFailure(
            f"ONNX Runtime cannot hold a tensor {shape} on {device}: {first_line(error)}",
            "Check the device's free memory with nvidia-smi, or use --device cpu.",
        ) from error

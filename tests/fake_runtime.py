"""A runtime of the right shapes in numpy alone: deterministic, different for different feeds."""

from __future__ import annotations

import hashlib

import numpy as np

from tiue_export.bundle.read import Bundle
from tiue_export.specs import Array, Feeds, RuntimeOptions, axis_size


class FakeRuntime:
    """Outputs are noise in [-1, 1] seeded by the feeds' bytes."""

    name = "fake"
    device = "none"

    def __init__(self, bundle: Bundle) -> None:
        self.precision = bundle.manifest.precision
        self._bundle = bundle

    def run(self, graph: str, feeds: Feeds) -> dict[str, Array]:
        """Shapes and dtypes from the spec; open axes as the feeds have them."""
        digest = hashlib.sha256()
        for name in sorted(feeds):
            digest.update(np.ascontiguousarray(feeds[name]).tobytes())
        random = np.random.RandomState(int.from_bytes(digest.digest()[:4], "little"))
        graph_spec = self._bundle.spec(graph)
        sizes = {str(spec.shape[0]): len(feeds[spec.name]) for spec in graph_spec.inputs}
        outputs = {}
        for spec in graph_spec.outputs:
            shape = tuple(axis_size(side, sizes) for side in spec.shape)
            outputs[spec.name] = random.uniform(-1, 1, shape).astype(spec.dtype)
        return outputs

    def close(self) -> None:
        """Nothing is held."""


def open_runtime(bundle: Bundle, options: RuntimeOptions) -> FakeRuntime:
    """As a backend's entry opens it."""
    return FakeRuntime(bundle)

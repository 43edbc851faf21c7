"""A runtime of the right shapes in numpy alone: deterministic, different for different feeds."""

from __future__ import annotations

import hashlib

import numpy as np

from tiue_export.bundle import Bundle
from tiue_export.specs import Array, Feeds, RuntimeOptions


class FakeRuntime:
    """Outputs are noise in [-1, 1] seeded by the feeds' bytes."""

    name = "fake"
    device = "none"

    def __init__(self, bundle: Bundle) -> None:
        self.precision = bundle.manifest.precision
        self._bundle = bundle

    def run(self, graph: str, feeds: Feeds) -> dict[str, Array]:
        """Shapes and dtypes from the spec; a dynamic batch from the first feed."""
        digest = hashlib.sha256()
        for name in sorted(feeds):
            digest.update(np.ascontiguousarray(feeds[name]).tobytes())
        random = np.random.RandomState(int.from_bytes(digest.digest()[:4], "little"))
        batch = len(next(iter(feeds.values())))
        outputs = {}
        for spec in self._bundle.spec(graph).outputs:
            shape = tuple(batch if isinstance(side, str) else side for side in spec.shape)
            outputs[spec.name] = random.uniform(-1, 1, shape).astype(spec.dtype)
        return outputs

    def close(self) -> None:
        """Nothing is held."""


def open_runtime(bundle: Bundle, options: RuntimeOptions) -> FakeRuntime:
    """Open on any bundle."""
    return FakeRuntime(bundle)

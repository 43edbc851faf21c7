"""The vocabulary that crosses modules: tensors, graphs, feeds, and what a runtime is.

One list of `TensorSpec` per graph drives ONNX names and axes, runtime checks and the manifest.
Letters used in shape comments everywhere: B batch, K decoder steps, C channels, H W latent
height and width, L tokens, D width of the text embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tiue_export.errors import RuntimeFailure

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

TEXT_ENCODER = "text_encoder"
UNET_ENCODER = "unet_encoder"
UNET_DECODER = "unet_decoder"
VAE_DECODER = "vae_decoder"
GRAPH_NAMES = (TEXT_ENCODER, UNET_ENCODER, UNET_DECODER, VAE_DECODER)
UNET_GRAPHS = (UNET_ENCODER, UNET_DECODER)

BATCH = "batch"


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one graph input or output; a `str` in `shape` is a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    meaning: str = ""

    def check(self, graph: str, array: Array) -> None:
        """Raise `RuntimeFailure` unless `array` has this dtype and shape."""
        fits = len(array.shape) == len(self.shape) and all(
            isinstance(want, str) or got == want
            for got, want in zip(array.shape, self.shape, strict=True)
        )
        if not fits:
            raise RuntimeFailure(
                f'{graph}: input "{self.name}" has shape {_shape(array.shape)}; '
                f"the bundle expects {_shape(self.shape)}",
                "Resize the request, or export again with --height/--width/--batch.",
            )
        if str(array.dtype) != self.dtype:
            raise RuntimeFailure(
                f'{graph}: input "{self.name}" is {array.dtype}; the bundle expects {self.dtype}',
                f"Convert it with array.astype({self.dtype!r}).",
            )


@dataclass(frozen=True)
class GraphSpec:
    """The contract of one graph. Equal tensor names in two graphs mean the same tensor."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def select(self, pool: Feeds) -> dict[str, Array]:
        """Pick this graph's inputs out of `pool` by name, each checked against its spec."""
        missing = [spec.name for spec in self.inputs if spec.name not in pool]
        if missing:
            raise RuntimeFailure(
                f"{self.name}: no value for input {', '.join(missing)}; got {', '.join(pool)}"
            )
        chosen = {spec.name: pool[spec.name] for spec in self.inputs}
        for spec in self.inputs:
            spec.check(self.name, chosen[spec.name])
        return chosen


@dataclass(frozen=True)
class RuntimeOptions:
    """How to open a runtime. `device` "auto" takes the best the runtime finds and says which.

    `low_memory` gives memory back between operations where the runtime can; slower.
    `checkpoint` and `base` are for the torch reference, which runs the student itself.
    """

    device: str = "auto"
    threads: int | None = None
    low_memory: bool = False
    checkpoint: str | None = None
    base: str | None = None


class Runtime(Protocol):
    """What runs a bundle's graphs. `run` neither changes feeds nor reuses its outputs' memory."""

    name: str
    device: str

    def run(self, graph: str, feeds: Feeds) -> dict[str, Array]:
        """Run one graph on inputs that fit its spec and return its outputs by name."""
        ...

    def close(self) -> None:
        """Free everything; the runtime cannot be used afterwards."""
        ...


def check_finite(graph: str, outputs: Feeds) -> None:
    """Raise `RuntimeFailure` naming the graph and the first output with a NaN or infinity."""
    for name, array in outputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = int(array.size - np.isfinite(array).sum())
            raise RuntimeFailure(
                f'{graph}: output "{name}" holds {bad} non-finite values of {array.size}',
                "If this is an fp16 bundle, export it again with --precision fp32.",
            )


def _shape(shape: tuple[int | str, ...]) -> str:
    return "(" + ", ".join(str(side) for side in shape) + ")"

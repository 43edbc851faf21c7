"""The vocabulary that crosses modules: tensors, graphs, feeds, and what a runtime is.

One list of `TensorSpec` per graph drives ONNX names and axes, runtime checks and the manifest.
Letters used in shape comments everywhere: B batch, K decoder steps, C channels, H W latent
height and width, L tokens, D width of the text embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

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

# How graphs double a picture: by four small convolutions, or as the model does.
SUBPIXEL, NEAREST = "subpixel", "nearest"
UPSAMPLINGS = (SUBPIXEL, NEAREST)

# Only in bundles of Faster Diffusion with a ControlNet; its outputs are added to the encoder's.
CONTROLNET = "controlnet"
# Only in bundles that draw from pictures: a picture to its latents.
VAE_ENCODER = "vae_encoder"
VAE_GRAPHS = (VAE_ENCODER, VAE_DECODER)
# All graphs that a bundle may have, in running order.
RUNNING_ORDER = (
    TEXT_ENCODER,
    VAE_ENCODER,
    CONTROLNET,
    UNET_ENCODER,
    UNET_DECODER,
    VAE_DECODER,
)

BATCH = "batch"
# The open axis of a decoder whose timesteps are an input and that takes several of them at once; an
# axis may be a product, such as "2*steps".
STEPS = "steps"


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
    `precision` is the arithmetic, for runtimes that can choose: fp32, bf16, fp16.
    `checkpoint`, `base`, `vae`, `lora`, `embedding` and `controlnet` are for the torch reference,
    which runs the student itself.
    `provider` is ONNX Runtime's: cpu, cuda, rtx (None: by `device`). `cuda_graph` None records a
    run as a CUDA graph where the runtime does so by itself; True insists, False forbids it.
    """

    device: str = "auto"
    threads: int | None = None
    low_memory: bool = False
    precision: str = "auto"
    checkpoint: str | None = None
    base: str | None = None
    vae: str | None = None
    lora: tuple[str, ...] = ()
    embedding: tuple[str, ...] = ()
    controlnet: str | None = None
    provider: str | None = None
    cuda_graph: bool | None = None


class Runtime(Protocol):
    """What runs a bundle's graphs. `run` neither changes feeds nor reuses its outputs' memory.

    `precision` is the coarsest that a picture passes through (fp32, fp16, bf16): its gate applies.
    """

    name: str
    device: str
    precision: str

    def run(self, graph: str, feeds: Feeds) -> dict[str, Array]:
        """Run one graph on inputs that fit its spec and return its outputs by name."""
        ...

    def close(self) -> None:
        """Free everything; the runtime cannot be used afterwards."""
        ...


@dataclass(frozen=True)
class ChainResult:
    """One run of all graphs: `latents` (B, 4, H, W) and `picture` (B, 3, 8H, 8W), float32.

    Both are the caller's and finite. `stage_latency_ms` has one entry for each part that was timed
    alone: a graph, or all of them where they are a single CUDA graph.
    """

    latents: Array
    picture: Array
    stage_latency_ms: Mapping[str, float]


@runtime_checkable
class ChainRuntime(Protocol):
    """A runtime that can also run all four graphs without handing tensors back in between.

    The result is that of `run` graph by graph, the latents divided by the VAE's scaling factor on
    the way. Such a runtime may still say None: then `run` is to be used.
    """

    def run_chain(self, input_ids: Array, noise: Array) -> ChainResult | None:
        """Tokens (B, L) int64 and noise (B, 4, H, W) float32 -> latents and picture, checked.

        Raises `RuntimeFailure` naming the first graph with a non-finite output.
        """
        ...


@runtime_checkable
class BatchLimited(Protocol):
    """A runtime whose compiled graphs may take fewer batches than a bundle with a dynamic batch."""

    def batch_range(self) -> tuple[int, int]:
        """The smallest and largest batch it takes."""
        ...


@runtime_checkable
class StepLimited(Protocol):
    """A runtime whose compiled decoder may take fewer of a loop's steps at once than a plan has."""

    def step_limit(self) -> int | None:
        """The most steps of one decoder run; None: any number, or no loop."""
        ...


@runtime_checkable
class Placed(Protocol):
    """A runtime that can tell on which units of the device each graph's operations run."""

    def placement(self) -> Mapping[str, Mapping[str, int]]:
        """By graph, how many operations run on each unit, the most first; empty: unknown here."""
        ...


def step_limit(runtime: Runtime) -> int | None:
    """The most steps of a loop that a runtime's decoder takes at once; None is any number."""
    return runtime.step_limit() if isinstance(runtime, StepLimited) else None


def check_finite(graph: str, outputs: Feeds) -> None:
    """Raise `RuntimeFailure` naming the graph and the first output with a NaN or infinity."""
    for name, array in outputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = int(array.size - np.isfinite(array).sum())
            raise RuntimeFailure(
                f'{graph}: output "{name}" holds {bad} non-finite values of {array.size}',
                "If this is an fp16 bundle, export it again with --precision fp32.",
            )


def axis_size(side: int | str, sizes: Mapping[str, int]) -> int:
    """A side of a spec's shape as a number, given the size of each open axis."""
    if isinstance(side, int):
        return side
    return math.prod(int(part) if part.isdigit() else sizes[part] for part in side.split("*"))


def _shape(shape: tuple[int | str, ...]) -> str:
    return "(" + ", ".join(str(side) for side in shape) + ")"

"""Which tensors of a bundle's graphs share memory, and how much a device must hold: pure functions.

The graphs run one after the other and a tensor has the same name where it is made and where it is
used, so each gets one buffer: the encoder writes where the decoder reads, and nothing is copied.
Buffers are not reused for other tensors: all of them together are a few percent of the weights,
and a non-finite picture can be traced back to the graph that broke it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from tiue_export.bundle.chain import IN_PASSES, NOISE, ONE_PASS, TOKENS
from tiue_export.errors import BundleError, RuntimeFailure
from tiue_export.specs import (
    BATCH,
    CONTROLNET,
    STEPS,
    TEXT_ENCODER,
    UNET_ENCODER,
    Array,
    Feeds,
    GraphSpec,
    TensorSpec,
    axis_size,
)

# TensorRT wants its scratch memory aligned to this; cudaMalloc's always is.
ALIGNMENT_BYTES = 256


@dataclass(frozen=True)
class Tensor:
    """One value of a run, all its axes fixed: it owns one buffer."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class ChainMemory:
    """Buffers by value name, and for each graph which of its tensors lies in which buffer.

    `size` is that of the graphs' open axes: the batch, or in a loop the decoder's steps.
    """

    size: int
    tensors: Mapping[str, Tensor]
    places: Mapping[str, Mapping[str, str]]

    @property
    def size_bytes(self) -> int:
        """All buffers together, without scratch memory and weights."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    def graph_of(self, value: str) -> str:
        """The first graph that has to do with a value."""
        return next(graph for graph, places in self.places.items() if value in places.values())


def plan_memory(specs: Iterable[GraphSpec], size: int, *, in_loop: bool = False) -> ChainMemory:
    """One buffer for each distinct tensor of `specs`, its open axes set to `size`.

    In a loop (Faster Diffusion) the UNet reads two text embeddings, of the negative prompts and
    the prompts, each written by a run of its own: the text encoder's output lies apart. So does
    what a ControlNet adds to the encoder's outputs, under their names. Raises `BundleError` where
    one value is given and taken in two forms.
    """
    values = dict((IN_PASSES if in_loop else ONE_PASS).renamed)
    tensors: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    places: dict[str, dict[str, str]] = {}
    for spec in specs:
        if spec.name == CONTROLNET:
            values |= {(CONTROLNET, t.name): f"{CONTROLNET} {t.name}" for t in spec.outputs}
        places[spec.name] = {}
        for tensor in (*spec.inputs, *spec.outputs):
            value = values.get((spec.name, tensor.name), tensor.name)
            here = Tensor(tensor.dtype, concrete_shape(tensor, size))
            there = tensors.setdefault(value, here)
            if here != there:
                raise BundleError(
                    f"{spec.name} has {tensor.name} as {here.dtype} {here.shape}, "
                    f"{origin[value]} as {there.dtype} {there.shape}",
                    "Export the bundle again.",
                )
            origin.setdefault(value, spec.name)
            places[spec.name][tensor.name] = value
    return ChainMemory(size, tensors, places)


def concrete_shape(tensor: TensorSpec, size: int) -> tuple[int, ...]:
    """The tensor's shape with `size` for its open axes, such as "batch" and "2*steps"."""
    sizes = {BATCH: size, STEPS: size}
    return tuple(axis_size(side, sizes) for side in tensor.shape)


def open_inputs(spec: GraphSpec) -> tuple[TensorSpec, ...]:
    """The inputs whose first axis is open; none where a graph takes one shape only."""
    return tuple(tensor for tensor in spec.inputs if isinstance(tensor.shape[0], str))


def checked_feeds(spec: GraphSpec, feeds: Feeds) -> tuple[dict[str, Array], int]:
    """The graph's inputs out of `feeds`, contiguous, and the size of their open axis.

    That is the batch, or in a loop the decoder's steps; the first input's own where none is open.
    Raises `RuntimeFailure` for a missing feed, a wrong dtype or shape, or feeds of unequal batch.
    """
    chosen = {name: np.ascontiguousarray(array) for name, array in spec.select(feeds).items()}
    counted = open_inputs(spec) or spec.inputs[:1]
    sizes = {tensor.name: chosen[tensor.name].shape[0] for tensor in counted}
    if len(set(sizes.values())) != 1:
        raise RuntimeFailure(
            f"{spec.name}: the inputs have unequal batches: "
            + ", ".join(f"{name} {size}" for name, size in sizes.items()),
            "Feed as many rows of each.",
        )
    return chosen, next(iter(sizes.values()))


def checked_chain_feeds(specs: Iterable[GraphSpec], feeds: Feeds) -> tuple[dict[str, Array], int]:
    """What a whole drawing starts from, tokens (B, L) and noise (B, 4, H, W), and their batch."""
    wanted = {(TEXT_ENCODER, TOKENS), (UNET_ENCODER, NOISE)}
    inputs = [t for spec in specs for t in spec.inputs if (spec.name, t.name) in wanted]
    return checked_feeds(GraphSpec("drawing", tuple(inputs), ()), feeds)


def scratch_size_bytes(sizes_bytes: Iterable[int]) -> int:
    """What graphs that run one after the other need together: the largest, aligned."""
    largest = max(sizes_bytes, default=0)
    return -(-largest // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True)
class EngineTensor:
    """An engine's own idea of one input or output; -1 in `shape` is a dynamic axis.

    `size_range` is the smallest and largest first side that an input's profile allows.
    """

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int, ...]
    size_range: tuple[int, int] | None = None


@dataclass(frozen=True)
class EngineDescription:
    """All that a runtime must know of a deserialized engine before it gives it memory."""

    graph: str
    tensors: tuple[EngineTensor, ...]
    scratch_bytes: int

    def size_range(self, spec: GraphSpec) -> tuple[int, int] | None:
        """The smallest and largest size of the graph's open axis; None where it has none."""
        names = {tensor.name for tensor in open_inputs(spec)}
        opened = [tensor for tensor in self.tensors if tensor.is_input and tensor.name in names]
        ranges = [tensor.size_range or (tensor.shape[0],) * 2 for tensor in opened]
        if not ranges:
            return None
        return max(low for low, _ in ranges), min(high for _, high in ranges)


def check_engine_fits(engine: EngineDescription, spec: GraphSpec, rebuild: str) -> None:
    """Raise `BundleError` unless the engine's tensors are the bundle's: names, dtypes, shapes.

    `rebuild` is the line that builds the engines again.
    """
    for is_input, expected in ((True, spec.inputs), (False, spec.outputs)):
        kind = "input" if is_input else "output"
        found = {t.name: t for t in engine.tensors if t.is_input == is_input}
        wanted = {t.name for t in expected}
        if found.keys() != wanted:
            raise _unfit(engine, f"the {kind}s {_names(found)}", _names(wanted), rebuild)
        for tensor in expected:
            got = found[tensor.name]
            fits = len(got.shape) == len(tensor.shape) and all(
                isinstance(want, str) or side in (want, -1)
                for side, want in zip(got.shape, tensor.shape, strict=True)
            )
            if got.dtype != tensor.dtype or not fits:
                raise _unfit(
                    engine,
                    f'{kind} "{tensor.name}" as {got.dtype} {got.shape}',
                    f"{tensor.dtype} {tensor.shape}",
                    rebuild,
                )


def check_size(engine: EngineDescription, spec: GraphSpec, size: int, rebuild: str) -> None:
    """Raise `RuntimeFailure` unless the engine takes this batch, or in a loop so many steps."""
    limits = engine.size_range(spec)
    if limits is None or limits[0] <= size <= limits[1]:
        return
    low, high = limits
    takes = str(low) if low == high else f"{low} to {high}"
    if open_inputs(spec)[0].shape[0] == STEPS:
        raise RuntimeFailure(
            f"{engine.graph}: {size} steps were asked for at once; this engine takes {takes}",
            f"{rebuild} --max-decoder-rows {concrete_shape(spec.outputs[0], size)[0]}",
        )
    raise RuntimeFailure(
        f"{engine.graph}: the batch is {size}; this engine takes {takes}",
        f"{rebuild} --batch {min(low, size)}:{low}:{max(high, size)}",
    )


def _unfit(engine: EngineDescription, got: str, expected: str, rebuild: str) -> BundleError:
    return BundleError(
        f"the plan of {engine.graph} has {got}; the bundle expects {expected}",
        rebuild,
    )


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"

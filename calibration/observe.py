"""What passes through a graph: statistics of layer inputs, computed inside the graph itself.

Each watched tensor gets a few reducing operations beside it, so that a run hands out vectors and a
sample instead of every intermediate tensor: memory stays that of an ordinary run. The largest |x|
of each channel is exact; histograms count an even sample of at most `SAMPLE` values a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiue_export.errors import RuntimeFailure
from tiue_export.specs import Array, Feeds

from .histogram import Histogram
from .onnx_layers import Layer, along
from .onnx_session import OnnxSession

SAMPLE = 65_536


@dataclass(frozen=True)
class Observed:
    """One tensor: `channels` (C,) has the largest |x| of each channel, over all runs."""

    histogram: Histogram
    channels: Array


@dataclass(frozen=True)
class Watched:
    """A tensor to look at: (R, ..., C at `channel_axis`, ...); `divide` (C,) is taken out first."""

    name: str
    shape: tuple[int, ...]
    channel_axis: int
    divide: Array | None = None


def watched(layers: Iterable[Layer], divide: Mapping[str, Array] | None = None) -> list[Watched]:
    """The inputs of layers, each once."""
    found: dict[str, Watched] = {}
    for layer in layers:
        factor = (divide or {}).get(layer.activation)
        found[layer.activation] = Watched(
            layer.activation, layer.activation_shape, layer.channel_axis, factor
        )
    return list(found.values())


def observe(
    path: Path,
    tensors: Sequence[Watched],
    runs: Iterable[Feeds],
    threads: int | None = None,
    on_run: Callable[[int], None] = lambda done: None,
) -> dict[str, Observed]:
    """Run the ONNX graph at `path` on each of `runs`; what passed through `tensors`.

    `on_run` gets the number of runs that are done.
    """
    session = OnnxSession(_watching(path, tensors), path.parent, threads)
    seen: dict[str, Observed] = {}
    for done, pool in enumerate(runs, 1):
        outputs = session.run(pool)
        for number, tensor in enumerate(tensors):
            channels, sample = (outputs[_name(number, part)] for part in _PARTS)
            if not np.isfinite(channels).all():
                raise RuntimeFailure(f"{tensor.name} holds non-finite values: it has no range")
            before = seen.get(tensor.name)
            histogram = Histogram() if before is None else before.histogram
            histogram.add(sample, float(channels.max()))
            if before is not None:
                channels = np.maximum(channels, before.channels)
            seen[tensor.name] = Observed(histogram, channels)
        on_run(done)
    return seen


_PARTS = ("channels", "sample")


def _name(number: int, part: str) -> str:
    return f"watched.{number}.{part}"


def _watching(path: Path, tensors: Sequence[Watched]) -> Any:
    """The model with its outputs replaced by statistics; weights are not loaded."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    del model.graph.value_info[:]
    del model.graph.output[:]
    for number, tensor in enumerate(tensors):
        _watch(model.graph, number, tensor)
    return model


def _watch(graph: Any, number: int, tensor: Watched) -> None:
    from onnx import TensorProto, helper, numpy_helper

    source = tensor.name

    def add(op: str, inputs: list[str], output: str, **attributes: int) -> str:
        graph.node.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def constant(part: str, values: Any, dtype: Any) -> str:
        name = _name(number, part)
        graph.initializer.append(numpy_helper.from_array(np.array(values, dtype), name))
        return name

    source = add("Cast", [source], _name(number, "float"), to=TensorProto.FLOAT)
    if tensor.divide is not None:
        spread = along(1 / tensor.divide, tensor.channel_axis, len(tensor.shape))
        factor = constant("factor", spread, np.float32)
        source = add("Mul", [source, factor], _name(number, "divided"))
    source = add("Abs", [source], _name(number, "abs"))
    others = [axis for axis in range(len(tensor.shape)) if axis != tensor.channel_axis]
    axes = constant("channels.axes", others, "int64")
    add("ReduceMax", [source, axes], _name(number, "channels"), keepdims=0)
    flat = add("Reshape", [source, constant("flat.shape", [-1], "int64")], _name(number, "flat"))
    bounds = [
        constant(part, [value], "int64")
        for part, value in (("start", 0), ("end", 2**62), ("axis", 0), ("step", _stride(tensor)))
    ]
    add("Slice", [flat, *bounds], _name(number, "sample"))
    for part in _PARTS:
        graph.output.append(
            helper.make_tensor_value_info(_name(number, part), TensorProto.FLOAT, None)
        )


def _stride(tensor: Watched) -> int:
    """A step that shares no factor with any side, so that all rows and channels are met."""
    size = math.prod(tensor.shape)
    step = max(1, size // SAMPLE)
    while step > 1 and math.gcd(step, size) > 1:
        step += 1
    return step

"""In what precision the layers of a TensorRT engine run, and why those in float do.

Under strong typing the dtypes of the parsed network are binding: the builder may fuse layers, not
retype them. So the network is the proof where an engine cannot be opened (TensorRT-RTX without a
GPU), and the engine inspector's answer stands beside it where it can. The reason for a float layer
is read off the network's structure, not off names: float layers that hang together form an island,
and what is in the island says what it is for.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# These arrange data or pick from it; they compute nothing that a precision could spoil.
_MOVING = {
    "CONSTANT", "SHAPE", "SHUFFLE", "IDENTITY", "SQUEEZE", "UNSQUEEZE", "SLICE", "CONCATENATION",
    "GATHER", "FILL", "SCATTER", "PADDING",
}  # fmt: skip
# What stands at the border between two precisions computes nothing of its own.
_BORDERS = {"CAST", "QUANTIZE", "DEQUANTIZE"}
_PRODUCTS = {"CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM"}
_KINDS = {"HALF": "half", "FLOAT": "float", "BF16": "bf16", "INT8": "int8", "FP8": "fp8"}
# What the inspector writes, in formats of 10.x ("Row major linear FP16 format") and 11.x ("Half").
_INSPECTED = (
    ("int8", r"int8"),
    ("fp8", r"fp8"),
    ("bf16", r"bf16|bfloat16"),
    ("half", r"fp16|half"),
    ("float", r"fp32|float"),
)


@dataclass(frozen=True)
class Census:
    """Layers that compute, by precision; `products` counts convolutions and matrix products alone.

    `reasons` says what the float layers belong to, with their number; casts are counted apart, as
    they are the borders of the islands. `audited` are the float products of modules that the
    bundle's overflow audit put in float32.
    """

    layers: Mapping[str, int]
    products: Mapping[str, int]
    reasons: Mapping[str, int] = field(default_factory=dict)
    casts: int = 0
    audited: int = 0

    @property
    def mostly_float(self) -> bool:
        """Whether float carries most of the work: then this is no half-precision engine.

        Products that an audit put in float32 are there on purpose and do not count.
        """
        counts = self.products if sum(self.products.values()) else self.layers
        return 2 * (counts.get("float", 0) - self.audited) > sum(counts.values()) - self.audited

    def report(self) -> dict[str, str | int]:
        """The census as entries of `CompiledGraph.report`."""
        entries: dict[str, str | int] = {
            f"layers_{kind}": self.layers.get(kind, 0)
            for kind in ("half", "float", *sorted(set(self.layers) - {"half", "float"}))
        }
        entries |= {f"products_{kind}": count for kind, count in sorted(self.products.items())}
        entries["layers_cast"] = self.casts
        entries["float_because"] = ", ".join(
            f"{reason}: {count}" for reason, count in self.reasons.items()
        )
        return entries


def network_census(network: Any, float32_modules: Iterable[str] = ()) -> Census:
    """Count a parsed `INetworkDefinition`, whose dtypes are final under strong typing.

    `float32_modules` are those of the manifest's graph record: layers carry their nodes' names,
    which begin with the path of their module.
    """
    audited, kept = 0, tuple(f"{path}{end}" for path in float32_modules for end in "/.")
    layers: Counter[str] = Counter()
    products: Counter[str] = Counter()
    islands, casts = _Islands(), 0
    every = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {layer.get_output(0).name: layer for layer in every if layer.num_outputs}
    constants = {layer.get_output(0).name for layer in every if layer.type.name == "CONSTANT"}
    for index, layer in enumerate(every):
        kind, precision = layer.type.name, _precision(layer)
        if kind == "CAST" and precision is not None:
            casts += layer.get_input(0).dtype.name in _KINDS
        if precision == "float" and kind != "CONSTANT":
            islands.add(index, kind, _float_tensors(layer, constants))
        if precision is None or kind in _MOVING or kind in _BORDERS:
            continue
        if kind in _PRODUCTS and _reads_int8(layer, makers):
            precision = "int8"
        layers[precision] += 1
        if kind in _PRODUCTS:
            products[precision] += 1
            audited += precision == "float" and layer.name.startswith(kept)
    # Islands explain what stands out of a reduced graph; in a float32 one nothing does.
    reduced = layers["half"] or layers["bf16"]
    reasons = islands.reasons() if reduced else {"a float32 graph": layers["float"]}
    return Census(dict(layers), dict(products), reasons, casts, audited)


def _reads_int8(layer: Any, makers: Mapping[str, Any]) -> bool:
    """Whether both factors come out of int8: explicit quantization, which the builder fuses."""
    for index in (0, 1):
        tensor = layer.get_input(index)
        before = None if tensor is None else makers.get(tensor.name)
        while before is not None and before.type.name in ("CAST", "SHUFFLE"):
            before = makers.get(before.get_input(0).name)
        if before is None or before.type.name != "DEQUANTIZE":
            return False
    return True


def _precision(layer: Any) -> str | None:
    """Of the first output; of comparisons and index arithmetic there is none."""
    output = layer.get_output(0)
    return None if output is None else _KINDS.get(output.dtype.name)


def _float_tensors(layer: Any, constants: set[str]) -> Iterator[tuple[str, bool]]:
    """Names of the float tensors a layer touches, and whether one is an output of the network."""
    inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
    outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
    for tensor in filter(None, [*inputs, *outputs]):
        # Inputs and constants reach many layers that have nothing else in common.
        shared = tensor.is_network_input or tensor.name in constants
        if tensor.dtype.name == "FLOAT" and not shared:
            yield tensor.name, tensor.is_network_output


class _Islands:
    """Float layers joined by the tensors they share (union-find over tensor names)."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}
        self._kinds: list[tuple[str, str]] = []  # (tensor that stands for the island, layer type)
        self._outputs: set[str] = set()

    def add(self, index: int, kind: str, tensors: Iterable[tuple[str, bool]]) -> None:
        own = f"\0layer {index}"
        self._parent[own] = own
        for name, is_output in tensors:
            self._parent.setdefault(name, name)
            self._parent[self._root(name)] = self._root(own)
            if is_output:
                self._outputs.add(name)
        self._kinds.append((own, kind))

    def reasons(self) -> dict[str, int]:
        """Reason -> number of computing layers in the islands it explains, most first."""
        outputs = {self._root(name) for name in self._outputs}
        members: dict[str, Counter[str]] = {}
        for own, kind in self._kinds:
            members.setdefault(self._root(own), Counter())[kind] += 1
        found: Counter[str] = Counter()
        for root, kinds in members.items():
            computing = sum(n for k, n in kinds.items() if k not in _MOVING | _BORDERS)
            if computing:
                found[_reason(kinds, root in outputs)] += computing
        return dict(found.most_common())

    def _root(self, name: str) -> str:
        while self._parent[name] != name:
            self._parent[name] = self._parent[self._parent[name]]
            name = self._parent[name]
        return name


def _reason(kinds: Counter[str], is_output: bool) -> str:
    products = sum(kinds[kind] for kind in _PRODUCTS)
    if kinds["NORMALIZATION"] and not products:
        return "norm statistics"
    if kinds["SOFTMAX"]:
        return "softmax" if not products else "upcast attention"
    if products:
        return "kept in float32"
    return "weighted sum into a float output" if is_output else "other float arithmetic"


def engine_census(information: str) -> Census | None:
    """Count the layers of a built engine from `EngineInspector`'s JSON of TensorRT 10.x or 11.x.

    None where the inspector names layers but no types, as at a lower profiling verbosity.
    """
    try:
        layers = json.loads(information).get("Layers", [])
    except (ValueError, AttributeError):
        return None
    counts: Counter[str] = Counter()
    casts = 0
    for layer in layers:
        precision = _inspected_precision(layer) if isinstance(layer, dict) else None
        if precision is None:
            continue
        if layer.get("LayerType") in ("Reformat", "reformat", "NoOp"):
            casts += 1
        else:
            counts[precision] += 1
    return Census(dict(counts), {}, casts=casts) if counts else None


def _inspected_precision(layer: Mapping[str, Any]) -> str | None:
    for tensor in layer.get("Outputs") or []:
        if not isinstance(tensor, dict):
            continue
        keys = ("Format/Datatype", "DataType", "Datatype", "Format")  # 10.x, then 11.x
        text = " ".join(str(tensor[key]) for key in keys if key in tensor).lower()
        for precision, pattern in _INSPECTED:
            if re.search(pattern, text):
                return precision
    return None

"""How near a network's values come to the limit of half precision, and what stays in float32.

The torch half measures (`reference/half_audit.py`); here are the findings, the rule, and the file
that a bundle keeps of them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tiue_export.bundle.manifest import structured
from tiue_export.bundle.read import Bundle
from tiue_export.errors import BundleError
from tiue_export.system.json_file import parse_json

HALF_MAX = 65504.0
# Real prompts are few; others reach somewhat further, and a backend may hold an intermediate twice
# as large as the result (the exact GELU does). A value is hot above a quarter of the limit.
HOT_ABOVE = HALF_MAX / 4
AUDIT_FILE = "audit/fp16.json"
WHOLE_GRAPH = ""
# Wrappers of ours that say nothing to a reader; without them names are equal at every precision.
_OUTER_WRAPPER = re.compile(r"^(unet|vae|text_encoder|rows|encoder)\.")


def node_path(module: str) -> str:
    """A module's path as it stands in the names of the exported graph's nodes."""
    return _OUTER_WRAPPER.sub("", module)


@dataclass(frozen=True)
class OpRange:
    """The largest |value| that an operation of a module gave, over all prompts.

    `op` is torch's name of the operation, a weight's name, "attention_scores" (before softmax), or
    "input NAME" and "output NAME" of the graph. `in_half`: the fp16 graph holds the value in half.
    """

    graph: str
    module: str
    op: str
    max_abs: float
    in_half: bool

    @property
    def share(self) -> float:
        """Of the largest number that half precision holds."""
        return self.max_abs / HALF_MAX

    @property
    def hot(self) -> bool:
        """Whether half precision is at risk here."""
        return self.in_half and self.max_abs > HOT_ABOVE


@dataclass(frozen=True)
class Island:
    """A module that stays in float32 ("" is the whole graph), and the largest value behind that."""

    module: str
    cause: OpRange


@dataclass(frozen=True)
class GraphRanges:
    """Everything measured in one graph: `ranges`, largest first, and max|output| of each module."""

    graph: str
    ranges: tuple[OpRange, ...]
    outputs: Mapping[str, float]

    def islands(self) -> tuple[Island, ...]:
        """The modules that the rule keeps in float32, largest value first."""
        hot = [found for found in self.ranges if found.hot]
        homes = {found.module: island_of(found.module, self.outputs) for found in hot}
        roots = outermost(homes.values())
        causes: dict[str, OpRange] = {}
        for found in hot:  # largest first: the first of an island is its cause
            home = next(root for root in roots if lies_in(homes[found.module], [root]))
            causes.setdefault(home, found)
        return tuple(Island(module, cause) for module, cause in causes.items())

    def audit(self, top: int = 20) -> GraphAudit:
        """The summary that is kept: counts, islands and the `top` largest values held in half."""
        islands = self.islands()
        half = [found for found in self.ranges if found.in_half]
        spared = [found for found in self.ranges if not found.in_half]
        left = [f for f in half if not lies_in(f.module, [island.module for island in islands])]
        return GraphAudit(
            graph=self.graph,
            measured=len(self.ranges),
            in_half=len(half),
            hot=sum(found.hot for found in half),
            islands=tuple(
                Island(node_path(island.module), _as_node(island.cause)) for island in islands
            ),
            max_abs_in_half=left[0].max_abs if left else 0.0,
            largest=tuple(_as_node(found) for found in _distinct(half)[:top]),
            largest_in_float32=_as_node(spared[0]) if spared else None,
        )


def _distinct(ranges: Iterable[OpRange]) -> list[OpRange]:
    """Without those that only hand on the value of one before: reshapes, sums with a zero."""
    return list({found.max_abs: found for found in reversed(list(ranges))}.values())[::-1]


def _as_node(found: OpRange) -> OpRange:
    return dataclasses.replace(found, module=node_path(found.module))


@dataclass(frozen=True)
class GraphAudit:
    """One graph's summary, modules by their paths in node names.

    `measured`, `in_half` and `hot` count operations and weights. `largest` are held in half by a
    graph without islands; `max_abs_in_half` is what is left outside the islands.
    """

    graph: str
    measured: int
    in_half: int
    hot: int
    islands: tuple[Island, ...]
    max_abs_in_half: float
    largest: tuple[OpRange, ...]
    largest_in_float32: OpRange | None = None


@dataclass(frozen=True)
class OverflowAudit:
    """What an audit found on `inputs`; a |value| above `hot_above` is a risk in half precision."""

    inputs: str
    graphs: tuple[GraphAudit, ...]
    half_max: float = HALF_MAX
    hot_above: float = HOT_ABOVE

    def to_json(self) -> str:
        """The text of `AUDIT_FILE`."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str, where: str) -> OverflowAudit:
        """Parse and check every field; `where` names the file in errors."""
        try:
            data = parse_json(text)
        except ValueError as error:
            raise BundleError(f"{where} is not JSON: {error}", "Export the bundle again.") from None
        audit: OverflowAudit = structured(OverflowAudit, data, where)
        return audit


@dataclass(frozen=True)
class Float32Parts:
    """What stays in float32 in graphs of half precision.

    `modules`: graph name -> module paths, `WHOLE_GRAPH` for all of it; `tensors`: names of graph
    inputs and outputs that half precision could not carry.
    """

    modules: Mapping[str, frozenset[str]] = field(default_factory=dict)
    tensors: frozenset[str] = frozenset()

    def of(self, graph: str) -> frozenset[str]:
        """The module paths of one graph."""
        return self.modules.get(graph, frozenset())


def float32_parts(graphs: Iterable[GraphRanges]) -> Float32Parts:
    """What the rule keeps in float32 after an audit of these graphs."""
    modules, tensors = {}, set()
    for graph in graphs:
        if islands := graph.islands():
            modules[graph.graph] = frozenset(island.module for island in islands)
        borders = [found for found in graph.ranges if found.hot and found.module == WHOLE_GRAPH]
        for found in borders:
            kind, _, name = found.op.partition(" ")
            if kind in ("input", "output"):
                tensors.add(name)
    return Float32Parts(modules, frozenset(tensors))


def island_of(module: str, outputs: Mapping[str, float]) -> str:
    """The smallest module around `module` (itself included) whose own output is not hot.

    `outputs` holds max|output| by path, of modules that are called; containers are not. Returns
    `WHOLE_GRAPH` when there is none below the graph itself.
    """
    while module:
        if outputs.get(module, float("inf")) <= HOT_ABOVE:
            return module
        module = module.rpartition(".")[0]
    return WHOLE_GRAPH


def outermost(paths: Iterable[str]) -> frozenset[str]:
    """The paths that lie in no other of them."""
    every = set(paths)
    return frozenset(path for path in every if not lies_in(path, every - {path}))


def lies_in(path: str, roots: Iterable[str]) -> bool:
    """Whether a module path is one of `roots` or below one; "" holds everything."""
    return any(not root or path == root or path.startswith(f"{root}.") for root in roots)


def load_audit(bundle: Bundle) -> OverflowAudit | None:
    """The audit stored in a bundle; None for one that was exported without."""
    if AUDIT_FILE not in bundle.manifest.files:
        return None
    path = bundle.file(AUDIT_FILE)
    return OverflowAudit.from_json(path.read_text("utf-8"), str(path))

"""Where OpenVINO's time goes in one graph, by kind of node, for several bundles in turn.

    python -m tiue_export.benchmarks.studies.openvino_profile before/ after/ --graph unet_decoder \\
        --precision bf16 --threads 1 --rounds 6

Bundles take turns, so that drift meets all alike. Two measures are printed: the CPU time of a run,
which other work on the machine disturbs little (with one thread best), and OpenVINO's own counters
by node, of which each node's smallest over all runs counts: they are wall time, and other work only
ever adds to them. Inputs are seeded Gaussian noise: times do not depend on them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiue_export.bundle.read import Bundle, open_bundle
from tiue_export.errors import UsageError, unknown_name
from tiue_export.proof.latency_record import write_text
from tiue_export.registry.packages import require
from tiue_export.registry.spokes import run_explained
from tiue_export.specs import GRAPH_NAMES, UNET_DECODER
from tiue_export.system.openvino_core import openvino_core

from ..markdown import table_lines

_TYPES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


@dataclass(frozen=True)
class Kind:
    """All nodes of one type that one kernel computes; `ms` is the sum of each node's smallest."""

    node_type: str
    kernel: str
    nodes: int
    ms: float


@dataclass(frozen=True)
class Profile:
    """One bundle's graph. `cpu_ms` and `wall_ms` have one value per run."""

    name: str
    cpu_ms: tuple[float, ...]
    wall_ms: tuple[float, ...]
    kinds: tuple[Kind, ...]

    @property
    def counters_ms(self) -> float:
        """The sum over all nodes."""
        return math.fsum(kind.ms for kind in self.kinds)

    def cpu_ratio(self, base: Profile) -> float:
        """Geometric mean over the rounds of this one's CPU time over the other's."""
        pairs = zip(self.cpu_ms, base.cpu_ms, strict=True)
        return math.exp(statistics.fmean(math.log(mine / other) for mine, other in pairs))


class _Compiled:
    """A graph of one bundle, compiled on the CPU, and what its runs took."""

    def __init__(self, bundle: Bundle, graph: str, precision: str, threads: int | None) -> None:
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _TYPES[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "PERF_COUNT": True,
        }
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        model = openvino_core().compile_model(bundle.graph_path(graph), "CPU", config)
        self._name, self._request = bundle.root.name, model.create_infer_request()
        random = np.random.default_rng(0)
        self._feeds: dict[str, Any] = {}
        for tensor in bundle.spec(graph).inputs:
            shape = [side if isinstance(side, int) else 1 for side in tensor.shape]
            whole = tensor.dtype.startswith("int")
            values = np.zeros(shape) if whole else random.standard_normal(shape)
            self._feeds[tensor.name] = values.astype(tensor.dtype)
        self._cpu_ms: list[float] = []
        self._wall_ms: list[float] = []
        self._nodes: dict[str, tuple[str, str, float]] = {}
        self._request.infer(self._feeds)  # the first run allocates

    def run(self) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        self._request.infer(self._feeds)
        self._cpu_ms.append((time.process_time() - cpu) * 1e3)
        self._wall_ms.append((time.perf_counter() - wall) * 1e3)
        for node in self._request.profiling_info:
            ms = node.real_time.total_seconds() * 1e3
            *_, smallest = self._nodes.get(node.node_name, (ms,))
            if ms > 0:
                self._nodes[node.node_name] = node.node_type, node.exec_type, min(ms, smallest)

    def profile(self) -> Profile:
        sums: dict[tuple[str, str], list[float]] = {}
        for node_type, kernel, ms in self._nodes.values():
            sums.setdefault((node_type, kernel), []).append(ms)
        kinds = [Kind(*key, len(times), math.fsum(times)) for key, times in sums.items()]
        ordered = tuple(sorted(kinds, key=lambda kind: -kind.ms))
        return Profile(self._name, tuple(self._cpu_ms), tuple(self._wall_ms), ordered)


def profile(
    bundles: Sequence[Bundle], graph: str, precision: str, threads: int | None, rounds: int
) -> list[Profile]:
    """Compile `graph` of each bundle on the CPU and run them in turn, once a round."""
    require("profiling", ("openvino",), "openvino")
    if graph not in GRAPH_NAMES:
        raise unknown_name("graph", graph, GRAPH_NAMES)
    if precision not in _TYPES:
        raise unknown_name("precision", precision, _TYPES)
    if rounds < 1:
        raise UsageError(f"--rounds is {rounds}; expected 1 or more")
    compiled = [_Compiled(bundle, graph, precision, threads) for bundle in bundles]
    for _ in range(rounds):
        for one in compiled:
            one.run()
    return [one.profile() for one in compiled]


def main() -> None:
    """Profile, print a table, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--graph", default=UNET_DECODER, help=f"[{UNET_DECODER}]")
    parser.add_argument("--precision", default="bf16", help="fp32, bf16 or fp16 [bf16]")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="record to write (.json)")
    arguments = parser.parse_args()
    run_explained(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    bundles = [open_bundle(path) for path in arguments.bundles]
    found = profile(
        bundles, arguments.graph, arguments.precision, arguments.threads, arguments.rounds
    )
    print(markdown(found))
    if arguments.out is not None:
        write_text(arguments.out, json.dumps([asdict(one) for one in found], indent=1) + "\n")


def markdown(profiles: Sequence[Profile]) -> str:
    """A table: kinds down, bundles across; milliseconds, and nodes in brackets."""
    found = [{(kind.node_type, kind.kernel): kind for kind in one.kinds} for one in profiles]
    shown = {key: None for kinds in found for key, kind in kinds.items() if kind.ms >= 0.1}

    def cells(key: tuple[str, str]) -> list[str]:
        own = [kinds.get(key) for kinds in found]
        return ["0" if kind is None else f"{kind.ms:.1f} ({kind.nodes})" for kind in own]

    rows = [[" / ".join(key), *cells(key)] for key in shown]
    sums: Mapping[str, Callable[[Profile], str]] = {
        "sum of counters": lambda one: f"{one.counters_ms:.0f}",
        "CPU time, smallest": lambda one: f"{min(one.cpu_ms):.0f}",
        "CPU time, median": lambda one: f"{statistics.median(one.cpu_ms):.0f}",
        "CPU time, ratio to the first": lambda one: f"{one.cpu_ratio(profiles[0]):.3f}",
        "wall time, smallest": lambda one: f"{min(one.wall_ms):.0f}",
    }
    rows += [[name, *map(cell, profiles)] for name, cell in sums.items()]
    return "\n".join(table_lines(["ms", *(one.name for one in profiles)], rows))


if __name__ == "__main__":
    main()

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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tiue_export.bundle.read import Bundle, open_bundle
from tiue_export.errors import UsageError, unknown_name
from tiue_export.registry.packages import require
from tiue_export.registry.spokes import run_explained
from tiue_export.specs import GRAPH_NAMES, UNET_DECODER
from tiue_export.system.disk_errors import disk_errors
from tiue_export.system.openvino_core import openvino_core

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


@dataclass
class _Compiled:
    """A graph ready to run, and what its runs took."""

    request: Any
    feeds: Mapping[str, Any]
    cpu_ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)
    nodes: dict[str, tuple[str, str, float]] = field(default_factory=dict)

    def run(self) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        self.request.infer(self.feeds)
        self.cpu_ms.append((time.process_time() - cpu) * 1e3)
        self.wall_ms.append((time.perf_counter() - wall) * 1e3)
        for entry in self.request.profiling_info:
            ms = entry.real_time.total_seconds() * 1e3
            if entry.node_name in self.nodes:
                ms = min(ms, self.nodes[entry.node_name][2])
            if ms > 0:
                self.nodes[entry.node_name] = entry.node_type, entry.exec_type, ms


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
    compiled = [_compiled(bundle, graph, precision, threads) for bundle in bundles]
    for _ in range(rounds):
        for one in compiled:
            one.run()
    return [
        Profile(bundle.root.name, tuple(one.cpu_ms), tuple(one.wall_ms), _kinds(one))
        for bundle, one in zip(bundles, compiled, strict=True)
    ]


def _compiled(bundle: Bundle, graph: str, precision: str, threads: int | None) -> _Compiled:

    config: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": _TYPES[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "PERF_COUNT": True,
    }
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    spec, random = bundle.spec(graph), np.random.default_rng(0)
    feeds: dict[str, Any] = {}
    for tensor in spec.inputs:
        shape = [side if isinstance(side, int) else 1 for side in tensor.shape]
        whole = tensor.dtype.startswith("int")
        feeds[tensor.name] = (np.zeros(shape) if whole else random.standard_normal(shape)).astype(
            tensor.dtype
        )
    model = openvino_core().compile_model(bundle.graph_path(graph), "CPU", config)
    request = model.create_infer_request()
    request.infer(feeds)  # the first run allocates
    return _Compiled(request, feeds)


def _kinds(compiled: _Compiled) -> tuple[Kind, ...]:
    sums: dict[tuple[str, str], list[float]] = {}
    for node_type, kernel, ms in compiled.nodes.values():
        sums.setdefault((node_type, kernel), []).append(ms)
    kinds = [Kind(*key, len(times), math.fsum(times)) for key, times in sums.items()]
    return tuple(sorted(kinds, key=lambda kind: -kind.ms))


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
        text = json.dumps([asdict(one) for one in found], indent=1) + "\n"
        with disk_errors(arguments.out):
            arguments.out.write_text(text, "utf-8")


def markdown(profiles: Sequence[Profile]) -> str:
    """A table: kinds down, bundles across; milliseconds, and nodes in brackets."""
    keys: dict[tuple[str, str], None] = {}
    for one in profiles:
        keys.update({(kind.node_type, kind.kernel): None for kind in one.kinds if kind.ms >= 0.1})
    lines = [f"| ms | {' | '.join(one.name for one in profiles)} |"]
    lines.append("|---|" + "---:|" * len(profiles))
    for key in keys:
        cells = [_cell(one, key) for one in profiles]
        lines.append(f"| {' / '.join(key)} | {' | '.join(cells)} |")
    rows = {
        "sum of counters": [f"{one.counters_ms:.0f}" for one in profiles],
        "CPU time, smallest": [f"{min(one.cpu_ms):.0f}" for one in profiles],
        "CPU time, median": [f"{statistics.median(one.cpu_ms):.0f}" for one in profiles],
        "CPU time, ratio to the first": [f"{one.cpu_ratio(profiles[0]):.3f}" for one in profiles],
        "wall time, smallest": [f"{min(one.wall_ms):.0f}" for one in profiles],
    }
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines)


def _cell(one: Profile, key: tuple[str, str]) -> str:
    for kind in one.kinds:
        if (kind.node_type, kind.kernel) == key:
            return f"{kind.ms:.1f} ({kind.nodes})"
    return "0"


if __name__ == "__main__":
    main()

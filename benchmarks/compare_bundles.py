"""Time several bundles of one student against each other on ONNX Runtime's CPU provider.

    python -m tiue_export.benchmarks.compare_bundles hoisted/ naive/ --out result.json

Each bundle runs in a process of its own, in turn (A B A B ...), so that drift of the machine hits
all alike and none sees another's memory. Per process: one warm-up, then timed runs of all graphs on
the bundle's own reference inputs. Ratios are taken against the first bundle, round by round.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tiue_export.bundle import open_bundle
from tiue_export.parity import load_reference, with_dtypes
from tiue_export.registry import open_runtime
from tiue_export.specs import RuntimeOptions

_MEASURE_ONE = "--measure-one"


def measure_one(
    path: Path, runs: int, threads: int | None, graphs: list[str] | None
) -> dict[str, Any]:
    """Time graphs of one bundle in this process; milliseconds per run, peak memory."""
    bundle = open_bundle(path)
    known = dict(load_reference(bundle).arrays)
    runtime = open_runtime("ort", bundle, RuntimeOptions(device="cpu", threads=threads))
    names = [n for n in bundle.manifest.graphs if graphs is None or n in graphs]
    latency_ms: dict[str, list[float]] = {name: [] for name in names}
    for run in range(runs + 1):
        pool = dict(known)
        for name in names:
            feeds = with_dtypes(bundle.spec(name), pool)
            start = time.perf_counter()
            outputs = runtime.run(name, feeds)
            if run > 0:
                latency_ms[name].append((time.perf_counter() - start) * 1e3)
            pool.update({key: value for key, value in outputs.items() if key not in known})
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"latency_ms": latency_ms, "peak_memory_bytes": peak_bytes}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=2, help="timed runs per process")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--graphs", nargs="+", help="only these, the encoder before the decoder")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument(_MEASURE_ONE, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_one:
        (path,) = arguments.bundles
        measured = measure_one(path, arguments.runs, arguments.threads, arguments.graphs)
        print(json.dumps(measured))
        return
    rounds: list[list[dict[str, Any]]] = []
    for number in range(arguments.rounds):
        rounds.append([_in_child(path, arguments) for path in arguments.bundles])
        print(f"round {number + 1} of {arguments.rounds} done", file=sys.stderr)
    summary = [
        _summary(path, [r[i] for r in rounds], [r[0] for r in rounds])
        for i, path in enumerate(arguments.bundles)
    ]
    _print_table(summary)
    if arguments.out is not None:
        doctor = [sys.executable, "-m", "tiue_export", "doctor", "--json"]
        environment = json.loads(subprocess.run(doctor, capture_output=True, check=True).stdout)
        record = {"environment": environment, "summary": summary, "rounds": rounds}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def _in_child(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "tiue_export.benchmarks.compare_bundles", _MEASURE_ONE]
    command += [str(path), "--runs", str(arguments.runs)]
    if arguments.threads is not None:
        command += ["--threads", str(arguments.threads)]
    if arguments.graphs is not None:
        command += ["--graphs", *arguments.graphs]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def _summary(path: Path, own: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all timed runs, and the ratio of the UNet's sum to the first bundle's."""
    graphs = list(own[0]["latency_ms"])
    medians = {
        graph: statistics.median([ms for result in own for ms in result["latency_ms"][graph]])
        for graph in graphs
    }
    ratios = [_unet_ms(a) / _unet_ms(b) for a, b in zip(own, first, strict=True)]
    return {
        "bundle": path.name,
        "median_ms": medians,
        "unet_ms": sum(medians[graph] for graph in graphs if graph.startswith("unet")),
        "unet_ratio_median": statistics.median(ratios),
        "unet_ratio_min": min(ratios),
        "unet_ratio_max": max(ratios),
        "peak_memory_bytes": max(result["peak_memory_bytes"] for result in own),
    }


def _unet_ms(result: dict[str, Any]) -> float:
    latency_ms: dict[str, list[float]] = result["latency_ms"]
    return sum(
        statistics.median(runs) for graph, runs in latency_ms.items() if graph.startswith("unet")
    )


def _print_table(summary: list[dict[str, Any]]) -> None:
    graphs = list(summary[0]["median_ms"])
    print("| bundle | " + " | ".join(f"{g} ms" for g in graphs) + " | UNet ms | ratio | peak GB |")
    print("|---|" + "---:|" * (len(graphs) + 3))
    for row in summary:
        cells = [f"{row['median_ms'][graph]:.0f}" for graph in graphs]
        ratio = (
            f"{row['unet_ratio_median']:.3f} "
            f"({row['unet_ratio_min']:.3f}-{row['unet_ratio_max']:.3f})"
        )
        peak = f"{row['peak_memory_bytes'] / 1e9:.1f}"
        cells += [f"{row['unet_ms']:.0f}", ratio, peak]
        print(f"| {row['bundle']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

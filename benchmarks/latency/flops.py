"""Floating-point operations of an ONNX graph, counted from its shapes; attention included.

    python -m tiue_export.benchmarks.latency.flops BUNDLE

Counted are convolutions and matrix products, at 2 operations per multiply-add: attention is two
matrix products in these graphs. Norms, activations and additions are left out: at SD 2.1-base size
they are below 1 % of the operations, though not of the time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tiue_export.bundle.read import Bundle, open_bundle
from tiue_export.graphs.flops import GraphFlops, count_flops
from tiue_export.registry.spokes import run_explained

from ..markdown import table_lines

__all__ = ["GraphFlops", "bundle_flops", "count_flops"]


def bundle_flops(bundle: Bundle, batch: int = 1, steps: int = 1) -> dict[str, GraphFlops]:
    """Every graph whose ONNX file the bundle holds; `steps` of a decoder that takes any number."""
    return {
        name: count_flops(bundle.graph_path(name), batch, steps)
        for name, graph in bundle.manifest.graphs.items()
        if graph.has_onnx
    }


def main() -> None:
    """Print a table for one bundle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", type=int, default=1, help="for a bundle with an open batch axis")
    parser.add_argument("--steps", type=int, default=1, help="for a decoder that takes any number")
    arguments = parser.parse_args()
    run_explained(lambda: _print_table(arguments.bundle, arguments.batch, arguments.steps))


def _print_table(path: Path, batch: int, steps: int) -> None:
    kinds, rows = ("Conv", "MatMul", "Gemm"), []
    for name, flops in bundle_flops(open_bundle(path), batch, steps).items():
        counts = [flops.total, *(flops.by_operator.get(kind, 0) for kind in kinds)]
        rows.append([name, *(f"{count / 1e9:.3g}" for count in counts)])
    print("\n".join(table_lines(["graph", "GFLOP", *kinds], rows)))


if __name__ == "__main__":
    main()

"""An int8 bundle whose time alone counts: every layer that no rule keeps out, by NNCF.

    python -m tiue_export.calibration.int8_for_timing BUNDLE OUT

Ranges are from one run, the bundle's own reference, so that neither prompts nor a text encoder are
needed: what random weights of full size are measured with. Nothing judges what such a bundle draws;
`tiue-export quantize` makes those that draw.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from tiue_export._version import __version__
from tiue_export.bundle.read import Bundle, open_bundle
from tiue_export.bundle.write import new_bundle
from tiue_export.graphs.flops import count_flops
from tiue_export.proof.parity import load_reference, with_dtypes
from tiue_export.proof.quantization_plan import (
    FLOAT,
    PLAN_VERSION,
    W8A8,
    LayerPlan,
    QuantizationPlan,
    student_identity,
)
from tiue_export.registry.backends import open_runtime
from tiue_export.registry.spokes import run_explained
from tiue_export.specs import UNET_DECODER, UNET_ENCODER, UNET_GRAPHS, Feeds, RuntimeOptions

from .onnx_layers import Layer, find_layers
from .openvino_int8 import NncfOptions, write_nncf_graphs
from .placement import excluded_by_rule


def write_for_timing(bundle: Bundle, out: Path, *, force: bool = False) -> Bundle:
    """Write `out` from a bundle that has ONNX and OpenVINO graphs; raises as `quantize` does."""
    feeds = _reference_feeds(bundle)
    with new_bundle(out, force=force) as folder:
        write_nncf_graphs(bundle, _plan(bundle), NncfOptions(W8A8, feeds.__getitem__), folder)
    return open_bundle(out)


def _reference_feeds(bundle: Bundle) -> dict[str, Iterable[Feeds]]:
    """The one run of each of the UNet's graphs that ranges are from."""
    known = load_reference(bundle).arrays
    encoder, decoder = bundle.spec(UNET_ENCODER), bundle.spec(UNET_DECODER)
    first = with_dtypes(encoder, known)
    runtime = open_runtime("openvino", bundle, RuntimeOptions(device="cpu", precision="fp32"))
    try:
        features = runtime.run(UNET_ENCODER, first)
    finally:
        runtime.close()
    return {UNET_ENCODER: [first], UNET_DECODER: [with_dtypes(decoder, {**known, **features})]}


def _plan(bundle: Bundle) -> QuantizationPlan:
    layers = [
        _planned(layer)
        for graph in UNET_GRAPHS
        for layer in find_layers(bundle.graph_path(graph), graph, bundle.manifest.batch or 1)
    ]
    return QuantizationPlan(
        format_version=PLAN_VERSION,
        created_by=f"tiue-export {__version__}",
        student=student_identity(bundle.manifest),
        calibration="none: for timing alone",
        ranges="min-max",
        samples=1,
        target_psnr_db=0.0,
        total_flops=sum(count_flops(bundle.graph_path(graph)).total for graph in UNET_GRAPHS),
        layers=tuple(layers),
    )


def _planned(layer: Layer) -> LayerPlan:
    excluded = excluded_by_rule(layer)
    return LayerPlan(
        graph=layer.graph,
        name=layer.name,
        op=layer.op,
        mode=FLOAT if excluded else W8A8,
        why=excluded or "for timing: every layer that no rule keeps out",
        flops=layer.flops,
        activation=layer.activation,
    )


def main() -> None:
    """Make one bundle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, help="with ONNX and OpenVINO graphs")
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    run_explained(lambda: print(write_for_timing(open_bundle(asked.bundle), asked.out).root))


if __name__ == "__main__":
    main()

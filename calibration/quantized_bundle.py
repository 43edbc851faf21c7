"""Bundle + plan -> a new bundle whose planned graphs hold Q/DQ pairs; all else is the same.

Other graphs and the tokenizer are linked or copied. Compiled forms are left behind: they are those
of the float graphs. The plan goes along, so that the result says how it was made.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiue_export.bundle.manifest import GraphRecord, Manifest
from tiue_export.bundle.read import Bundle, file_records, records_below
from tiue_export.bundle.write import link_or_copy, write_manifest
from tiue_export.errors import UsageError, unknown_name
from tiue_export.proof.quantization_plan import (
    PLAN_FILE,
    VERDICT_FILE,
    QuantizationPlan,
)

from .onnx_layers import find_folds, find_layers
from .qdq_onnx import SCALES, matched_folds, write_qdq


def write_quantized_graphs(
    bundle: Bundle, plan: QuantizationPlan, folder: Path, scales: str = "auto"
) -> Bundle:
    """Write a bundle into the empty `folder` of `new_bundle`; it opens once that is in place.

    Raises `UsageError` for a plan that quantizes nothing.
    """
    if scales not in SCALES:
        raise unknown_name("scales", scales, SCALES)
    if not any(plan.of(graph) for graph in bundle.manifest.graphs):
        raise UsageError(
            "the plan quantizes no layer",
            "Lower --target-psnr, or look at the plan's losses: --plots FOLDER.",
        )
    graphs: dict[str, GraphRecord] = {}
    for name, record in bundle.manifest.graphs.items():
        kind = plan.kind(name)
        if kind is None:
            link_files(bundle.root, folder, record.files if record.has_onnx else ())
            graphs[name] = record
            continue
        source = bundle.graph_path(name)
        layers = find_layers(source, name, bundle.manifest.batch or 1)
        folds = matched_folds(plan, name, find_folds(source, layers))
        path = write_qdq(source, folder / name, layers, plan.of(name), folds, scales)
        graphs[name] = replace(
            record,
            path=path.relative_to(folder).as_posix(),
            files=records_below(folder, name),
            precision=kind,
        )
    return finish(bundle, folder, plan, replace(bundle.manifest, graphs=graphs, compiled={}))


def finish(bundle: Bundle, folder: Path, plan: QuantizationPlan, manifest: Manifest) -> Bundle:
    """Bring the bundle's other files and the plan into `folder`, and write its manifest."""
    link_files(bundle.root, folder, manifest.files)
    (folder / PLAN_FILE).parent.mkdir(exist_ok=True)
    (folder / PLAN_FILE).write_text(plan.to_json(), "utf-8")
    files = {**manifest.files, **file_records(folder, [PLAN_FILE])}
    # Parity was measured on the float graphs; the verdict brings its own.
    finished = replace(manifest, files=files, parity=(), parity_loss_allowed=False)
    write_manifest(folder, finished)
    return Bundle(folder, finished)


def add_verdict(bundle: Bundle, verdict: Mapping[str, Any], manifest: Manifest) -> None:
    """Put the verdict into the bundle, with the manifest that goes with it."""
    text = json.dumps(verdict, indent=1, allow_nan=False) + "\n"
    (bundle.root / VERDICT_FILE).write_text(text, "utf-8")
    files = {**manifest.files, **file_records(bundle.root, [VERDICT_FILE])}
    write_manifest(bundle.root, replace(manifest, files=files))


def link_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Bring files to the same place below `target`: hard links where the disk has them."""
    for name in names:
        link_or_copy(source / name, target / name)

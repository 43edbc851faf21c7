"""The torch reference: the student's own graphs in float32, behind the runtime interface."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tiue_export.bundle import Bundle
from tiue_export.checkpoint import load_student
from tiue_export.errors import CheckpointError, UsageError
from tiue_export.graphs import ExportOptions, Graph, build_graphs
from tiue_export.specs import Array, Feeds, RuntimeOptions


class TorchRuntime:
    """Runs the fp32 twin of each graph; feeds and outputs keep the bundle's dtypes."""

    name = "torch"

    def __init__(self, bundle: Bundle, graphs: list[Graph], device: str) -> None:
        self.device = device
        self._bundle = bundle
        self._modules = {g.spec.name: g.module.to(device) for g in graphs}

    def run(self, graph: str, feeds: Feeds) -> dict[str, Array]:
        """Run one graph in float32."""
        tensors = [_wide(array).to(self.device) for array in feeds.values()]
        with torch.no_grad():
            outputs = self._modules[graph](*tensors)
        specs = self._bundle.spec(graph).outputs
        return {
            spec.name: output.cpu().numpy().astype(spec.dtype)
            for spec, output in zip(specs, outputs, strict=True)
        }

    def close(self) -> None:
        """Drop the modules."""
        self._modules.clear()


def _wide(array: Array) -> torch.Tensor:
    copy = np.array(array)
    return torch.from_numpy(copy.astype(np.float32) if copy.dtype.kind == "f" else copy)


def open_runtime(bundle: Bundle, options: RuntimeOptions) -> TorchRuntime:
    """Load the bundle's own student from `options.checkpoint`; another one is refused by hash."""
    if options.checkpoint is None:
        raise UsageError(
            "the torch runtime runs the student itself and needs its checkpoint",
            f"Add --ckpt {bundle.manifest.source.name} (and --base as at the export).",
        )
    manifest = bundle.manifest
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    student = load_student(
        Path(options.checkpoint),
        options.base,
        family=None if manifest.source.family == "custom" else manifest.source.family,
        steps=manifest.schedule.steps,
        allow_other_steps=True,
    )
    if student.source.sha256 != manifest.source.sha256:
        raise CheckpointError(
            f"{options.checkpoint} is not the student of this bundle: its SHA-256 is "
            f"{student.source.sha256[:12]}..., the bundle's {manifest.source.sha256[:12]}...",
            f"Give the checkpoint named {manifest.source.name}, or export this one.",
        )
    student.schedule = manifest.schedule
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    graphs = build_graphs(
        student,
        ExportOptions(
            precision="fp32",
            height=manifest.height_px,
            width=manifest.width_px,
            batch=manifest.batch or 1,
            hoist=manifest.hoisted,
        ),
    )
    return TorchRuntime(bundle, graphs, device)

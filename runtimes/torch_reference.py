"""The torch reference: the student's own graphs in float32, behind the runtime interface."""

from __future__ import annotations

import numpy as np
import torch

from tiue_export.bundle.read import Bundle
from tiue_export.errors import RuntimeFailure, UsageError, unknown_name
from tiue_export.export.own_student import fp32_options, open_student
from tiue_export.graphs.build import Graph, build_graphs
from tiue_export.methods.load import CheckpointRequest
from tiue_export.specs import Array, Feeds, RuntimeOptions


class TorchRuntime:
    """Runs the fp32 twin of each graph; feeds and outputs keep the bundle's dtypes."""

    name = "torch"

    def __init__(self, bundle: Bundle, graphs: list[Graph], device: str) -> None:
        self.device = device
        # Float32 inside, but its inputs and outputs are rounded as the bundle's are.
        self.precision = bundle.manifest.precision
        self._bundle = bundle
        self._modules = {g.spec.name: g.module.to(device) for g in graphs}

    def run(self, graph: str, feeds: Feeds) -> dict[str, Array]:
        """Run one graph in float32."""
        if not self._modules:
            raise RuntimeFailure("the torch runtime is closed", "Open it again.")
        spec = self._bundle.spec(graph)
        tensors = [_wide(feeds[tensor.name]).to(self.device) for tensor in spec.inputs]
        with torch.no_grad():
            outputs = self._modules[graph](*tensors)
        return {
            spec.name: output.cpu().numpy().astype(spec.dtype)
            for spec, output in zip(spec.outputs, outputs, strict=True)
        }

    def close(self) -> None:
        """Drop the modules."""
        self._modules.clear()


def _device(asked: str) -> str:
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": _has_mps()}
    if asked == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if usable[name])
    if asked not in usable:
        raise unknown_name("device", asked, usable)
    if not usable[asked]:
        raise RuntimeFailure(
            f"this torch ({torch.__version__}) finds no {asked} device", "Use --device cpu."
        )
    return asked


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def _wide(array: Array) -> torch.Tensor:
    copy = np.array(array)
    return torch.from_numpy(copy.astype(np.float32) if copy.dtype.kind == "f" else copy)


def open_runtime(bundle: Bundle, options: RuntimeOptions) -> TorchRuntime:
    """Load the bundle's own student from `options.checkpoint`; another one is refused by hash."""
    if options.checkpoint is None:
        raise UsageError(
            "the torch runtime runs the student itself and needs its checkpoint",
            "generate and parity take it: --ckpt CHECKPOINT, which is "
            f"{bundle.manifest.source.name} (with --base as at the export).",
        )
    manifest = bundle.manifest
    device = _device(options.device)
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"--threads is {options.threads}; expected 1 or more")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    request = CheckpointRequest(
        options.checkpoint,
        options.base,
        options.vae,
        lora=options.lora,
        embedding=options.embedding,
        controlnet=options.controlnet,
    )
    student = open_student(request, manifest)
    size = manifest.height_px, manifest.width_px
    graphs = build_graphs(student, fp32_options(manifest, size), only=tuple(manifest.graphs))
    return TorchRuntime(bundle, graphs, device)

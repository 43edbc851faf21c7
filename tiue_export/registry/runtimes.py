"""Names to implementations. Runtimes live outside the hub and are imported only on use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from tiue_export.errors import UsageError, unknown_name
from tiue_export.registry.packages import require
from tiue_export.registry.support import require_support
from tiue_export.specs import Runtime, RuntimeOptions

if TYPE_CHECKING:
    from tiue_export.bundle.read import Bundle


@dataclass(frozen=True)
class RuntimeEntry:
    """One runtime: `opener` is "module:function", `needs` the modules it imports.

    `automatic`: a bundle is all it needs, so that `--runtime auto` may choose it.
    """

    opener: str
    needs: tuple[str, ...]
    extra: str
    summary: str
    chooses_precision: bool = False
    automatic: bool = True


RUNTIMES: Mapping[str, RuntimeEntry] = {
    "ort": RuntimeEntry(
        "tiue_export.runtimes.ort.runtime:open_runtime",
        ("onnxruntime",),
        "ort",
        "ONNX Runtime on CPU or CUDA",
    ),
    "openvino": RuntimeEntry(
        "tiue_export.runtimes.openvino:open_runtime",
        ("openvino",),
        "openvino",
        "OpenVINO on Intel CPUs, GPUs and NPUs; fastest on CPUs",
        chooses_precision=True,
    ),
    "coreml": RuntimeEntry(
        "tiue_export.runtimes.coreml.runtime:open_runtime",
        ("coremltools",),
        "coreml",
        "Core ML on a Mac; elsewhere an evaluator of its packages, slow but exact",
        chooses_precision=True,
        # Elsewhere it would be the evaluator: a proof, not a way to draw.
        automatic=sys.platform == "darwin",
    ),
    "coreai": RuntimeEntry(
        "tiue_export.runtimes.coreai:open_runtime",
        ("coreai",),
        "coreai",
        "Core AI (beta) on macOS 27; elsewhere Apple's interpreter on the CPU",
        chooses_precision=True,
        automatic=False,
    ),
    # Which TensorRT it needs depends on the bundle's engines; the runtime says what is missing.
    "trt": RuntimeEntry(
        "tiue_export.runtimes.trt.runtime:open_runtime",
        (),
        "trt",
        "TensorRT or TensorRT-RTX engines on an NVIDIA GPU; fastest there",
    ),
    "torch": RuntimeEntry(
        "tiue_export.runtimes.torch_reference:open_runtime",
        ("torch", "diffusers", "transformers"),
        "export",
        "the student itself in PyTorch: ground truth, needs --ckpt",
        automatic=False,
    ),
    "fake": RuntimeEntry(
        "tiue_export.runtimes.fake:open_runtime",
        (),
        "",
        "right shapes, meaningless pictures: for testing applications",
        automatic=False,
    ),
}

_OPTIONS_OF_SOME: Mapping[str, tuple[str, ...]] = {
    "provider": ("ort",),
    "cuda_graph": ("ort", "trt"),
}


def open_runtime(name: str, bundle: Bundle, options: RuntimeOptions) -> Runtime:
    """Open a runtime by name; unknown names and missing packages are explained."""
    entry = RUNTIMES.get(name)
    if entry is None:
        raise unknown_name("runtime", name, RUNTIMES)
    require(f"the {name} runtime", entry.needs, entry.extra)
    own = ("auto", bundle.manifest.precision)
    if options.precision not in own and not entry.chooses_precision:
        raise UsageError(
            f"the {name} runtime computes in its bundle's precision, {bundle.manifest.precision}",
            f"Leave --precision {options.precision} out, or export a bundle in that precision.",
        )
    for option, takers in _OPTIONS_OF_SOME.items():
        if getattr(options, option) is not None and name not in takers:
            raise UsageError(
                f"the {name} runtime takes no --{option.replace('_', '-')}",
                f"It is for --runtime {' and '.join(takers)}.",
            )
    if options.cuda_graph:
        require_support("cuda-graph", bundle)
    module, _, function = entry.opener.partition(":")
    return cast(Runtime, getattr(importlib.import_module(module), function)(bundle, options))

"""Backends: one entry says all that the program knows of each, and opens it by name.

What draws (a runtime, in runtimes/), what makes its form of a bundle (an exporter, in export/), and
whatever doctor, cache, bench, init, --help and `--runtime auto` ask of it. Both are reached by name
on use: nothing here imports a backend's library.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from tiue_export.errors import UsageError, unknown_name
from tiue_export.registry.packages import require
from tiue_export.system.snapdragon import ARCHITECTURES, may_be_snapdragon

if TYPE_CHECKING:
    from tiue_export.bundle.read import Bundle
    from tiue_export.specs import Runtime, RuntimeOptions
    from tiue_export.system.progress import Observer


class Exporter(Protocol):
    """What adds a form to a bundle by a backend's default options, as `compile_form` does it."""

    def __call__(
        self,
        bundle: Bundle,
        *,
        force: bool = False,
        allow_parity_loss: bool = False,
        observer: Observer | None = None,
    ) -> Bundle: ...


@dataclass(frozen=True)
class BackendEntry:
    """One backend. Names of code are "module:attribute"; `needs` are modules its runtime imports.

    Help: `title` is its product, `summary` a line for --runtime, `device_words` what --device takes
    beside auto and cpu, `options` those of `RuntimeOptions` that it alone or few others take.

    Runtime: `chooses_precision` where the form does not decide it, and then `precisions` names a
    function that lists what this machine computes in; `automatic` where a bundle is all it needs,
    so that `--runtime auto` and bench may choose it; `on_gpu` where it needs a GPU; `emulated`
    where an emulator stands in for the device here, whose time says nothing of it.

    Form: `folders` are where it lies in a bundle (none: the ONNX graphs are what is drawn with),
    `exporter` makes it and needs `export_needs` too; `from_student`: of the checkpoint, not of the
    bundle's ONNX files. `command`: the program has a command for it with options of its own;
    without it, one is made of the exporter.

    Machine: `check` names doctor's checks, None asks for the modules alone; `packages` are the
    distributions whose versions decide speed; `caches` are kinds of `tiue-export cache` with their
    meaning; `devices` those of `tiue-export init` that it is for. `made_by_bench`: bench may make
    the form for graphs of ordinary sampling, to measure them.
    """

    title: str
    summary: str
    opener: str
    needs: tuple[str, ...] = ()
    extra: str = ""
    device_words: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    chooses_precision: bool = False
    precisions: str | None = None
    automatic: bool = True
    on_gpu: bool = False
    emulated: bool = False
    folders: tuple[str, ...] = ()
    exporter: str | None = None
    export_needs: tuple[str, ...] = ()
    from_student: bool = False
    command: bool = False
    check: str | None = None
    packages: tuple[str, ...] = ()
    caches: Mapping[str, str] = field(default_factory=dict)
    devices: Mapping[str, str] = field(default_factory=dict)
    made_by_bench: bool = False


BACKENDS: Mapping[str, BackendEntry] = {
    "ort": BackendEntry(
        title="ONNX Runtime",
        summary="ONNX Runtime on CPU or CUDA",
        opener="tiue_export.runtimes.ort.runtime:open_runtime",
        needs=("onnxruntime",),
        extra="ort",
        device_words=("cuda",),
        options=("provider", "cuda_graph"),
        check="tiue_export.apps.doctor:check_onnx_runtime",
        packages=("onnxruntime", "onnxruntime-gpu"),
        caches={"onnxruntime-rtx": "kernels of ONNX Runtime on RTX"},
        devices={"arm": "another processor (Raspberry Pi, Graviton): ONNX Runtime"},
        made_by_bench=True,
    ),
    "openvino": BackendEntry(
        title="OpenVINO",
        summary="OpenVINO on Intel CPUs, GPUs and NPUs; fastest on CPUs",
        opener="tiue_export.runtimes.openvino:open_runtime",
        needs=("openvino",),
        extra="openvino",
        device_words=("gpu", "npu"),
        chooses_precision=True,
        precisions="tiue_export.system.openvino_core:native_precisions",
        folders=("openvino",),
        exporter="tiue_export.export.openvino:compile_openvino",
        command=True,
        packages=("openvino",),
        caches={"openvino": "graphs compiled by OpenVINO"},
        devices={"cpu": "Intel or AMD processor: OpenVINO"},
        made_by_bench=True,
    ),
    "coreml": BackendEntry(
        title="Core ML",
        summary="Core ML on a Mac; elsewhere an evaluator of its packages, slow but exact",
        opener="tiue_export.runtimes.coreml.runtime:open_runtime",
        needs=("coremltools",),
        extra="coreml",
        device_words=("gpu", "ane", "evaluator"),
        chooses_precision=True,
        # Elsewhere it would be the evaluator: a proof, not a way to draw.
        automatic=sys.platform == "darwin",
        folders=("coreml",),
        exporter="tiue_export.export.coreml.bundle:compile_coreml",
        export_needs=("sklearn", "torch", "diffusers"),
        from_student=True,
        command=True,
        check="tiue_export.apps.doctor:check_core_ml",
        packages=("coremltools",),
        caches={"coreml": "packages compiled by Core ML"},
        devices={"mac": "Mac: Core ML", "iphone": "iPhone: Core ML", "ipad": "iPad: Core ML"},
    ),
    "coreai": BackendEntry(
        title="Core AI (beta)",
        summary="Core AI (beta) on macOS 27; elsewhere Apple's interpreter on the CPU",
        opener="tiue_export.runtimes.coreai:open_runtime",
        needs=("coreai",),
        extra="coreai",
        chooses_precision=True,
        automatic=False,
        folders=("coreai",),
        exporter="tiue_export.export.coreai:compile_coreai",
        export_needs=("coreai_torch",),
        from_student=True,
        command=True,
        packages=("coreai-core", "coreai-torch"),
    ),
    "trt": BackendEntry(
        title="TensorRT",
        summary="TensorRT or TensorRT-RTX engines on an NVIDIA GPU; fastest there",
        opener="tiue_export.runtimes.trt.runtime:open_runtime",
        # Which TensorRT it needs depends on the bundle's engines; the runtime says what is missing.
        extra="trt",
        options=("cuda_graph",),
        on_gpu=True,
        folders=("trt", "trt-rtx"),
        exporter="tiue_export.export.trt.bundle:compile_trt",
        command=True,
        check="tiue_export.apps.doctor:check_tensorrt",
        packages=(
            "tensorrt-cu12",
            "tensorrt-cu13",
            "tensorrt",
            "tensorrt-rtx-cu13",
            "polygraphy",
            "cuda-bindings",
        ),
        caches={
            "tensorrt-rtx": "kernels compiled by TensorRT-RTX",
            "timings": "TensorRT's timings of kernels",
        },
        devices={
            "rtx": "NVIDIA RTX card: TensorRT-RTX",
            "nvidia": "NVIDIA GPU of a server: TensorRT",
            "jetson": "NVIDIA Jetson: TensorRT, built on the device",
        },
    ),
    "qnn": BackendEntry(
        title="Snapdragon NPU",
        summary="the NPU of a Snapdragon; elsewhere Qualcomm's emulator of it, slow but exact",
        opener="tiue_export.runtimes.qnn:open_runtime",
        needs=("onnxruntime", "onnxruntime_qnn"),
        extra="qnn",
        device_words=("npu", "emulator", *ARCHITECTURES),
        # Elsewhere it would be the emulator: a proof, not a way to draw.
        automatic=may_be_snapdragon(),
        emulated=not may_be_snapdragon(),
        folders=tuple(f"qnn-{architecture}" for architecture in ARCHITECTURES),
        exporter="tiue_export.export.qnn.bundle:compile_qnn",
        command=True,
        check="tiue_export.apps.doctor:check_snapdragon",
        packages=("onnxruntime-qnn",),
        devices={
            "snapdragon": "Snapdragon phone or tablet: its NPU",
            "snapdragon-pc": "Windows on Snapdragon: its NPU",
        },
    ),
    "torch": BackendEntry(
        title="PyTorch",
        summary="the student itself in PyTorch: ground truth, needs --ckpt",
        opener="tiue_export.runtimes.torch_reference:open_runtime",
        needs=("torch", "diffusers", "transformers"),
        extra="export",
        automatic=False,
    ),
}


def backend_named(name: str) -> BackendEntry:
    """The entry of a runtime; an unknown name is explained."""
    entry = BACKENDS.get(name)
    if entry is None:
        raise unknown_name("runtime", name, BACKENDS)
    return entry


def open_runtime(name: str, bundle: Bundle, options: RuntimeOptions) -> Runtime:
    """Open a runtime by name; unknown names and missing packages are explained."""
    entry = backend_named(name)
    require(f"the {name} runtime", entry.needs, entry.extra)
    own = ("auto", bundle.manifest.precision)
    if options.precision not in own and not entry.chooses_precision:
        raise UsageError(
            f"the {name} runtime computes in its bundle's precision, {bundle.manifest.precision}",
            f"Leave --precision {options.precision} out, or export a bundle in that precision.",
        )
    for option in ("provider", "cuda_graph"):
        takers = [taker for taker, each in BACKENDS.items() if option in each.options]
        if getattr(options, option) is not None and name not in takers:
            raise UsageError(
                f"the {name} runtime takes no --{option.replace('_', '-')}",
                f"It is for --runtime {' and '.join(takers)}.",
            )
    if options.cuda_graph:
        # Brings numpy, which --help, that reads the table above, does without.
        from tiue_export.registry.support import require_support

        require_support("cuda-graph", bundle)
    return cast("Runtime", _attribute(entry.opener)(bundle, options))


def open_exporter(name: str) -> Exporter:
    """What makes the form of a backend that has one of its own, from a bundle alone."""
    names = [name for name, entry in BACKENDS.items() if entry.exporter and not entry.from_student]
    exporter = backend_named(name).exporter
    if name not in names or exporter is None:
        raise unknown_name("form of a bundle's ONNX graphs", name, names)
    return cast(Exporter, _attribute(exporter))


def native_precisions(name: str) -> tuple[str, ...]:
    """What a runtime computes in on this machine's processor; "auto" where its form decides."""
    entry = backend_named(name)
    if entry.precisions is None:
        return ("auto",)
    return tuple(_attribute(entry.precisions)())


def doctor_checks(entry: BackendEntry) -> Callable[[], list[Any]] | None:
    """The checks that an entry names for `tiue-export doctor`; None: its modules say enough."""
    return None if entry.check is None else cast("Callable[[], list[Any]]", _attribute(entry.check))


def _attribute(name: str) -> Any:
    """ "module:attribute" -> the attribute; its module is imported now."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)

"""OpenVINO: Intel CPUs, GPUs and NPUs, in a precision that is always named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from tiue_export.bundle.read import Bundle
from tiue_export.errors import BundleError, RuntimeFailure, UsageError, first_line, unknown_name
from tiue_export.specs import Array, Feeds, RuntimeOptions
from tiue_export.system.command_line import command_line
from tiue_export.system.kept_folder import KeptFolder
from tiue_export.system.openvino_core import arithmetic_of, import_openvino, openvino_core

ov = import_openvino()

_FOLDER = "openvino"
_TYPES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
# From exact to coarse: what a picture has passed through is the coarsest of all.
_COARSENESS = ("fp32", "fp16", "bf16")


class OpenvinoRuntime:
    """One compiled model per graph, opened on first use and kept."""

    name = "openvino"

    def __init__(
        self, bundle: Bundle, core: Any, device: str, arithmetic: str, options: RuntimeOptions
    ) -> None:
        compiled = bundle.manifest.compiled[_FOLDER]
        used = (bundle.manifest.precision, str(compiled.flags["weights"]), arithmetic)
        self.precision = max(used, key=_COARSENESS.index)
        self.device = f"{device.lower()} {arithmetic}"
        self._bundle, self._core, self._target = bundle, core, device
        self._config = _config(device, arithmetic, options)
        self._keep = not options.low_memory
        self._requests: dict[str, Any] = {}
        self._closed = False

    def run(self, graph: str, feeds: Feeds) -> dict[str, Array]:
        """Run one graph; outputs are fresh arrays."""
        request = self._request(graph)
        spec = self._bundle.spec(graph)
        try:
            request.infer({name: np.ascontiguousarray(array) for name, array in feeds.items()})
            # The request's own memory is written again by the next run.
            outputs = {t.name: np.array(request.get_tensor(t.name).data) for t in spec.outputs}
        except Exception as error:  # OpenVINO raises RuntimeError and its own kinds
            raise RuntimeFailure(f"OpenVINO failed in {graph}: {first_line(error)}") from error
        if not self._keep:
            self._requests.clear()
        return outputs

    def close(self) -> None:
        """Drop all models and their memory."""
        self._requests.clear()
        self._closed = True

    def _request(self, graph: str) -> Any:
        if self._closed:
            raise RuntimeFailure("the openvino runtime is closed", "Open it again.")
        if graph not in self._requests:
            path = self._bundle.root / self._bundle.manifest.compiled[_FOLDER].graphs[graph].path
            try:
                model = self._compiled(graph, path)
            except Exception as error:
                raise RuntimeFailure(
                    f"OpenVINO {ov.__version__} cannot compile {graph} for {self._target}: "
                    f"{first_line(error)}",
                    "Check `tiue-export doctor`, or use --device cpu.",
                ) from error
            self._requests[graph] = model.create_infer_request()
        return self._requests[graph]

    def _compiled(self, graph: str, path: Path) -> Any:
        """The model, by what an earlier start kept of it where that is whole."""
        kept = KeptFolder(_FOLDER, self._key(graph, path))
        if kept.place is None:
            return self._core.compile_model(path, self._target, self._config)
        # The weights stay in the bundle, whose hashes are checked: 5.6 MB are kept and not 4.6 GB
        # (SD 2.1 shape, two precisions, OpenVINO 2026.4 on the CPU), and in bf16 the start takes
        # the same 2.7 s, of 3.6 s without a cache.
        caching = {"CACHE_DIR": str(kept.place), "CACHE_MODE": "OPTIMIZE_SIZE"}
        try:
            model = self._core.compile_model(path, self._target, {**self._config, **caching})
        except Exception:
            kept.drop()
            # The cache may be full. What is wrong with the model itself is wrong without it too.
            return self._core.compile_model(path, self._target, self._config)
        if not kept.is_whole:
            kept.save()
        return model

    def _key(self, graph: str, path: Path) -> str:
        """Of all that decides the compiled model; its place, for that is where its weights are."""
        identity = self._bundle.manifest.compiled[_FOLDER].graphs[graph].identity
        parts = (identity, str(path.resolve()), self._target, self._config, ov.__version__)
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return f"{graph}-{digest[:16]}"


def open_runtime(bundle: Bundle, options: RuntimeOptions) -> OpenvinoRuntime:
    """Open on `options.device` (auto and cpu: the CPU; gpu, npu) in `options.precision`.

    Precision auto is bf16 where the device computes it natively, else fp32 (fp16 on a GPU or NPU).
    """
    if _FOLDER not in bundle.manifest.compiled:
        raise BundleError(
            f"{bundle.root} has no OpenVINO graphs",
            "Make them: " + command_line("openvino", "--bundle", bundle.root),
        )
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"--threads is {options.threads}; expected 1 or more")
    core = openvino_core()
    device = _device(core, options.device)
    return OpenvinoRuntime(bundle, core, device, arithmetic_of(device, options.precision), options)


def _device(core: Any, wanted: str) -> str:
    """OpenVINO's name of the device; GPU.1 and the like are passed on."""
    device = "CPU" if wanted == "auto" else wanted.upper()
    available = [str(name) for name in core.available_devices]
    families = {name.partition(".")[0] for name in available}
    if device.partition(".")[0] not in {"CPU", "GPU", "NPU"}:
        raise unknown_name("device", wanted, ("auto", "cpu", "gpu", "npu"))
    if device not in available and device not in families:
        raise RuntimeFailure(
            f"OpenVINO finds no {device} here; it finds {', '.join(available)}",
            "Install Intel's driver for it, or use --device cpu.",
        )
    return device


def _config(device: str, arithmetic: str, options: RuntimeOptions) -> dict[str, Any]:
    config: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": _TYPES[arithmetic],
        "PERFORMANCE_HINT": "LATENCY",
    }
    if device == "CPU" and options.threads is not None:
        config["INFERENCE_NUM_THREADS"] = options.threads
    return config

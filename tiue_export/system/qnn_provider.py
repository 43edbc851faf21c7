"""Qualcomm's provider for ONNX Runtime: a plug-in that compiles for and runs on an HTP.

On x86-64 Linux its package holds the compiler and an emulator of the HTP; on a Snapdragon it opens
the processor itself (docs of onnxruntime-qnn 2.7).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tiue_export.system.onnx_runtime import import_onnx_runtime

NEEDS = ("onnxruntime", "onnxruntime_qnn")
_ERRORS_ONLY = 3


def qnn_versions() -> tuple[str, str]:
    """Versions of the plug-in and of the Qualcomm SDK in it, such as ("2.7.0", "2.51.0")."""
    module = importlib.import_module("onnxruntime_qnn.build_and_package_info")
    return str(module.__version__), str(module.qnn_version)


def has_npu() -> bool:
    """Whether the plug-in finds a real HTP here; else it has its emulator."""
    ort = import_onnx_runtime()
    return any(device.device.type == ort.OrtHardwareDeviceType.NPU for device in _devices(ort))


def qnn_session(
    model: Path,
    settings: Mapping[str, str],
    entries: Mapping[str, str] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Any:
    """A session of `model` on the HTP alone: nothing may be left to ONNX Runtime's CPU kernels.

    `settings` are the provider's (docs of the QNN execution provider), `entries` the session's,
    `sizes` of the model's open axes. Raises what ONNX Runtime raises.
    """
    ort = import_onnx_runtime()
    devices = _devices(ort)
    npus = [each for each in devices if each.device.type == ort.OrtHardwareDeviceType.NPU]
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    for key, value in {"session.disable_cpu_ep_fallback": "1", **(entries or {})}.items():
        options.add_session_config_entry(key, value)
    for axis, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(axis, size)
    backend = importlib.import_module("onnxruntime_qnn").get_qnn_htp_path()
    options.add_provider_for_devices((npus or devices)[:1], {"backend_path": backend, **settings})
    with _without_greeting():
        # By default ONNX Runtime would print the failure and try its CPU kernels.
        return ort.InferenceSession(str(model), options, enable_fallback=0)


def _devices(ort: Any) -> list[Any]:
    """The plug-in's devices; it is registered once in a process."""
    qnn = importlib.import_module("onnxruntime_qnn")
    name = qnn.get_ep_name()
    found = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not found:
        with _without_greeting():
            ort.register_execution_provider_library(name, qnn.get_library_path())
        found = [device for device in ort.get_ep_devices() if device.ep_name == name]
    return found


@contextlib.contextmanager
def _without_greeting() -> Iterator[None]:
    """The emulator greets on standard output, where `--json` has its object."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)

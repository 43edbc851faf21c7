"""TensorRT-RTX as a plug-in provider of ONNX Runtime: found, registered, explained when it fails.

The plug-in (`onnxruntime-ep-nv-tensorrt-rtx`) brings TensorRT-RTX along and compiles the bundle's
ONNX graphs for the card when they are loaded; no engines need to be in the bundle.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from tiue_export.errors import MissingExtraError, RuntimeFailure, first_line
from tiue_export.system.onnx_runtime import import_onnx_runtime

ort = import_onnx_runtime()

PROVIDER = "NvTensorRTRTXExecutionProvider"
_PACKAGE = "onnxruntime-ep-nv-tensorrt-rtx"


@cache
def rtx_devices() -> list[Any]:
    """The plug-in's devices on this machine, at least one.

    Raises `MissingExtraError` without the plug-in, `RuntimeFailure` for an ONNX Runtime without
    plug-ins, no driver, or no card that TensorRT-RTX supports.
    """
    if not hasattr(ort, "register_execution_provider_library"):
        raise RuntimeFailure(
            f"this onnxruntime ({ort.__version__}) takes no plug-in providers; expected 1.24 or "
            "newer",
            f"pip install 'onnxruntime>=1.24' {_PACKAGE}",
        )
    try:
        plugin = importlib.import_module(_PACKAGE.replace("-", "_"))
    except ImportError as error:
        raise MissingExtraError(
            f"--provider rtx needs {_PACKAGE}, which is not installed",
            f"pip uninstall onnxruntime-gpu; pip install 'onnxruntime>=1.24' {_PACKAGE}",
        ) from error
    return registered_devices(plugin.get_ep_name(), plugin.get_library_path())


def registered_devices(name: str, library: str) -> list[Any]:
    """Register a plug-in library with ONNX Runtime and list the devices it can use."""
    try:
        ort.register_execution_provider_library(name, library)
    except Exception as error:  # onnxruntime's exceptions share no public base class
        raise RuntimeFailure(
            f"ONNX Runtime cannot load {name}: {first_line(error)}",
            "Without libcuda there is no NVIDIA driver: check nvidia-smi, or use --provider cpu.",
        ) from error
    devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise RuntimeFailure(
            f"{name} finds no card that it supports",
            "TensorRT-RTX runs on RTX cards from Ampere on; use --provider cuda or cpu.",
        )
    return devices

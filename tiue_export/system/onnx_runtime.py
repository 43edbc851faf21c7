"""ONNX Runtime, with its telemetry off."""

from __future__ import annotations

import importlib
from typing import Any


def import_onnx_runtime() -> Any:
    """The `onnxruntime` module. Raises `ImportError` where it is not installed, or broken.

    Its builds for Windows report to Microsoft unless told not to (docs/Privacy.md of ONNX Runtime);
    the others take the call and have nothing to switch off.
    """
    module = importlib.import_module("onnxruntime")
    module.disable_telemetry_events()
    return module


def onnx_runtime_part(name: str) -> Any:
    """A module of ONNX Runtime's tools, such as "quantization"; its telemetry is off too."""
    import_onnx_runtime()
    return importlib.import_module(f"onnxruntime.{name}")

"""OpenVINO for this process: imported without its telemetry, one core that lives to the end."""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

from tiue_export.errors import UsageError, unknown_name

# The arithmetics that can be asked for, and OpenVINO's name of the capability each one needs.
_CAPABILITIES = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}


def import_openvino() -> Any:
    """The `openvino` module.

    Its import would report itself to Google Analytics (openvino/tools/ovc/__init__.py of 2026.4)
    whenever `openvino_telemetry` can be imported; where it cannot, OpenVINO and NNCF take stand-ins
    of their own that send nothing.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module("openvino")


@functools.cache
def openvino_core() -> Any:
    """The one `openvino.Core` of this process, never freed.

    Every core loads the CPU plugin anew, which installs a signal stack of its own and restores,
    when freed, the one it had found: of two cores freed in the order they were made, the second
    restores the first's, which is unmapped by then, and the next Ctrl-C is a segmentation fault
    (measured with OpenVINO 2026.4; the code is src/plugins/intel_cpu/src/plugin.cpp,
    SigAltStackSetup, of pull request #11894).
    """
    return import_openvino().Core()


def native_precisions() -> tuple[str, ...]:
    """What the CPU computes natively: fp32, and bf16 where it has instructions for it."""
    capabilities = openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("fp32", "bf16") if "BF16" in capabilities else ("fp32",)


def arithmetic_of(device: str, precision: str) -> str:
    """What `precision` is on a device: "auto" its fastest; one it cannot compute in is refused."""
    native = set(openvino_core().get_property(device, "OPTIMIZATION_CAPABILITIES"))
    offered = [name for name, capability in _CAPABILITIES.items() if capability in native]
    if precision == "auto":
        order = ("bf16", "fp32") if device == "CPU" else ("fp16", "fp32")
        return next((name for name in order if name in offered), "fp32")
    if precision not in _CAPABILITIES:
        raise unknown_name("precision", precision, ("auto", *_CAPABILITIES))
    if precision not in offered:
        raise UsageError(
            f"this {device} does not compute in {precision}; it has {', '.join(offered)}",
            f"Use --precision {offered[0]}.",
        )
    return precision

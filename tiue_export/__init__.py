"""tiue-export: take a distilled TiUE Stable Diffusion student to a device, with proof.

The names below are imported on first use, so that `import tiue_export` stays light (no torch).
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from tiue_export._version import __version__

if TYPE_CHECKING:
    from tiue_export.bundle.read import Bundle, open_bundle
    from tiue_export.drawing.pipeline import Pipeline
    from tiue_export.errors import TiueError
    from tiue_export.export.onnx.bundle import export_onnx
    from tiue_export.graphs.options import ExportOptions
    from tiue_export.methods.load import load_student
    from tiue_export.sampling.ddim import one_pass_plan
    from tiue_export.sampling.plan import Plan
    from tiue_export.sampling.plan_change import PlanChange
    from tiue_export.specs import RuntimeOptions
    from tiue_export.student.model import Student

# Our optimum plugin is a second distribution in optimum's namespace: diffusers says so on import.
logging.getLogger("diffusers.utils.import_utils").addFilter(
    lambda record: "for package optimum" not in record.getMessage()
)

_HOMES = {
    "Bundle": "bundle.read",
    "open_bundle": "bundle.read",
    "load_student": "methods.load",
    "TiueError": "errors",
    "export_onnx": "export.onnx.bundle",
    "ExportOptions": "graphs.options",
    "Pipeline": "drawing.pipeline",
    "PlanChange": "sampling.plan_change",
    "Plan": "sampling.plan",
    "one_pass_plan": "sampling.ddim",
    "RuntimeOptions": "specs",
    "Student": "student.model",
}
__all__ = [
    "Bundle",
    "ExportOptions",
    "Pipeline",
    "Plan",
    "PlanChange",
    "RuntimeOptions",
    "Student",
    "TiueError",
    "__version__",
    "export_onnx",
    "load_student",
    "one_pass_plan",
    "open_bundle",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tiue_export' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tiue_export.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

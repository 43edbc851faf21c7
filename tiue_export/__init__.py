"""tiue-export: take a distilled TiUE Stable Diffusion student to a device, with proof.

The names below are imported on first use, so that `import tiue_export` stays light (no torch).
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from tiue_export._version import __version__

if TYPE_CHECKING:
    from tiue_export.bundle import Bundle, open_bundle
    from tiue_export.checkpoint import load_student
    from tiue_export.errors import TiueError
    from tiue_export.export.onnx_bundle import export_onnx
    from tiue_export.faster.planning import PlanChange
    from tiue_export.graphs import ExportOptions
    from tiue_export.pipeline import Pipeline
    from tiue_export.schedule import Schedule, schedule_from_config
    from tiue_export.specs import RuntimeOptions
    from tiue_export.student import Student

# Our optimum plugin is a second distribution in optimum's namespace: diffusers says so on import.
logging.getLogger("diffusers.utils.import_utils").addFilter(
    lambda record: "for package optimum" not in record.getMessage()
)

_HOMES = {
    "Bundle": "bundle",
    "open_bundle": "bundle",
    "load_student": "checkpoint",
    "TiueError": "errors",
    "export_onnx": "export.onnx_bundle",
    "ExportOptions": "graphs",
    "Pipeline": "pipeline",
    "PlanChange": "faster.planning",
    "Schedule": "schedule",
    "schedule_from_config": "schedule",
    "RuntimeOptions": "specs",
    "Student": "student",
}
__all__ = [
    "Bundle",
    "ExportOptions",
    "Pipeline",
    "PlanChange",
    "RuntimeOptions",
    "Schedule",
    "Student",
    "TiueError",
    "__version__",
    "export_onnx",
    "load_student",
    "open_bundle",
    "schedule_from_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tiue_export' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tiue_export.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

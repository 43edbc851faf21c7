"""Import OpenVINO without its telemetry: drawing a picture sends nothing from the machine."""

from __future__ import annotations

import importlib
import sys
from typing import Any


def import_openvino() -> Any:
    """The `openvino` module.

    Its import would report itself to Google Analytics (openvino/tools/ovc/__init__.py of 2026.4)
    whenever `openvino_telemetry` can be imported; where it cannot, OpenVINO and NNCF take stand-ins
    of their own that send nothing.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module("openvino")

"""Packages that parts of the program need: which are missing, and the line that brings them."""

from __future__ import annotations

import importlib.util

from tiue_export.errors import MissingExtraError
from tiue_export.system.install import install_line

EXPORT_NEEDS = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "psutil",
)

TRAIN_NEEDS = (*EXPORT_NEEDS, "accelerate", "peft", "tensorboard")
SERVER_NEEDS = ("fastapi", "fastapi_offline", "prometheus_client", "uvicorn")


def missing_modules(names: tuple[str, ...]) -> list[str]:
    """Those of the modules that are not installed; none of them is imported."""
    # A dotted name looks behind a namespace: our own plugin file makes "optimum" importable.
    return [name for name in names if not _found(name)]


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def require(what: str, modules: tuple[str, ...], extra: str) -> None:
    """Raise `MissingExtraError` with the pip line unless all modules are installed."""
    missing = missing_modules(modules)
    if missing:
        raise MissingExtraError(
            f"{what} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            "installed",
            install_line(extra),
        )

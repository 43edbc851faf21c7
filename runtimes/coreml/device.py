"""Core ML itself, on macOS: a package compiled once for this system, loaded for a compute unit.

The Neural Engine keeps what it made of a model under the path of the compiled model, so that lies
in the user's cache under a name that says package and system, and is never moved.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiue_export.bundle.manifest import FileRecord
from tiue_export.errors import RuntimeFailure, first_line
from tiue_export.export.coreml.mil.package import TensorType, has_native_library
from tiue_export.specs import Array, Feeds
from tiue_export.system.kept_folder import KeptFolder
from tiue_export.system.quiet import errors_only

# coremltools: models/compute_plan.py, models/model.py (_verify_optimization_hint_input).
_HINTS_SINCE = (15, 0)
_PLANS_SINCE = (14, 4)
_UNIT_OF_DEVICE = {
    "MLCPUComputeDevice": "CPU",
    "MLGPUComputeDevice": "GPU",
    "MLNeuralEngineComputeDevice": "Neural Engine",
}
_CACHE = "coreml"  # the kind of its entries in the cache
_MODEL = "model.mlmodelc"
_LIBRARY = "libcoremlpython"


@dataclass(frozen=True)
class MacSystem:
    """The macOS that runs: its version, and the build that compiled models belong to."""

    version: tuple[int, ...]
    build: str


@dataclass(frozen=True)
class PackageFile:
    """One graph's package: where it lies, which function to run, and the hashes of its files."""

    graph: str
    path: Path
    function: str | None
    inputs: Mapping[str, TensorType]
    files: Mapping[str, FileRecord]

    @property
    def identity(self) -> str:
        """A SHA-256 over the package's content."""
        content = sorted((name, record.sha256) for name, record in self.files.items())
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class NativeModel:
    """A model that Core ML has loaded; `unit` is coremltools' name of where it may run."""

    def __init__(self, package: PackageFile, model: Any, unit: str) -> None:
        self.unit = unit
        self._package, self._model = package, model

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run on `feeds`; floats go in and come out as float32, which is what Python may pass.

        coremltools widens half-precision arrays itself, both ways (models/model.py).
        """
        wide = {
            name: np.ascontiguousarray(array, np.float32 if array.dtype.kind == "f" else np.int32)
            for name, array in feeds.items()
        }
        try:
            outputs: dict[str, Array] = self._model.predict(wide)
        except Exception as error:  # coremltools raises RuntimeError and plain Exception
            raise RuntimeFailure(
                f"Core ML failed in {self._package.graph} on {self.unit}: {first_line(error)}",
                "Try --device cpu or gpu.",
            ) from error
        return outputs


class CoremlDevice:
    """Core ML by way of `library`, the module coremltools."""

    def __init__(self, library: Any, system: MacSystem) -> None:
        self._library, self._system = library, system

    def load(self, package: PackageFile, unit: str) -> NativeModel:
        """Compile where that was not done yet, load for `unit`, and run once on zeros."""
        compiled = self._compiled(package)
        try:
            loaded = self._library.models.CompiledMLModel(
                str(compiled),
                compute_units=getattr(self._library.ComputeUnit, unit),
                function_name=package.function,
                optimization_hints=self._hints(),
            )
        except Exception as error:
            raise RuntimeFailure(
                f"Core ML cannot load {package.graph} for {unit}: {first_line(error)}",
                f"Try --device cpu. If {compiled} is damaged, delete it.",
            ) from error
        model = NativeModel(package, loaded, unit)
        # The first run specializes the model for the hardware; nobody should time that.
        model.run(
            {name: np.zeros(_sides(kind), kind.dtype) for name, kind in package.inputs.items()}
        )
        return model

    def placement(self, package: PackageFile, unit: str) -> dict[str, int]:
        """How many ops Core ML plans to run where; empty before macOS 14.4, which does not say."""
        if self._system.version < _PLANS_SINCE:
            return {}
        try:
            plan = self._library.models.compute_plan.MLComputePlan.load_from_path(
                str(self._compiled(package)),
                compute_units=getattr(self._library.ComputeUnit, unit),
            )
            function = plan.model_structure.program.functions[package.function or "main"]
            usages = [
                plan.get_compute_device_usage_for_mlprogram_operation(operation)
                for operation in function.block.operations
            ]
        except Exception as error:
            raise RuntimeFailure(
                f"Core ML has no compute plan of {package.graph}: {first_line(error)}"
            ) from error
        # Constants run nowhere and have no usage.
        kinds = (type(usage.preferred_compute_device).__name__ for usage in usages if usage)
        return dict(Counter(_UNIT_OF_DEVICE.get(kind, kind) for kind in kinds).most_common())

    def _hints(self) -> dict[str, Any] | None:
        if self._system.version < _HINTS_SINCE:
            return None
        # Loads longer, runs faster: a pipeline loads once and draws many times.
        return {"specializationStrategy": self._library.SpecializationStrategy.FastPrediction}

    def _compiled(self, package: PackageFile) -> Path:
        """The compiled model: an earlier start's where it is whole, else made now."""
        build = self._system.build
        kept = KeptFolder(_CACHE, f"{package.graph}-{package.identity[:16]}-macos{build}")
        if kept.place is not None and not kept.is_whole:
            try:
                self._compile(package, str(kept.place / _MODEL))
            except RuntimeFailure:
                kept.drop()
                raise
            kept.save()
        if kept.place is not None:
            return kept.place / _MODEL
        # Nothing can be kept: coremltools takes a temporary place, gone with the process.
        return Path(self._compile(package))

    def _compile(self, package: PackageFile, *place: str) -> str:
        try:
            return str(self._library.models.utils.compile_model(str(package.path), *place))
        except Exception as error:
            raise RuntimeFailure(
                f"Core ML cannot compile {package.graph}: {first_line(error)}",
                f"Its package needs a newer system than macOS {_dotted(self._system.version)}, or "
                "disk space ran out.",
            ) from error


def missing_core_ml() -> str | None:
    """Why packages cannot run natively here; None where they can."""
    if sys.platform != "darwin":
        return f"Core ML is part of macOS, and this is {platform.system()}"
    if not has_native_library(_LIBRARY):
        return f"this coremltools was installed without its library for Core ML, {_LIBRARY}"
    return None


def open_device() -> CoremlDevice:
    """This Mac's Core ML."""
    reason = missing_core_ml()
    if reason is not None:
        raise RuntimeFailure(
            reason,
            "Use --device evaluator, or install the wheel: pip install --only-binary :all: "
            "coremltools",
        )
    with errors_only("coremltools"):
        import coremltools
        import coremltools.models.compute_plan
        import coremltools.models.utils
    return CoremlDevice(coremltools, this_mac())


def this_mac() -> MacSystem:
    """Version and build of the macOS that runs."""
    try:
        build = subprocess.run(
            ["sw_vers", "-buildVersion"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeFailure(f"sw_vers does not say the macOS build: {error}") from error
    version = platform.mac_ver()[0]
    return MacSystem(tuple(int(part) for part in version.split(".")), build)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _sides(kind: TensorType) -> tuple[int, ...]:
    return tuple(side if isinstance(side, int) else 1 for side in kind.shape)

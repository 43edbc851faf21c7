"""Which TensorRT is here, and on which GPU: `tensorrt` (Jetson, servers) or `tensorrt_rtx`.

Both bring one Python API, which 10.3 (JetPack 6) and 11.4 share but for the names in `BEYOND_CORE`;
whoever wants one of those asks `Flavor.has` first. Python 3.10 syntax and numpy only: devices load
this file; TensorRT and the CUDA bindings are imported on use.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tiue_export.errors import MissingExtraError, unknown_name
from tiue_export.system.install import install_line

# Flavour to the folder of its plans in a bundle.
FOLDERS: Mapping[str, str] = {"tensorrt": "trt", "rtx": "trt-rtx"}
# Flavour to the Python module; the module of every TensorRT, whatever its version.
MODULES: Mapping[str, str] = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
TITLES: Mapping[str, str] = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}

# All that this project touches and that 10.3, 10.16, 11.4 and RTX 1.7 do not all have.
BEYOND_CORE = frozenset(
    {
        "ComputeCapability",  # RTX: what an engine built without a GPU is for
        "IBuilderConfig.set_compute_capability",
        "ICudaEngine.create_runtime_config",  # after 10.3
        "IRuntimeConfig",
        "IRuntimeConfig.create_runtime_cache",  # RTX
        "IRuntimeConfig.set_runtime_cache",
        "IRuntimeConfig.cuda_graph_strategy",
        "ICudaEngine.get_engine_stat",
        "ParserError.node_name",
        "Runtime.get_engine_validity",
    }
)

_TEGRA = Path("/etc/nv_tegra_release")
_DRIVER = Path("/sys/module/nvidia/version")
_GPU_SIGNS = (Path("/dev/nvidia0"), Path("/dev/nvhost-gpu"), Path("/dev/nvgpu"), _TEGRA)


@dataclass(frozen=True)
class Flavor:
    """An imported TensorRT: `name` "tensorrt" or "rtx", its module, its version."""

    name: str
    trt: Any
    version: str

    @property
    def folder(self) -> str:
        """Where a bundle keeps this flavour's plans."""
        return FOLDERS[self.name]

    @property
    def title(self) -> str:
        """As people write it, with the version."""
        return f"{TITLES[self.name]} {self.version}"

    def has(self, name: str) -> bool:
        """Whether this version has `name` ("Class" or "Class.attribute") of `BEYOND_CORE`."""
        if name not in BEYOND_CORE:
            raise KeyError(f"{name} is not in BEYOND_CORE: either core or to be added there")
        found: Any = self.trt
        for part in name.split("."):
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """What this RTX can build for without a GPU, such as "8.6"; empty for tensorrt."""
        if not self.has("ComputeCapability"):
            return ()
        names = self.trt.ComputeCapability.__members__
        found = [name[2:] for name in names if name.startswith("SM") and name[2:].isdigit()]
        return tuple(f"{sm[:-1]}.{sm[-1]}" for sm in sorted(found, key=int))


@dataclass(frozen=True)
class Device:
    """One NVIDIA GPU: `compute_capability` such as "8.7"; `cuda` is the newest the driver runs.

    `unified_memory`: the GPU works in the system's memory (Jetson), so free memory is the system's.
    """

    name: str
    compute_capability: str
    driver: str
    cuda: str
    unified_memory: bool = False


def load_flavor(name: str = "auto") -> Flavor:
    """Import a TensorRT; "auto" takes what is installed, tensorrt first where a GPU is there.

    Raises `MissingExtraError` with the line to type on this kind of machine, `UsageError` for an
    unknown name.
    """
    if name not in (*MODULES, "auto"):
        raise unknown_name("TensorRT flavour", name, ["auto", *MODULES])
    if name == "auto":
        installed = installed_flavors()
        if not installed:
            raise MissingExtraError(
                "neither TensorRT nor TensorRT-RTX is installed",
                f"{flavor_install_line('tensorrt')} (on the GPU's machine); for RTX cards, with or "
                f"without a GPU here: {flavor_install_line('rtx')}",
            )
        # Without a GPU only RTX can build anything.
        name = "rtx" if "rtx" in installed and not _gpu_signs() else installed[0]
    return _import_flavor(name)


def installed_flavors() -> list[str]:
    """Flavours whose Python module is installed, tensorrt first; none is imported."""
    return [name for name, module in MODULES.items() if importlib.util.find_spec(module)]


@cache
def _import_flavor(name: str) -> Flavor:
    if not importlib.util.find_spec(MODULES[name]):
        raise MissingExtraError(f"{TITLES[name]} is not installed", flavor_install_line(name))
    try:
        module = importlib.import_module(MODULES[name])
        return Flavor(name, module, str(module.__version__))
    except Exception as error:  # the bindings raise whatever their loader of libraries raises
        raise MissingExtraError(
            f"{TITLES[name]} is installed but does not import: {error}", flavor_install_line(name)
        ) from error


def flavor_install_line(flavor: str) -> str:
    """What to type on this machine to get a flavour."""
    system, machine = platform.system(), platform.machine()
    if flavor == "rtx":
        if machine.lower() in ("x86_64", "amd64") and system != "Darwin":
            return install_line("trt-rtx")
        return "TensorRT-RTX exists for x86-64 Linux and Windows only: build there."
    if _TEGRA.is_file():
        return (
            "TensorRT comes with JetPack: sudo apt install python3-libnvinfer python3-venv && "
            f"python3 -m venv --system-site-packages venv && venv/bin/{install_line('trt')}"
        )
    if system == "Darwin":
        return "TensorRT does not exist for macOS: build on the NVIDIA machine, with --bundle."
    if machine == "aarch64":
        return f"{install_line('trt')} tensorrt-cu13"
    return install_line("trt")


def this_device() -> Device | None:
    """The first visible GPU, or None where there is no GPU or no driver.

    Raises `MissingExtraError` where a GPU seems to be there and only cuda-python is missing.
    """
    cuda = _driver_api()
    if cuda is None:
        return None
    try:
        if int(cuda.cuInit(0)[0]) != 0 or not _value(cuda.cuDeviceGetCount()):
            return None
        return _describe(cuda, _value(cuda.cuDeviceGet(0)))
    except RuntimeError:  # no libcuda: the bindings find the driver at the first call
        return None


def _driver_api() -> Any:
    # `cuda.bindings` from 12.6 on; before, the same functions were in `cuda.cuda`.
    for module in ("cuda.bindings.driver", "cuda.cuda"):
        try:
            return importlib.import_module(module)
        except ImportError:
            continue
    if _gpu_signs():
        raise MissingExtraError(
            "there seems to be an NVIDIA GPU, but cuda-python, which talks to it, is not installed",
            "pip install 'cuda-bindings<13' (13 does not run on JetPack 6)",
        )
    return None


def _describe(cuda: Any, device: Any) -> Device:
    attributes = cuda.CUdevice_attribute

    def number(name: str) -> int:
        key = getattr(attributes, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(_value(cuda.cuDeviceGetAttribute(key, device)))

    version = int(_value(cuda.cuDriverGetVersion()))
    name: bytes = _value(cuda.cuDeviceGetName(128, device))
    return Device(
        name=name.split(b"\0")[0].decode("utf-8", "replace").strip(),
        compute_capability=f"{number('COMPUTE_CAPABILITY_MAJOR')}."
        f"{number('COMPUTE_CAPABILITY_MINOR')}",
        driver=_driver_version() or f"for CUDA {version // 1000}.{version % 1000 // 10}",
        cuda=f"{version // 1000}.{version % 1000 // 10}",
        unified_memory=bool(number("INTEGRATED")),
    )


def _value(result: tuple[Any, ...]) -> Any:
    if int(result[0]) != 0:
        raise RuntimeError(f"CUDA driver: {result[0]}")
    return result[1]


def _driver_version() -> str | None:
    """The kernel driver's version; Jetson's goes by its L4T release ("R36, REVISION: 4.7")."""
    for path in (_DRIVER, _TEGRA):
        try:
            line = path.read_text("utf-8").splitlines()[0]
        except (OSError, IndexError, UnicodeDecodeError):
            continue
        parts = [part.strip(" #") for part in line.split(",")[:2]]
        return ", ".join(part.removesuffix(" (release)") for part in parts)
    return None


def _gpu_signs() -> bool:
    if sys.platform == "win32":
        return (Path(os.environ.get("SYSTEMROOT", "C:/Windows")) / "System32/nvcuda.dll").is_file()
    return any(path.exists() for path in _GPU_SIGNS)

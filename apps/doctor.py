"""`tiue-export doctor`: what is installed, what can run here, and what to type where not."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, replace
from importlib import metadata

from rich.text import Text

from tiue_export._version import __version__
from tiue_export.errors import MissingExtraError
from tiue_export.export.coreml.mil.package import has_native_library
from tiue_export.registry.backends import BACKENDS, BackendEntry, doctor_checks
from tiue_export.registry.packages import EXPORT_NEEDS, SERVER_NEEDS, TRAIN_NEEDS, missing_modules
from tiue_export.system.cache_folder import user_cache_folder
from tiue_export.system.install import install_line
from tiue_export.system.kept_folder import limit_bytes
from tiue_export.system.machine import describe_machine, installed_versions, nvidia_gpus
from tiue_export.system.onnx_runtime import import_onnx_runtime
from tiue_export.system.qnn_provider import NEEDS, has_npu, qnn_versions
from tiue_export.system.snapdragon import SOCS, soc_here
from tiue_export.system.tensorrt_flavor import (
    TITLES,
    flavor_install_line,
    load_flavor,
    this_device,
)

from .draw.fastest_runtime import choice_rows, choice_table
from .report.tables import console, facts_table, megabytes, print_json, titled

# Of no backend in particular.
_PACKAGES = (
    "numpy", "tokenizers", "safetensors", "pillow", "torch", "diffusers", "transformers", "onnx",
    "onnxscript", "accelerate", "optimum",
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One way to use a bundle here. `remedy` is what to type when it cannot be used."""

    name: str
    usable: bool
    detail: str
    remedy: str = ""


def run(as_json: bool) -> None:
    """Print machine, packages and backends."""
    machine = {**describe_machine(), "cache": _cache()}
    named = dict.fromkeys(name for entry in BACKENDS.values() for name in entry.packages)
    packages, backends = installed_versions((*_PACKAGES, *named)), check_backends()
    problems, choices = conflicts(packages), choice_rows()
    if as_json:
        print_json(
            {
                "tiue-export": __version__,
                "machine": machine,
                "packages": packages,
                "backends": [asdict(backend) for backend in backends],
                "runtime_choices": choices,
                "problems": problems,
            }
        )
        return
    installed = ", ".join(f"{n} {v}" for n, v in packages.items() if v)
    about = {**machine, "packages": installed}
    console.print(facts_table(f"tiue-export {__version__}", about.items()))
    table = titled("What works here", "", "backend", "detail", "to make it work")
    for backend in backends:
        mark = Text("yes", "green") if backend.usable else Text("no", "yellow")
        table.add_row(mark, backend.name, backend.detail, backend.remedy)
    console.print(table)
    if choices:
        console.print(choice_table(choices))
    for problem in problems:
        console.print(f"[bold red]problem:[/] {problem}")


def _cache() -> str:
    """Compiled models and what was measured here, and how large it may grow."""
    folder = user_cache_folder()
    size_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return (
        f"{folder}, {megabytes(size_bytes)} of at most {megabytes(limit_bytes())}; "
        "can be deleted at any time (tiue-export cache)"
    )


def check_backends() -> list[Check]:
    """Every way to export or run, tried as far as that costs nothing."""
    return [
        _by_modules("export to ONNX", EXPORT_NEEDS, "export"),
        *(check for name, entry in BACKENDS.items() for check in _checks_of(name, entry)),
        _by_modules("quantize for OpenVINO", ("openvino", "nncf"), "int8"),
        _by_modules("distill a student", TRAIN_NEEDS, "train"),
        _by_modules("studio: the page in the browser", ("gradio", "fastapi", "uvicorn"), "studio"),
        _by_modules("serve: pictures over HTTP", SERVER_NEEDS, "app"),
        _by_modules("serve and generate with --ray", ("ray",), "ray"),
        _by_modules(
            "optimum-cli export tiue", ("optimum.exporters", "torch", "diffusers"), "optimum"
        ),
    ]


def _checks_of(name: str, entry: BackendEntry) -> list[Check]:
    """What the entry names, or whether its modules are there; nothing where it needs none."""
    own = doctor_checks(entry)
    if own is not None:
        return own()
    modules = (*entry.needs, *entry.export_needs)
    if not modules:
        return []
    what = f"convert to {entry.title}, run: {name}" if entry.export_needs else f"run: {name}"
    return [_by_modules(what, modules, entry.extra)]


def conflicts(packages: dict[str, str | None]) -> list[str]:
    """Combinations that are known to break."""
    found = []
    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        found.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "pip uninstall both, then install one."
        )
    return found


def _by_modules(name: str, modules: tuple[str, ...], extra: str) -> Check:
    missing = missing_modules(modules)
    if missing:
        return Check(name, False, f"missing: {', '.join(missing)}", install_line(extra))
    return Check(name, True, "installed")


_WHEEL = "pip install --force-reinstall --only-binary :all: coremltools"


def check_core_ml() -> list[Check]:
    """Converting to packages, which any system can, and running them, natively on macOS alone."""
    names = ("convert to Core ML", "run: coreml")
    missing = missing_modules(("coremltools", "sklearn"))
    if missing:
        install = install_line("coreml")
        return [Check(n, False, f"missing: {', '.join(missing)}", install) for n in names]
    title = f"coremltools {metadata.version('coremltools')}"
    runs = _run_core_ml(names[1], title)
    if not has_native_library("libmilstoragepython"):
        detail = f"{title} without libmilstoragepython"
        return [Check(names[0], False, detail, _WHEEL), runs]
    converts = _by_modules(names[0], ("torch", "diffusers"), "export")
    return [replace(converts, detail=title) if converts.usable else converts, runs]


def _run_core_ml(name: str, title: str) -> Check:
    if platform.system() != "Darwin":
        evaluator = _by_modules(name, ("torch",), "export")
        detail = f"{title}: by the evaluator, slow; Core ML itself is part of macOS"
        return replace(evaluator, detail=detail) if evaluator.usable else evaluator
    if not has_native_library("libcoremlpython"):
        return Check(name, False, f"{title} without libcoremlpython", _WHEEL)
    return Check(name, True, f"{title}, macOS {platform.mac_ver()[0]}")


def check_snapdragon() -> list[Check]:
    """Compiling, which x86-64 Linux can, and the processor itself or its emulator."""
    compiles, runs = "compile for Snapdragon", "run: qnn"
    missing = missing_modules(NEEDS)
    if missing:
        install = install_line("qnn")
        return [
            Check(n, False, f"missing: {', '.join(missing)}", install) for n in (compiles, runs)
        ]
    plug_in, sdk = qnn_versions()
    title = f"onnxruntime-qnn {plug_in}, Qualcomm's SDK {sdk}"
    soc = soc_here()
    if has_npu():
        named = SOCS[soc].title if soc else "a Snapdragon"
        return [Check(compiles, True, title), Check(runs, True, f"the NPU of {named}")]
    return [Check(compiles, True, title), Check(runs, True, "by Qualcomm's emulator, slow")]


def check_tensorrt() -> list[Check]:
    """Both flavours."""
    return [_tensorrt("tensorrt"), _tensorrt("rtx")]


def _tensorrt(flavor: str) -> Check:
    """What a TensorRT flavour can do here: build engines, and run them where a GPU is."""
    name = f"build and run: {TITLES[flavor]}"
    try:
        title = load_flavor(flavor).title
        device = this_device()
    except MissingExtraError as error:
        return Check(name, False, error.message, error.next_step or flavor_install_line(flavor))
    if missing_modules(("polygraphy",)):
        extra = "trt-rtx" if flavor == "rtx" else "trt"
        return Check(
            name,
            False,
            f"{title}, but no polygraphy to build",
            install_line(extra),
        )
    if device is not None:
        where = f"{device.name}, compute capability {device.compute_capability}"
        return Check(name, True, f"{title} on {where}, driver {device.driver}")
    if flavor == "rtx":
        return Check(name, True, f"{title} builds for RTX cards; no NVIDIA GPU to run on")
    return Check(name, False, f"{title}, but no NVIDIA GPU found", "check the driver: nvidia-smi")


def check_onnx_runtime() -> list[Check]:
    """Its providers, as far as this program uses them."""
    return [
        _ort("CPUExecutionProvider", "run: ort on cpu", "ort"),
        _ort("CUDAExecutionProvider", "run: ort on cuda", "gpu"),
        _ort_rtx(),
    ]


def _ort(provider: str, name: str, extra: str) -> Check:
    remedy = install_line(extra)
    if missing_modules(("onnxruntime",)):
        return Check(name, False, "onnxruntime is not installed", remedy)
    try:
        onnxruntime = import_onnx_runtime()
    except Exception as error:  # a broken install is what this command is for
        return Check(name, False, f"onnxruntime does not import: {error}", remedy)
    if provider not in onnxruntime.get_available_providers():
        return Check(
            name,
            False,
            f"this onnxruntime ({onnxruntime.__version__}) was built without {provider}",
            f"pip uninstall onnxruntime && {remedy}",
        )
    if provider == "CUDAExecutionProvider" and nvidia_gpus() is None:
        return Check(name, False, "no NVIDIA GPU found", "check the driver with nvidia-smi")
    return Check(name, True, f"onnxruntime {onnxruntime.__version__}")


def _ort_rtx() -> Check:
    """The plug-in is only looked for: loading it takes its libraries, 150 MB, into memory."""
    name, package = "run: ort with --provider rtx", "onnxruntime-ep-nv-tensorrt-rtx"
    if missing_modules((package.replace("-", "_"),)):
        return Check(name, False, f"{package} is not installed", f"pip install {package}")
    if nvidia_gpus() is None:
        return Check(name, False, "no NVIDIA GPU found", "check the driver with nvidia-smi")
    return Check(name, True, "installed")

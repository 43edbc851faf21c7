"""The architecture as a test: imports go one way, and spokes are reached by name only.

The rules are functions on source text, so that each is also shown to catch a planted breach.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HUB = "tiue_export"
SUB_PACKAGES = ("export", "faster", "mil", "train")
SPOKES = ("runtimes", "calibration", "benchmarks", "apps")

# The hub, lowest first: a module imports only from lines above its own.
LIGHT_LAYERS = (  # numpy only: what runs a bundle on a device, without torch
    ("_version", "errors", "faster"),  # the last is only a docstring
    ("atomic_file", "cache_folder", "demo_student", "specs", "schedule", "family"),
    ("weight_container",),
    ("faster.plan", "faster.key_steps"),
    ("faster.planning", "faster.sampler"),
    (
        "compare",
        "contact_sheet",
        "manifest",
        "noise",
        "openvino_core",
        "picture",
        "tokenizer",
        "vae_tiles",
    ),
    ("bundle",),
    ("bundle_archive", "tensorrt_flavor"),
    ("engine_identity", "quantization_plan"),
    ("overflow", "registry"),
    ("parity", "pipeline"),
    ("runtime_choice",),
)
EXPORT_LAYERS = (  # torch, diffusers, transformers, onnx: imported on use
    ("flops", "ldm_keys", "memory", "vocabulary"),
    ("student", "weights"),
    ("components", "lowering"),
    ("checkpoint", "faster.scheduler", "lora_file"),
    ("faster.teacher", "lora", "pipeline_folder", "split"),
    ("hoisting", "synthetic"),
    ("faster.split",),
    ("graphs",),
    ("overflow_audit",),
    ("faster.reference",),
    ("reference",),
    ("mil",),  # only a docstring, as it runs before its modules
    ("mil.ops", "mil.package"),
    ("mil.weights",),
    ("mil.evaluator",),
    ("export",),  # only a docstring, as it runs before its modules
    ("export.trt_precision",),
    ("export.trt_engine",),
    ("export.trt_plan",),
    ("export.trt_bundle",),
    ("export.to_onnx", "export.tokenizer_files", "export.plan"),
    ("export.onnx_bundle", "export.onnx_layers", "faster.errors"),
    ("export.bundle_student", "export.coreml_profiles"),
    ("export.coreml_convert", "export.coreml_layout", "export.coreml_swift"),
    ("export.coreml_compress",),
    ("export.coreml_job",),
    ("export.coreml_recipe",),
    ("export.coreml_bundle",),
    ("export.coreai_bundle", "export.openvino_ir", "export.qdq_onnx", "export.triton_config"),
    ("export.triton_repository",),
    ("export.quantized_bundle",),
    ("export.openvino_int8",),
)
TRAIN_LAYERS = (  # torch too, with accelerate and peft
    ("train",),  # only a docstring, as it runs before its modules
    ("train.config", "train.cpu_precision", "train.losses", "train.prompts", "train.run_folder"),
    ("quality_data", "train.clip_term", "train.loop", "train.score_networks"),
    ("train.networks",),
    ("train.distillation", "train.sample_grid"),
    ("train.distill",),
)
DOORS = ("__init__", "__main__")  # public names, found on use, and `python -m tiue_export`
LAYERS = (*LIGHT_LAYERS, *EXPORT_LAYERS, *TRAIN_LAYERS, DOORS)
LIGHT = (*(name for layer in LIGHT_LAYERS for name in layer), *DOORS)
# Never in the light half or in a device runtime, not even inside a function.
HEAVY = {"torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "coremltools"}
TYPES_ONLY = ("TYPE_CHECKING", "typing.TYPE_CHECKING")


@dataclass(frozen=True)
class Import:
    """One imported name, absolute and dotted; `on_load` when importing the file executes it."""

    target: str
    line: int
    on_load: bool
    relative: bool

    @property
    def top(self) -> str:
        return self.target.partition(".")[0]


def imports_in(source: str, package: str) -> list[Import]:
    """Every import of a file that lies in `package`; relative ones are made absolute."""
    return list(_walk(ast.parse(source), package, True))


def _walk(node: ast.AST, package: str, on_load: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.Import):
            yield from (Import(x.name, child.lineno, on_load, False) for x in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = [child.module] if child.module else []
            if child.level:
                parents = package.split(".")
                base = parents[: max(0, len(parents) - child.level + 1)] + base
            for name in child.names:
                target = ".".join([*base, name.name])
                yield Import(target, child.lineno, on_load, child.level > 0)
        elif isinstance(child, ast.If) and ast.unparse(child.test) in TYPES_ONLY:
            yield from _walk(ast.Module(child.body, []), package, False)
            yield from _walk(ast.Module(child.orelse, []), package, on_load)
        else:
            yield from _walk(child, package, on_load and not deferred)


def package_of(path: str) -> str:
    """The package of a file as the repository's folders spell it: apps/web/server.py, apps.web."""
    return ".".join(path.split("/")[:-1])


def spoke_breaches(path: str, source: str) -> list[str]:
    """Static imports of a spoke, but for a spoke's own files imported relatively."""
    package = package_of(path)
    # The optimum plugin lies in apps/, but is installed in optimum's namespace: it has no siblings.
    own = package if "optimum_plugin" in package else package.partition(".")[0]
    found = []
    for item in imports_in(source, package):
        if item.relative and own in SPOKES and item.target.startswith(f"{own}."):
            continue
        parts = item.target.split(".")
        named = parts[1:2] if parts[0] == HUB else parts[:1]
        if named and named[0] in SPOKES:
            found.append(f"{path}:{item.line} imports the spoke {item.target}")
    return found


def shadow_breaches(modules: list[str]) -> list[str]:
    """Hub modules that would hide the spoke installed under the same name."""
    return [name for name in modules if name.partition(".")[0] in SPOKES]


def light_breaches(name: str, source: str) -> list[str]:
    """What keeps a module of the light half from loading with numpy alone."""
    found = []
    allowed = {*sys.stdlib_module_names, "numpy"}
    light = {f"{HUB}.{module}" for module in LIGHT} - {f"{HUB}.__init__"}
    for item in imports_in(source, HUB):
        parts = item.target.split(".")
        ours = ".".join(parts[:2]) in light
        if item.on_load and not ours and item.top not in allowed:
            found.append(f"{name}:{item.line} loads {item.target} at import")
        if HEAVY & set(parts):
            found.append(f"{name}:{item.line} names {item.target}")
    return found


def heavy_breaches(path: str, source: str) -> list[str]:
    """Imports, anywhere in a device runtime, of what a device does not have."""
    # On a Mac, coremltools is the door to Core ML.
    missing = HEAVY - {"coremltools"} if path.startswith("runtimes/coreml") else HEAVY
    return [
        f"{path}:{item.line} names {item.target}"
        for item in imports_in(source, package_of(path))
        if missing & set(item.target.split("."))
    ]


def order_breaches(name: str, source: str) -> list[str]:
    """Imports of a hub module that do not come from a lower layer."""
    rank = {module: number for number, layer in enumerate(LAYERS) for module in layer}
    if name not in rank:
        return [f"{name} has no place in LAYERS: add it to tests/test_layering.py"]
    top = name.partition(".")[0]
    package = f"{HUB}.{top}" if top in SUB_PACKAGES else HUB
    found = []
    for item in imports_in(source, package):
        if item.top == HUB:
            used = _hub_module(item.target, rank)
            if rank[used] >= rank[name]:
                found.append(f"{name}:{item.line} imports {used}, which is not below it")
    return found


def _hub_module(target: str, known: dict[str, int]) -> str:
    """The longest known module that `target` starts with; the package itself when none is."""
    parts = target.split(".")[1:]
    candidates = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in candidates if name in known), "__init__")


def source_files() -> dict[str, str]:
    """Every Python file of the repository outside tests/, by its path."""
    skipped = {"tests", "build", "dist", "demo"}
    tops = [
        top
        for top in ROOT.iterdir()
        if top.name not in skipped and top.name[0] != "." and not (top / "pyvenv.cfg").exists()
    ]
    files = [file for top in tops for file in ([top] if top.is_file() else top.rglob("*.py"))]
    return {
        file.relative_to(ROOT).as_posix(): file.read_text("utf-8")
        for file in files
        if file.suffix == ".py"
    }


def hub_modules() -> dict[str, str]:
    """Module name inside the hub -> source; a sub-package goes by its own name."""
    found = {}
    for path, source in source_files().items():
        if path.startswith(f"{HUB}/"):
            name = path.removeprefix(f"{HUB}/").removesuffix(".py").replace("/", ".")
            found[name.removesuffix(".__init__")] = source
    return found


FILES = source_files()
MODULES = hub_modules()


def test_the_whole_repository_is_looked_at() -> None:
    tops = {path.partition("/")[0] for path in FILES}
    assert {HUB, *SPOKES} <= tops
    assert {"__init__", "bundle", "export", "export.to_onnx"} <= set(MODULES)


def test_no_file_imports_a_spoke_statically() -> None:
    assert [line for path, text in FILES.items() for line in spoke_breaches(path, text)] == []


def test_no_hub_module_hides_a_spoke() -> None:
    assert shadow_breaches(list(MODULES)) == []


@pytest.mark.parametrize("name", LIGHT)
def test_the_light_half_loads_with_numpy_alone(name: str) -> None:
    assert light_breaches(name, MODULES[name]) == []


def test_device_runtimes_never_name_torch() -> None:
    runtimes = [path for path in FILES if path.startswith("runtimes/")]
    device = [path for path in runtimes if not path.endswith("torch_reference.py")]
    assert "runtimes/ort.py" in device
    assert [line for path in device for line in heavy_breaches(path, FILES[path])] == []


@pytest.mark.parametrize("name", MODULES)
def test_hub_modules_import_only_lower_layers(name: str) -> None:
    assert order_breaches(name, MODULES[name]) == []


def test_every_layer_names_modules_that_exist_once() -> None:
    assert sorted(name for layer in LAYERS for name in layer) == sorted(MODULES)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("tiue_export/bundle.py", "import runtimes"),
        ("tiue_export/bundle.py", "from runtimes.ort import OrtRuntime"),
        ("tiue_export/bundle.py", "import tiue_export.apps.cli"),
        ("tiue_export/bundle.py", "from tiue_export import calibration"),
        ("tiue_export/bundle.py", "from . import runtimes"),
        ("tiue_export/bundle.py", "def late():\n    from tiue_export.benchmarks import report"),
        ("tiue_export/export/to_onnx.py", "from ..apps import cli"),
        ("apps/cli.py", "from apps.failures import explained"),
        ("apps/cli.py", "from tiue_export.apps.failures import explained"),
        ("apps/cli.py", "from tiue_export.runtimes import ort"),
        ("apps/web/server.py", "from ...runtimes import ort"),
        ("apps/optimum_plugin/register_tiue.py", "from ..cli import app"),
        ("setup.py", "import benchmarks"),
    ],
)
def test_a_planted_import_of_a_spoke_is_caught(path: str, source: str) -> None:
    assert spoke_breaches(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("apps/cli.py", "from .failures import explained"),
        ("apps/cli.py", "from . import tables"),
        ("apps/web/server.py", "from ..tables import console"),
        ("apps/cli.py", "from tiue_export.bundle import open_bundle"),
        ("runtimes/ort.py", "import onnxruntime as ort"),
        ("tiue_export/registry.py", 'import_module("tiue_export.apps.cli")'),
    ],
)
def test_siblings_hub_modules_and_names_in_strings_are_allowed(path: str, source: str) -> None:
    assert spoke_breaches(path, source) == []


@pytest.mark.parametrize("name", ["runtimes", "apps", "calibration.ranges"])
def test_a_planted_module_named_like_a_spoke_is_caught(name: str) -> None:
    assert shadow_breaches(["bundle", name]) == [name]


@pytest.mark.parametrize(
    "source",
    [
        "import PIL",
        "from rich.table import Table",
        "try:\n    import tokenizers\nexcept ImportError:\n    pass",
        "class Late:\n    import safetensors",
        "from tiue_export.student import Student",
        "from tiue_export import load_student",
        "def late():\n    import torch",
        "def late():\n    from safetensors.torch import load_file",
        "if TYPE_CHECKING:\n    from diffusers import DDIMScheduler",
        "if not TYPE_CHECKING:\n    import PIL",
    ],
)
def test_a_planted_heavy_import_in_the_light_half_is_caught(source: str) -> None:
    assert light_breaches("bundle", source)


@pytest.mark.parametrize(
    "source",
    [
        "import json\nimport numpy as np\nfrom tiue_export.specs import Array",
        "def late():\n    from PIL import Image",
        "if TYPE_CHECKING:\n    from PIL.Image import Image",
    ],
)
def test_numpy_late_imports_and_types_are_allowed_in_the_light_half(source: str) -> None:
    assert light_breaches("bundle", source) == []


def test_a_planted_torch_in_a_device_runtime_is_caught() -> None:
    assert heavy_breaches("runtimes/ort.py", "def run():\n    import torch")


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("errors", "from tiue_export.specs import Array"),
        ("noise", "from tiue_export.picture import save_png"),
        ("bundle", "def late():\n    from tiue_export.student import Student"),
        ("specs", "if TYPE_CHECKING:\n    from tiue_export.bundle import Bundle"),
        ("graphs", "from .export import to_onnx"),
        ("export.to_onnx", "from .onnx_bundle import export_onnx"),
        ("checkpoint", "from tiue_export import Pipeline"),
        ("train.losses", "from .networks import Networks"),
        ("synthetic", "from tiue_export.train.loop import train"),
        ("newcomer", ""),
    ],
)
def test_a_planted_import_of_a_higher_layer_is_caught(name: str, source: str) -> None:
    assert order_breaches(name, source)

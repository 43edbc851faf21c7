"""The architecture as a test: imports go one way, and spokes are reached by name only.

The rules are functions on source text, so that each is also shown to catch a planted breach.
"""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HUB = "tiue_export"
SPOKES = ("runtimes", "calibration", "benchmarks", "apps")

# The folders are the layers: a file imports from folders to the left of its own, and within its
# folder without a circle. The left half is light: numpy only, what runs a bundle on a device.
LIGHT = "errors _version < specs < system < sampling < bundle < proof < registry < drawing"
HEAVY_ORDER = "checkpoint < student < methods < graphs < reference < export < train"
ORDER = f"{LIGHT} < {HEAVY_ORDER} < __init__ __main__"
DOORS = ("__init__", "__main__")  # public names, found on use, and `python -m tiue_export`
RANK = {name: at for at, names in enumerate(ORDER.split(" < ")) for name in names.split()}
LIGHT_ROOMS = {*LIGHT.replace("<", "").split(), *DOORS}
# Never in the light half or in a device runtime, not even inside a function.
HEAVY = {"torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "coremltools"}
# "tiue_export.apps.cli", "tiue_export.runtimes.openvino:open_runtime"
SPOKE_NAME = re.compile(rf"{HUB}\.({'|'.join(SPOKES)})(?:\.\w+)*\.?(?::\w+)?")
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
    if path.startswith("examples/"):  # a user of the program, who may import all of it
        return []
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


def string_breaches(path: str, source: str) -> list[str]:
    """Names of a spoke in strings, with which it could be imported: the registry's alone.

    A spoke may name its own files, which it runs in a process of their own.
    """
    top = path.partition("/")[0]
    if path.startswith(f"{HUB}/registry/") or top in ("docs", "examples"):
        return []
    return [
        f"{path}:{node.lineno} names the spoke {node.value}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and (named := SPOKE_NAME.fullmatch(node.value))
        and named[1] != top
    ]


def shadow_breaches(modules: list[str]) -> list[str]:
    """Hub modules that would hide the spoke installed under the same name."""
    return [name for name in modules if name.partition(".")[0] in SPOKES]


def light_breaches(name: str, source: str) -> list[str]:
    """What keeps a module of the light half from loading with numpy alone."""
    found = []
    allowed = {*sys.stdlib_module_names, "numpy"}
    light = {f"{HUB}.{room}" for room in LIGHT_ROOMS} - {f"{HUB}.__init__"}
    for item in imports_in(source, HUB):
        parts = item.target.split(".")
        ours = ".".join(parts[:2]) in light
        if item.on_load and not ours and item.top not in allowed:
            found.append(f"{name}:{item.line} loads {item.target} at import")
        if item.top != HUB and HEAVY & set(parts):
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
    """Imports of a hub module that come from a folder to the right of its own."""
    room = room_of(name)
    if room not in RANK:
        return [f"{name} lies in no folder of ORDER: give it one in tests/test_layering.py"]
    return [
        f"{name}:{line} imports {target}, which does not lie to its left"
        for line, target in _hub_imports(name, source)
        if RANK.get(room_of(target), len(RANK)) > RANK[room]
        or (RANK.get(room_of(target)) == RANK[room] and room_of(target) != room)
    ]


def room_of(name: str) -> str:
    """The folder of a hub module, or the root file itself; the package is `__init__`."""
    return name.partition(".")[0]


def _hub_imports(name: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, module inside the hub) of every import of the hub in a hub module."""
    package = f"{HUB}.{name.rpartition('.')[0]}".removesuffix(".")
    for item in imports_in(source, package):
        if item.top == HUB:
            yield item.line, item.target.removeprefix(HUB).removeprefix(".") or "__init__"


def circles(modules: dict[str, str]) -> list[str]:
    """Modules of one folder of the hub that import each other, straight or around corners."""
    return _circle(
        {
            name: {
                known
                for _, target in _hub_imports(name, source)
                for known in (target, target.rpartition(".")[0])
                if known in modules and known != name and room_of(known) == room_of(name)
            }
            for name, source in modules.items()
        }
    )


def spoke_circles(files: dict[str, str]) -> list[str]:
    """Files of the spokes that import each other, inside functions and for types too."""
    modules = {path.removesuffix(".py").replace("/", "."): text for path, text in files.items()}
    return _circle(
        {
            name: {
                known
                for item in imports_in(source, name.rpartition(".")[0])
                for known in (item.target, item.target.rpartition(".")[0])
                if known in modules and known != name
            }
            for name, source in modules.items()
        }
    )


def _circle(arrows: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


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
    assert {"__init__", "bundle", "bundle.manifest", "export.onnx.write"} <= set(MODULES)


def test_no_file_imports_a_spoke_statically() -> None:
    assert [line for path, text in FILES.items() for line in spoke_breaches(path, text)] == []


def test_only_the_registry_reaches_another_spoke_by_string() -> None:
    assert [line for path, text in FILES.items() for line in string_breaches(path, text)] == []


def test_no_hub_module_hides_a_spoke() -> None:
    assert shadow_breaches(list(MODULES)) == []


@pytest.mark.parametrize("name", [name for name in MODULES if room_of(name) in LIGHT_ROOMS])
def test_the_light_half_loads_with_numpy_alone(name: str) -> None:
    assert light_breaches(name, MODULES[name]) == []


def test_device_runtimes_never_name_torch() -> None:
    runtimes = [path for path in FILES if path.startswith("runtimes/")]
    device = [path for path in runtimes if not path.endswith("torch_reference.py")]
    assert "runtimes/ort/runtime.py" in device
    assert [line for path in device for line in heavy_breaches(path, FILES[path])] == []


@pytest.mark.parametrize("name", MODULES)
def test_hub_modules_import_only_from_folders_to_their_left(name: str) -> None:
    assert order_breaches(name, MODULES[name]) == []


def test_the_order_names_folders_and_files_that_exist() -> None:
    assert set(RANK) == {room_of(name) for name in MODULES}


def test_no_folder_imports_itself_in_a_circle() -> None:
    assert circles(MODULES) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("tiue_export/bundle/read.py", "import runtimes"),
        ("tiue_export/bundle/read.py", "from runtimes.ort import OrtRuntime"),
        ("tiue_export/bundle/read.py", "import tiue_export.apps.cli"),
        ("tiue_export/bundle/read.py", "from tiue_export import calibration"),
        ("tiue_export/registry/spokes.py", "from .. import runtimes"),
        (
            "tiue_export/bundle/read.py",
            "def late():\n    from tiue_export.benchmarks import report",
        ),
        ("tiue_export/export/onnx/write.py", "from ...apps import cli"),
        ("apps/cli.py", "from apps.failures import explained"),
        ("apps/cli.py", "from tiue_export.apps.report.failures import explained"),
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
        ("apps/cli.py", "from tiue_export.bundle.read import open_bundle"),
        ("runtimes/ort/runtime.py", "import onnxruntime as ort"),
        ("tiue_export/registry/spokes.py", 'import_module("tiue_export.apps.cli")'),
    ],
)
def test_siblings_hub_modules_and_names_in_strings_are_allowed(path: str, source: str) -> None:
    assert spoke_breaches(path, source) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("apps/bench.py", 'bench = import_module("tiue_export.benchmarks.latency.bench")'),
        ("apps/bench.py", '_PACKAGE = "tiue_export.benchmarks.latency"'),
        ("apps/bench.py", 'import_module(f"tiue_export.benchmarks.{name}")'),
        ("benchmarks/latency/bench.py", 'import_module("tiue_export.apps.doctor")'),
        ("tiue_export/export/coreai.py", 'open = "tiue_export.runtimes.coreai:open_runtime"'),
    ],
)
def test_a_planted_name_of_a_spoke_is_caught(path: str, source: str) -> None:
    assert string_breaches(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("tiue_export/registry/spokes.py", '_door("tiue_export.apps.cli:main")'),
        ("benchmarks/latency/process.py", '_WORKER = "tiue_export.benchmarks.latency.worker"'),
        ("apps/doctor.py", '"""Next: python -m tiue_export.benchmarks.studies.ceiling."""'),
        ("apps/studio/serving.py", 'import_module("gradio")'),
    ],
)
def test_the_registrys_names_and_a_spokes_own_are_allowed(path: str, source: str) -> None:
    assert string_breaches(path, source) == []


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
        "from tiue_export.student.model import Student",
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
    assert heavy_breaches("runtimes/ort/runtime.py", "def run():\n    import torch")


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("errors", "from tiue_export.specs import Array"),
        ("sampling.noise", "from tiue_export.drawing.picture import save_png"),
        ("bundle.read", "def late():\n    from tiue_export.student.model import Student"),
        ("specs", "if TYPE_CHECKING:\n    from tiue_export.bundle.read import Bundle"),
        ("graphs.build", "from ..export.onnx import write"),
        ("student.load", "from tiue_export import Pipeline"),
        ("reference.capture", "from tiue_export.train.loop import train"),
        ("newcomer", ""),
    ],
)
def test_a_planted_import_from_the_right_is_caught(name: str, source: str) -> None:
    assert order_breaches(name, source)


def test_no_spoke_imports_itself_in_a_circle() -> None:
    spokes = {path: text for path, text in FILES.items() if path.partition("/")[0] in SPOKES}
    assert len(spokes) > 100
    assert spoke_circles(spokes) == []


def test_a_planted_circle_of_a_spoke_is_caught() -> None:
    command = "def call() -> None:\n    from ..work import run\n"
    work = "from .commands.draw import DrawRequest\n"
    planted = {"apps/commands/draw.py": command, "apps/work.py": work}
    assert spoke_circles(planted)
    assert not spoke_circles({**planted, "apps/work.py": ""})


def test_a_planted_circle_is_caught() -> None:
    there, back = "from tiue_export.graphs.b import x", "from .a import y"
    assert circles({"graphs.a": there, "graphs.b": back})
    assert not circles({"graphs.a": there, "graphs.b": ""})

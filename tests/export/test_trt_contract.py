"""What our code touches of TensorRT exists in 10.3, 10.16 and 11.4, or is asked for first.

The real Python bindings of each version (1.2 MB from PyPI, kept in the user's cache) are imported
over stub libraries made here by the system's C compiler, each in a process of its own. So classes,
enums and signatures are NVIDIA's; only nothing can run.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_layering import FILES, ROOT

from tiue_export.system.tensorrt_flavor import BEYOND_CORE

VERSIONS = ("10.3.0", "10.16.1.11", "11.4.0.106")  # JetPack 6; JetPack 7 and desktop; the newest
PACKAGE = "tensorrt_cu12_bindings"
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")

# Every file that touches TensorRT, and the class behind each variable that holds such an object.
# A function's name before the variable makes it the meaning there only; "" is none of TensorRT's.
TOUCHING: dict[str, dict[str, str]] = {
    "tiue_export/system/tensorrt_flavor.py": {},
    "tiue_export/export/trt/build_process.py": {
        "builder": "Builder",
        "network": "INetworkDefinition",
        "parser": "OnnxParser",
        "_parser_error:error": "ParserError",
        "config": "IBuilderConfig",
        "engine": "ICudaEngine",
        "refitter": "Refitter",
        "_refit:parser": "OnnxParserRefitter",
        "inspector": "EngineInspector",
        "runtime": "Runtime",
    },
    "tiue_export/export/trt/precision.py": {
        "network": "INetworkDefinition",
        "layer": "ILayer",
        "before": "ILayer",
        "tensor": "ITensor",
        "output": "ITensor",
        "engine_census:layer": "",  # there and below they are parts of the inspector's JSON
        "_inspected_precision:layer": "",
        "_inspected_precision:tensor": "",
    },
    "runtimes/trt/engine.py": {
        "self._runtime": "Runtime",
        "engine": "ICudaEngine",
        "context": "IExecutionContext",
        "self._context": "IExecutionContext",
        "config": "IRuntimeConfig",
        "runtime_cache": "IRuntimeCache",
        "self._cache": "IRuntimeCache",
        "strategies": "DynamicShapesKernelSpecializationStrategy",
    },
}
# Newer names that are reached only where another one, asked for, exists.
_SPECIALIZATION = "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy"
BEHIND = {
    "IRuntimeConfig.set_execution_context_allocation_strategy": (
        "ICudaEngine.create_runtime_config"
    ),
    "DynamicShapesKernelSpecializationStrategy": _SPECIALIZATION,
    "DynamicShapesKernelSpecializationStrategy.EAGER": _SPECIALIZATION,
    "IRuntimeCache.deserialize": "IRuntimeConfig.create_runtime_cache",
    "IRuntimeCache.serialize": "IRuntimeConfig.create_runtime_cache",
}
# Our own objects whose attributes happen to be called like one of TensorRT's.
OURS = {"self", "spec", "logger", "request", "self._loader", "census", "plan", "cache"}
MODULES = ("trt", "flavor.trt", "self.trt", "self._flavor.trt")

# Classes and what their methods must take: the parts of a signature that our calls rely on.
SIGNATURES = {
    "Runtime.deserialize_cuda_engine": r"serialized_engine: (buffer|\S*Buffer)",
    "ICudaEngine.create_execution_context": r"strategy: \S*ExecutionContextAllocationStrategy",
    "ICudaEngine.get_tensor_profile_shape": r"name: str, profile_index",
    "IExecutionContext.set_device_memory": r"memory: \S+, size: ",
    "IExecutionContext.set_input_shape": r"name: str, shape: ",
    "IExecutionContext.set_tensor_address": r"name: str, memory: ",
    "IExecutionContext.execute_async_v3": r"stream_handle: ",
    "OnnxParser.parse_from_file": r"model: str",
}


@dataclass(frozen=True)
class Use:
    """One attribute of TensorRT in our source: `name` is "Class", "Class.attribute"."""

    path: str
    line: int
    name: str
    asked_for: bool


def uses_in(path: str, source: str, receivers: dict[str, str]) -> list[Use]:
    """Every attribute of the TensorRT module and of the listed variables."""
    found = []
    for function, node in attributes(ast.parse(source)):
        receiver = ast.unparse(node.value)
        owner, _, kind = receiver.rpartition(".")
        guarded = node.attr in asked_for(function)
        if receiver in MODULES:
            found.append(Use(path, node.lineno, node.attr, guarded))
        elif owner in MODULES:
            found.append(Use(path, node.lineno, f"{kind}.{node.attr}", guarded))
        else:
            inside = f"{getattr(function, 'name', '')}:{receiver}"
            known = receivers.get(inside, receivers.get(receiver))
            if known:
                found.append(Use(path, node.lineno, f"{known}.{node.attr}", guarded))
    return found


def strangers_in(path: str, source: str, receivers: dict[str, str], words: set[str]) -> list[str]:
    """Attributes called like TensorRT's, on variables that nobody told the class of."""
    known = {receiver.rpartition(":")[2] for receiver in receivers}
    found = []
    for _, node in attributes(ast.parse(source)):
        receiver = ast.unparse(node.value)
        plain = receiver in known or receiver in OURS or receiver in MODULES
        if node.attr in words and not plain and receiver.rpartition(".")[0] not in MODULES:
            found.append(f"{path}:{node.lineno} touches {receiver}.{node.attr}")
    return found


def attributes(
    tree: ast.AST, function: ast.AST | None = None
) -> Iterator[tuple[ast.AST, ast.Attribute]]:
    """Each attribute with the innermost named function around it (or the module)."""
    for child in ast.iter_child_nodes(tree):
        inner = child if isinstance(child, ast.FunctionDef) else function
        if isinstance(child, ast.Attribute) and not child.attr.startswith("__"):
            yield inner or tree, child
        yield from attributes(child, inner)


def asked_for(function: ast.AST) -> set[str]:
    """Names that a function passes to hasattr."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    asked = [call for call in calls if ast.unparse(call.func) == "hasattr"]
    return {a.args[1].value for a in asked if isinstance(a.args[1], ast.Constant)}


def all_uses() -> list[Use]:
    return [use for path, kinds in TOUCHING.items() for use in uses_in(path, FILES[path], kinds)]


def missing_in(api: dict[str, list[str] | None], name: str) -> bool:
    kind, _, attribute = name.partition(".")
    return kind not in api or bool(attribute and attribute not in (api[kind] or ()))


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stub libraries of both major versions."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        pytest.skip("stub libraries need Linux and a C compiler (cc, gcc or clang)")
    folder = tmp_path_factory.mktemp("stubs")
    source = Path(__file__).with_name("tensorrt_stub.c")
    first = folder / "stub.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", first, source], check=True)
    for library in LIBRARIES:
        for major in {version.split(".")[0] for version in VERSIONS}:
            shutil.copy(first, folder / f"{library}.so.{major}")
    return folder


@pytest.fixture(scope="module", params=VERSIONS)
def bindings(request, stubs: Path, tmp_path_factory: pytest.TempPathFactory):
    """A function that runs code in a fresh process where `tensorrt` is this version."""
    folder = tmp_path_factory.mktemp(f"bindings-{request.param}")
    with zipfile.ZipFile(bindings_wheel(request.param)) as wheel:
        wheel.extractall(folder)
    start = (
        f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\n"
        "import json, tensorrt_bindings as trt; sys.modules['tensorrt'] = trt\n"
    )

    def run(code: str):
        done = subprocess.run(
            [sys.executable, "-I", "-B", "-c", start + code],
            env={**os.environ, "LD_LIBRARY_PATH": str(stubs)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    run.version = request.param
    return run


@pytest.fixture(scope="module")
def api(bindings) -> dict[str, list[str] | None]:
    """Every name of the module; of classes also their attributes."""
    return bindings(DUMP)


@pytest.fixture(scope="module")
def rtx_api() -> dict[str, list[str] | None]:
    """The same of the installed TensorRT-RTX."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    kinds = {name: getattr(trt, name) for name in dir(trt)}
    return {name: dir(kind) if isinstance(kind, type) else None for name, kind in kinds.items()}


DUMP = (
    "import inspect\n"
    "members = lambda kind: [n for n in dir(kind) if not n.startswith('__')]\n"
    "kinds = {name: getattr(trt, name) for name in dir(trt)}\n"
    "print(json.dumps({n: members(k) if inspect.isclass(k) else None for n, k in kinds.items()}))"
)


def bindings_wheel(version: str) -> Path:
    """The wheel from the user's cache, or from PyPI once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tiue-export"
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    folder = cache / "wheels" / tag
    found = sorted(folder.glob(f"{PACKAGE}-{version}-{tag}-*.whl"))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", str(folder), f"{PACKAGE}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        found = sorted(folder.glob(f"{PACKAGE}-{version}-{tag}-*.whl"))
        if not found:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            pytest.skip(f"no bindings of TensorRT {version}: {reason}")
    return found[0]


def test_each_file_that_touches_tensorrt_is_looked_at() -> None:
    naming = {p for p, text in FILES.items() if re.search(r"(?<![\w.])(flavor\.)?trt\.[A-Z]", text)}
    assert naming <= set(TOUCHING), "add the file, and the classes of its variables"
    assert len(all_uses()) > 40


def lost_in(api: dict[str, list[str] | None]) -> list[str]:
    """Uses that would end in an AttributeError with this API."""
    return [
        f"{use.path}:{use.line} {use.name}"
        for use in all_uses()
        if missing_in(api, use.name)
        and not use.asked_for
        and use.name not in BEYOND_CORE
        and (use.name not in BEHIND or not missing_in(api, BEHIND[use.name]))
    ]


def test_everything_used_exists_in_every_version_or_is_asked_for(bindings, api) -> None:
    assert lost_in(api) == [], f"TensorRT {bindings.version} has none of these"


def test_everything_used_exists_in_tensorrt_rtx(rtx_api) -> None:
    assert lost_in(rtx_api) == []


def test_no_variable_of_an_unknown_class_is_used_like_one_of_tensorrt(api) -> None:
    # Single words ("name", "shape") are too common to tell anything.
    words = {name for members in api.values() for name in members or () if "_" in name.strip("_")}
    found = [
        line
        for path, kinds in TOUCHING.items()
        for line in strangers_in(path, FILES[path], kinds, words)
    ]
    assert found == []


def test_what_is_asked_for_exists_in_tensorrt_rtx_if_nowhere_else(rtx_api) -> None:
    guarded = {use.name for use in all_uses() if use.asked_for} | BEYOND_CORE
    guarded |= {*BEHIND, *BEHIND.values()}
    assert [name for name in sorted(guarded) if missing_in(rtx_api, name)] == []


@pytest.mark.parametrize("name", SIGNATURES)
def test_methods_take_what_our_calls_pass(bindings, name: str) -> None:
    text = bindings(f"print(json.dumps(trt.{name}.__doc__))")
    assert re.search(SIGNATURES[name], text), text


def test_our_logger_and_flavour_work_on_the_real_bindings(bindings) -> None:
    told = bindings(
        "from tiue_export.system.tensorrt_flavor import BEYOND_CORE, load_flavor\n"
        "from tiue_export.runtimes.trt.engine import EngineLoader, _dtype_name, _quiet_logger\n"
        "flavor, errors = load_flavor('tensorrt'), []\n"
        "logger = _quiet_logger(trt, errors)\n"
        "logger.log(trt.ILogger.WARNING, 'a warning')\n"
        "logger.log(trt.ILogger.ERROR, ' an\\n error ')\n"
        "try:\n"
        "    EngineLoader(flavor, 'GPU', 'Rebuild', lambda: (0, 0))\n"
        "except Exception as error:\n"
        "    start = [type(error).__name__, error.message]\n"
        "kinds = [_dtype_name(getattr(trt.DataType, n), trt) for n in ('HALF', 'INT64', 'BOOL')]\n"
        "has = {name: flavor.has(name) for name in BEYOND_CORE}\n"
        "print(json.dumps([flavor.title, errors, start, kinds, has]))"
    )
    title, errors, start, kinds, has = told
    assert title == f"TensorRT {bindings.version}"
    assert errors == ["an error"]
    assert start[0] == "RuntimeFailure"
    assert start[1].startswith(f"{title} cannot start: ")
    assert kinds == ["float16", "int64", "DataType.BOOL"]
    newer = bindings.version != "10.3.0"
    assert has["ICudaEngine.create_runtime_config"] == newer
    assert not has["IRuntimeConfig.create_runtime_cache"]


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("trt.Runtime(logger)", ["Runtime"]),
        ("x = flavor.trt.DataType.HALF", ["DataType.HALF", "DataType"]),
        ("def f(engine):\n    return engine.num_layers", ["ICudaEngine.num_layers"]),
        ("def f(engine):\n    engine.name = 1", ["ICudaEngine.name"]),
        ("self._flavor.trt.Builder", ["Builder"]),
        ("other.num_layers", []),
    ],
)
def test_uses_are_found(source: str, names: list[str]) -> None:
    found = uses_in("file.py", source, {"engine": "ICudaEngine"})
    assert [use.name for use in found] == names


def test_a_guard_covers_its_own_function_only() -> None:
    source = (
        "def f(engine):\n    return engine.new if hasattr(engine, 'new') else None\n"
        "def g(engine):\n    return engine.new\n"
    )
    asked = [use.asked_for for use in uses_in("file.py", source, {"engine": "ICudaEngine"})]
    assert asked == [True, False]


def test_a_variable_without_a_class_is_caught() -> None:
    words = {"num_layers"}
    assert strangers_in("file.py", "thing.num_layers", {}, words)
    assert not strangers_in("file.py", "engine.num_layers", {"engine": "ICudaEngine"}, words)

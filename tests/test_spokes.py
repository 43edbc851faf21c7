"""The doors to the spokes: each says of its function what the function says of itself."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import pytest

from tiue_export.registry import spokes


def names_in(module: ModuleType) -> dict[str, Any]:
    """What annotations of a module may name: what it imports for types alone, too."""
    found = dict(vars(module))
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            exec(compile(ast.Module(node.body, []), module.__file__ or "", "exec"), found)
    return found


def described(function: Callable[..., Any]) -> list[tuple[str, Any, Any, Any]]:
    """(name, kind, default, type) of each parameter, then the result."""
    names = names_in(importlib.import_module(function.__module__))
    signature = inspect.signature(function)
    rows = [
        (each.name, each.kind, comparable(each.default), eval(each.annotation, names))
        for each in signature.parameters.values()
    ]
    return [*rows, ("return", None, None, eval(signature.return_annotation, names))]


def comparable(default: Any) -> Any:
    """A default; two functions that compute the same are alike."""
    return default.__code__.co_code if isinstance(default, FunctionType) else default


def behind(door: str) -> Callable[..., Any]:
    module, _, name = spokes.DOORS[door].partition(":")
    return getattr(importlib.import_module(f"tiue_export.{module}"), name)


@pytest.mark.parametrize("door", spokes.DOORS)
def test_a_door_has_the_signature_and_the_types_of_the_function_behind_it(door: str) -> None:
    assert described(getattr(spokes, door)) == described(behind(door))


def test_a_door_calls_what_is_behind_it_and_gives_what_that_returns(monkeypatch) -> None:
    capture = sys.modules[behind("capture").__module__]
    monkeypatch.setattr(capture, "capture", lambda *args, **more: (args, more))
    assert spokes.capture("bundle", "root", "options", force=True) == (
        ("bundle", "root", "options"),
        {"force": True},
    )


def test_the_doors_load_no_spoke_before_one_is_opened() -> None:
    code = (
        "import sys, tiue_export.registry.spokes\n"
        "spokes = ('runtimes', 'calibration', 'benchmarks', 'apps')\n"
        "loaded = {name.split('.')[1] for name in sys.modules if name.startswith('tiue_export.')}\n"
        "assert not loaded & set(spokes), loaded\n"
        "assert 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True)

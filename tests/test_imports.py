"""What importing costs: nothing heavy, no side effect, and the light half on Python 3.10 too."""

from __future__ import annotations

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from test_layering import FILES, LIGHT_ROOMS, MODULES, ROOT, room_of
from typer.testing import CliRunner

import tiue_export

HEAVY = {"torch", "diffusers", "transformers", "onnx", "onnxruntime", "coremltools"}
OLDEST = (3, 10)  # JetPack 6
CLI = importlib.import_module("tiue_export.apps.cli")
COMMANDS = typer.main.get_command(CLI.app).commands  # type: ignore[attr-defined]
# The light half without its doors, as a program loads it.
LIGHT = [name for name in MODULES if room_of(name) in LIGHT_ROOMS and name[:2] != "__"]
# The files that a device runs: the light half, the thin runtimes, the command line.
ON_DEVICE = [
    *(path for path in FILES if path.split("/")[1:] and path.split("/")[1] in LIGHT_ROOMS),
    *(path for path in FILES if path.startswith("tiue_export/export/trt/")),
    *(path for path in FILES if path.startswith("runtimes/") and "torch_reference" not in path),
    *(path for path in FILES if path.startswith("apps/") and path.count("/") == 1),
    *(path for path in FILES if path.startswith(("apps/commands/", "apps/report/", "apps/draw/"))),
]


def bare(code: str, *options: str) -> Any:
    """What a fresh interpreter prints as JSON on its last line, whatever this process has done."""
    done = subprocess.run(
        [sys.executable, "-I", *options, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_loads_nothing_heavy_and_warns_of_nothing() -> None:
    loaded = bare(
        "import sys, json, tiue_export; print(json.dumps(sorted(sys.modules)))", "-W", "error"
    )
    assert "tiue_export" in loaded
    assert not {*HEAVY, "PIL", "typer", "rich", "numpy"} & set(loaded)


def test_importing_the_package_leaves_the_process_as_it_was() -> None:
    before, after = bare(
        "import json, logging, os, sys\n"
        "def state():\n"
        "    log = logging.getLogger()\n"
        "    handlers = [repr(handler) for handler in log.handlers]\n"
        "    return [os.getcwd(), dict(os.environ), handlers, log.level, sys.path[:]]\n"
        "before = state()\n"
        "import tiue_export\n"
        "print(json.dumps([before, state()]))"
    )
    assert after == before


def test_every_public_name_resolves_and_is_listed() -> None:
    resolved, listed = bare(
        "import json, tiue_export as package\n"
        "names = {name: getattr(package, name) is not None for name in package.__all__}\n"
        "print(json.dumps([names, dir(package)]))"
    )
    assert resolved == dict.fromkeys(tiue_export.__all__, True)
    assert set(listed) >= set(tiue_export.__all__)


def test_an_unknown_public_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_studnet'"):
        _ = tiue_export.load_studnet


def test_the_light_half_loads_without_torch() -> None:
    names = [f"tiue_export.{name}" for name in LIGHT]
    loaded = bare(f"import sys, json, {', '.join(names)}; print(json.dumps(sorted(sys.modules)))")
    assert set(names) <= set(loaded)
    assert not {*HEAVY, "PIL", "typer", "rich"} & set(loaded)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"]])
def test_help_and_version_load_neither_torch_nor_numpy(arguments: list[str]) -> None:
    code, loaded = bare(
        "import json, sys\n"
        "from tiue_export.apps.cli import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit as stop:\n"
        "    print(json.dumps([stop.code, sorted(sys.modules)]))"
    )
    assert code == 0
    assert not {*HEAVY, "PIL", "numpy"} & set(loaded)


def test_help_exits_with_0_and_lists_every_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tiue_export", "--help"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "100"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line.strip("│| ").partition(" ")[0] for line in done.stdout.splitlines()}
    assert COMMANDS
    assert set(COMMANDS) <= rows


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_exits_with_0_and_shows_an_example(command: str) -> None:
    done = CliRunner().invoke(CLI.app, [command, "--help"], env={"COLUMNS": "100"})
    assert done.exit_code == 0
    assert f"Example:  tiue-export {command}" in done.output


@pytest.mark.parametrize("path", ON_DEVICE)
def test_what_a_device_runs_is_written_for_python_3_10(path: str) -> None:
    ast.parse(FILES[path], filename=path, feature_version=OLDEST)


def test_the_light_half_loads_on_python_3_10() -> None:
    python = _oldest_python()
    if python is None:
        pytest.skip("no python3.10 with numpy on PATH or in ~/.pyenv/versions")
    imports = "".join(f"import tiue_export.{name}\n" for name in LIGHT)
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{imports}import runtimes.buffers\n"
    done = subprocess.run(
        [python, "-I", "-B", "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def _oldest_python() -> str | None:
    """An interpreter of the oldest supported version that has numpy."""
    homes = sorted(Path.home().glob(".pyenv/versions/3.10*/bin/python"))
    probe = f"import sys, numpy; sys.exit(sys.version_info[:2] != {OLDEST!r})"
    for candidate in filter(None, [shutil.which("python3.10"), *map(str, homes)]):
        if subprocess.run([candidate, "-I", "-c", probe], capture_output=True).returncode == 0:
            return candidate
    return None

"""The wheel, built once per session from a clean copy of the sources, and an installation of it.

A plugin, loaded by the test files that need it: pytest_plugins = ["packaging_fixtures"].
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("tiue_export", "runtimes", "calibration", "benchmarks", "apps")
BUILD_FILES = ("pyproject.toml", "README.md", "LICENSE")
_LITTER = ("__pycache__", "*.pyc", "*.egg-info", ".*")


@dataclass(frozen=True)
class Installation:
    """An environment that holds our wheel and, after it, what the tests' environment holds."""

    python: Path
    site: Path

    def run(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run its Python outside the repository, with nothing of this process's paths."""
        environment = {key: os.environ[key] for key in os.environ if not key.startswith("PYTHON")}
        return subprocess.run(
            [str(self.python), *arguments],
            cwd=cwd,
            env={**environment, "NO_COLOR": "1", "COLUMNS": "100"},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="session")
def source_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources alone: no build output, no caches, nothing of an editable installation."""
    copy = tmp_path_factory.mktemp("source")
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, copy)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns(*_LITTER))
    return copy


@pytest.fixture(scope="session")
def wheel(source_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our wheel, built with the environment's own setuptools."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run(
        [*command, "."], cwd=source_copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The wheel unpacked into a virtual environment of its own.

    The dependencies are found by a plain path, whose .pth files are not read: an editable
    installation of this package cannot stand in for the wheel.
    """
    home = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    (site,) = home.glob("lib/python3*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(sorted(paths)), "utf-8")
    return Installation(home / "bin" / "python", site)

"""The wheel holds what the folders hold, under one name; pins and versions agree."""

from __future__ import annotations

import configparser
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tiue_export
from tiue_export.registry.backends import BACKENDS

if TYPE_CHECKING:
    from packaging_fixtures import Installation

pytest_plugins = ["packaging_fixtures"]
ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
# Where each folder of the repository is installed; the longest match counts.
INSTALLED_AS = {
    "tiue_export": "tiue_export",
    "runtimes": "tiue_export/runtimes",
    "calibration": "tiue_export/calibration",
    "benchmarks": "tiue_export/benchmarks",
    "apps": "tiue_export/apps",
    "apps/optimum_plugin": "optimum/commands/register",
}
# Kept in the repository only: measured numbers and notes are no part of the program.
NOT_SHIPPED = re.compile(
    r"benchmarks/results/|^apps/(android|swift)/|^(?!tiue_export/demo/).*\.md$"
)
# Package data of `tiue_export`, as deep as it goes: no packages.
# Files that are no code: folders of them are no packages.
DATA = ("tiue_export/demo/", "tiue_export/apps/browser/page/")
DIST_INFO = f"tiue_export-{tiue_export.__version__}.dist-info"
NAME = "tiue-export"


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    """What lies in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def shipped(source: Path) -> Iterator[str]:
    """Where the wheel must hold each file of the folders."""
    tops = [folder for folder in INSTALLED_AS if "/" not in folder]
    for path in sorted(file for top in tops for file in (source / top).rglob("*")):
        relative = path.relative_to(source).as_posix()
        if path.is_file() and not NOT_SHIPPED.search(relative):
            folder = max((f for f in INSTALLED_AS if relative.startswith(f"{f}/")), key=len)
            yield INSTALLED_AS[folder] + relative.removeprefix(folder)


def in_wheel(wheel: Path, name: str) -> str:
    """The text of one file in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name).decode("utf-8")


def test_the_wheel_holds_exactly_what_the_folders_hold(names, source_copy: Path) -> None:
    expected = list(shipped(source_copy))
    assert {"tiue_export/py.typed", "tiue_export/checkpoint/families/tiny.json"} <= set(expected)
    assert "tiue_export/train/presets/sd21-base.toml" in expected
    assert sorted(name for name in names if not name.startswith(DIST_INFO)) == sorted(expected)


def test_the_wheel_installs_no_other_top_level_name(names) -> None:
    assert {name.partition("/")[0] for name in names} == {"tiue_export", "optimum", DIST_INFO}


def test_optimum_gets_one_plugin_file_and_no_package_file(names) -> None:
    added = [name for name in names if name.startswith("optimum/")]
    assert added == ["optimum/commands/register/register_tiue.py"]


def test_the_wheel_carries_the_command_the_licence_and_the_version(wheel: Path, names) -> None:
    entry_points = configparser.ConfigParser()
    entry_points.read_string(in_wheel(wheel, f"{DIST_INFO}/entry_points.txt"))
    assert dict(entry_points["console_scripts"]) == {NAME: "tiue_export.apps.cli:main"}
    licence = in_wheel(wheel, f"{DIST_INFO}/licenses/LICENSE")
    assert licence == (ROOT / "LICENSE").read_text("utf-8")
    metadata = in_wheel(wheel, f"{DIST_INFO}/METADATA").splitlines()
    assert f"Version: {tiue_export.__version__}" in metadata
    assert "License-Expression: Apache-2.0" in metadata


def test_the_installed_wheel_runs_from_anywhere(installation: Installation, tmp_path: Path) -> None:
    code = (
        "import tiue_export, tiue_export.runtimes.buffers, tiue_export.apps.cli as cli\n"
        "import tiue_export.calibration, tiue_export.benchmarks\n"
        "from tiue_export.checkpoint.family import load_family\n"
        "load_family('tiny')\n"
        "print(tiue_export.__file__, cli.__file__)"
    )
    done = installation.run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(installation.site)) for path in done.stdout.split())
    done = installation.run("-m", "tiue_export", "--version", cwd=tmp_path)
    assert done.stdout == f"{NAME} {tiue_export.__version__}\n"


def test_pyproject_lists_every_sub_package(source_copy: Path) -> None:
    code = (name for name in shipped(source_copy) if not name.startswith(DATA))
    folders = {name.rpartition("/")[0].replace("/", ".") for name in code}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(folders)


def test_pyproject_maps_every_folder_to_its_place() -> None:
    mapped = PROJECT["tool"]["setuptools"]["package-dir"]
    assert mapped == {place.replace("/", "."): folder for folder, place in INSTALLED_AS.items()}


def test_the_newest_entry_of_the_changelog_is_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    versions = re.findall(r"^## +\[?v?(\d+\.\d+[^\]\s]*)", text, re.MULTILINE)
    assert versions[:1] == [tiue_export.__version__]


def requirements() -> dict[str, list[Requirement]]:
    """Every dependency that pyproject names, by its normalised name; our own extras excluded."""
    extras = PROJECT["project"]["optional-dependencies"].values()
    found: dict[str, list[Requirement]] = {}
    for line in [
        *PROJECT["project"]["dependencies"],
        *(line for extra in extras for line in extra),
    ]:
        requirement = Requirement(line)
        found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    del found[NAME]
    return found


def pins() -> dict[str, Requirement]:
    """The lines of constraints.txt by normalised name."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    parsed = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def test_constraints_pin_every_dependency() -> None:
    assert sorted(set(requirements()) - set(pins())) == []


def test_every_constraint_is_one_exact_version() -> None:
    for name, pin in pins().items():
        assert [part.operator for part in pin.specifier] == ["=="], name


@pytest.mark.parametrize("name", sorted(set(requirements()) & set(pins())))
def test_the_pinned_version_lies_in_the_range_that_pyproject_gives(name: str) -> None:
    (pin,) = pins()[name].specifier
    for requirement in requirements()[name]:
        assert requirement.specifier.contains(pin.version, prereleases=True)


def test_every_extra_that_code_or_documents_name_exists(source_copy: Path) -> None:
    files = [*source_copy.rglob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    text = "\n".join(file.read_text("utf-8") for file in files)
    named = {
        name for names in re.findall(rf"{NAME}\[([\w,-]+)\]", text) for name in names.split(",")
    }
    extras = {entry.extra for entry in BACKENDS.values() if entry.extra} | named
    assert sorted(extras - set(PROJECT["project"]["optional-dependencies"])) == []

"""The pip line of an extra leads to the place that this program was installed from."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from tiue_export.errors import MissingExtraError
from tiue_export.registry.packages import require
from tiue_export.system import install
from tiue_export.system.install import install_line, wheel_line


@pytest.mark.parametrize(
    ("note", "line"),
    [
        (
            {"url": "file:///home/me/my%20clone", "dir_info": {"editable": True}},
            "pip install -e '/home/me/my clone[ort]'",
        ),
        ({"url": "file:///home/me/clone", "dir_info": {}}, "pip install '/home/me/clone[ort]'"),
        (
            {"url": "file:///w/tiue_export-0.1.0-py3-none-any.whl", "archive_info": {}},
            "pip install '/w/tiue_export-0.1.0-py3-none-any.whl[ort]'",
        ),
        ({"url": "https://host/x.whl"}, "pip install 'tiue-export[ort]'"),
        ({}, "pip install 'tiue-export[ort]'"),
        ([], "pip install 'tiue-export[ort]'"),
    ],
)
def test_an_extra_is_installed_from_where_the_program_came_from(monkeypatch, note, line):
    class Distribution:
        def read_text(self, name: str) -> str:
            assert name == "direct_url.json"
            return json.dumps(note)

    monkeypatch.setattr(install.metadata, "distribution", lambda name: Distribution())
    assert install_line("ort") == line


def test_a_wheel_is_made_of_the_clone_and_of_nothing_where_there_is_none(monkeypatch):
    def noted(note: dict) -> None:
        distribution = SimpleNamespace(read_text=lambda name: json.dumps(note))
        monkeypatch.setattr(install.metadata, "distribution", lambda name: distribution)

    noted({"url": "file:///home/me/my%20clone", "dir_info": {"editable": True}})
    assert wheel_line() == "pip wheel --no-deps --wheel-dir dist '/home/me/my clone'"
    noted({})
    assert wheel_line() is None


def test_from_an_index_or_a_bare_folder_the_line_names_the_package(monkeypatch):
    def missing(name: str) -> None:
        raise install.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(install.metadata, "distribution", missing)
    assert install_line("export,ort") == "pip install 'tiue-export[export,ort]'"


def test_a_missing_package_is_told_with_that_line():
    with pytest.raises(MissingExtraError) as caught:
        require("this", ("no_such_module",), "ort")
    assert caught.value.next_step == install_line("ort")

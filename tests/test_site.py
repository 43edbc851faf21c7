"""The documentation as a site: built strictly, whole, and loading nothing from elsewhere."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = typer.main.get_command(importlib.import_module("tiue_export.apps.cli").app)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: [docs]"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site. Strict: a dead link, heading or page that nobody placed fails it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_page_of_commands_has_every_command_with_its_options(site):
    page = (site / "commands" / "index.html").read_text("utf-8")
    for name, command in PROGRAM.commands.items():
        assert f'id="{name}"' in page
        for inner, parameters in getattr(command, "commands", {"": command}).items():
            assert not inner or f'id="{name}-{inner}"' in page
            for option in parameters.params:
                if option.param_type_name == "option":
                    assert f"<code>{option.opts[0]}</code>" in page


def test_the_python_pages_show_signatures_and_shapes(site):
    page = (site / "api" / "pipeline" / "index.html").read_text("utf-8")
    assert 'id="tiue_export.drawing.pipeline.Pipeline.latents_from_noise"' in page
    assert "(B, 4, H, W)" in page


def test_every_manual_page_is_reached_from_the_first(site):
    first = (site / "index.html").read_text("utf-8")
    linked = set(re.findall(r'href="(?:\./)?([\w/-]+)/"', first))
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages - linked == set()


def test_nothing_is_loaded_from_another_place(site):
    loaded = re.compile(
        r'<(?:script|img|source)[^>]*\bsrc="(https?:[^"]+)|<link[^>]*"(https?:[^"]+)'
    )
    found = {match for page in site.rglob("*.html") for match in loaded.findall(page.read_text())}
    assert found == set()

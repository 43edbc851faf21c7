"""The line that installs this program's extras, from wherever it was installed itself."""

from __future__ import annotations

import json
import shlex
from importlib import metadata
from urllib.parse import unquote, urlsplit

from tiue_export._version import __version__

PACKAGE = "tiue-export"
WHEEL = f"tiue_export-{__version__}-py3-none-any.whl"


def install_line(extras: str) -> str:
    """`pip install ...[extras]`, of the clone or the wheel that this program was installed from.

    pip notes it in direct_url.json (PEP 610). Without a note it came from an index.
    """
    place, editable = _place()
    return f"pip install {'-e ' if editable else ''}{shlex.quote(f'{place or PACKAGE}[{extras}]')}"


def wheel_line() -> str | None:
    """What makes a wheel of this program, `WHEEL` in dist/; None where it came from an index."""
    place, _ = _place()
    return place and f"pip wheel --no-deps --wheel-dir dist {shlex.quote(place)}"


def _place() -> tuple[str | None, bool]:
    """The folder or wheel that this program was installed from, and whether it follows edits."""
    note = _note()
    url = urlsplit(str(note.get("url", "")))
    if url.scheme != "file":
        return None, False
    folder = note.get("dir_info")
    return unquote(url.path), isinstance(folder, dict) and folder.get("editable") is True


def _note() -> dict[str, object]:
    try:
        text = metadata.distribution(PACKAGE).read_text("direct_url.json")
    except metadata.PackageNotFoundError:  # imported from a folder that was never installed
        return {}
    found = json.loads(text or "{}")
    return found if isinstance(found, dict) else {}

"""The line that installs this program's extras, from wherever it was installed itself."""

from __future__ import annotations

import json
import shlex
from importlib import metadata
from urllib.parse import unquote, urlsplit

NAME = "tiue-export"


def install_line(extras: str) -> str:
    """`pip install ...[extras]`, of the clone or the wheel that this program was installed from.

    pip notes it in direct_url.json (PEP 610). Without a note it came from an index.
    """
    note = _note()
    url = urlsplit(str(note.get("url", "")))
    if url.scheme != "file":
        return f"pip install {shlex.quote(f'{NAME}[{extras}]')}"
    editable = isinstance(folder := note.get("dir_info"), dict) and folder.get("editable") is True
    return f"pip install {'-e ' if editable else ''}{shlex.quote(f'{unquote(url.path)}[{extras}]')}"


def _note() -> dict[str, object]:
    try:
        text = metadata.distribution(NAME).read_text("direct_url.json")
    except metadata.PackageNotFoundError:  # imported from a folder that was never installed
        return {}
    found = json.loads(text or "{}")
    return found if isinstance(found, dict) else {}

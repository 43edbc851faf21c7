"""A changed tiue.json whose digest is right again: what a careful forger would write."""

from __future__ import annotations

import json
from typing import Any

from tiue_export.bundle.manifest import digest_of


def sealed_text(data: dict[str, Any]) -> str:
    """The text of a manifest with this content, and the digest that belongs to it."""
    content = {name: value for name, value in data.items() if name != "sha256"}
    return json.dumps({**content, "sha256": digest_of(content)})

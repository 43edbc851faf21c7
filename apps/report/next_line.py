"""The line that a finished command suggests: draw with what was made."""

from __future__ import annotations

import shlex

from tiue_export.bundle.read import Bundle

# What the demo family cannot draw would make a poor first picture of it.
_EXAMPLES = {"demo": "a red apple"}


def draw_line(bundle: Bundle, *options: str) -> str:
    """`tiue-export generate BUNDLE "PROMPT" OPTIONS`, with a prompt that its family can draw."""
    prompt = _EXAMPLES.get(bundle.manifest.source.family, "a red fox")
    command = f'tiue-export generate {shlex.quote(str(bundle.root))} "{prompt}"'
    return " ".join([command, *options])

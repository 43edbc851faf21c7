"""The line that a finished command suggests, whole: it is there to be copied."""

from __future__ import annotations

from tiue_export.bundle.read import Bundle
from tiue_export.system.command_line import command_line

from .tables import console

# What the demo family cannot draw would make a poor first picture of it.
_EXAMPLES = {"demo": "a red apple"}


def print_next(line: str) -> None:
    """`next:  LINE`, never broken, however narrow the terminal is."""
    console.print(f"next:  {line}", markup=False, highlight=False, soft_wrap=True)


def draw_line(bundle: Bundle, *options: str) -> str:
    """`tiue-export generate BUNDLE "PROMPT" OPTIONS`, with a prompt that its family can draw."""
    prompt = _EXAMPLES.get(bundle.manifest.source.family, "a red fox")
    return " ".join([command_line("generate", bundle.root), f'"{prompt}"', *options])

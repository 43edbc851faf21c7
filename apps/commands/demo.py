"""`tiue-export demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..options.group import OptionGroup, command, option
from ..options.output import WriteOptions


@dataclass(frozen=True)
class DemoOptions(OptionGroup):
    """Where the demo goes."""

    panel = "Output"
    out: Path = option(Path("demo"), "Folder for everything it makes.")


@command
def demo(folder: DemoOptions, output: WriteOptions) -> None:
    """See it all in a minute: export the student that ships, prove it, draw 16 pictures.

    Example:  tiue-export demo
    """
    from ..demo import run

    run(folder.out, output.force, output.as_json)

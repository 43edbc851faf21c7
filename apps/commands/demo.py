"""`tiue-export demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..options.group import OptionGroup, command
from ..options.output import WriteOptions


@dataclass(frozen=True)
class DemoOptions(OptionGroup):
    """Where the demo goes."""

    panel = "Output"
    out: Annotated[Path, typer.Option("--out", help="Folder for everything it makes.")] = Path(
        "demo"
    )


@command
def demo(folder: DemoOptions, output: WriteOptions) -> None:
    """See it all in a minute: export the student that ships, prove it, draw 16 pictures.

    Example:  tiue-export demo
    """
    from ..demo import run

    run(folder.out, output.force, output.as_json)

"""`tiue-export demo`."""

from __future__ import annotations

from ..options.demo import DemoOptions
from ..options.group import command
from ..options.output import WriteOptions


@command
def demo(folder: DemoOptions, output: WriteOptions) -> None:
    """See it all in a minute: export the student that ships, prove it, draw 16 pictures.

    Example:  tiue-export demo
    """
    from ..demo import run

    run(folder.out, output.force, output.as_json)

"""The `tiue-export` command line: the program itself; its commands are in commands/."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from tiue_export._version import __version__

from .commands import analyze, carry, check, draw, export, quantize, start, train
from .welcome import panel_of

app = typer.Typer(
    name="tiue-export",
    help=(
        "Take a distilled one-pass Stable Diffusion student (TiUE) to a device, with proof.\n\n"
        "A checkpoint becomes a bundle of verified graphs; a bundle draws pictures without torch."
    ),
    epilog="First steps: tiue-export init   |   exit codes: docs/errors.md",
    invoke_without_command=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"tiue-export {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Options of the program itself."""
    if context.invoked_subcommand is None:
        from .welcome import run

        run(context.command.commands, Path())  # type: ignore[attr-defined]


for _group in (start, export, analyze, quantize, draw, check, carry, train):
    for _command in _group.app.registered_commands:
        _command.rich_help_panel = panel_of(_command.callback.__name__ if _command.callback else "")
    app.add_typer(_group.app)  # without a name: its commands are the program's own


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script; `arguments` default to the process's own."""
    # A plain SIGTERM would skip the clean-up of an unfinished export.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app(args=sys.argv[1:] if arguments is None else arguments)

"""The `tiue-export` command line: the program itself; its commands are in commands/."""

from __future__ import annotations

import io
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, TextIO

import typer

from tiue_export._version import __version__
from tiue_export.errors import TiueWarning
from tiue_export.system.owned_path import remove_temporary_leftovers

from .commands.analyze import analyze
from .commands.audit import audit
from .commands.bench import bench
from .commands.bundle import app as bundle_app
from .commands.cache import cache
from .commands.calibrate import calibrate
from .commands.coreai import coreai
from .commands.coreml import coreml
from .commands.demo import demo
from .commands.distill import distill
from .commands.doctor import doctor
from .commands.form import form_commands
from .commands.generate import generate
from .commands.init import init
from .commands.inspect import inspect
from .commands.onnx import onnx
from .commands.openvino import openvino
from .commands.parity import parity
from .commands.qnn import qnn
from .commands.quantize import quantize
from .commands.recipes import recipes
from .commands.serve import serve
from .commands.studio import studio
from .commands.triton import triton
from .commands.trt import trt
from .commands.web import web
from .welcome import panel_of

# In the order of --help.
_COMMANDS = (
    *(init, demo, doctor, recipes),
    *(onnx, openvino, coreml, coreai, trt, qnn, *form_commands()),
    *(audit, analyze, calibrate, quantize),
    *(generate, studio, serve),
    *(inspect, parity, bench),
    *(triton, web, cache),
    distill,
)

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
    remove_temporary_leftovers()
    if context.invoked_subcommand is None:
        from .welcome import run

        run(context.command.commands, Path())  # type: ignore[attr-defined]


for _command in _COMMANDS:
    app.command(rich_help_panel=panel_of(_command.__name__))(_command)
app.add_typer(bundle_app, name="bundle", rich_help_panel=panel_of("bundle"))


_show_other_warning = warnings.showwarning


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings are for the user: no line of our code with them."""
    if issubclass(category, TiueWarning):
        print(f"warning: {message}", file=sys.stderr)
    else:
        _show_other_warning(message, category, filename, lineno, file, line)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script; `arguments` default to the process's own."""
    for stream in (sys.stdout, sys.stderr):
        # A path may hold bytes that are no text, a terminal may know few letters: shown escaped.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # A plain SIGTERM would skip the clean-up of an unfinished export.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    warnings.showwarning = _show_warning
    app(args=sys.argv[1:] if arguments is None else arguments)

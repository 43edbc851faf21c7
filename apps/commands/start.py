"""Commands to begin with: what to type, the tour, what works here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..report.failures import explained
from .shared_options import Base, Force, Json

app = typer.Typer()


@app.command()
@explained
def init(
    context: typer.Context,
    device: Annotated[
        str | None,
        typer.Option("--device", help="cpu, arm, rtx, nvidia, jetson, mac \\[default: asked]."),
    ] = None,
    ckpt: Annotated[
        str | None, typer.Option("--ckpt", help="Student or model \\[default: asked].")
    ] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Say which commands take a checkpoint to a device: asks for both, changes nothing.

    Example:  tiue-export init

    Example:  tiue-export init --device jetson --ckpt student.safetensors --base sd21-base/
    """
    from ..init import run

    commands = context.find_root().command.commands  # type: ignore[attr-defined]
    run(device, ckpt, base, commands, as_json)


@app.command()
@explained
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything it makes.")] = Path(
        "demo"
    ),
    force: Force = False,
    as_json: Json = False,
) -> None:
    """See it all in a minute: export the student that ships, prove it, draw 16 pictures.

    Example:  tiue-export demo
    """
    from ..demo import run

    run(out, force, as_json)


@app.command()
@explained
def doctor(as_json: Json = False) -> None:
    """Say what is installed and which runtimes can run here, and why not.

    Example:  tiue-export doctor
    """
    from ..doctor import run

    run(as_json)

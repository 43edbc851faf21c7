"""`tiue-export init`."""

from __future__ import annotations

import typer

from ..options.group import command
from ..options.init import RouteOptions
from ..options.output import JsonOptions


@command
def init(context: typer.Context, route: RouteOptions, output: JsonOptions) -> None:
    """Say which commands take a checkpoint to a device: asks for both, changes nothing.

    Example:  tiue-export init

    Example:  tiue-export init --device jetson --ckpt student.safetensors --base sd21-base/
    """
    from ..init import run

    commands = context.find_root().command.commands  # type: ignore[attr-defined]
    run(route.device, route.ckpt, route.base, commands, output.as_json)

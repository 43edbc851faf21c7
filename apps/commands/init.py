"""`tiue-export init`."""

from __future__ import annotations

from dataclasses import dataclass

import typer

from ..options.group import OptionGroup, command, option
from ..options.output import JsonOptions


@dataclass(frozen=True)
class RouteOptions(OptionGroup):
    """From where to where; what is not given is asked."""

    device: str | None = option(None, "cpu, arm, rtx, nvidia, jetson, mac \\[default: asked].")
    ckpt: str | None = option(None, "Student or model \\[default: asked].")
    base: str | None = option(None, "Pipeline folder or hub id for what the checkpoint lacks.")


@command
def init(context: typer.Context, route: RouteOptions, output: JsonOptions) -> None:
    """Say which commands take a checkpoint to a device: asks for both, changes nothing.

    Example:  tiue-export init

    Example:  tiue-export init --device jetson --ckpt student.safetensors --base sd21-base/
    """
    from ..init import run

    commands = context.find_root().command.commands  # type: ignore[attr-defined]
    run(route.device, route.ckpt, route.base, commands, output.as_json)

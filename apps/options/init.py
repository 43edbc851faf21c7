"""The options of `tiue-export init`."""

from __future__ import annotations

from dataclasses import dataclass

from .group import OptionGroup, option


@dataclass(frozen=True)
class RouteOptions(OptionGroup):
    """From where to where; what is not given is asked."""

    device: str | None = option(
        None, "cpu, arm, rtx, nvidia, jetson, mac, iphone, ipad \\[default: asked]."
    )
    ckpt: str | None = option(None, "Student or model \\[default: asked].")
    base: str | None = option(None, "Pipeline folder or hub id for what the checkpoint lacks.")

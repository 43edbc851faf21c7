"""diffusers' DDIM for a checkpoint of any scheduler class."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from diffusers import DDIMScheduler

from tiue_export.sampling.ddim import ddim_settings


def ddim_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """DDIMScheduler's arguments for a configuration that any scheduler class saved.

    `DDIMScheduler.from_config` would take its own defaults (clipping!) for keys that a PNDM
    configuration never has.
    """
    accepted = signature(DDIMScheduler.__init__).parameters
    return {key: value for key, value in ddim_settings(config).items() if key in accepted}

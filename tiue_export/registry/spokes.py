"""Doors to the spokes: runtimes, calibration, benchmarks and apps are reached from here by name."""

from __future__ import annotations

import importlib


def run_command_line(arguments: list[str] | None = None) -> None:
    """The `tiue-export` command; its code is a spoke, so it is reached by name."""
    importlib.import_module("tiue_export.apps.cli").main(arguments)

"""`python -m tiue_export` is the same as `tiue-export`."""

from tiue_export.registry.spokes import run_command_line

run_command_line()

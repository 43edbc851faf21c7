"""`optimum-cli export tiue`: optimum finds this file by its place in the wheel.

optimum loads every module in its `optimum.commands.register` namespace; the class only parses
arguments and calls the same function as `tiue-export onnx`.
"""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class TiueExportCommand(BaseOptimumCLICommand):
    """The `tiue` subcommand of `optimum-cli export`."""

    COMMAND = CommandInfo(name="tiue", help="Export a TiUE student to a verified ONNX bundle.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """The arguments of `tiue-export onnx` in optimum's spelling."""
        parser.add_argument(
            "--model",
            required=True,
            help="pipeline folder, or a .safetensors file with --base",
        )
        parser.add_argument("--base", help="pipeline folder for what a file lacks")
        parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32")
        parser.add_argument("--height", type=int)
        parser.add_argument("--width", type=int)
        parser.add_argument("--batch-size", type=int, default=1)
        parser.add_argument("--steps", type=int)
        parser.add_argument("--family", help="for a bare UNet whose family is ambiguous")
        parser.add_argument("--force", action="store_true", help="replace an existing bundle")
        parser.add_argument("output", help="bundle folder to write")

    def run(self) -> None:
        """Export through the same code as the tiue-export command line."""
        from tiue_export.registry.spokes import run_command_line

        command = ["onnx", "--ckpt", self.args.model, "--out", self.args.output]
        command += ["--precision", self.args.dtype, "--batch", str(self.args.batch_size)]
        for option in ("base", "height", "width", "steps", "family"):
            value = getattr(self.args, option)
            if value is not None:
                command += [f"--{option}", str(value)]
        run_command_line(command + ["--force"] * self.args.force)


REGISTER_COMMANDS = [(TiueExportCommand, ExportCommand)]

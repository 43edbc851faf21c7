"""`tiue-export bundle seal`: what a person changed in tiue.json is checked and accepted."""

from __future__ import annotations

from pathlib import Path

from tiue_export.bundle.read import MANIFEST_FILE
from tiue_export.bundle.write import seal
from tiue_export.system.command_line import command_line

from .report.next_line import print_next
from .report.tables import console, print_json


def run(path: Path, *, as_json: bool) -> None:
    """Seal, and say how to prove what the constants now draw."""
    bundle = seal(path)
    if as_json:
        print_json({"bundle": str(bundle.root)})
        return
    console.print(f"{bundle.root / MANIFEST_FILE} is sealed as it now is.", markup=False)
    print_next(command_line("parity", bundle.root))

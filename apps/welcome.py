"""`tiue-export` alone: where a newcomer starts, and what the commands are for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tiue_export._version import __version__
from tiue_export.registry.backends import BACKENDS
from tiue_export.system.command_line import command_line

if TYPE_CHECKING:
    from rich.console import Console

_BUNDLES_SHOWN = 3
_OTHER = "More"
# Also the panels of --help. A command named nowhere is listed last.
PANELS: Mapping[str, tuple[str, ...]] = {
    "Start": ("init", "demo", "doctor", "recipes"),
    "Export": (
        "onnx", *(name for name, entry in BACKENDS.items() if entry.exporter),
        "audit", "analyze", "calibrate", "quantize",
    ),
    "Draw": ("generate", "studio", "serve"),
    "Check": ("inspect", "parity", "bench"),
    "Carry": ("bundle", "triton", "web", "cache"),
    "Train": ("distill",),
}  # fmt: skip


def panel_of(command: str) -> str:
    """The heading under which a command is listed."""
    return next((panel for panel, names in PANELS.items() if command in names), _OTHER)


def run(commands: Iterable[str], folder: Path) -> None:
    """Print the way in; bundles in `folder` are taken up as examples."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"[bold]tiue-export {__version__}[/]: students of Stable Diffusion to devices.\n")
    bundles = bundles_in(folder)
    if bundles:
        _line_up(console, "Bundles here", _bundle_lines(bundles))
    _line_up(
        console,
        "New here?",
        [
            ("tiue-export demo", "see it all in a minute, offline"),
            ("tiue-export init", "two questions, then the exact commands for your device"),
            ("tiue-export doctor", "what works on this machine, and what to install"),
        ],
    )
    _line_up(
        console,
        "With a checkpoint",
        [
            (
                "tiue-export onnx --ckpt student.safetensors --base sd21-base/ --out fox",
                "a verified bundle",
            ),
            ('tiue-export generate fox "a red fox in the snow"', "pictures, without torch"),
            ("tiue-export studio fox", "the same in the browser"),
        ],
    )
    console.print("[bold]All commands[/]   (tiue-export COMMAND --help shows examples)")
    for panel, names in _by_panel(commands).items():
        console.print(f"  {panel:<8} {'  '.join(names)}")
    console.print("\nTab completion: tiue-export --install-completion")


def bundles_in(folder: Path) -> list[str]:
    """Names of the bundles directly in a folder, newest first."""
    try:
        found = [path.parent for path in folder.glob("[!.]*/tiue.json")]
        found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:  # a folder that vanishes or cannot be read holds nothing to show
        return []
    return [path.name for path in found]


def _bundle_lines(bundles: list[str]) -> list[tuple[str, str]]:
    shown = (command_line("generate", name) for name in bundles[:_BUNDLES_SHOWN])
    lines = [(f'{line} "a red fox"', "") for line in shown]
    more = len(bundles) - _BUNDLES_SHOWN
    if more > 0:
        lines[-1] = (lines[-1][0], f"and {more} more")
    return lines


def _line_up(console: Console, title: str, lines: list[tuple[str, str]]) -> None:
    console.print(f"[bold]{title}[/]")
    width = max(len(command) for command, _ in lines)
    for command, meaning in lines:
        line = f"  {command:<{width}}   {meaning}".rstrip()
        console.print(line, markup=False, soft_wrap=True)
    console.print()


def _by_panel(commands: Iterable[str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {panel: [] for panel in (*PANELS, _OTHER)}
    known = set(commands)
    for panel, names in PANELS.items():
        grouped[panel] = [name for name in names if name in known]
    grouped[_OTHER] = sorted(name for name in known if panel_of(name) == _OTHER)
    return {panel: names for panel, names in grouped.items() if names}

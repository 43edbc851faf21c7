"""Writes the site's page of commands from the program itself, and lists pages nobody placed.

A hook of MkDocs (`mkdocs.yml`): the page exists in the site only.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

PAGE = "commands.md"


def on_files(files: Files, config: Any) -> Files:
    """Add the generated page to those of the folder."""
    files.append(File.generated(config, PAGE, content=command_page()))
    return files


def on_config(config: Any) -> Any:
    """Place manual pages that the navigation does not name yet under their own heading."""
    placed = set(re.findall(r"[\w./-]+\.md", str(config.nav)))
    folder = Path(config.docs_dir)
    names = sorted(path.name for path in folder.glob("*.md"))
    rest = [name for name in names if name not in placed]
    if rest:
        config.nav.insert(-2, {"More": rest})
    return config


def command_page() -> str:
    """Every command with its help, examples, arguments and options, in Markdown."""
    cli: Any = importlib.import_module("tiue_export.apps.cli")
    panels: Any = importlib.import_module("tiue_export.apps.welcome")
    program: Any = typer.main.get_command(cli.app)
    lines = [
        "# Commands",
        "",
        "Generated from the program: `tiue-export COMMAND --help` says the same. "
        "[Exit codes](errors.md) are stable; `--json` prints one object on standard output.",
    ]
    placed = [name for panel in panels.PANELS.values() for name in panel]
    known = [name for name in placed if name in program.commands]
    for name in [*known, *sorted(set(program.commands) - set(known))]:
        lines += _command(program.commands[name], f"tiue-export {name}")
    return "\n".join(lines) + "\n"


def _command(command: Any, path: str) -> Iterator[str]:
    text, _, examples = (command.help or "").partition("Example:")
    yield from ("", f"## {path.removeprefix('tiue-export ')}", "", text.strip(), "")
    found = [line.strip() for line in examples.replace("Example:", "\n").splitlines()]
    yield from ("```sh", *(line for line in found if line), "```", "")
    for name, inner in getattr(command, "commands", {}).items():
        yield from _command(inner, f"{path} {name}")
    if not hasattr(command, "commands"):
        yield from ("| | meaning | default |", "|---|---|---|")
        yield from (_row(parameter) for parameter in command.params if not _is_help(parameter))


def _is_help(parameter: Any) -> bool:
    return "--help" in parameter.opts


def _row(parameter: Any) -> str:
    argument = parameter.param_type_name == "argument"
    flags = [*parameter.opts, *parameter.secondary_opts]
    many = parameter.nargs == -1 or getattr(parameter, "multiple", False)
    name = parameter.name.upper() if argument else "`, `".join(flags)
    help_text = (parameter.help or "").replace("\\[", "[").replace("|", "\\|")
    text, _, told = help_text.partition("[default: ")
    default = told.rstrip(".] ") or _default(parameter)
    if parameter.required:
        default = "required"
    return f"| `{name}`{' ...' if many else ''} | {text.strip()} | {default} |"


def _default(parameter: Any) -> str:
    value = parameter.default
    plain = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    if hasattr(value, "parts"):  # a path
        return f"`{value}`"
    return f"`{value}`" if plain and value != "" else ""

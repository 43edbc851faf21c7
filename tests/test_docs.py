"""The documents keep their word: links lead somewhere, and commands and flags exist."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from test_layering import HEAVY_ORDER, HUB, LIGHT, SPOKES

from tiue_export import errors

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/errors.md")
DOCUMENTS = sorted({*REQUIRED, *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))})
PROGRAM = typer.main.get_command(importlib.import_module("tiue_export.apps.cli").app)
README_LINES = 130
FENCE = re.compile(r"^ *(```+|~~~+)[^\n]*\n(.*?)^ *\1[ \t]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(
    r"\]\(\s*<?([^)>\s]+)"  # [text](target "title"), ![text](target)
    r"|^ {0,3}\[[^\]^]+\]:\s*<?([^>\s]+)>?"  # [name]: target
    r"|<(?:a|img|source)\b[^>]*\b(?:href|src|srcset)=[\"']([^\"'\s]+)",
    re.MULTILINE,
)
PAGES = sorted({*DOCUMENTS, *(f"docs/api/{path.name}" for path in ROOT.glob("docs/api/*.md"))})
PROJECT_PATH = re.compile(
    rf"(?<![\w./-])(?:{HUB}|{'|'.join(SPOKES)}|docs|examples|tests)/[\w./-]*\w"
)
PROJECT_MODULE = re.compile(rf"(?:-m|from|import|:::) ({HUB}(?:\.\w+)+)")
INTERRUPTED = 130


def read(document: str) -> str:
    """A document, or the failure that says it is still to be written."""
    path = ROOT / document
    assert path.is_file(), f"{document} does not exist"
    return path.read_text("utf-8")


def prose(text: str) -> str:
    """A document without its code: what looks like a link there is none."""
    return re.sub(r"`[^`\n]+`", "`code`", FENCE.sub("", text))


def link_targets(text: str) -> list[str]:
    """Where the links and pictures of a document lead, web addresses left out."""
    targets = (next(filter(None, match.groups())) for match in LINK.finditer(prose(text)))
    return [target for target in targets if not re.match(r"[a-z][a-z0-9+.-]+:", target)]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a document's headings, and those it sets itself."""
    found: dict[str, int] = {}
    body = FENCE.sub("", text)
    names = set(re.findall(r"<a\b[^>]*\b(?:id|name)=[\"']([^\"']+)", body))
    for heading in re.findall(r"^ {0,3}#{1,6}[ \t]+(.+?)[ \t#]*$", body, re.MULTILINE):
        words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        count = found[slug] = found.get(slug, -1) + 1
        names.add(f"{slug}-{count}" if count else slug)
    return names


def dead_links(document: str, text: str) -> list[str]:
    """The links whose file or heading does not exist."""
    dead = []
    for target in link_targets(text):
        name, _, anchor = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        if not path.exists() or not path.resolve().is_relative_to(ROOT):
            dead.append(target)
        elif anchor and path.suffix == ".md":
            if anchor not in anchors(path.read_text("utf-8") if name else text):
                dead.append(target)
    return dead


def dead_paths(text: str) -> list[str]:
    """Files, folders and modules of this repository that a text names and that do not exist.

    A name in capitals, such as runtimes/NAME.py, stands for one that the reader chooses.
    """
    paths = [path for path in PROJECT_PATH.findall(text) if not re.search("[A-Z]{2}", path)]
    dead = [path for path in paths if not (ROOT / path).exists()]
    return dead + [name for name in PROJECT_MODULE.findall(text) if not module_exists(name)]


def module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent is missing, or is a module itself
        return False


def folders_of_the_tree(text: str) -> set[str]:
    """The folders that a tree of indented lines, `name/  what is in it`, names by their paths."""
    folders: list[tuple[int, str]] = []
    paths = set()
    for spaces, name in re.findall(r"^( *)([\w./-]+)/ +\S", text, re.MULTILINE):
        folders = [folder for folder in folders if folder[0] < len(spaces)]
        folders.append((len(spaces), name))
        paths.add("/".join(name for _, name in folders))
    return paths


def folders_with_code() -> set[str]:
    files = [file for top in (HUB, *SPOKES) for file in (ROOT / top).rglob("*.py")]
    return {file.parent.relative_to(ROOT).as_posix() for file in files}


def invocations(text: str) -> Iterator[list[str]]:
    """The arguments of each `tiue-export ...` in fenced blocks and in inline code."""
    blocks = [match.group(2) for match in FENCE.finditer(text)]
    inline = [code for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)) if " " in code]
    for line in re.sub(r"\\\n\s*", " ", "\n".join([*blocks, *inline])).splitlines():
        yield from _invocations_in(line)


def _invocations_in(line: str) -> Iterator[list[str]]:
    line = line.replace("-m tiue_export", "-m tiue-export")
    if not re.search(r"(^|[\s/(=])tiue-export(\s|$)", line):
        return
    try:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;()<>")
        lexer.whitespace_split = True
        words = list(lexer)
    except ValueError:  # prose with an apostrophe
        words = line.split()
    current: list[str] | None = None
    for word in [*words, ";"]:
        if word.rpartition("/")[2] == "tiue-export" and "://" not in word:
            current = []
        elif current is not None and set(word) <= set("|&;()<>"):
            yield current
            current = None
        elif current is not None:
            current.append(word)


def mistakes(arguments: list[str]) -> list[str]:
    """The command or the flags of one invocation that the program does not know."""
    commands = PROGRAM.commands
    root_flags = {"--help", "-h", *_flags(PROGRAM)}
    while arguments and arguments[0] in root_flags:
        arguments = arguments[1:]
    if not arguments or re.fullmatch(r"[A-Z.…]+|\[.*|\d.*", arguments[0]):
        return []  # a placeholder (COMMAND, [OPTIONS]) or what --version prints
    name, *rest = arguments
    if name not in commands:
        return [f"tiue-export has no {name!r}"]
    command = commands[name]
    if hasattr(command, "commands") and rest and not rest[0].startswith("-"):  # bundle pack
        if rest[0] not in command.commands:
            return [f"tiue-export {name} has no {rest[0]!r}"]
        command, name, rest = command.commands[rest[0]], f"{name} {rest[0]}", rest[1:]
    known = {"--help", "-h", *_flags(command)}
    used = [word.strip("[]").partition("=")[0] for word in rest]
    flags = [word for word in used if re.fullmatch(r"--[a-z][a-z-]*|-[a-zA-Z]", word)]
    return [f"tiue-export {name} has no {flag}" for flag in flags if flag not in known]


def _flags(command: object) -> set[str]:
    options = [*command.params]  # type: ignore[attr-defined]
    return {flag for option in options for flag in [*option.opts, *option.secondary_opts]}


def unknown_commands(text: str) -> list[str]:
    return [mistake for arguments in invocations(text) for mistake in mistakes(arguments)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings_that_exist(document: str) -> None:
    assert dead_links(document, read(document)) == []


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    assert len(read("README.md").splitlines()) <= README_LINES
    reached, waiting = set(), ["README.md"]
    while waiting:
        document = waiting.pop()
        if document not in reached:
            reached.add(document)
            folder = (ROOT / document).parent
            pages = [target.partition("#")[0] for target in link_targets(read(document))]
            linked = [folder / page for page in pages if page.endswith(".md")]
            waiting += [path.resolve().relative_to(ROOT).as_posix() for path in linked]
    assert {*DOCUMENTS} - reached == {"docs/index.md"}  # the site's first page


def test_the_readme_keeps_the_command_that_runs_the_tests() -> None:
    commands = [match.group(2).splitlines() for match in FENCE.finditer(read("README.md"))]
    assert "make test" in {line.partition("#")[0].strip() for lines in commands for line in lines}


def test_the_python_of_the_readme_draws(tiny_bundle, tmp_path, monkeypatch) -> None:
    blocks = [match.group(0) for match in FENCE.finditer(read("README.md"))]
    (block,) = [text for text in blocks if text.startswith("```python")]
    (tmp_path / "emoji").symlink_to(tiny_bundle.root)
    monkeypatch.chdir(tmp_path)
    exec(compile(block.partition("\n")[2].rpartition("```")[0], "README.md", "exec"), {})
    assert len(list(tmp_path.glob("*.png"))) == 4


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_flags_in_the_documents_exist(document: str) -> None:
    assert unknown_commands(read(document)) == []


@pytest.mark.parametrize("document", PAGES)
def test_files_and_modules_that_the_documents_name_exist(document: str) -> None:
    assert dead_paths(read(document)) == []


def test_the_tree_of_the_architecture_page_is_the_one_on_disk() -> None:
    tree = read("docs/architecture.md").partition("## The tree")[2].partition("\n## ")[0]
    assert folders_of_the_tree(tree) == folders_with_code()


def test_the_architecture_page_has_the_order_that_is_tested() -> None:
    assert f"```text\n{LIGHT}\n< {HEAVY_ORDER}\n```" in read("docs/architecture.md")


def test_the_documents_show_every_command() -> None:
    written = [read(document) for document in DOCUMENTS if (ROOT / document).is_file()]
    shown = {arguments[0] for text in written for arguments in invocations(text) if arguments}
    assert sorted(set(PROGRAM.commands) - shown) == []


@pytest.mark.parametrize("name", PROGRAM.commands)
def test_the_examples_in_the_help_of_a_command_are_ones_it_accepts(name: str) -> None:
    text = PROGRAM.commands[name].help
    examples = list(invocations(f"```\n{text.partition('Example:')[2].strip()}\n```"))
    assert len(examples) == text.count("Example:") > 0
    assert {arguments[0] for arguments in examples} == {name}
    assert [mistake for arguments in examples for mistake in mistakes(arguments)] == []


def test_the_error_page_has_a_row_for_every_exit_code() -> None:
    rows = [line for line in read("docs/errors.md").splitlines() if line.startswith("|")]
    cells = {cell.strip(" `*") for row in rows for cell in row.split("|")}
    kinds = [value for value in vars(errors).values() if isinstance(value, type)]
    codes = {kind.exit_code for kind in kinds if issubclass(kind, errors.TiueError)}
    assert codes == set(range(1, 12))
    assert {str(code) for code in {*codes, INTERRUPTED}} - cells == set()


@pytest.mark.parametrize(
    "text",
    [
        "[gone](docs/gone.md)",
        "![gone](docs/gone.png)",
        "[gone]: docs/gone.md",
        "[![badge](https://example.org/x.svg)](docs/gone.md)",
        "[outside the repository](../)",
        '<img src="docs/gone.svg" width="600">',
        "# Here\n[wrong heading](#there)",
        "[wrong heading](README.md#there-is-none)",
    ],
)
def test_a_planted_dead_link_is_caught(text: str) -> None:
    assert dead_links("README.md", text)


@pytest.mark.parametrize(
    "text",
    [
        "[web](https://example.org/x) [mail](mailto:a@b.c) [licence](LICENSE)",
        "## One `--flag`, two!\n[there](#one---flag-two)",
        "# Twice\n# Twice\n[second](#twice-1)",
        "```\n[not](a-link)\n```\nand `[nor](this)`",
    ],
)
def test_good_links_and_code_are_left_alone(text: str) -> None:
    assert dead_links("README.md", text) == []


@pytest.mark.parametrize(
    "text",
    [
        "`tiue_export/gone.py` did it",
        "| apps/gone/ | moved |",
        "python -m tiue_export.benchmarks.gone OUT",
        "from tiue_export.gone.file import name",
        "::: tiue_export.specs.deeper",
    ],
)
def test_a_planted_dead_path_is_caught(text: str) -> None:
    assert dead_paths(text)


@pytest.mark.parametrize(
    "text",
    [
        "`runtimes/NAME.py`, written by you",
        "`runtimes/`, `tiue_export/specs.py`.",
        "see my/apps/gone.py",
        "python -m tiue_export demo",
    ],
)
def test_paths_that_exist_or_are_placeholders_are_left_alone(text: str) -> None:
    assert dead_paths(text) == []


def test_a_tree_is_read_by_its_indentation() -> None:
    tree = "hub/   all\n  a/  x\n    b/ y\n  c/  z\nspoke/  w\n"
    assert folders_of_the_tree(tree) == {"hub", "hub/a", "hub/a/b", "hub/c", "spoke"}


@pytest.mark.parametrize(
    "text",
    [
        "```sh\ntiue-export onxx --ckpt a\n```",
        "```sh\n$ tiue-export onnx --ckpt a --presicion fp16\n```",
        "```sh\ntiue-export onnx --ckpt a \\\n    --fast=1\n```",
        "```sh\ncd x && .venv/bin/tiue-export doctor --loud | head\n```",
        "```sh\npython -m tiue_export demo --quick\n```",
        "Say `tiue-export inspect fox --deep`.",
        "```sh\ntiue-export bundle send fox\n```",
        "```sh\ntiue-export bundle pack fox --gzip\n```",
    ],
)
def test_a_planted_wrong_command_is_caught(text: str) -> None:
    assert unknown_commands(text)


@pytest.mark.parametrize(
    "text",
    [
        "```sh\npip install 'tiue-export[export]' --upgrade  # tiue-export's extras\n```",
        "```sh\ntiue-export inspect fox --json | jq --raw-output .steps\n```",
        '```sh\ntiue-export generate fox "--not a flag" --seed 7 --count=4\n```',
        "```\nUsage: tiue-export [OPTIONS] COMMAND [ARGS]...\n```",
        "```sh\ntiue-export --version && tiue-export doctor\n```",
        "```sh\ntiue-export bundle pack fox --runtime trt\n```",
        "```sh\ngit clone https://example.org/tiue-export folder\n```",
    ],
)
def test_right_commands_and_other_programs_are_left_alone(text: str) -> None:
    assert unknown_commands(text) == []

"""What a `next:` line promises: its commands are ones the program takes, its options are there."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import typer

PROGRAM = typer.main.get_command(importlib.import_module("tiue_export.apps.cli").app)
# What the parser raises for what it cannot take.
_REFUSED = typer.BadParameter.__mro__[2]
# "Export it with --batch 2": an option of another command, where the sentence says which.
_SAID = {
    "export": "onnx",
    "pack": "bundle pack",
    "capture": "calibrate",
    "refit": "trt",
}
# What a reader types, not the name of the program in a sentence.
_COMMAND = re.compile(r"\btiue-export (?!(?:again|that|with)\b)(?=[a-z])")
_OTHER_PROGRAMS = re.compile(r"\b(?:pip|nvidia-smi|python) [^;,]*")
_ENDS = ("`", ". ", ": ", "; ", ", ", " (", ")", "   ", "\n", " on the ")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def verbs() -> dict[str, Any]:
    """Every command by what is typed for it: "onnx", "bundle pack"."""
    found: dict[str, Any] = {}
    for name, command in PROGRAM.commands.items():
        inner = getattr(command, "commands", None)
        found |= {f"{name} {n}": c for n, c in inner.items()} if inner else {name: command}
    return found


VERBS = verbs()


def options_of(verb: str) -> set[str]:
    """The flags of one command."""
    params = VERBS[verb].params
    return {"--help", *(flag for each in params for flag in (*each.opts, *each.secondary_opts))}


def split(text: str) -> tuple[list[str], str]:
    """The command lines within a text, and the prose that is left of it.

    A command ends where a reader would end it: with its line, a comma, a bracket, a sentence.
    """
    lines, prose, place = [], "", 0
    while found := _COMMAND.search(text, place):
        prose += text[place : found.start()]
        end = _end(text, found.end())
        lines.append(text[found.start() : end])
        place = end
    return lines, prose + text[place:]


def _end(text: str, start: int) -> int:
    """The first mark after `start` that ends a command and lies in no quotes."""
    quote = ""
    for at in range(start, len(text)):
        if quote or text[at] in "'\"":
            quote = (quote if quote != text[at] else "") if quote else text[at]
        elif text.startswith(_ENDS, at) and text[at - 1] != ".":  # not of an ellipsis
            return at
    return len(text)


def verb_of(words: Sequence[str]) -> str | None:
    """The verb of a command's words; None where they name none."""
    names = (" ".join(words[:2]), *words[:1])
    return next((name for name in names if name in VERBS), None)


def printed(out: str, err: str) -> list[str]:
    """Every next line of a command's output: after a failure to its end, else to that of its line.

    "" is what stands for none.
    """
    failed = err.partition("\n  next: ")[2] if err.startswith("error: ") else ""
    if "\nerror: " in err:
        failed = err.rpartition("\nerror: ")[2].partition("\n  next: ")[2]
    return [failed.strip(), *re.findall(r"^next:  (.*)$", out + "\n" + err, re.MULTILINE)]


def printed_mistakes(words: Sequence[str], out: str, err: str) -> list[str]:
    """What in the next lines that a command printed leads nowhere."""
    verb = verb_of(words)
    running = () if verb is None else (verb,)
    return [problem for text in printed(out, err) for problem in mistakes(text, *running)]


def mistakes(text: str, *running: str) -> list[str]:
    """What in a next line leads nowhere, for the verbs that may print it (none: for any verb)."""
    lines, prose = split(text)
    wrong = [problem for line in lines for problem in refused(line)]
    for sentence in re.split(r"(?<=[.;:])\s+", _OTHER_PROGRAMS.sub("", prose)):
        said = [verb for word, verb in _SAID.items() if re.search(word, sentence, re.IGNORECASE)]
        said += [verb for verb in VERBS if re.search(rf"\b{verb}\b", sentence)]
        others = {option for verb in said for option in options_of(verb)}
        for option in {*_OPTION.findall(sentence)} - others:
            if not running and not any(option in options_of(verb) for verb in VERBS):
                wrong.append(f"no command has {option}")
            lacking = [verb for verb in running if option not in options_of(verb)]
            wrong += [f"tiue-export {verb} has no {option}" for verb in lacking]
    return wrong


def refused(line: str) -> Iterator[str]:
    """Why the program would not even begin with a command line."""
    words = shlex.split(line)[1:]
    if any(re.fullmatch(r"\.\.\.|…", word) for word in words):
        yield f"{line!r} cannot be typed"
        return
    verb = verb_of(words)
    if verb is None:
        yield f"tiue-export has no {words[0]!r}"
        return
    rest = words[len(verb.split()) :]
    try:
        VERBS[verb].make_context(verb, list(rest))
    except typer.Exit:  # --help
        return
    except _REFUSED as error:
        yield f"{line!r}: {error.format_message()}"

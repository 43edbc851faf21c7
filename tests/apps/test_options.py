"""Options as data: from groups to a command and back, and what all export commands share."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields

import pytest
import typer
from typer.testing import CliRunner

from tiue_export.errors import UsageError

GROUP = importlib.import_module("tiue_export.apps.options.group")
OptionGroup, option, command = GROUP.OptionGroup, GROUP.option, GROUP.command
given, picked, refuse = GROUP.given, GROUP.picked, GROUP.refuse
CLI = importlib.import_module("tiue_export.apps.cli")
COMMANDS = typer.main.get_command(CLI.app).commands  # type: ignore[attr-defined]
EXPORTS = ("onnx", "openvino", "trt", "coreml", "coreai")


@dataclass(frozen=True)
class Colour(OptionGroup):
    """One of several bases."""

    panel = "Colour"
    red: int = option(0, "Red.")
    matte: bool = option(True, "Matte.", "--matte/--glossy")


@dataclass(frozen=True)
class Names(OptionGroup):
    """One that is required, one that is repeated, and data that no option sets."""

    panel = "Names"
    title: str = option(..., "Title.")
    name: tuple[str, ...] = option((), "Names.")
    letters: int = 40


@dataclass(frozen=True)
class Picture(Colour, Names):
    """Both, and one changed."""

    red: int = option(7, "Redder.")


def program(seen: list[object]) -> typer.Typer:
    @command
    def paint(context: typer.Context, picture: Picture) -> None:
        """Paint."""
        seen.extend([context.command.name, picture])

    app = typer.Typer()
    app.command()(paint)
    return app


def test_a_command_gets_the_groups_made_of_what_was_typed() -> None:
    seen: list[object] = []
    done = CliRunner().invoke(program(seen), ["--title", "A", "--name", "b", "--name", "c"])
    assert done.exit_code == 0, done.output
    assert seen == ["paint", Picture("A", ("b", "c"), red=7)]


def test_a_required_option_is_missed_by_its_flag() -> None:
    done = CliRunner().invoke(program([]), [])
    assert done.exit_code == 2
    assert "--title" in done.output


def test_each_option_stands_under_the_heading_of_its_group() -> None:
    output = CliRunner().invoke(program([]), ["--help"], env={"COLUMNS": "80"}).output
    names, _, colours = output.partition("Colour")
    assert "Names" in names
    assert "--title" in names
    assert "--glossy" in colours


def test_what_was_given_is_named_by_its_flag() -> None:
    assert given(Picture("A")) == ("--title",)
    assert given(Picture("A"), usable=("title",)) == ()
    changed = Picture("A", ("b",), red=0, matte=False)
    assert given(changed) == ("--title", "--name", "--red", "--glossy")
    assert given(changed, only=("red", "matte")) == ("--red", "--glossy")


def test_a_refusal_names_one_option_or_several() -> None:
    with pytest.raises(UsageError, match=r"^--red is for walls\n"):
        refuse("for walls", "Leave it out.", Picture("A", red=1), usable=("title",))
    with pytest.raises(UsageError, match=r"^--title, --red are for walls\n"):
        refuse("for walls", "Leave it out.", Picture("A", red=1))
    refuse("for walls", "Leave it out.", Picture("A"), usable=("title",))


@dataclass(frozen=True)
class Paint:
    """What the work takes, with defaults of its own."""

    red: int
    coats: int = 2
    name: tuple[str, ...] | None = ("plain",)


def test_what_the_work_takes_is_picked_by_name() -> None:
    assert picked(Paint, Picture("A", ("b",), red=1)) == Paint(1, 2, ("b",))
    assert picked(Paint, Picture("A"), coats=3, name=None) == Paint(7, 3, None)


def test_an_option_that_was_not_given_leaves_the_default() -> None:
    @dataclass(frozen=True)
    class Unsure(OptionGroup):
        red: int = option(1, "Red.")
        coats: int | None = option(None, "Coats.")

    assert picked(Paint, Unsure()).coats == 2


def options_of(name: str) -> dict[str, str]:
    """Flag -> help of one command."""
    return {
        flag: p.help or "" for p in COMMANDS[name].params for flag in p.opts if flag[:2] == "--"
    }


def test_every_option_of_an_export_is_in_every_export_command() -> None:
    shared = importlib.import_module("tiue_export.apps.options.graphs").ExportRequest
    flags = {GROUP.flag_of(shared, name) for name in (field.name for field in fields(shared))}
    assert {"--family", "--lora", "--controlnet", "--merge-below", "--vae-tile"} < flags
    for name in EXPORTS:
        assert flags <= set(options_of(name)), name


@pytest.mark.parametrize("name", EXPORTS[1:])
def test_a_shared_option_means_the_same_everywhere(name: str) -> None:
    onnx, other = options_of("onnx"), options_of(name)
    # Engines are built for a range of batches, and each form has precisions of its own.
    own = {"--ckpt", "--precision", *(["--batch"] if name == "trt" else [])}
    assert {f: h for f, h in other.items() if f in onnx.keys() - own} == {
        f: h for f, h in onnx.items() if f not in own
    }


@pytest.mark.parametrize(
    ("arguments", "now"),
    [
        (["coreml", "--latent-h", "8"], ""),
        (["coreml", "--quantize-nbits", "6"], ""),
        (["coreml", "--attention-implementation", "sdpa"], "--attention"),
        (["coreml", "--bundle-resources-for-swift-cli"], ""),
        (["coreai", "--compute-precision", "fp16"], "--precision"),
        (["generate", "fox", "--low-vram"], ""),
    ],
)
def test_a_second_spelling_is_no_option_any_more(run, arguments, now) -> None:
    code, _, err = run(*arguments)
    told = " ".join(err.split())
    assert code == 2
    assert f"No such option: {next(word for word in arguments if word[:2] == '--')}" in told
    assert now in told

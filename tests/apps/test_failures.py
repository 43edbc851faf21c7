"""What is printed where no part of the program has words of its own for a failure."""

from __future__ import annotations

import importlib

import pytest

explained = importlib.import_module("tiue_export.apps.report.failures").explained
tables = importlib.import_module("tiue_export.apps.report.tables")
next_line = importlib.import_module("tiue_export.apps.report.next_line")
onnx = importlib.import_module("tiue_export.apps.export.onnx")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "Close other programs."),
        (("--low-memory", "--json"), "Close other programs, or ask for less (--low-memory)."),
        (
            ("--width", "--height", "--dry-run"),
            "Close other programs, or ask for less (--height, --width); --dry-run estimates the "
            "need.",
        ),
    ],
)
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("cannot allocate memory")])
def test_a_lack_of_memory_names_what_this_command_can_lessen(capsys, flags, said, error):
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        explained(command, flags)()
    assert stopped.value.code == 10
    assert capsys.readouterr().err == f"error: memory ran out\n  next: {said}\n"


def test_a_next_line_is_whole_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setattr(next_line, "console", tables.PipeConsole(width=40))
    line = "tiue-export quantize 'a folder of a long name' --calibration 'another folder'"
    next_line.print_next(line)
    assert capsys.readouterr().out == f"next:  {line}\n"


@pytest.mark.parametrize(
    ("hop", "remedy"),
    [
        ("merged t=1", " Lower --merge-below."),
        ("tiled 64x64 px", " Raise --vae-tile, or leave it out."),
        ("fp16 arithmetic", ""),
    ],
)
def test_a_loss_that_can_be_seen_names_the_option_that_caused_it(hop, remedy):
    assert onnx._remedy(hop) == remedy

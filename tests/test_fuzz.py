"""Damaged and hostile files of every kind open, or are refused in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fuzz import outcome
from fuzz.__main__ import main
from fuzz.inputs import INPUTS, write_valid
from fuzz.outcome import Outcome, explore, outcome_of

from tiue_export.errors import TiueError, UsageError, printable

CASES = 6


@pytest.fixture(scope="module")
def valid_files(made_once, tmp_path_factory) -> Path:
    made = made_once("valid-files", write_valid)
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("fuzz") / "files"))


@pytest.mark.parametrize("number", range(len(INPUTS)), ids=[each.kind for each in INPUTS])
def test_a_damaged_file_opens_or_is_refused_in_words(number, valid_files):
    found: list[Outcome] = []
    explore(INPUTS[number], valid_files, CASES, found.append, seed=number)
    assert len(found) >= CASES
    assert [each.detail for each in found if each.what == "other"] == []


def test_anything_but_opening_and_a_plain_refusal_is_told(tmp_path, monkeypatch):
    def fails_with(error: BaseException) -> Outcome:
        def read(root: Path) -> None:
            raise error

        return outcome_of(read, tmp_path)

    assert outcome_of(lambda root: None, tmp_path).what == "opened"
    assert fails_with(UsageError("no such thing")).what == "refused"
    assert fails_with(KeyError("a")).detail.startswith("KeyError at ")
    assert "exit code of a defect" in fails_with(TiueError("odd")).detail
    assert "says nothing" in fails_with(UsageError(" ")).detail
    monkeypatch.setattr(outcome, "DEADLINE_S", 0.05)
    assert outcome_of(lambda root: any(False for _ in range(10**9)), tmp_path).detail.startswith(
        "Waited at "
    )


def test_a_message_is_printable_whatever_a_file_says():
    error = UsageError("a \x1b[31m red \ud800 name\nand a second line", "x" * 10_000)
    assert error.message == "a \\x1b[31m red \\ud800 name\nand a second line"
    assert len(error.next_step) < 5_000
    assert printable("caf\u00e9, \u732b") == "caf\u00e9, \u732b"


def test_the_command_counts_by_kind(capsys):
    assert main(["--cases", "8", "--kind", "^prompts", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sum(told["total"].values()) >= 8
    assert (list(told["kinds"]), told["others"]) == (["prompts"], {})

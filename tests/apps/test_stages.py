"""Long work says that it goes on, also where no bar can move."""

from __future__ import annotations

import importlib

import pytest

stages = importlib.import_module("tiue_export.apps.report.stages")


@pytest.mark.parametrize(
    ("silence_s", "told"),
    [(0.0, ["  prompt 1: step 2 (20%)", "  prompt 1: step 9 (90%)"]), (60, [])],
)
def test_a_piped_command_that_is_long_at_work_tells_how_far_it_is(
    monkeypatch, capsys, silence_s, told
):
    monkeypatch.setattr(stages, "_SILENCE_S", silence_s)
    with stages.stage_bar(quiet=False) as bar:
        bar.begin("prompt 1")
        bar.within(0.2, "prompt 1: step 2")
        bar.within(0.9, "prompt 1: step 9")
    assert capsys.readouterr().err.splitlines() == told


def test_a_command_that_prints_one_object_stays_silent(monkeypatch, capsys):
    monkeypatch.setattr(stages, "_SILENCE_S", 0.0)
    with stages.stage_bar(quiet=True) as bar:
        bar.within(0.2, "prompt 1: step 2")
    assert capsys.readouterr().err == ""

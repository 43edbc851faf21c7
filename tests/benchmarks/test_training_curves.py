"""Curves of training runs: what a journal says, its running means, its picture."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tiue_export.errors import UsageError

curves = importlib.import_module("tiue_export.benchmarks.studies.training_curves")


def run_of(folder, lines):
    folder.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "journal.jsonl").write_text(text, "utf-8")
    return folder


@pytest.fixture
def teacher(tmp_path):
    lines = [{"step": 20 * i, "loss": 1 / i, "note": "x", "seconds": 36.0} for i in range(1, 101)]
    lines[3]["rare"] = 1.0
    return run_of(tmp_path / "teacher", lines)


def test_a_journal_gives_each_figure_that_every_line_has(teacher):
    found = curves.read_curves(teacher)
    assert (found.name, found.hours, list(found.values)) == ("teacher", 1.0, ["loss"])
    assert found.steps[-1] == 2000
    assert found.values["loss"][1] == 0.5


def test_a_line_cut_off_by_a_kill_is_left_out(teacher):
    with (teacher / "journal.jsonl").open("a") as file:
        file.write('{"step": 2020, "lo')
    assert curves.read_curves(teacher).steps[-1] == 2000


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=60))
def test_a_running_mean_stays_within_its_values_and_keeps_a_constant(values):
    found = curves.running_mean(np.array(values))
    assert found.shape == (len(values),)
    assert min(values) - 1e-6 <= found.min() <= found.max() <= max(values) + 1e-6
    assert curves.running_mean(np.full(len(values), 3.0)) == pytest.approx(3.0)


def test_the_command_prints_a_table_and_draws_a_row_for_each_run(teacher, tmp_path, capsys):
    student = [{"step": i, "loss": i, "kl": -i, "seconds": 1.0} for i in range(1, 9)]
    other = run_of(tmp_path / "student", student)
    heights = []
    for folders in ([teacher], [teacher, other]):
        plot = tmp_path / "new" / "curves.png"
        curves.main([*map(str, folders), "--plot", str(plot)])
        with Image.open(plot) as picture:
            heights.append(picture.height)
    assert heights[1] > 1.8 * heights[0]
    out = capsys.readouterr().out
    assert "| teacher | 2000 | 1.0 | loss 0.01" in out
    assert "| student | 8 | 0.0 | loss 7.5, kl -7.5 |" in out


def test_a_folder_without_a_journal_and_one_without_a_curve_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"has no journal\.jsonl"):
        curves.read_curves(tmp_path)
    with pytest.raises(UsageError, match="logged 1 time"):
        curves.read_curves(run_of(tmp_path / "short", [{"step": 1, "loss": 2.0}]))
    with pytest.raises(UsageError, match="logged no figure with every line"):
        curves.read_curves(run_of(tmp_path / "bare", [{"step": 1}, {"step": 2, "loss": 2.0}]))

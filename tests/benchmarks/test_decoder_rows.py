"""What the rows of one decoder run cost: each size runs the same group, in its own pieces."""

from __future__ import annotations

import json
import sys

import pytest

from tiue_export.benchmarks.studies import decoder_rows
from tiue_export.errors import UsageError


def run_main(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["decoder_rows", *map(str, arguments)])
    decoder_rows.main()


def test_the_command_runs_the_group_in_pieces_of_each_size(
    faster_bundle, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "rows.json"
    sizes = ["--rows", "10,2,4", "--steps", 5, "--json", file]
    run_main(monkeypatch, faster_bundle.root, *sizes)
    record = json.loads(file.read_text("utf-8"))
    found = [(cost["max_decoder_rows"], cost["decoder_runs"]) for cost in record["sizes"]]
    assert found == [(2, 5), (4, 3), (10, 1)]
    assert all(cost["unet_decoder_s"] > 0 for cost in record["sizes"])
    assert all(cost["peak_memory_bytes"] > 10**7 for cost in record["sizes"])
    assert "peak GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1", "at most 1 decoder rows were allowed; one step takes 2"),
        ("2,x", "--rows is '2,x'; expected numbers, such as 2,10,30"),
    ],
)
def test_sizes_that_cannot_be_are_refused(faster_bundle, monkeypatch, capsys, rows, message):
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, faster_bundle.root, "--rows", rows)
    assert stopped.value.code == UsageError.exit_code
    assert message in capsys.readouterr().err


def test_a_student_has_no_groups(tiny_bundle, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, tiny_bundle.root)
    assert stopped.value.code == UsageError.exit_code
    assert "is a distilled student" in capsys.readouterr().err

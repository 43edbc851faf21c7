"""The profile of a graph in OpenVINO: bundles in turn, counters by kind of node."""

from __future__ import annotations

import importlib
import json
import sys

import pytest

from tiue_export.errors import UsageError

pytest.importorskip("openvino", reason="openvino is not installed")
openvino_profile = importlib.import_module("tiue_export.benchmarks.studies.openvino_profile")


def test_every_bundle_runs_in_every_round_and_nodes_are_told_by_kind(tiny_bundle):
    first, second = openvino_profile.profile(
        [tiny_bundle, tiny_bundle], "unet_decoder", "fp32", threads=1, rounds=3
    )
    for one in (first, second):
        assert len(one.cpu_ms) == len(one.wall_ms) == 3
        assert {"Convolution", "FullyConnected"} <= {kind.node_type for kind in one.kinds}
        # What an exact rewriting of the graph has removed.
        assert "Split" not in {kind.node_type for kind in one.kinds}
        assert [kind.ms for kind in one.kinds] == sorted((k.ms for k in one.kinds), reverse=True)
        assert one.counters_ms > 0
    assert first.cpu_ratio(first) == 1
    text = openvino_profile.markdown([first, second])
    assert "| Convolution /" in text
    assert "CPU time, ratio to the first | 1.000 |" in text


def test_the_command_prints_a_table_and_writes_its_record(
    tiny_bundle, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "p.json"
    words = ["profile", str(tiny_bundle.root), "--graph", "text_encoder", "--precision", "fp32"]
    monkeypatch.setattr(sys, "argv", [*words, "--rounds", "1", "--out", str(out)])
    openvino_profile.main()
    assert capsys.readouterr().out.startswith("| ms | tiny-fp32 |")
    (written,) = json.loads(out.read_text("utf-8"))
    assert written["name"] == "tiny-fp32"
    assert written["kinds"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"graph": "unet"}, "unknown graph 'unet'"),
        ({"precision": "f32"}, "unknown precision 'f32'"),
        ({"rounds": 0}, "--rounds is 0; expected 1 or more"),
    ],
)
def test_what_cannot_be_profiled_is_refused(tiny_bundle, wrong, said):
    asked = {"graph": "unet_decoder", "precision": "fp32", "threads": 1, "rounds": 1, **wrong}
    with pytest.raises(UsageError, match=said):
        openvino_profile.profile([tiny_bundle], **asked)

"""The script for a machine with a GPU runs on this one, and says what it needs there."""

from __future__ import annotations

import json

import pytest
import torch

from tiue_export.benchmarks.studies import gpu_latency
from tiue_export.errors import RuntimeFailure

NAMES = [
    "TiUE naive",
    "TiUE hoisted",
    "TiUE merged",
    "one-step",
    "four-step",
    "one-step diffusers",
    "four-step diffusers",
]


@pytest.mark.slow
def test_every_contender_is_timed_in_turn_and_written_down(tiny_pipeline, tmp_path, capsys):
    out = tmp_path / "result.json"
    arguments = [
        "--ckpt",
        str(tiny_pipeline),
        "--device",
        "cpu",
        "--runs",
        "2",
        "--batch",
        "1",
        "2",
    ]
    gpu_latency.main([*arguments, "--out", str(out)])
    found = json.loads(out.read_text("utf-8"))
    timed = [(each["batch"], each["contender"]) for each in found["results"]]
    assert timed == [(batch, name) for batch in (1, 2) for name in NAMES]
    for each in found["results"]:
        assert len(each["latency_ms"]) == found["runs"] == 2
        assert 0 < each["fastest_ms"] <= each["median_ms"] <= each["slowest_ms"]
        assert each["mode"] == "eager"
    assert found["device"]["name"] == "cpu"
    assert len(capsys.readouterr().out.splitlines()) == len(timed) + 1


def test_the_contenders_compute_latents_of_the_student(tiny_student):
    with torch.inference_mode():
        ways = gpu_latency.contenders(tiny_student, 2, "cpu", channels_last=False)
        latents = {way.name: way.run() for way in ways}
    assert [way.name for way in ways] == NAMES
    assert {tuple(each.shape) for each in latents.values()} == {(2, 4, 8, 8)}
    # Naive and hoisted are the same function, but for rounding to half.
    difference = (latents["TiUE naive"] - latents["TiUE hoisted"]).abs().max()
    assert difference < 0.02 * latents["TiUE naive"].abs().max()
    rows = {way.name: way.rows for way in ways}
    assert rows["TiUE hoisted"] == 8
    assert rows["TiUE merged"] == 6
    assert rows["one-step"] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_line_to_try_it_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_latency.main(["--family", "tiny"])
    assert stopped.value.code == RuntimeFailure.exit_code
    assert "--device cpu --family tiny --runs 2" in capsys.readouterr().err

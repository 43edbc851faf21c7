"""The study that times a page beside ONNX Runtime."""

from __future__ import annotations

import json

import pytest
from chromium_at_hand import needs_chromium
from npm_at_hand import npm_files

from tiue_export.benchmarks.studies.browser_latency import main
from tiue_export.errors import UsageError


@needs_chromium
def test_every_stage_is_timed_in_the_page_and_in_onnx_runtime(tiny_bundle, tmp_path, capsys):
    npm_files()  # skips without
    record = tmp_path / "record.json"
    main([str(tiny_bundle.root), "--rounds", "1", "--out", str(record)])
    told = json.loads(record.read_text("utf-8"))
    assert set(told["page_ms"]) == set(told["ort_ms"]) == {"text", "UNet", "VAE"}
    assert min(told["ort_ms"].values()) > 0
    assert min(told["parity_db"].values()) > 100
    assert told["tab_peak_bytes"] > 50e6
    assert told["drawn_by"].startswith(f"WASM, {told['threads']} thread")
    assert "page / ONNX" in capsys.readouterr().out


def test_without_a_browser_it_says_what_to_pass(tiny_bundle, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="no browser: none of chromium") as raised:
        main([str(tiny_bundle.root)])
    assert raised.value.next_step == "Pass --browser PATH."


def test_no_rounds_are_refused(tiny_bundle):
    with pytest.raises(UsageError, match="--rounds is 0; expected 1 or more"):
        main([str(tiny_bundle.root), "--rounds", "0"])

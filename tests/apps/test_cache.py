"""The cache command: all that is kept is listed, and nothing else is ever deleted."""

from __future__ import annotations

import json
import os
import time

import pytest


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A cache with one entry of three kinds, one of them old, and a stranger's file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "tiue-export"
    for name, size in (
        ("openvino/new.blob", 2_000_000),
        ("openvino/old.blob", 1_000_000),
        ("coreml/model.mlmodelc/weights.bin", 500_000),
        ("10.3-L4.timing", 7),
        ("notes.txt", 11),
    ):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(size))
    old = time.time() - 40 * 86400
    os.utime(folder / "openvino" / "old.blob", (old, old))
    return folder


def left(folder):
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def test_everything_kept_is_listed_by_kind_and_nothing_is_touched(run, kept):
    before = left(kept)
    code, out, _ = run("cache")
    assert code == 0
    assert [name for name in ("openvino", "3.00 MB", "timings", "notes") if name in out] == [
        "openvino",
        "3.00 MB",
        "timings",
    ]
    data = json.loads(run("cache", "--json")[1])
    assert {entry["kind"] for entry in data["entries"]} == {"openvino", "coreml", "timings"}
    assert data["deleted"] is False
    assert left(kept) == before


def test_clear_deletes_what_is_ours_and_leaves_what_is_not(run, kept):
    code, out, _ = run("cache", "--clear")
    assert (code, "deleted 4 of" in out) == (0, True)
    assert left(kept) == ["notes.txt"]
    assert "nothing of the kind" in run("cache")[1]


@pytest.mark.parametrize(
    ("chosen", "gone"),
    [
        (["--unused-days", "30"], ["openvino/old.blob"]),
        (["--kind", "coreml"], ["coreml/model.mlmodelc/weights.bin"]),
        (["--kind", "coreml", "--unused-days", "30"], []),
    ],
)
def test_a_part_can_be_chosen(run, kept, chosen, gone):
    before = left(kept)
    assert run("cache", "--clear", *chosen)[0] == 0
    assert sorted(set(before) - set(left(kept))) == gone


def test_a_link_is_deleted_and_not_what_it_leads_to(run, kept, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").touch()
    (kept / "openvino" / "link").symlink_to(elsewhere)
    assert run("cache", "--clear")[0] == 0
    assert (elsewhere / "mine").exists()
    assert not (kept / "openvino" / "link").is_symlink()


def test_an_empty_machine_has_nothing(run, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    code, out, _ = run("cache")
    assert (code, "nothing of the kind is kept" in out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--kind", "openvin"], "unknown kind 'openvin'"),
        (["--unused-days", "-1"], "--unused-days is -1; expected 0 or more"),
        (["--unused-days", "nan"], "--unused-days is nan; expected 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(run, kept, arguments, says):
    before = left(kept)
    code, _, error = run("cache", "--clear", *arguments)
    assert (code, says in error) == (2, True), error
    assert left(kept) == before

"""Large files are hashed once while they stay as they are, and read again when they do not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from tiue_export import open_bundle
from tiue_export.errors import BundleError
from tiue_export.system import file_hash
from tiue_export.system.file_hash import size_and_sha256


@pytest.fixture(autouse=True)
def known(monkeypatch, tmp_path) -> Path:
    """Where hashes are remembered; every file is large and old enough."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_hash, "_REMEMBERED_BYTES", 1)
    monkeypatch.setattr(file_hash, "_SETTLED_NS", 0)
    return tmp_path / "cache" / "tiue-export" / "hashes" / "known.json"


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The names of the files that were read."""
    taken: list[str] = []
    read = file_hash._read

    def counted(path: Path) -> tuple[int, str]:
        taken.append(path.name)
        return read(path)

    monkeypatch.setattr(file_hash, "_read", counted)
    return taken


def written(path: Path, content: bytes = b"weights") -> Path:
    path.write_bytes(content)
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_an_unchanged_file_is_read_once_wherever_its_folder_moves(tmp_path, reads):
    folder = tmp_path / "fox"
    folder.mkdir()
    written(folder / "weights")
    expected = (7, sha256(b"weights"))
    assert size_and_sha256(folder / "weights") == expected
    moved = folder.rename(tmp_path / "moved")
    assert size_and_sha256(moved / "weights") == expected
    assert reads == ["weights"]
    assert size_and_sha256(moved / "weights", anew=True) == expected
    assert reads == ["weights"] * 2


@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_file_of_the_same_size_that_was_written_again_is_read_again(tmp_path, reads, keeps_time):
    path = written(tmp_path / "weights")
    size_and_sha256(path)
    before = path.stat()
    written(path, b"altered")
    if keeps_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert size_and_sha256(path) == (7, sha256(b"altered"))
    assert len(reads) == 2


def test_a_copy_is_another_file(tmp_path, reads):
    path = written(tmp_path / "weights")
    size_and_sha256(path)
    size_and_sha256(Path(shutil.copy2(path, tmp_path / "copy")))
    assert reads == ["weights", "copy"]


def test_a_file_that_has_just_been_written_is_not_remembered(tmp_path, reads, known, monkeypatch):
    monkeypatch.setattr(file_hash, "_SETTLED_NS", 10**12)
    path = written(tmp_path / "weights")
    assert size_and_sha256(path) == size_and_sha256(path)
    assert len(reads) == 2
    assert not known.exists()


def test_small_files_are_always_read(tmp_path, reads, known, monkeypatch):
    monkeypatch.setattr(file_hash, "_REMEMBERED_BYTES", 8)
    path = written(tmp_path / "weights")
    assert size_and_sha256(path) == size_and_sha256(path)
    assert len(reads) == 2
    assert not known.exists()


def test_the_files_that_were_hashed_last_are_remembered(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(file_hash, "_MOST", 2)
    paths = [written(tmp_path / name) for name in "abc"]
    for path in paths:
        size_and_sha256(path)
    reads.clear()
    for path in reversed(paths):
        size_and_sha256(path)
    assert reads == ["a"]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"1:2": 3}', '{"1:2": []}', "[" * 9999])
def test_a_damaged_list_costs_reading_and_no_more(tmp_path, reads, known, content):
    path = written(tmp_path / "weights")
    size_and_sha256(path)
    known.write_text(content)
    assert size_and_sha256(path) == (7, sha256(b"weights"))
    assert size_and_sha256(path) == (7, sha256(b"weights"))
    assert len(reads) == 2


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, reads, known):
    known.parent.parent.mkdir(parents=True)
    known.parent.write_text("a file where the folder would be")
    path = written(tmp_path / "weights")
    assert size_and_sha256(path) == size_and_sha256(path)
    assert len(reads) == 2


def test_a_bundle_is_hashed_at_its_first_opening_and_refused_when_it_was_altered(
    bundle_copy, reads
):
    open_bundle(bundle_copy)
    assert reads
    reads.clear()
    open_bundle(bundle_copy)
    assert reads == []
    weights = next(bundle_copy.rglob("*.onnx"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match="was altered after the export"):
        open_bundle(bundle_copy)


def test_inspect_reads_every_file_whatever_is_remembered(run, bundle_copy, known):
    """What a disk loses by itself changes no time of a file."""
    open_bundle(bundle_copy)
    remembered = json.loads(known.read_text())
    known.write_text(json.dumps({key: [*v[:-1], "0" * 64] for key, v in remembered.items()}))
    with pytest.raises(BundleError, match="was altered after the export"):
        open_bundle(bundle_copy)
    code, _, err = run("inspect", bundle_copy)
    assert code == 0, err
    code, out, err = run("cache")
    assert (code, "hashes" in out) == (0, True), err

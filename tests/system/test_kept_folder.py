"""What is kept for the next start is used as it was sealed or not at all, and stays bounded."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tiue_export.errors import TiueWarning, UsageError
from tiue_export.system import kept_folder
from tiue_export.system.kept_folder import LIMIT_VARIABLE, SEAL, KeptFolder, limit_bytes


@pytest.fixture(autouse=True)
def kind(monkeypatch, tmp_path) -> Path:
    """The folder of one kind of entries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tiue-export" / "kind"


def make(name: str, content: bytes = b"content") -> KeptFolder:
    kept = KeptFolder("kind", name)
    assert not kept.is_whole
    kept.save({"blob": content})
    return kept


def names(kind: Path) -> list[str]:
    return sorted(path.name for path in kind.iterdir())


def test_what_was_saved_is_there_at_the_next_start(kind):
    place = make("fox").place
    kept = KeptFolder("kind", "fox")
    assert kept.is_whole
    assert kept.place == place == kind / "fox"
    assert (kept.place / "blob").read_bytes() == b"content"
    assert names(kind) == ["fox"]


@pytest.mark.parametrize("byte", range(7))
def test_a_flipped_bit_is_noticed_and_the_entry_thrown_away(kind, byte):
    make("fox")
    content = bytearray((kind / "fox" / "blob").read_bytes())
    content[byte] ^= 4
    (kind / "fox" / "blob").write_bytes(content)
    kept = KeptFolder("kind", "fox")
    assert not kept.is_whole
    assert not (kind / "fox").exists()
    kept.save({"blob": b"made again"})
    assert (kind / "fox" / "blob").read_bytes() == b"made again"


@pytest.mark.parametrize(
    "damage", ["missing", "added", "no seal", "seal of markup", "seal of bytes"]
)
def test_files_that_are_not_those_that_were_sealed_are_not_used(kind, damage):
    make("fox")
    entry = kind / "fox"
    if damage == "missing":
        (entry / "blob").unlink()
    elif damage == "added":
        (entry / "more").write_bytes(b"x")
    elif damage == "no seal":
        (entry / SEAL).unlink()
    else:
        (entry / SEAL).write_bytes(b"[" * 100_000 if damage == "seal of markup" else b"\xff")
    assert not KeptFolder("kind", "fox").is_whole


def test_what_is_not_saved_is_not_kept_and_a_kill_leaves_nothing_that_stays(kind):
    code = (
        "import os, signal; from tiue_export.system.kept_folder import KeptFolder\n"
        "(KeptFolder('kind', 'fox').place / 'blob').write_bytes(b'half')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(names(kind)) == 1
    kept = KeptFolder("kind", "fox")
    assert not kept.is_whole
    kept.drop()
    assert names(kind) == []


def test_of_two_that_make_the_same_entry_the_first_is_kept_and_both_go_on(kind):
    first, second = KeptFolder("kind", "fox"), KeptFolder("kind", "fox")
    first.save({"blob": b"first"})
    second.save({"blob": b"second"})
    assert first.place == second.place == kind / "fox"
    assert (kind / "fox" / "blob").read_bytes() == b"first"
    assert names(kind) == ["fox"]


def test_an_entry_that_another_process_has_just_made_is_not_taken_for_a_damaged_one(
    kind, monkeypatch
):
    first, judge = KeptFolder("kind", "fox"), kept_folder._is_sealed

    def judged_too_early(entry: Path) -> bool:
        monkeypatch.setattr(kept_folder, "_is_sealed", judge)
        first.save({"blob": b"first"})
        return False

    monkeypatch.setattr(kept_folder, "_is_sealed", judged_too_early)
    second = KeptFolder("kind", "fox")
    assert (kind / "fox" / "blob").read_bytes() == b"first"
    second.save({"blob": b"second"})
    assert (kind / "fox" / "blob").read_bytes() == b"first"


def test_others_that_make_room_at_the_same_time_cost_nobody_an_entry(kind, monkeypatch):
    def vanished(newest: Path) -> None:
        raise FileNotFoundError(newest)

    monkeypatch.setattr(kept_folder, "make_room", vanished)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make("fox")
    assert KeptFolder("kind", "fox").is_whole


def test_the_entries_used_longest_ago_go_when_there_is_too_much(kind, monkeypatch):
    monkeypatch.setenv(LIMIT_VARIABLE, "0.0000025")  # 2,500 bytes
    for age, name in enumerate(("oldest", "older", "old")):
        make(name, bytes(800))
        os.utime(kind / name / SEAL, (age, age))
    assert KeptFolder("kind", "oldest").is_whole  # used now
    make("new", bytes(800))
    assert names(kind) == ["new", "old", "oldest"]


def test_one_entry_above_the_limit_stays_for_as_long_as_it_is_the_newest(kind, monkeypatch):
    monkeypatch.setenv(LIMIT_VARIABLE, "0")
    make("large", bytes(800))
    assert names(kind) == ["large"]
    make("next", bytes(1))
    assert names(kind) == ["next"]


def test_what_an_earlier_version_kept_in_the_same_folder_goes(kind):
    kind.mkdir(parents=True)
    (kind / "123.blob").write_bytes(b"as large as the weights")
    make("fox")
    assert names(kind) == ["fox"]


@pytest.mark.parametrize("text", ["much", "-1", "inf", "nan"])
def test_a_limit_that_is_no_size_is_refused(monkeypatch, text):
    monkeypatch.setenv(LIMIT_VARIABLE, text)
    with pytest.raises(UsageError) as caught:
        limit_bytes()
    assert caught.value.message == f"{LIMIT_VARIABLE} is {text!r}; expected gigabytes, such as 20"
    assert caught.value.next_step == f"Type: unset {LIMIT_VARIABLE}   (then it is 8)"


def test_a_cache_that_cannot_be_written_is_a_warning(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(
        TiueWarning, match=r"kind cannot be written \(Not a directory\): the next st"
    ):
        kept = KeptFolder("kind", "fox")
    assert (kept.is_whole, kept.place) == (False, None)
    kept.save({"blob": b"x"})


def test_a_disk_that_is_full_is_a_warning_and_leaves_nothing(kind):
    kept = KeptFolder("kind", "fox")
    with pytest.warns(TiueWarning, match=r"kind cannot be written \(File name too long\)"):
        kept.save({"b" * 300: b"x"})
    assert names(kind) == []
    assert kept.place is None


def test_where_a_library_wrote_nothing_nothing_is_kept(kind):
    kept = KeptFolder("kind", "fox")
    with pytest.warns(TiueWarning, match=r"kind cannot be written \(nothing could be written\)"):
        kept.save()
    assert names(kind) == []


def test_a_whole_entry_of_a_cache_that_is_read_only_is_used(kind, monkeypatch):
    make("fox")

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert KeptFolder("kind", "fox").is_whole

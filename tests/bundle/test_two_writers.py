"""Two commands that add to one bundle: both forms survive, and each is told of the other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tiue_export.bundle.lock import LOCK_FILE, locked
from tiue_export.bundle.manifest import Compiled, CompiledGraph
from tiue_export.bundle.read import Bundle, file_records, open_bundle
from tiue_export.bundle.write import add_compiled, compiled_folder, new_bundle, write_manifest
from tiue_export.errors import BundleError, UsageError

# A second process that opens the bundle, waits for a line, and adds the form it is told to.
WRITER = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_two_writers import add
from tiue_export.bundle.read import open_bundle
bundle = open_bundle(sys.argv[1]); print("opened", flush=True); sys.stdin.readline()
add(bundle, sys.argv[2], lambda text: print(text, flush=True))
"""


def add(bundle: Bundle, name: str, on_note=lambda text: None) -> Bundle:
    """A form NAME of one small file."""
    with compiled_folder(bundle, name) as folder:
        (folder / "x.bin").write_bytes(name.encode())
        (record,) = file_records(folder, ["x.bin"]).values()
        path = f"{name}/x.bin"
        graph = CompiledGraph(path, "0" * 64, {path: record})
        compiled = Compiled(name, "1", {}, {}, {"unet_encoder": graph})
        return add_compiled(bundle, name, folder, compiled, on_note)


class Writer:
    """Another process with the bundle open."""

    def __init__(self, bundle: Bundle, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(bundle.root), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "opened\n"

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def finish(self) -> tuple[int, str, str]:
        told, error = self.process.communicate(timeout=60)
        return self.process.returncode, told, error


@pytest.fixture
def own(micro_bundle, tmp_path) -> Bundle:
    return open_bundle(shutil.copytree(micro_bundle.root, tmp_path / "own"))


def forms(bundle: Bundle) -> set[str]:
    return set(open_bundle(bundle.root).manifest.compiled)


def hidden(bundle: Bundle) -> list[str]:
    return [path.name for path in bundle.root.iterdir() if path.name.startswith(".")]


def test_what_two_processes_add_at_the_same_time_is_all_listed_and_there(own):
    names = ["openvino", "trt-rtx", "coreml", "coreai"]
    writers = [Writer(own, name) for name in names]
    for writer in writers:
        writer.go()
    assert [writer.finish()[0] for writer in writers] == [0] * 4
    assert forms(own) == set(names)
    assert hidden(own) == []


def test_a_form_added_since_the_bundle_was_opened_stays_in_what_comes_back(own):
    add(open_bundle(own.root), "openvino")
    assert set(add(own, "trt-rtx").manifest.compiled) == {"openvino", "trt-rtx"} == forms(own)


def test_a_writer_that_must_wait_says_for_whom_and_then_goes_on(own):
    writer = Writer(own, "openvino")
    with locked(own.root):
        writer.go()
        assert writer.process.stdout is not None
        told = writer.process.stdout.readline()
        assert forms(own) == set()
    me = f"process {os.getpid()} on "
    assert told.startswith("waiting for ")
    assert me in told
    assert told.endswith(f", which is adding to {own.root}\n")
    assert writer.finish()[:2] == (0, "")
    assert forms(own) == {"openvino"}


def test_the_lock_of_a_killed_writer_does_not_hold_up_the_next(own):
    code = (
        "import os, signal, sys; from pathlib import Path; from tiue_export.bundle.lock import *\n"
        "with locked(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(own.root)], check=False)
    assert hidden(own) == [LOCK_FILE]
    notes: list[str] = []
    start = time.monotonic()
    add(own, "openvino", notes.append)
    assert (forms(own), hidden(own), notes) == ({"openvino"}, [], [])
    assert time.monotonic() - start < 10


def test_the_same_form_made_by_another_process_is_kept_and_said(own):
    add(open_bundle(own.root), "openvino")
    with pytest.raises(BundleError) as caught:
        add(own, "openvino")
    assert str(caught.value) == (
        f"another process put a openvino form into {own.root} while this one was made\n"
        "Keep that one, or run the command again with --force."
    )
    assert forms(own) == {"openvino"}


def test_a_form_of_graphs_that_were_exported_again_is_refused(own):
    graphs = dict(own.manifest.graphs)
    graphs.popitem()
    write_manifest(own.root, type(own.manifest)(**{**vars(own.manifest), "graphs": graphs}))
    with pytest.raises(BundleError) as caught:
        add(own, "openvino")
    assert str(caught.value) == (
        f"{own.root} was exported again while its openvino form was made\nRun the command again."
    )
    assert forms(own) == set()


def test_a_form_whose_bundle_was_replaced_meanwhile_is_refused_in_words(own):
    def replaced_before_the_file_is_written() -> None:
        with compiled_folder(own, "openvino") as folder:
            with new_bundle(own.root, force=True) as partial:
                (partial / "tiue.json").write_text("new")
            (folder / "x.bin").write_bytes(b"late")

    with pytest.raises(BundleError) as caught:
        replaced_before_the_file_is_written()
    assert str(caught.value) == (
        f"{own.root} was replaced while its openvino form was made\nRun the command again."
    )


def test_an_export_that_replaces_a_bundle_waits_for_who_is_adding_to_it(own):
    code = (
        "import sys; from tiue_export.bundle.write import new_bundle\n"
        "with new_bundle(sys.argv[1], force=True) as partial:\n"
        "    (partial / 'tiue.json').write_text('new'); print('made', flush=True)\n"
    )
    with locked(own.root):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(own.root)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "made\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        open_bundle(own.root)
    assert process.wait(timeout=30) == 0
    assert (own.root / "tiue.json").read_text() == "new"
    process.stdout.close()


def test_a_system_without_file_locks_is_told_of_and_still_adds(own, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    notes: list[str] = []
    add(own, "openvino", notes.append)
    assert notes == [f"no file locks here: let no other tiue-export add to {own.root} meanwhile"]
    assert forms(own) == {"openvino"}


# A second process that begins a bundle, says so, and waits for a line.
EXPORTER = """
import sys; from pathlib import Path
from tiue_export.bundle.write import new_bundle
with new_bundle(sys.argv[1]) as folder:
    print("begun", flush=True); sys.stdin.readline()
    (folder / "tiue.json").write_text("{}")
"""


@pytest.fixture
def exporter(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", EXPORTER, str(tmp_path / "fox")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    yield process
    process.kill()
    process.communicate()


def test_of_two_exports_to_one_new_place_the_second_hears_before_its_work(exporter, tmp_path):
    def second() -> None:
        with new_bundle(tmp_path / "fox"):
            raise AssertionError("two processes write one bundle")

    with pytest.raises(UsageError) as caught:
        second()
    assert f", process {exporter.pid} on " in caught.value.message
    assert caught.value.message.endswith(f" is writing {tmp_path / 'fox'} at this moment")
    assert caught.value.next_step == "Wait until it has ended, or choose another output."
    exporter.communicate("\n", timeout=20)
    assert exporter.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["fox"]


def test_a_killed_export_keeps_nobody_from_the_place(exporter, tmp_path):
    exporter.kill()
    exporter.communicate()
    with new_bundle(tmp_path / "fox") as folder:
        (folder / "tiue.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["fox"]


def test_of_two_that_make_one_form_the_second_hears_before_its_work(own):
    with compiled_folder(own, "openvino"):
        with pytest.raises(UsageError, match=r" is making the openvino form of .* at this moment"):
            compiled_folder(own, "openvino").__enter__()
        with compiled_folder(own, "coreml"):
            pass
    assert hidden(own) == []

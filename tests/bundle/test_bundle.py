"""Bundles on disk: every damage is found and named; exports appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sealed_manifest import sealed_text

from tiue_export.bundle.manifest import FileRecord
from tiue_export.bundle.read import Bundle, open_bundle, records_below
from tiue_export.bundle.write import check_target, new_bundle
from tiue_export.errors import BundleError, ResourceError

WEIGHTS = "unet_decoder/model.onnx.data"
COPY_AGAIN = "Copy the bundle again, or export it again."


def refusal(path: Path) -> BundleError:
    with pytest.raises(BundleError) as caught:
        open_bundle(path)
    return caught.value


def edit_manifest(folder: Path, edit) -> None:
    path = folder / "tiue.json"
    data = json.loads(path.read_text("utf-8"))
    edit(data)
    path.write_text(sealed_text(data), "utf-8")


def test_an_intact_bundle_opens_with_its_manifest(bundle_copy, tiny_bundle):
    for path in (bundle_copy, str(bundle_copy)):
        bundle = open_bundle(path)
        assert bundle == Bundle(bundle_copy, tiny_bundle.manifest)
        for graph in bundle.manifest.graphs:
            assert bundle.graph_path(graph) == bundle_copy / graph / "model.onnx"
            assert bundle.graph_path(graph).is_file()


def test_the_size_of_a_bundle_is_that_of_its_files(bundle_copy):
    files = [path for path in bundle_copy.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files if path.name != "tiue.json")
    assert open_bundle(bundle_copy).size_bytes == total


def test_a_graph_the_bundle_lacks_is_explained(tiny_bundle):
    with pytest.raises(BundleError) as caught:
        tiny_bundle.graph_path("vae_encoder")
    assert caught.value.message == (
        f"{tiny_bundle.root} has no vae_encoder: it was exported from a checkpoint without that "
        "part"
    )
    assert "--base" in caught.value.next_step


def test_a_path_that_does_not_exist_is_said_not_to(tmp_path):
    error = refusal(tmp_path / "absent")
    assert error.message == f"{tmp_path / 'absent'} does not exist"
    assert error.next_step.startswith("Make one with: tiue-export onnx ")


def test_a_file_is_no_bundle(tmp_path):
    path = tmp_path / "student.safetensors"
    path.write_bytes(b"")
    assert refusal(path).message == f"{path} is a file; a bundle is a folder with a tiue.json"


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert refusal(tmp_path).message == f"{tmp_path} is no bundle: it has no tiue.json"


@pytest.mark.parametrize("complete", [False, True])
def test_an_unfinished_export_never_opens(bundle_copy, complete):
    partial = bundle_copy.with_name(".x.partial-host-1-deadbeef")
    bundle_copy.rename(partial)
    if not complete:
        (partial / "tiue.json").unlink()
    error = refusal(partial)
    assert error.message == f"{partial} is an unfinished export"
    assert error.next_step == "Export again; it can be deleted."


def test_a_manifest_that_is_not_utf8_cannot_be_read(bundle_copy):
    (bundle_copy / "tiue.json").write_bytes(b"\xff\xfe{}")
    error = refusal(bundle_copy)
    assert error.message.startswith(f"{bundle_copy / 'tiue.json'} cannot be read: ")


def test_a_cut_manifest_is_not_json(bundle_copy):
    path = bundle_copy / "tiue.json"
    path.write_bytes(path.read_bytes()[:-20])
    assert refusal(bundle_copy).message.startswith(f"{path} is not JSON: ")


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_one_flipped_byte_in_the_weights_is_found_with_both_hashes(bundle_copy):
    before = hashlib.sha256((bundle_copy / WEIGHTS).read_bytes()).hexdigest()
    flip_byte(bundle_copy / WEIGHTS)
    after = hashlib.sha256((bundle_copy / WEIGHTS).read_bytes()).hexdigest()
    error = refusal(bundle_copy)
    assert error.message == (
        f"{bundle_copy}: {WEIGHTS} was altered after the export: its SHA-256 is {after[:12]}..., "
        f"the manifest says {before[:12]}..."
    )
    assert error.next_step == COPY_AGAIN


def test_one_flipped_byte_in_any_file_is_found(bundle_copy):
    for path in [p for p in bundle_copy.rglob("*") if p.is_file() and p.name != "tiue.json"]:
        intact = path.read_bytes()
        flip_byte(path)
        name = path.relative_to(bundle_copy).as_posix()
        assert f"{name} was altered after the export" in refusal(bundle_copy).message
        path.write_bytes(intact)
    open_bundle(bundle_copy)


@pytest.mark.parametrize("change", [-1, 1], ids=["cut", "lengthened"])
def test_a_file_of_another_size_is_found_with_both_sizes(bundle_copy, change):
    path = bundle_copy / WEIGHTS
    size = path.stat().st_size
    os.truncate(path, size + change)
    error = refusal(bundle_copy)
    assert error.message == (
        f"{bundle_copy}: {WEIGHTS} has {size + change:,} bytes; the manifest says {size:,}"
    )
    assert error.next_step == COPY_AGAIN


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer/tokenizer.json"])
def test_a_missing_file_is_named(bundle_copy, name):
    (bundle_copy / name).unlink()
    error = refusal(bundle_copy)
    assert error.message == f"{bundle_copy}: {name} is missing"
    assert error.next_step == COPY_AGAIN


@pytest.mark.parametrize("where", ["files", "graph files"])
@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "unet_encoder/../../secret"])
def test_a_manifest_never_names_a_file_outside_the_bundle(bundle_copy, name, where):
    (bundle_copy.parent / "secret").write_text("mine")

    def add(data):
        files = data["files"] if where == "files" else data["graphs"]["unet_encoder"]["files"]
        files[name] = {"size_bytes": 4, "sha256": hashlib.sha256(b"mine").hexdigest()}

    edit_manifest(bundle_copy, add)
    message = refusal(bundle_copy).message
    assert message == f"{bundle_copy}: the manifest points outside the bundle: {name!r}"


@pytest.mark.parametrize("name", ["../model.onnx", "/tmp/model.onnx", "unhashed.onnx"])
def test_a_graph_is_never_loaded_from_a_file_that_was_not_hashed(bundle_copy, name):
    edit_manifest(bundle_copy, lambda data: data["graphs"]["unet_encoder"].update(path=name))
    assert name in refusal(bundle_copy).message


def test_a_file_that_is_a_link_out_of_the_bundle_is_refused(bundle_copy, tmp_path):
    weights = bundle_copy / "unet_encoder" / "model.onnx.data"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    error = refusal(bundle_copy)
    name = "unet_encoder/model.onnx.data"
    assert error.message == f"{bundle_copy}: {name} is a link that leads out of the bundle"
    command = error.next_step.partition(": ")[2].replace("BUNDLE", str(bundle_copy))
    subprocess.run(command.replace("COPY", str(tmp_path / "copy")).split(), check=True)
    assert open_bundle(tmp_path / "copy")


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "exports"
    folder.mkdir()
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_old(target: Path) -> Path:
    """What counts as a bundle in the way: a folder with a manifest."""
    target.mkdir(parents=True)
    (target / "tiue.json").write_text("old")
    return target


def export(target: Path, text: str = "new", *, force: bool = False, work=lambda partial: None):
    """An export that writes a manifest and does `work` in its partial folder."""
    with new_bundle(target, force=force) as partial:
        (partial / "tiue.json").write_text(text)
        work(partial)


def raising(fault: BaseException):
    def work(partial: Path) -> None:
        raise fault

    return work


def test_the_new_bundle_appears_only_when_the_block_ends(folder):
    with new_bundle(folder / "out") as partial:
        (partial / "tiue.json").write_text("new")
        (partial / "deep").mkdir()
        (partial / "deep" / "model.onnx").write_bytes(b"weights")
        assert not (folder / "out").exists()
        assert partial.parent == folder
        with pytest.raises(BundleError, match="is an unfinished export"):
            open_bundle(partial)
    assert names(folder) == ["out"]
    assert (folder / "out" / "deep" / "model.onnx").read_bytes() == b"weights"


def test_missing_parent_folders_are_made(folder):
    export(folder / "a" / "b" / "out")
    assert names(folder / "a" / "b") == ["out"]


def test_an_empty_folder_is_taken(folder):
    (folder / "out").mkdir()
    export(folder / "out")
    assert names(folder) == ["out"]
    assert (folder / "out" / "tiue.json").read_text() == "new"


@pytest.mark.parametrize("fault", [ValueError("broken"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_inside_leaves_nothing_and_passes_on(folder, fault):
    with pytest.raises(type(fault)) as caught:
        export(folder / "out", work=raising(fault))
    assert caught.value is fault
    assert names(folder) == []


def test_an_error_inside_leaves_the_old_bundle_as_it_was(folder):
    old = write_old(folder / "out")
    with pytest.raises(ValueError, match="broken"):
        export(old, force=True, work=raising(ValueError("broken")))
    assert names(folder) == ["out"]
    assert (old / "tiue.json").read_text() == "old"


def test_an_existing_bundle_is_refused_without_force_before_any_work(folder):
    old = write_old(folder / "out")
    for attempt in (lambda: export(old), lambda: check_target(old, force=False)):
        with pytest.raises(BundleError) as caught:
            attempt()
        assert caught.value.message == f"{old} already holds a bundle"
        assert "--force" in caught.value.next_step
    assert (old / "tiue.json").read_text() == "old"
    assert names(folder) == ["out"]


def test_force_replaces_the_whole_bundle(folder):
    old = write_old(folder / "out")
    (old / "stale.onnx").write_bytes(b"old")
    with new_bundle(old, force=True) as partial:
        (partial / "tiue.json").write_text("new")
        assert (old / "tiue.json").read_text() == "old"
    assert names(folder) == ["out"]
    assert names(old) == ["tiue.json"]
    assert (old / "tiue.json").read_text() == "new"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_bundle_is_never_replaced(folder, kind, force):
    target = folder / "photos"
    if kind == "folder":
        target.mkdir()
        (target / "cat.jpg").write_bytes(b"mine")
    else:
        target.write_bytes(b"mine")
    with pytest.raises(BundleError) as caught:
        export(target, force=force)
    assert caught.value.message == f"{target} exists and is no bundle; it is never replaced"
    assert names(folder) == ["photos"]
    kept = target / "cat.jpg" if kind == "folder" else target
    assert kept.read_bytes() == b"mine"


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_appears_during_the_export_is_not_destroyed(folder, force):
    target = folder / "photos"

    def meanwhile(partial: Path) -> None:
        target.mkdir()
        (target / "cat.jpg").write_bytes(b"mine")

    with pytest.raises(BundleError, match="is no bundle; it is never replaced"):
        export(target, force=force, work=meanwhile)
    assert (target / "cat.jpg").read_bytes() == b"mine"
    assert names(folder) == ["photos"]


def test_without_file_locks_the_later_of_two_exports_does_not_replace_the_earlier_unasked(
    folder, monkeypatch
):
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no locks")

    monkeypatch.setattr("fcntl.flock", unsupported)
    target = folder / "out"
    with pytest.raises(BundleError, match="already holds a bundle"):
        export(target, "later", work=lambda partial: export(target, "earlier"))
    assert names(folder) == ["out"]
    assert (target / "tiue.json").read_text() == "earlier"


def test_force_over_a_symbolic_link_leaves_a_bundle_there_and_no_litter(folder):
    write_old(folder / "real")
    (folder / "link").symlink_to("real")
    export(folder / "link", force=True)
    assert (folder / "link" / "tiue.json").read_text() == "new"
    assert names(folder) == ["link", "real"]


def host_of_this_machine(folder: Path) -> str:
    with new_bundle(folder / "probe") as partial:
        found = re.fullmatch(rf"\.probe\.partial-([^-]+)-{os.getpid()}-[0-9a-f]{{8}}", partial.name)
    shutil.rmtree(folder / "probe")
    return found[1]


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leftover(folder: Path, name: str, host: str, pid: int) -> str:
    path = folder / f".{name}.partial-{host}-{pid}-deadbeef"
    path.mkdir()
    (path / "model.onnx").write_bytes(b"half")
    return path.name


def test_leftovers_of_dead_exports_of_the_same_name_are_removed_and_no_others(folder):
    host, dead = host_of_this_machine(folder), dead_pid()
    leftover(folder, "out", host, dead)
    kept = {
        leftover(folder, "out", host, os.getpid()),
        leftover(folder, "other", host, dead),
        leftover(folder, "out2", host, dead),
        leftover(folder, "out", "elsewhere", dead),
    }
    with new_bundle(folder / "out") as partial:
        assert set(names(folder)) == kept | {partial.name, ".out.lock"}
    assert set(names(folder)) == kept | {"out"}


def test_a_killed_export_leaves_nothing_that_opens_and_the_next_one_cleans_up(folder):
    script = (
        "import os, signal, sys; from tiue_export.bundle.write import new_bundle\n"
        "with new_bundle(sys.argv[1], force=True) as folder:\n"
        "    (folder / 'tiue.json').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    old = write_old(folder / "out")
    done = subprocess.run([sys.executable, "-c", script, str(old)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (old / "tiue.json").read_text() == "old"
    (left,) = folder.glob(".out.partial-*")
    assert refusal(left).message == f"{left} is an unfinished export"
    export(old, force=True)
    assert names(folder) == ["out"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_explained_and_nothing_is_kept(folder, code):
    with pytest.raises(ResourceError) as caught:
        export(folder / "out", work=raising(OSError(code, os.strerror(code))))
    assert re.fullmatch(
        rf"the disk of {re.escape(str(folder))} is full; nothing unfinished was kept",
        caught.value.message,
    )
    assert caught.value.next_step == "Free some space, or choose another output."
    assert names(folder) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_place_that_cannot_be_written_is_explained(folder, code):
    with pytest.raises(ResourceError) as caught:
        export(folder / "out", work=raising(OSError(code, os.strerror(code))))
    assert caught.value.message == f"{folder / 'out'} cannot be written: {os.strerror(code)}"


def test_other_operating_system_errors_pass_unchanged(folder):
    with pytest.raises(FileNotFoundError):
        export(folder / "out", work=lambda partial: (partial / "absent").read_bytes())
    assert names(folder) == []


def test_records_hold_size_and_hash_of_every_file_below_a_folder(tmp_path):
    (tmp_path / "part" / "deep").mkdir(parents=True)
    (tmp_path / "part" / "empty").write_bytes(b"")
    (tmp_path / "part" / "deep" / "big").write_bytes(b"x" * (2**20 + 1))
    (tmp_path / "elsewhere").write_bytes(b"y")
    assert records_below(tmp_path, "part") == {
        "part/empty": FileRecord(0, hashlib.sha256(b"").hexdigest()),
        "part/deep/big": FileRecord(2**20 + 1, hashlib.sha256(b"x" * (2**20 + 1)).hexdigest()),
    }

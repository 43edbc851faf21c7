"""Packing a bundle for a device and unpacking it: nothing lost, foreign or half done."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from sealed_manifest import sealed_text

from tiue_export.bundle.archive import manifest_for, pack_bundle, unpack_bundle
from tiue_export.bundle.manifest import Compiled, CompiledGraph, Manifest
from tiue_export.bundle.read import Bundle, all_files, file_records, open_bundle
from tiue_export.bundle.write import add_compiled, compiled_folder
from tiue_export.errors import BundleError, UsageError


@pytest.fixture(scope="module")
def compiled(tiny_bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with two compiled forms; their files are stand-ins of a few bytes. Shared."""
    root = tmp_path_factory.mktemp("forms") / "fox"
    shutil.copytree(tiny_bundle.root, root)
    bundle = open_bundle(root)
    for form in ("trt-rtx", "trt"):
        with compiled_folder(bundle, form) as folder:
            graphs = {}
            for name in bundle.manifest.graphs:
                (folder / f"{name}.plan").write_bytes(f"{form} {name}".encode())
                (record,) = file_records(folder, [f"{name}.plan"]).values()
                path = f"{form}/{name}.plan"
                graphs[name] = CompiledGraph(path, "0" * 64, {path: record})
            bundle = add_compiled(bundle, form, folder, Compiled("rtx", "1.7", {}, {}, graphs))
    return bundle


@pytest.fixture
def archive(compiled: Bundle, tmp_path: Path) -> Path:
    """Everything, packed."""
    return pack_bundle(compiled, tmp_path / "fox.tar").path


def members(path: Path) -> dict[str, bytes]:
    """Content of each member, in order."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def write(path: Path, contents, kind=tarfile.REGTYPE, link: str = "") -> Path:
    """An archive as somebody else could have made it; every member but the manifest of `kind`."""
    with tarfile.open(path, "w") as tar:
        for name, content in contents:
            member = tarfile.TarInfo(name)
            if name != "tiue.json":
                member.type, member.linkname = kind, link
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content))
    return path


def refusal(archive: Path, out: Path) -> BundleError:
    with pytest.raises(BundleError) as caught:
        unpack_bundle(archive, out)
    assert not out.exists()
    assert not [path for path in out.parent.iterdir() if "partial" in path.name]
    return caught.value


def test_a_whole_bundle_comes_out_as_it_went_in(compiled, archive, tmp_path):
    bundle = unpack_bundle(archive, tmp_path / "out")
    assert bundle.manifest == compiled.manifest
    for name, _ in all_files(compiled.manifest):
        assert (tmp_path / "out" / name).read_bytes() == (compiled.root / name).read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"fox.tar", "out"}


def test_an_archive_of_equal_content_is_equal_and_starts_with_the_manifest(compiled, tmp_path):
    first = pack_bundle(compiled, tmp_path / "a.tar")
    second = pack_bundle(compiled, tmp_path / "b.tar")
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.size_bytes == first.path.stat().st_size
    names = list(members(first.path))
    assert names[0] == "tiue.json"
    assert names[1:] == sorted(names[1:])


@pytest.mark.parametrize("runtime", ["ort", "trt"])
def test_for_a_runtime_that_starts_from_onnx_compiled_forms_stay_behind(
    compiled, tmp_path, runtime
):
    packed = pack_bundle(compiled, tmp_path / "fox.tar", runtime=runtime)
    names = set(members(packed.path))
    assert {"unet_decoder/model.onnx", "tokenizer/tokenizer.json"} <= names
    assert "parity/reference.safetensors" in names
    assert not {name for name in names if name.startswith("trt")}
    bundle = unpack_bundle(packed.path, tmp_path / "out")
    assert bundle.manifest.compiled == {}
    assert bundle.manifest.graphs == compiled.manifest.graphs


def test_for_rtx_the_engines_go_alone_and_the_bundle_still_opens(compiled, tmp_path):
    packed = pack_bundle(compiled, tmp_path / "fox.tar", runtime="rtx")
    names = set(members(packed.path))
    assert "trt-rtx/unet_decoder.plan" in names
    assert not {name for name in names if "onnx" in name or name.startswith("trt/")}
    bundle = unpack_bundle(packed.path, tmp_path / "out")
    assert list(bundle.manifest.compiled) == ["trt-rtx"]
    for name, record in bundle.manifest.graphs.items():
        assert record == replace(compiled.manifest.graphs[name], omitted=True)
        with pytest.raises(BundleError, match="was packed for one runtime, without its ONNX files"):
            bundle.graph_path(name)
    with pytest.raises(BundleError, match="without its ONNX files"):
        manifest_for(bundle, "ort")
    assert pack_bundle(bundle, tmp_path / "again.tar", runtime="rtx").size_bytes


def test_a_form_the_bundle_lacks_is_refused_with_what_there_is(tiny_bundle, compiled, tmp_path):
    with pytest.raises(UsageError) as caught:
        pack_bundle(tiny_bundle, tmp_path / "fox.tar", runtime="rtx")
    assert caught.value.message == f"{tiny_bundle.root} has no engines of rtx to pack"
    assert caught.value.next_step.endswith("--flavor rtx")
    with pytest.raises(UsageError, match=r"unknown form of the bundle 'rtz'; there are: ort, rtx,"):
        pack_bundle(compiled, tmp_path / "fox.tar", runtime="rtz")
    forms = dict(compiled.manifest.compiled)
    part = {"unet_encoder": forms["trt-rtx"].graphs["unet_encoder"]}
    manifest = replace(
        compiled.manifest, compiled={"trt-rtx": replace(forms["trt-rtx"], graphs=part)}
    )
    with pytest.raises(UsageError, match="has no rtx form of text_encoder, unet_decoder, vae_"):
        pack_bundle(Bundle(compiled.root, manifest), tmp_path / "fox.tar", runtime="rtx")
    assert list(tmp_path.iterdir()) == []


def test_existing_outputs_are_refused_and_replaced_on_demand(compiled, archive, tmp_path):
    with pytest.raises(BundleError, match=r"fox\.tar exists") as caught:
        pack_bundle(compiled, archive)
    assert "--force" in caught.value.next_step
    before = archive.stat().st_mtime_ns
    pack_bundle(compiled, archive, force=True)
    assert archive.stat().st_mtime_ns > before
    unpack_bundle(archive, tmp_path / "out")
    with pytest.raises(BundleError, match="already holds a bundle"):
        unpack_bundle(archive, tmp_path / "out")
    unpack_bundle(archive, tmp_path / "out", force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cat.jpg").touch()
    with pytest.raises(BundleError, match="is no bundle; it is never replaced"):
        unpack_bundle(archive, tmp_path / "mine", force=True)


@pytest.mark.parametrize(
    "name",
    ["../evil", "a/../../evil", "/etc/evil", "..\\evil", "C:evil", "C:\\evil"],
)
def test_a_path_that_leads_out_of_the_bundle_is_refused(archive, tmp_path, name):
    contents = [*members(archive).items(), (name, b"evil")]
    error = refusal(write(tmp_path / "bad.tar", contents), tmp_path / "out")
    assert error.message.endswith(f"holds a path that leads out of the bundle: {name!r}")


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE],
)
def test_anything_but_a_regular_file_is_refused(archive, tmp_path, kind):
    manifest = members(archive)["tiue.json"]
    contents = [("tiue.json", manifest), ("model_index.json", b"")]
    bad = write(tmp_path / "bad.tar", contents, kind, link="/etc/passwd")
    assert "which is no regular file" in refusal(bad, tmp_path / "out").message


def test_a_manifest_that_lists_a_path_outside_is_refused(archive, tmp_path):
    data = json.loads(members(archive)["tiue.json"])
    data["files"]["../evil"] = {"size_bytes": 4, "sha256": "0" * 64}
    contents = [("tiue.json", sealed_text(data).encode()), ("../evil", b"evil")]
    error = refusal(write(tmp_path / "bad.tar", contents), tmp_path / "out")
    assert "the manifest points outside the bundle: '../evil'" in error.message
    del data["files"]["../evil"]
    data["files"]["tiue.json"] = {"size_bytes": 4, "sha256": "0" * 64}
    bad = write(tmp_path / "bad.tar", [("tiue.json", sealed_text(data).encode())])
    assert "the manifest lists itself" in refusal(bad, tmp_path / "out").message


def test_a_sparse_member_writes_no_byte_of_what_it_claims(archive, tmp_path):
    data = json.loads(members(archive)["tiue.json"])
    data["files"] = {"big.bin": {"size_bytes": 4, "sha256": "0" * 64}}
    data["graphs"] = data["compiled"] = {}
    bomb = tmp_path / "bomb.tar"
    with tarfile.open(bomb, "w", format=tarfile.PAX_FORMAT) as tar:
        text = sealed_text(data).encode()
        manifest, big = tarfile.TarInfo("tiue.json"), tarfile.TarInfo("big.bin")
        manifest.size, big.size = len(text), 512
        big.pax_headers = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": "big.bin",
            "GNU.sparse.realsize": str(1 << 40),
        }
        tar.addfile(manifest, io.BytesIO(text))
        tar.addfile(big, io.BytesIO(b"1\n0\n0\n".ljust(512, b"\0")))
    error = refusal(bomb, tmp_path / "out")
    assert error.message == f"{bomb} holds 'big.bin', which is no regular file"


def test_files_that_are_unlisted_missing_or_there_twice_are_refused(archive, tmp_path):
    contents = list(members(archive).items())
    bad = tmp_path / "bad.tar"
    error = refusal(write(bad, [*contents, ("extra.txt", b"")]), tmp_path / "out")
    assert error.message == f"{bad} holds 'extra.txt', which its manifest does not list"
    error = refusal(write(bad, [*contents, contents[-1]]), tmp_path / "out")
    assert f"holds {contents[-1][0]!r}, which its manifest does not list" in error.message
    error = refusal(write(bad, contents[:-1]), tmp_path / "out")
    assert error.message == f"{bad} lacks {contents[-1][0]}"


def test_altered_and_resized_files_are_refused(archive, tmp_path):
    contents = members(archive)
    name = "unet_decoder/model.onnx"
    flipped = bytes([contents[name][0] ^ 1]) + contents[name][1:]
    for content, part in ((flipped, "was altered after packing"), (b"x", "has 1 bytes")):
        bad = write(tmp_path / "bad.tar", {**contents, name: content}.items())
        assert f"{name} {part}" in refusal(bad, tmp_path / "out").message


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_cut_archive_is_refused(archive, tmp_path, share):
    content = archive.read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: int(len(content) * share)])
    refusal(tmp_path / "cut.tar", tmp_path / "out")


def test_what_is_no_packed_bundle_is_said_to_be_none(archive, tmp_path):
    (tmp_path / "text.tar").write_text("hello")
    assert "is no packed bundle" in refusal(tmp_path / "text.tar", tmp_path / "out").message
    contents = list(members(archive).items())
    late = write(tmp_path / "late.tar", [*contents[1:], contents[0]])
    assert refusal(late, tmp_path / "out").message.endswith(
        "is no packed bundle: it does not start with tiue.json"
    )
    with tarfile.open(tmp_path / "small.tar.gz", "w:gz") as tar:
        tar.add(archive, "tiue.json")
    assert "is no packed bundle" in refusal(tmp_path / "small.tar.gz", tmp_path / "out").message
    assert refusal(tmp_path / "none.tar", tmp_path / "out").message.endswith("does not exist")
    broken = write(tmp_path / "bad.tar", [("tiue.json", b"\xff")])
    assert "is not UTF-8" in refusal(broken, tmp_path / "out").message


def test_a_failure_while_packing_leaves_nothing(tiny_bundle, tmp_path):
    root = Path(shutil.copytree(tiny_bundle.root, tmp_path / "b"))
    bundle = open_bundle(root)
    (root / "unet_decoder" / "model.onnx").unlink()
    with pytest.raises(FileNotFoundError):
        pack_bundle(bundle, tmp_path / "fox.tar")
    assert {path.name for path in tmp_path.iterdir()} == {"b"}


def test_manifests_written_before_packing_existed_still_open(tiny_bundle):
    data = json.loads(tiny_bundle.manifest.to_json())
    for graph in data["graphs"].values():
        del graph["omitted"]
    assert Manifest.from_json(sealed_text(data), "tiue.json") == tiny_bundle.manifest


def test_the_commands_pack_and_unpack(compiled, run):
    code, out, err = run("bundle", "pack", compiled.root, "--runtime", "rtx")
    assert (code, err) == (0, "")
    assert "with trt-rtx" in out
    assert "tiue-export bundle unpack fox-rtx.tar" in out
    code, out, _ = run("bundle", "unpack", "fox-rtx.tar", "--json")
    assert (code, json.loads(out)["bundle"]) == (0, "fox-rtx")
    code, out, _ = run("inspect", "fox-rtx")
    assert (code, out.count("no ONNX")) == (0, len(compiled.manifest.graphs))
    code, _, err = run("generate", "fox-rtx", "a red fox")
    assert (code, "was packed for one runtime, without its ONNX files" in err) == (6, True)
    code, _, err = run("bundle", "pack", compiled.root, "--out", "fox.tar.gz")
    assert (code, "the archive is plain tar" in err) == (2, True)
    code, _, err = run("bundle", "unpack", "fox-rtx.tar")
    assert (code, "already holds a bundle" in err) == (6, True)

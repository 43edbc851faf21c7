"""A bundle as one .tar, with only what a device needs, and back.

The archive is plain tar (weights do not compress), holds nothing but regular files in sorted order
without times or owners, and starts with the manifest: unpacking knows from it which files may come,
how large they are and what their SHA-256 is, and checks each while it is written.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tiue_export.bundle.manifest import FileRecord, Manifest
from tiue_export.bundle.read import MANIFEST_FILE, Bundle, all_files, check_listed, open_bundle
from tiue_export.bundle.write import new_bundle
from tiue_export.errors import BundleError, UsageError, first_line, unknown_name
from tiue_export.system.atomic_file import new_file
from tiue_export.system.command_line import command_line
from tiue_export.system.disk_errors import disk_errors
from tiue_export.system.file_name import is_path_below

# Runtimes that start from the ONNX graphs: TensorRT plans fit one GPU only and are built on it.
FROM_ONNX = ("ort", "trt")
# Names of runtimes to the folder of their own form, where the two differ.
FORM_FOLDERS: Mapping[str, str] = {"rtx": "trt-rtx"}
_MANIFEST_LIMIT_BYTES = 64 << 20
_PIECE_BYTES = 1 << 20
_DAMAGED = "Copy the archive again, or pack the bundle again."


@dataclass(frozen=True)
class Packed:
    """A written archive: where it is, how large, and the manifest inside."""

    path: Path
    size_bytes: int
    manifest: Manifest


def pack_bundle(
    bundle: Bundle, out: str | Path, *, runtime: str | None = None, force: bool = False
) -> Packed:
    """Write `bundle` to a .tar at `out`, whole or with what one runtime needs.

    `runtime` "ort" or "trt" keeps the ONNX graphs and leaves out compiled forms (TensorRT engines
    are built on the device); "rtx", "openvino" or another compiled form keeps that form alone,
    without the ONNX graphs, and "qnn" the forms of all its chips. Raises `UsageError` for a form
    the bundle lacks, `BundleError` for an output in the way. An unfinished archive is never left
    under `out`.
    """
    path = Path(out)
    if path.exists() and not force:
        raise BundleError(f"{path} exists", "Choose another --out, or pass --force.")
    if path.is_dir():
        raise BundleError(f"{path} is a folder; expected a name for a .tar file")
    manifest = manifest_for(bundle, runtime)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with (
        disk_errors(path),
        new_file(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        text = manifest.to_json().encode()
        archive.addfile(_member(MANIFEST_FILE, len(text)), io.BytesIO(text))
        for name, record in sorted(dict(all_files(manifest)).items()):
            with (bundle.root / name).open("rb") as source:
                archive.addfile(_member(name, record.size_bytes), source)
    return Packed(path, path.stat().st_size, manifest)


def unpack_bundle(archive: str | Path, out: str | Path, *, force: bool = False) -> Bundle:
    """Unpack an archive of `pack_bundle` to a bundle folder, every byte checked.

    Raises `BundleError` for anything that a packed bundle does not hold (links, devices, paths
    that lead elsewhere, files that the manifest does not list), for damage, and for an output in
    the way. Nothing is left under `out` then.
    """
    path = Path(archive)
    if not path.is_file():
        raise BundleError(f"{path} does not exist" if not path.exists() else f"{path} is no file")
    with new_bundle(out, force=force) as folder:
        try:
            with tarfile.open(path, mode="r:") as tar:
                _extract(tar, path, folder)
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            # tarfile reads numbers and sparse maps out of headers, whatever stands there.
            raise BundleError(
                f"{path} is no packed bundle: {first_line(error)}", _DAMAGED
            ) from error
        except EOFError as error:
            raise BundleError(f"{path} ends too early", _DAMAGED) from error
    return open_bundle(out)


def manifest_for(bundle: Bundle, runtime: str | None) -> Manifest:
    """The manifest of what `runtime` needs of the bundle; None keeps everything."""
    manifest = bundle.manifest
    if runtime is None:
        return manifest
    if runtime in FROM_ONNX:
        for name in manifest.graphs:
            bundle.graph_path(name)
        return replace(manifest, compiled={})
    folder = FORM_FOLDERS.get(runtime, runtime)
    # A runtime may have a form for each of several targets, such as qnn-v73 and qnn-v75.
    forms = {
        name: form
        for name, form in manifest.compiled.items()
        if name == folder or name.startswith(f"{folder}-")
    }
    if not forms:
        names = {form: name for name, form in FORM_FOLDERS.items()}
        here = [names.get(form, form) for form in manifest.compiled if form != "trt"]
        if runtime in FORM_FOLDERS:
            raise UsageError(
                f"{bundle.root} has no engines of {runtime} to pack",
                "Build them: " + command_line("trt", "--bundle", bundle.root, "--flavor", runtime),
            )
        raise unknown_name("form of the bundle", runtime, [*FROM_ONNX, *here])
    lacking = sorted(
        {g for form in forms.values() for g in manifest.graphs if g not in form.graphs}
    )
    if lacking:
        raise UsageError(
            f"{bundle.root} has no {runtime} form of {', '.join(lacking)}",
            "Build the missing graphs first, or pack without --runtime.",
        )
    graphs = {name: replace(record, omitted=True) for name, record in manifest.graphs.items()}
    return replace(manifest, graphs=graphs, compiled=forms)


def _member(name: str, size_bytes: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size_bytes, 0o644
    return member


def _extract(tar: tarfile.TarFile, path: Path, folder: Path) -> None:
    members = iter(tar)
    manifest = _read_manifest(tar, next(members, None), path)
    check_listed(path, manifest)
    expected = dict(all_files(manifest))
    for member in members:
        record = expected.pop(_safe_name(member, path), None)
        if record is None:
            raise BundleError(f"{path} holds {member.name!r}, which its manifest does not list")
        if member.size != record.size_bytes:
            raise BundleError(
                f"{path}: {member.name} has {member.size:,} bytes; the manifest says "
                f"{record.size_bytes:,}",
                _DAMAGED,
            )
        _write(tar, member, record, folder / member.name, path)
    if expected:
        raise BundleError(f"{path} lacks {', '.join(sorted(expected)[:3])}", _DAMAGED)
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), "utf-8")


def _read_manifest(tar: tarfile.TarFile, member: tarfile.TarInfo | None, path: Path) -> Manifest:
    source = None
    plain = member is not None and member.isreg() and not member.issparse()
    if member is not None and plain and member.name == MANIFEST_FILE:
        source = tar.extractfile(member)
    if source is None or member is None or member.size > _MANIFEST_LIMIT_BYTES:
        raise BundleError(
            f"{path} is no packed bundle: it does not start with {MANIFEST_FILE}",
            "Make one with: tiue-export bundle pack BUNDLE",
        )
    try:
        text = source.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path}: {MANIFEST_FILE} is not UTF-8", _DAMAGED) from error
    return Manifest.from_json(text, f"{path}: {MANIFEST_FILE}")


def _safe_name(member: tarfile.TarInfo, path: Path) -> str:
    # A sparse file may unpack to more than the disk holds, from a few bytes.
    if not member.isreg() or member.issparse():
        raise BundleError(f"{path} holds {member.name!r}, which is no regular file")
    if not is_path_below(member.name):
        raise BundleError(f"{path} holds a path that leads out of the bundle: {member.name!r}")
    return member.name


def _write(
    tar: tarfile.TarFile, member: tarfile.TarInfo, record: FileRecord, target: Path, path: Path
) -> None:
    source = tar.extractfile(member)
    assert source is not None  # a regular file, as `_safe_name` made sure
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, written = hashlib.sha256(), 0
    with target.open("xb") as file:
        while piece := source.read(_PIECE_BYTES):
            digest.update(piece)
            written += file.write(piece)
    if written != record.size_bytes:
        raise BundleError(f"{path} ends in the middle of {member.name}", _DAMAGED)
    if digest.hexdigest() != record.sha256:
        raise BundleError(
            f"{path}: {member.name} was altered after packing: its SHA-256 is "
            f"{digest.hexdigest()[:12]}..., the manifest says {record.sha256[:12]}...",
            _DAMAGED,
        )

"""A bundle on disk, opened with every hash checked, and what is looked up in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiue_export.bundle.contract import contract_problem
from tiue_export.bundle.manifest import CompiledGraph, FileRecord, GraphRecord, Manifest
from tiue_export.errors import BundleError
from tiue_export.specs import UNET_ENCODER, VAE_DECODER, GraphSpec
from tiue_export.system.file_hash import size_and_sha256
from tiue_export.system.file_name import is_path_below
from tiue_export.system.json_file import read_object
from tiue_export.system.new_folder import PARTIAL
from tiue_export.system.owned_path import is_owned

MANIFEST_FILE = "tiue.json"
REFERENCE_FILE = "parity/reference.safetensors"
_COPY_AGAIN = "Copy the bundle again, or export it again."


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: its folder and its manifest."""

    root: Path
    manifest: Manifest

    def spec(self, graph: str) -> GraphSpec:
        """The contract of one graph, or an error that says why the bundle lacks it."""
        record = self.manifest.graphs.get(graph)
        if record is None:
            raise BundleError(
                f"{self.root} has no {graph}: it was exported from a checkpoint without that part",
                "Export again with --base and the pipeline folder that holds it.",
            )
        return record.spec(graph)

    def graph_path(self, graph: str) -> Path:
        """The ONNX file of one graph."""
        self.spec(graph)
        record = self.manifest.graphs[graph]
        if record.path is None:
            forms = " or ".join(f"--runtime {form}" for form in self.manifest.compiled)
            raise BundleError(
                f"{self.root} was made without ONNX files, which not every backend reads",
                (f"Run it with {forms}, or export" if forms else "Export")
                + " them to another bundle: tiue-export onnx --ckpt STUDENT --out BUNDLE",
            )
        if record.omitted:
            raise BundleError(
                f"{self.root} was packed for one runtime, without its ONNX files",
                "Use the bundle it was packed from, or pack that one with --runtime ort.",
            )
        return self.root / record.path

    def file(self, name: str) -> Path:
        """A file of the bundle that the manifest answers for; others are not trusted."""
        if name not in self.manifest.files:
            raise BundleError(
                f"{self.root}: the manifest lists no {name}", "Export the bundle again."
            )
        return self.root / name

    def json_object(self, name: str) -> dict[str, Any]:
        """The object in a JSON file that the manifest answers for."""
        path = self.file(name)
        try:
            return read_object(path)
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} cannot be read: {error}", _COPY_AGAIN) from error

    @property
    def size_bytes(self) -> int:
        return sum(record.size_bytes for _, record in all_files(self.manifest))


def open_bundle(path: str | Path, *, sealed: bool = True, anew: bool = False) -> Bundle:
    """Open a bundle folder, checking the manifest and the SHA-256 of every file in it.

    `sealed`: the manifest must be as the program wrote it, by its own SHA-256. `anew`: large files
    are read even where they have not changed since they were hashed last.

    Raises `BundleError`: no bundle, unfinished export, unknown format version, a missing,
    truncated or altered file.
    """
    root = Path(path)
    if is_owned(root.name, PARTIAL):
        raise BundleError(f"{root} is an unfinished export", "Export again; it can be deleted.")
    if not (root / MANIFEST_FILE).is_file():
        raise BundleError(
            f"{root} is no bundle: it has no {MANIFEST_FILE}"
            if root.is_dir()
            else f"{root} does not exist"
            if not root.exists()
            else f"{root} is a file; a bundle is a folder with a {MANIFEST_FILE}",
            _bundle_meant(root),
        )
    manifest = read_manifest(root, sealed=sealed)
    problem = contract_problem(manifest)
    if problem is not None:
        raise BundleError(f"{root}: {MANIFEST_FILE} cannot be drawn from: {problem}", _COPY_AGAIN)
    _verify(root, manifest, anew=anew)
    return Bundle(root, manifest)


def read_manifest(root: Path, *, sealed: bool = True) -> Manifest:
    """What tiue.json says, its files unchecked. Raises `BundleError` where it cannot be read."""
    path = root / MANIFEST_FILE
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    return Manifest.from_json(text, str(path), sealed=sealed)


def _bundle_meant(root: Path) -> str:
    """What to type for a bundle that is not there: its neighbour of a similar name, or how to."""
    import difflib

    if (root / UNET_ENCODER).exists():  # its manifest was lost, or is still to come
        return _COPY_AGAIN
    try:
        near = [path.parent for path in root.parent.glob(f"[!.]*/{MANIFEST_FILE}")]
        near += [path.parent for path in root.glob(f"[!.]*/{MANIFEST_FILE}")]
    except OSError:  # a folder that cannot be listed suggests nothing
        near = []
    names = {path.name: path for path in near}
    inside = [path for path in near if path.parent == root]
    close = difflib.get_close_matches(root.name, names, n=1)
    if len(inside) == 1 or close:
        return f"Did you mean {str(inside[0] if inside else names[close[0]])!r}?"
    if near:
        listed = ", ".join(sorted(str(path) for path in near)[:5])
        return f"Bundles there: {listed}."
    return (
        "Make one with: tiue-export onnx --ckpt student.safetensors --base PIPELINE_FOLDER --out "
        "BUNDLE"
    )


def vae_tile_px(manifest: Manifest) -> int | None:
    """The side in pixels of the tiles that the VAE decodes; None: pictures as a whole, or no VAE.

    A tile is cut where the picture is shorter, so that the longer side is what was chosen.
    """
    record = manifest.graphs.get(VAE_DECODER)
    if record is None or record.inputs[0].shape[2:] == tuple(manifest.latent_shape[2:]):
        return None
    return manifest.vae_scale * max(int(side) for side in record.inputs[0].shape[2:])


def all_files(manifest: Manifest) -> list[tuple[str, FileRecord]]:
    """Every file the manifest answers for, with its record; those left out when packing are not."""
    files = list(manifest.files.items())
    for graph in manifest.graphs.values():
        if graph.has_onnx:
            files.extend(graph.files.items())
    for compiled in manifest.compiled.values():
        for form in compiled.graphs.values():
            files.extend(form.files.items())
    return files


def file_records(root: Path, names: Iterable[str], *, anew: bool = False) -> dict[str, FileRecord]:
    """Size and SHA-256 of files below `root`, hashed side by side."""
    listed = sorted(names)
    with ThreadPoolExecutor() as pool:
        return dict(
            zip(
                listed,
                pool.map(lambda name: file_record(root / name, anew=anew), listed),
                strict=True,
            )
        )


def records_below(root: Path, folder: str) -> Mapping[str, FileRecord]:
    """Records of all files below `root`/`folder`, keyed by path relative to `root`."""
    return file_records(root, files_below(root, folder))


def files_below(root: Path, folder: str = "") -> tuple[str, ...]:
    """All files below `root`/`folder`, by their paths relative to `root`."""
    paths = (root / folder).rglob("*")
    return tuple(sorted(p.relative_to(root).as_posix() for p in paths if p.is_file()))


def file_record(path: Path, *, anew: bool = False) -> FileRecord:
    """Size and SHA-256 of one file."""
    return FileRecord(*size_and_sha256(path, anew=anew))


def check_listed(root: Path, manifest: Manifest) -> None:
    """Refuse a manifest that answers for paths outside `root`, for itself, or not for its graphs.

    Needs no file; `root` names the bundle in errors.
    """
    entries: list[tuple[str, GraphRecord | CompiledGraph]] = [
        (graph, record) for graph, record in manifest.graphs.items() if record.path is not None
    ]
    for folder, compiled in manifest.compiled.items():
        entries += [(f"{folder}/{graph}", form) for graph, form in compiled.graphs.items()]
    for graph, entry in entries:
        if entry.path not in entry.files:
            raise BundleError(
                f"{root}: the manifest gives {entry.path!r} as {graph}, which is none of its "
                "hashed files",
                _COPY_AGAIN,
            )
    for name, _ in all_files(manifest):
        if not is_path_below(name):
            raise BundleError(f"{root}: the manifest points outside the bundle: {name!r}")
        if name == MANIFEST_FILE:
            raise BundleError(f"{root}: the manifest lists itself", _COPY_AGAIN)


def _verify(root: Path, manifest: Manifest, *, anew: bool) -> None:
    check_listed(root, manifest)
    files, inside = dict(all_files(manifest)), root.resolve()
    for name, record in files.items():
        path = root / name
        if not path.is_file():
            raise BundleError(f"{root}: {name} is missing", _COPY_AGAIN)
        if not path.resolve().is_relative_to(inside):
            raise BundleError(
                f"{root}: {name} is a link that leads out of the bundle",
                "Copy the bundle with its files: cp -rL BUNDLE COPY",
            )
        size_bytes = path.stat().st_size
        if size_bytes != record.size_bytes:
            raise BundleError(
                f"{root}: {name} has {size_bytes:,} bytes; the manifest says {record.size_bytes:,}",
                _COPY_AGAIN,
            )
    for name, found in file_records(root, files, anew=anew).items():
        if found.sha256 != files[name].sha256:
            raise BundleError(
                f"{root}: {name} was altered after the export: its SHA-256 is "
                f"{found.sha256[:12]}..., the manifest says {files[name].sha256[:12]}...",
                _COPY_AGAIN,
            )

"""The bundle on disk: opened with every hash checked, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from tiue_export.bundle.manifest import Compiled, CompiledGraph, FileRecord, GraphRecord, Manifest
from tiue_export.errors import BundleError, ResourceError, UsageError
from tiue_export.specs import VAE_DECODER, GraphSpec

MANIFEST_FILE = "tiue.json"
REFERENCE_FILE = "parity/reference.safetensors"
_PARTIAL = re.compile(r"\.(?P<name>.+)\.partial-(?P<host>[^-]+)-(?P<pid>\d{1,9})-[0-9a-f]{8}")
_REPLACED = re.compile(r"\.(?P<name>.+)\.replaced-(?P<host>[^-]+)-(?P<pid>\d{1,9})-[0-9a-f]{8}")
_FULL = {errno.ENOSPC, errno.EDQUOT}
# numpy's `tofile`, with which weights are written, tells a short write in words and no number.
_SHORT_WRITE = ("problem writing element", "requested and")


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

    @property
    def size_bytes(self) -> int:
        return sum(record.size_bytes for _, record in all_files(self.manifest))


def open_bundle(path: str | Path) -> Bundle:
    """Open a bundle folder, checking the manifest and the SHA-256 of every file in it.

    Raises `BundleError`: no bundle, unfinished export, unknown format version, a missing,
    truncated or altered file.
    """
    root = Path(path)
    if _PARTIAL.fullmatch(root.name):
        raise BundleError(f"{root} is an unfinished export", "Export again; it can be deleted.")
    manifest_path = root / MANIFEST_FILE
    if not manifest_path.is_file():
        raise BundleError(
            f"{root} is no bundle: it has no {MANIFEST_FILE}"
            if root.is_dir()
            else f"{root} does not exist"
            if not root.exists()
            else f"{root} is a file; a bundle is a folder with a {MANIFEST_FILE}",
            _bundle_meant(root),
        )
    try:
        text = manifest_path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{manifest_path} cannot be read: {error}") from error
    manifest = Manifest.from_json(text, str(manifest_path))
    _verify(root, manifest)
    return Bundle(root, manifest)


def _bundle_meant(root: Path) -> str:
    """What to type for a bundle that is not there: its neighbour of a similar name, or how to."""
    import difflib

    try:
        near = [path.parent for path in root.parent.glob(f"[!.]*/{MANIFEST_FILE}")]
        near += [path.parent for path in root.glob(f"[!.]*/{MANIFEST_FILE}")]
    except OSError:  # a folder that cannot be listed suggests nothing
        near = []
    names = {path.name: path for path in near}
    close = difflib.get_close_matches(root.name, names, n=1)
    if close or len(near) == 1:
        return f"Did you mean {str(names[close[0]] if close else near[0])!r}?"
    if near:
        listed = ", ".join(sorted(str(path) for path in near)[:5])
        return f"Bundles there: {listed}."
    return "Make one with: tiue-export onnx --ckpt student.safetensors --out BUNDLE"


def require_one_pass(bundle: Bundle, what: str) -> None:
    """Refuse a bundle of Faster Diffusion where only a distilled student will do."""
    if bundle.manifest.faster is not None:
        raise UsageError(
            f"{what} is for distilled students, which draw in one pass; {bundle.root} draws in a "
            "loop (Faster Diffusion)",
            "ONNX Runtime (CPU, CUDA) and OpenVINO run it: see docs/faster-diffusion.md.",
        )


def require_whole_vae(bundle: Bundle, what: str) -> None:
    """Refuse a bundle whose VAE decodes tiles where nobody would put them together."""
    manifest = bundle.manifest
    record = manifest.graphs.get(VAE_DECODER)
    if record is not None and record.inputs[0].shape[2:] != tuple(manifest.latent_shape[2:]):
        raise UsageError(
            f"{what} decodes a picture as a whole; the VAE of {bundle.root} takes tiles",
            "Export again without --vae-tile.",
        )


def all_files(manifest: Manifest) -> list[tuple[str, FileRecord]]:
    """Every file the manifest answers for, with its record; those left out when packing are not."""
    files = list(manifest.files.items())
    for graph in manifest.graphs.values():
        if not graph.omitted:
            files.extend(graph.files.items())
    for compiled in manifest.compiled.values():
        for form in compiled.graphs.values():
            files.extend(form.files.items())
    return files


def file_records(root: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Size and SHA-256 of files below `root`, hashed side by side."""
    listed = sorted(names)
    with ThreadPoolExecutor() as pool:
        return dict(zip(listed, pool.map(lambda name: _record(root / name), listed), strict=True))


def _record(path: Path) -> FileRecord:
    digest, size_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            size_bytes += len(piece)
    return FileRecord(size_bytes, digest.hexdigest())


def check_listed(root: Path, manifest: Manifest) -> None:
    """Refuse a manifest that answers for paths outside `root`, for itself, or not for its graphs.

    Needs no file; `root` names the bundle in errors.
    """
    entries: list[tuple[str, GraphRecord | CompiledGraph]] = [*manifest.graphs.items()]
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
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise BundleError(f"{root}: the manifest points outside the bundle: {name!r}")
        if pure == PurePosixPath(MANIFEST_FILE):
            raise BundleError(f"{root}: the manifest lists itself", _COPY_AGAIN)


def _verify(root: Path, manifest: Manifest) -> None:
    check_listed(root, manifest)
    files = dict(all_files(manifest))
    for name, record in files.items():
        path = root / name
        if not path.is_file():
            raise BundleError(f"{root}: {name} is missing", _COPY_AGAIN)
        size_bytes = path.stat().st_size
        if size_bytes != record.size_bytes:
            raise BundleError(
                f"{root}: {name} has {size_bytes:,} bytes; the manifest says {record.size_bytes:,}",
                _COPY_AGAIN,
            )
    for name, found in file_records(root, files).items():
        if found.sha256 != files[name].sha256:
            raise BundleError(
                f"{root}: {name} was altered after the export: its SHA-256 is "
                f"{found.sha256[:12]}..., the manifest says {files[name].sha256[:12]}...",
                _COPY_AGAIN,
            )


_COPY_AGAIN = "Copy the bundle again, or export it again."


@contextlib.contextmanager
def new_bundle(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A fresh folder beside `path` that becomes `path` when the block ends without an error.

    A killed or failed export leaves `path` as it was. Leftovers of killed exports of the same
    name on this machine are removed. An existing bundle is replaced only with `force`; any other
    folder never.
    """
    target = Path(path).resolve()
    _remove_leftovers(target)
    check_target(target, force=force)
    partial = _beside(target, "partial")
    with disk_errors(target):
        try:  # before mkdir: a SIGTERM that arrives while it runs raises as it returns
            partial.mkdir(parents=True)
            yield partial
            _sync(partial)
            # Again: hours may have passed, and another export may have finished here.
            check_target(target, force=force)
            _replace(partial, target)
        finally:
            if partial.exists():
                shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def compiled_folder(bundle: Bundle, name: str) -> Iterator[Path]:
    """A fresh folder inside the bundle for compiled graphs; `add_compiled` puts it in place.

    It is removed when the block ends, whatever happened: a killed or failed compilation leaves the
    bundle as it was.
    """
    _remove_leftovers(bundle.root / name)
    partial = _beside(bundle.root / name, "partial")
    with disk_errors(bundle.root / name):
        try:
            partial.mkdir()
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def trial_of(bundle: Bundle, name: str, folder: Path, compiled: Compiled) -> Bundle:
    """The bundle as if `compiled`, whose files still lie in `folder`, were in place at NAME/.

    Runtimes read paths from the manifest: so they can prove what is not yet listed.
    """
    moved = {
        graph: replace(form, path=form.path.replace(name, folder.name, 1))
        for graph, form in compiled.graphs.items()
    }
    forms = {**bundle.manifest.compiled, name: replace(compiled, graphs=moved)}
    return Bundle(bundle.root, replace(bundle.manifest, compiled=forms))


def form_identity(bundle: Bundle, graph: str, **decides: object) -> str:
    """SHA-256 over a graph's ONNX files and all else that decides its compiled form."""
    files = {name: file.sha256 for name, file in bundle.manifest.graphs[graph].files.items()}
    content = json.dumps({"files": files, **decides}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def add_compiled(bundle: Bundle, name: str, folder: Path, compiled: Compiled) -> Bundle:
    """Move `folder`, made by `compiled_folder`, to NAME/ in the bundle and list it; returns both.

    An earlier NAME/ is replaced. A kill in between leaves a bundle that opens, without NAME.
    """
    target = bundle.root / name
    others = {key: value for key, value in bundle.manifest.compiled.items() if key != name}
    with disk_errors(target):
        _sync(folder)
        if target.exists():
            write_manifest(bundle.root, replace(bundle.manifest, compiled=others))
            shutil.rmtree(target)
        folder.rename(target)
        manifest = replace(bundle.manifest, compiled={**others, name: compiled})
        write_manifest(bundle.root, manifest)
    return Bundle(bundle.root, manifest)


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write tiue.json so that a reader sees the old one or the new one."""
    partial = root / f".{MANIFEST_FILE}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(root / MANIFEST_FILE)


def check_target(path: str | Path, *, force: bool) -> None:
    """Refuse a target that is in the way, before any work is done."""
    target = Path(path)
    if target.resolve() == Path.cwd() or (target.exists() and os.path.ismount(target)):
        raise BundleError(
            f"{target} is the current folder or a mount point, which cannot be replaced whole",
            f"Name a new folder inside it: {target / 'bundle'}",
        )
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / MANIFEST_FILE).is_file():
        raise BundleError(
            f"{target} exists and is no bundle; it is never replaced", "Choose another output."
        )
    if not force:
        raise BundleError(
            f"{target} already holds a bundle",
            "Choose another output, or pass --force to replace it.",
        )


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn a full disk or a read-only place into an error that says what to do."""
    try:
        yield
    except OSError as error:
        short = error.errno is None and any(words in str(error) for words in _SHORT_WRITE)
        if short or error.errno in _FULL:
            raise ResourceError(
                f"the disk of {target.parent} is full; nothing unfinished was kept",
                "Free some space or choose another output; --dry-run prints the size needed.",
            ) from error
        if error.errno in {errno.EACCES, errno.EROFS, errno.EPERM}:
            raise ResourceError(f"{target} cannot be written: {error.strerror}") from error
        raise


def _replace(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    # A kill between the two renames leaves the old bundle under this name; the next export to
    # the same place puts it back (`_remove_leftovers`).
    old = _beside(target, "replaced")
    target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _sync(folder: Path) -> None:
    """Force every file to disk, so that a power cut cannot leave a bundle with empty files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _remove_leftovers(target: Path) -> None:
    if not target.parent.is_dir():
        return
    for path in list(target.parent.iterdir()):
        found = _PARTIAL.fullmatch(path.name) or _REPLACED.fullmatch(path.name)
        if not found or found["name"] != target.name or found["host"] != _host():
            continue
        if _alive(int(found["pid"])):
            continue
        if _REPLACED.fullmatch(path.name) and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _beside(target: Path, state: str) -> Path:
    """A hidden sibling of `target` that names the process it belongs to."""
    owner = f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    return target.with_name(f".{target.name}.{state}-{owner}")


def _host() -> str:
    return re.sub(r"\W", "_", socket.gethostname()) or "host"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def records_below(root: Path, folder: str) -> Mapping[str, FileRecord]:
    """Records of all files below `root`/`folder`, keyed by path relative to `root`."""
    names = [p.relative_to(root).as_posix() for p in (root / folder).rglob("*") if p.is_file()]
    return file_records(root, names)

"""Bundles are written whole or not at all, and forms are added to them one at a time."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from tiue_export.bundle.lock import locked
from tiue_export.bundle.manifest import Compiled, Manifest
from tiue_export.bundle.read import MANIFEST_FILE, Bundle, open_bundle, read_manifest
from tiue_export.errors import BundleError
from tiue_export.system.atomic_file import write_atomically
from tiue_export.system.disk_errors import disk_errors
from tiue_export.system.lock import lock_beside, sole_process
from tiue_export.system.new_folder import PARTIAL, force_to_disk, new_folder, remove_leftovers
from tiue_export.system.owned_path import owned_path


@contextlib.contextmanager
def new_bundle(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A fresh folder beside `path` that becomes `path` when the block ends without an error.

    A killed or failed export leaves `path` as it was. Leftovers of killed exports of the same
    name on this machine are removed. An existing bundle is replaced only with `force`; any other
    folder never.
    """
    target = Path(path).resolve()

    def check() -> None:
        check_target(target, force=force)

    # Nobody is adding a form to the old one while it gives place.
    with new_folder(target, check, locked) as folder:
        yield folder


@contextlib.contextmanager
def compiled_folder(bundle: Bundle, name: str) -> Iterator[Path]:
    """A fresh folder inside the bundle for compiled graphs; `add_compiled` puts it in place.

    It is removed when the block ends, whatever happened: a killed or failed compilation leaves the
    bundle as it was.
    """
    remove_leftovers(bundle.root / name)
    target = bundle.root / name
    partial = owned_path(target, PARTIAL)
    doing = f"making the {name} form of {bundle.root}"
    with disk_errors(target), sole_process(lock_beside(target), doing):
        try:
            partial.mkdir()
            yield partial
        except FileNotFoundError as error:
            if partial.exists():
                raise
            raise BundleError(
                f"{bundle.root} was replaced while its {name} form was made",
                "Run the command again.",
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def add_compiled(
    bundle: Bundle,
    name: str,
    folder: Path,
    compiled: Compiled,
    on_note: Callable[[str], None] = lambda text: None,
) -> Bundle:
    """Move `folder`, made by `compiled_folder`, to NAME/ in the bundle and list it; returns both.

    An earlier NAME/ is replaced. What other processes added since `bundle` was read stays listed: a
    writer holds the bundle (`locked`, which tells `on_note` of a wait) and reads its manifest anew.
    Raises `BundleError` when the bundle was exported again meanwhile, or NAME made by another
    process. A kill in between leaves a bundle that opens, without NAME.
    """
    target = bundle.root / name
    with disk_errors(target), locked(bundle.root, on_note):
        now = _manifest_now(bundle, name)
        others = {key: value for key, value in now.compiled.items() if key != name}
        force_to_disk(folder)
        if target.exists():
            write_manifest(bundle.root, replace(now, compiled=others))
            shutil.rmtree(target)
        folder.rename(target)
        manifest = replace(now, compiled={**others, name: compiled})
        write_manifest(bundle.root, manifest)
    return Bundle(bundle.root, manifest)


def seal(path: str | Path) -> Bundle:
    """Accept a manifest that was edited on purpose; returns the bundle.

    Raises `BundleError` where it contradicts itself or the bundle's files.
    """
    root = open_bundle(path, sealed=False).root
    with locked(root):
        manifest = read_manifest(root, sealed=False)
        write_manifest(root, manifest)
    return Bundle(root, manifest)


def _manifest_now(bundle: Bundle, name: str) -> Manifest:
    """The bundle's manifest as it is on disk, if a form NAME made from `bundle` still belongs."""
    now = read_manifest(bundle.root)
    if replace(now, compiled={}) != replace(bundle.manifest, compiled={}):
        raise BundleError(
            f"{bundle.root} was exported again while its {name} form was made",
            "Run the command again.",
        )
    if _identities(now, name) != _identities(bundle.manifest, name):
        raise BundleError(
            f"another process put a {name} form into {bundle.root} while this one was made",
            "Keep that one, or run the command again with --force.",
        )
    return now


def _identities(manifest: Manifest, name: str) -> dict[str, str]:
    form = manifest.compiled.get(name)
    return {} if form is None else {key: graph.identity for key, graph in form.graphs.items()}


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write tiue.json so that a reader sees the old one or the new one."""
    write_atomically(root / MANIFEST_FILE, manifest.to_json().encode())


def link_or_copy(source: Path, place: Path) -> None:
    """Bring a file to another place: a hard link where the disk has them."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)


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

"""`tiue-export bundle pack` and `unpack`: a bundle as one file for a device, and back."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape

from tiue_export.bundle.archive import pack_bundle, unpack_bundle
from tiue_export.bundle.read import open_bundle
from tiue_export.errors import UsageError
from tiue_export.system.command_line import command_line

from .report.tables import console, megabytes, print_json

_SUFFIX = ".tar"


def pack(
    bundle: Path, out: Path | None = None, runtime: str | None = None, *, force: bool, as_json: bool
) -> None:
    """Write the archive and say what is in it."""
    opened = open_bundle(bundle, anew=True)
    name = opened.root.resolve().name
    path = out or Path(f"{name}-{runtime}{_SUFFIX}" if runtime else f"{name}{_SUFFIX}")
    if path.suffix != _SUFFIX:
        raise UsageError(
            f"--out is {path.name}; the archive is plain tar, as weights do not compress",
            f"Name it {path.name}{_SUFFIX}.",
        )
    packed = pack_bundle(opened, path, runtime=runtime, force=force)
    manifest = packed.manifest
    forms = [*(["ONNX"] if manifest.has_onnx else []), *manifest.compiled]
    if as_json:
        print_json({"archive": str(path), "size_bytes": packed.size_bytes, "forms": forms})
        return
    console.print(
        f"[bold green]{escape(str(path))}[/]: {megabytes(packed.size_bytes)} of "
        f"{megabytes(opened.size_bytes)}, with {escape(', '.join(forms))}",
        highlight=False,
    )
    there = command_line("bundle", "unpack", path.name)
    console.print(f"on the device:  {there}", markup=False, soft_wrap=True)


def unpack(archive: Path, out: Path | None = None, *, force: bool, as_json: bool) -> None:
    """Unpack, verified, and say where."""
    target = out or Path(archive.name.removesuffix(_SUFFIX))
    if target.resolve() == archive.resolve():
        raise UsageError(f"{archive} has no name to unpack to", "Pass --out FOLDER.")
    bundle = unpack_bundle(archive, target, force=force)
    if as_json:
        print_json({"bundle": str(target), "size_bytes": bundle.size_bytes})
        return
    console.print(
        f"[bold green]{escape(str(target))}[/]: {megabytes(bundle.size_bytes)}, every SHA-256 "
        "verified",
        highlight=False,
    )

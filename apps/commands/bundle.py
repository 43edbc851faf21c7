"""`tiue-export bundle pack`, `unpack` and `seal`."""

from __future__ import annotations

import typer

from ..options.archive import PackOptions, UnpackOptions
from ..options.bundle import BundleOptions
from ..options.group import command
from ..options.output import JsonOptions, WriteOptions

app = typer.Typer(
    help=(
        "Carry a bundle to a device: one .tar with what it needs, and back.\n\n"
        "Example:  tiue-export bundle pack fox --runtime trt"
    ),
    no_args_is_help=True,
)


@app.command()
@command
def pack(what: BundleOptions, archive: PackOptions, output: WriteOptions) -> None:
    """Pack a bundle into one .tar, with only what a device needs.

    For trt the ONNX graphs, as its engines are built on the device; for rtx the engines alone.

    Example:  tiue-export bundle pack fox --runtime trt
    """
    from ..bundle_archive import pack as run

    run(what.bundle, archive.out, archive.runtime, force=output.force, as_json=output.as_json)


@app.command()
@command
def unpack(what: UnpackOptions, output: WriteOptions) -> None:
    """Unpack an archive; every file is verified before the bundle appears.

    Example:  tiue-export bundle unpack fox-trt.tar
    """
    from ..bundle_archive import unpack as run

    run(what.archive, what.out, force=output.force, as_json=output.as_json)


@app.command()
@command
def seal(what: BundleOptions, output: JsonOptions) -> None:
    """Accept a tiue.json that you edited on purpose: it is checked, and its digest made anew.

    Example:  tiue-export bundle seal fox
    """
    from ..bundle_seal import run

    run(what.bundle, as_json=output.as_json)

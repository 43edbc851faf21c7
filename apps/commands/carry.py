"""Commands that take bundles elsewhere, and tidy up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..report.failures import explained
from ..welcome import panel_of
from .shared_options import BundleArgument, Force, Json

app = typer.Typer()
bundle_app = typer.Typer(
    help=(
        "Carry a bundle to a device: one .tar with what it needs, and back.\n\n"
        "Example:  tiue-export bundle pack fox --runtime trt"
    ),
    no_args_is_help=True,
)
app.add_typer(bundle_app, name="bundle", rich_help_panel=panel_of("bundle"))


@bundle_app.command()
@explained
def pack(
    bundle: BundleArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="Archive to write \\[default: NAME.tar].")
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime", help="Only what it needs: ort, trt, rtx, openvino \\[default: all]."
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Pack a bundle into one .tar, with only what a device needs.

    For trt the ONNX graphs, as its engines are built on the device; for rtx the engines alone.

    Example:  tiue-export bundle pack fox --runtime trt
    """
    from ..bundle_archive import pack as run

    run(bundle, out, runtime, force=force, as_json=as_json)


@bundle_app.command()
@explained
def unpack(
    archive: Annotated[Path, typer.Argument(help="Archive of bundle pack.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write \\[default: the archive's name].")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Unpack an archive; every file is verified before the bundle appears.

    Example:  tiue-export bundle unpack fox-trt.tar
    """
    from ..bundle_archive import unpack as run

    run(archive, out, force=force, as_json=as_json)


@app.command()
@explained
def triton(
    bundle: BundleArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder for the repository.")],
    backend: Annotated[
        str,
        typer.Option("--backend", help="onnxruntime, or tensorrt for a bundle with engines."),
    ] = "onnxruntime",
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name of the ensemble \\[default: the bundle's folder]."),
    ] = None,
    max_batch: Annotated[
        int, typer.Option("--max-batch", help="Largest batch, if the bundle's is dynamic.")
    ] = 4,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a bundle as a model repository for NVIDIA Triton: each graph, and an ensemble.

    Example:  tiue-export triton fox --out repo/
    """
    from ..triton_repository import TritonRequest, run

    run(
        TritonRequest(
            bundle=bundle,
            out=out,
            backend=backend,
            name=name,
            max_batch=max_batch,
            force=force,
            as_json=as_json,
        )
    )


@app.command()
@explained
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete instead of listing.")] = False,
    kind: Annotated[
        str | None, typer.Option("--kind", help="Only this kind, as the list names it.")
    ] = None,
    unused_days: Annotated[
        float | None, typer.Option("--unused-days", help="Only what was not used for so long.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what is kept on this machine for quicker starts, or delete it.

    Example:  tiue-export cache

    Example:  tiue-export cache --clear --kind openvino --unused-days 30
    """
    from ..cache import run

    run(clear, kind, unused_days, as_json)

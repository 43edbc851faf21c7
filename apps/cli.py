"""The `tiue-export` command line. Each command imports its code when it runs: help stays fast."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from tiue_export._version import __version__

from .failures import explained

app = typer.Typer(
    name="tiue-export",
    help=(
        "Take a distilled one-pass Stable Diffusion student (TiUE) to a device, with proof.\n\n"
        "A checkpoint becomes a bundle of verified graphs; a bundle draws pictures without torch."
    ),
    epilog="First steps: tiue-export demo   |   exit codes: docs/errors.md",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Shared options: the same flag means the same in every command.
Checkpoint = Annotated[
    str, typer.Option("--ckpt", help="Student: .safetensors file, diffusers folder or hub id.")
]
Base = Annotated[
    str | None,
    typer.Option("--base", help="Pipeline folder or hub id for what the checkpoint lacks."),
]
BundleArgument = Annotated[Path, typer.Argument(help="Bundle folder.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
LowMemory = Annotated[
    bool, typer.Option("--low-memory", help="Give memory back between operations; slower.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing output.")]
RuntimeName = Annotated[str, typer.Option("--runtime", help="ort, torch (needs --ckpt) or fake.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Threads = Annotated[
    int | None, typer.Option("--threads", help="CPU threads [default: the runtime's choice].")
]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"tiue-export {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
@explained
def onnx(
    ckpt: Checkpoint,
    out: Annotated[
        Path | None, typer.Option("--out", help="Bundle to write [default: NAME-PRECISION].")
    ] = None,
    base: Base = None,
    precision: Annotated[
        str, typer.Option("--precision", help="fp32 (exact, fastest on CPUs) or fp16 (for GPUs).")
    ] = "fp32",
    height: Annotated[int | None, typer.Option("--height", help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Pixels.")] = None,
    batch: Annotated[int, typer.Option("--batch", help="Images per run.")] = 1,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Leave the batch axis open.")
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="K [default: what the checkpoint records, else 4]."),
    ] = None,
    allow_other_steps: Annotated[
        bool, typer.Option("--allow-other-steps", help="Export a K it was not trained for.")
    ] = False,
    family: Annotated[
        str | None,
        typer.Option("--family", help="sd15, sd21-base, sd21-v, tiny [default: recognised]."),
    ] = None,
    no_hoist: Annotated[
        bool, typer.Option("--no-hoist", help="Naive batched decoder, for comparison.")
    ] = False,
    hoist_into: Annotated[
        str,
        typer.Option("--hoist-into", help="Graph for the time-independent part: decoder, encoder."),
    ] = "decoder",
    merge_below: Annotated[
        float, typer.Option("--merge-below", help="Merge decoder rows weighing less (try 0.02).")
    ] = 0.0,
    allow_parity_loss: Annotated[
        bool, typer.Option("--allow-parity-loss", help="Keep a bundle that fails a gate.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, write nothing.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Export a student to a verified ONNX bundle.

    Example:  tiue-export onnx --ckpt student.safetensors --base sd21-base/ --out fox
    """
    from .export_onnx import ExportRequest, run

    run(
        ExportRequest(
            ckpt=ckpt,
            out=out,
            base=base,
            precision=precision,
            height=height,
            width=width,
            batch=batch,
            dynamic_batch=dynamic_batch,
            steps=steps,
            allow_other_steps=allow_other_steps,
            family=family,
            hoist="none" if no_hoist else hoist_into,
            merge_below=merge_below,
            allow_parity_loss=allow_parity_loss,
            dry_run=dry_run,
            force=force,
            as_json=as_json,
        )
    )


@app.command()
@explained
def generate(
    bundle: BundleArgument,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="One or more prompts.", show_default=False)
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts", help="Text file, one prompt a line.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Picture i uses seed + i [default: 0].")
    ] = None,
    count: Annotated[int, typer.Option("--count", help="Pictures per prompt.")] = 1,
    out: Annotated[
        Path, typer.Option("--out", help="Folder, or a .png path for a single picture.")
    ] = Path("pictures"),
    sheet: Annotated[
        Path | None,
        typer.Option("--sheet", help="Also write one .png: prompts down, seeds across."),
    ] = None,
    latents: Annotated[
        Path | None, typer.Option("--latents", help="Initial noise as .npy, instead of a seed.")
    ] = None,
    time_stages: Annotated[
        bool, typer.Option("--time", help="Print the time of each stage.")
    ] = False,
    runtime: RuntimeName = "ort",
    device: Device = "auto",
    threads: Threads = None,
    low_memory: LowMemory = False,
    ckpt: Annotated[str | None, typer.Option("--ckpt", help="Student for --runtime torch.")] = None,
    base: Base = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Draw pictures from a bundle: no torch needed.

    Example:  tiue-export generate fox "a red fox in the snow" --seed 7 --count 4
    """
    from .generate import GenerateRequest, run

    run(
        GenerateRequest(
            bundle=bundle,
            prompts=tuple(prompts or ()),
            prompts_file=prompts_file,
            seed=seed,
            count=count,
            out=out,
            sheet=sheet,
            latents=latents,
            time_stages=time_stages,
            runtime=runtime,
            device=device,
            threads=threads,
            low_memory=low_memory,
            ckpt=ckpt,
            base=base,
            force=force,
            as_json=as_json,
        )
    )


@app.command()
@explained
def parity(
    bundle: BundleArgument,
    runtime: RuntimeName = "ort",
    device: Device = "auto",
    threads: Threads = None,
    low_memory: LowMemory = False,
    ckpt: Annotated[str | None, typer.Option("--ckpt", help="Student for --runtime torch.")] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Hold a runtime on this machine against the reference stored in the bundle.

    Example:  tiue-export parity fox --runtime ort --device cuda
    """
    from tiue_export.specs import RuntimeOptions

    from .parity_check import run

    options = RuntimeOptions(device, threads, low_memory, ckpt, base)
    run(bundle, runtime, options, as_json)


@app.command()
@explained
def inspect(bundle: BundleArgument, as_json: Json = False) -> None:
    """Show what a bundle holds: graphs, constants, parity, origin. Verifies every file.

    Example:  tiue-export inspect fox
    """
    from .inspection import run

    run(bundle, as_json)


@app.command()
@explained
def doctor(as_json: Json = False) -> None:
    """Say what is installed and which runtimes can run here, and why not.

    Example:  tiue-export doctor
    """
    from .doctor import run

    run(as_json)


@app.command()
@explained
def distill(
    config: Annotated[
        Path | None, typer.Argument(help="TOML file; see docs/training.md.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder [default: the file's `out`].")
    ] = None,
    iterations: Annotated[
        int | None, typer.Option("--iterations", help="Stop after this many [default: the file's].")
    ] = None,
    presets: Annotated[
        bool, typer.Option("--presets", help="List the presets a configuration can name.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a TiUE student from a teacher. Run the same line again to resume.

    Example:  tiue-export distill student.toml

    Several GPUs or machines:  accelerate launch -m tiue_export distill student.toml
    """
    from .distill import run

    overrides = {"out": None if out is None else str(out), "iterations": iterations}
    given = {key: value for key, value in overrides.items() if value is not None}
    run(config, given, presets, as_json)


@app.command()
@explained
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything it makes.")] = Path(
        "demo"
    ),
    force: Force = False,
) -> None:
    """See it all in a minute: make a tiny student, export it, prove it, draw a picture.

    Example:  tiue-export demo
    """
    from .demo import run

    run(out, force)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script; `arguments` default to the process's own."""
    # Our optimum plugin lives in optimum's namespace, which diffusers remarks on when imported.
    logging.getLogger("diffusers.utils.import_utils").setLevel(logging.ERROR)
    # A plain SIGTERM would skip the clean-up of an unfinished export.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app(args=sys.argv[1:] if arguments is None else arguments)

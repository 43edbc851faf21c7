"""`tiue-export triton`: a bundle as a model repository for NVIDIA Triton."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.markup import escape

from tiue_export.bundle.read import open_bundle
from tiue_export.registry.packages import require

from .options.output import WriteOptions
from .options.triton import RepositoryOptions
from .report.tables import console, megabytes, numbers, print_json, titled


def run(path: Path, repository: RepositoryOptions, output: WriteOptions) -> None:
    """Write the repository and show its models."""
    require("writing a Triton repository", ("onnx",), "export")
    from tiue_export.export.triton.repository import (
        TritonOptions,
        TritonRepository,
        write_triton_repository,
    )

    bundle = open_bundle(path)
    options = TritonOptions(repository.backend, repository.name, repository.max_batch)
    made: TritonRepository = write_triton_repository(
        bundle, repository.out, options, force=output.force
    )
    if output.as_json:
        print_json({"out": str(repository.out), "models": [asdict(model) for model in made.models]})
        return
    columns = ("model", "backend", "inputs", "outputs")
    table = titled(str(repository.out), *columns, *numbers("size"))
    for model in made.models:
        files = [path for path in (made.root / model.name).rglob("*") if path.is_file()]
        table.add_row(
            model.name,
            model.backend or "ensemble",
            ", ".join(tensor.name for tensor in model.inputs),
            ", ".join(tensor.name for tensor in model.outputs),
            megabytes(sum(path.stat().st_size for path in files)),
        )
    console.print(table)
    console.print(
        f"[bold green]Done.[/] tritonserver --model-repository {escape(str(made.root))}",
        highlight=False,
    )

"""Student -> bundle of everything but the graphs' files: reference, tokenizer, plan, contracts.

What every bundle has. For backends that make their graphs from the student itself it is the whole
export: nothing is written that they cannot read.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiue_export._version import __version__
from tiue_export.bundle.manifest import FORMAT_VERSION, GraphRecord, Manifest
from tiue_export.bundle.read import (
    MANIFEST_FILE,
    REFERENCE_FILE,
    Bundle,
    file_records,
    files_below,
    open_bundle,
)
from tiue_export.bundle.write import check_target, new_bundle
from tiue_export.checkpoint.tokenizer_files import write_tokenizer
from tiue_export.drawing.tokenizer import Tokenizer, open_tokenizer
from tiue_export.graphs.build import build_graphs, exported_plan, taking_pictures
from tiue_export.graphs.options import ExportOptions
from tiue_export.graphs.shapes import shapes_of
from tiue_export.proof.gates import accept_loss
from tiue_export.proof.parity import require_passed
from tiue_export.reference.capture import Capture, capture
from tiue_export.reference.half_audit import RangeRecorder
from tiue_export.specs import BATCH, TEXT_ENCODER, UNET_GRAPHS, VAE_GRAPHS
from tiue_export.student.added_conditions import pooled_rows
from tiue_export.student.model import Student
from tiue_export.student.paired_text_encoder import PairedTextEncoder
from tiue_export.system.progress import Observer, stage

TOOLS = ("torch", "diffusers", "transformers", "numpy")
# What needs one part of the student alone, so that the others are not built beside it.
GRAPH_GROUPS = ((TEXT_ENCODER,), UNET_GRAPHS, VAE_GRAPHS)


def export_contract(
    student: Student,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    force: bool = False,
    allow_parity_loss: bool = False,
    check: Callable[[Bundle], None] = lambda bundle: None,
    observer: Observer | None = None,
) -> Bundle:
    """Write a bundle at `out` whose graphs have contracts and no files, and return it.

    `check` may refuse the bundle that it will be, before the student is run. The reference is the
    float32 student's run on real prompts. Each hop that PyTorch can prove is (split, closed form,
    hoisting); one that fails its gate raises `ParityError` and leaves nothing, unless
    `allow_parity_loss`.
    """
    options, observer = options or ExportOptions(), observer or Observer()
    check_target(out, force=force)
    student = taking_pictures(student, options)
    with new_bundle(out, force=force) as folder:
        tokenizer = write_parts(student, options, folder)
        records = _contracts(student, options)
        check(Bundle(Path(out), new_manifest(student, options, records, folder)))
        recorder = RangeRecorder(student, options, ())
        captured = write_reference(student, options, tokenizer, folder, recorder, observer)
        if not allow_parity_loss:
            require_passed(captured.hops, accept_loss(gentler_options(options)))
        manifest = replace(
            new_manifest(student, options, records, folder),
            parity=tuple(captured.hops),
            parity_loss_allowed=not all(hop.passed for hop in captured.hops),
        )
        (folder / MANIFEST_FILE).write_text(manifest.to_json(), "utf-8")
    return open_bundle(out)


def gentler_options(options: ExportOptions) -> str:
    """What to type for an export that loses less than by `options`; "" where they lose nothing."""
    losing = {
        "a smaller --fan-out": bool(options.fan_out),
        "--precision fp32": options.precision != "fp32",
    }
    return " or ".join(option for option, taken in losing.items() if taken)


def _contracts(student: Student, options: ExportOptions) -> dict[str, GraphRecord]:
    return {
        graph.spec.name: GraphRecord(
            path=None,
            inputs=graph.spec.inputs,
            outputs=graph.spec.outputs,
            precision=graph.precision,
            opset=None,
            files={},
        )
        for group in GRAPH_GROUPS
        for graph in build_graphs(student, options, only=group)
    }


def write_parts(student: Student, options: ExportOptions, folder: Path) -> Tokenizer | None:
    """Configurations and tokenizer, in the layout that optimum and diffusers read."""
    _write_json(folder / "scheduler" / "scheduler_config.json", student.scheduler_config)
    index: dict[str, Any] = {
        "_class_name": "TiUEPipeline" if student.plan.one_pass else "MultiPassPipeline",
        "scheduler": ["diffusers", student.scheduler_config.get("_class_name", "DDIMScheduler")],
    }
    if student.vae is not None:
        config = {k: v for k, v in student.vae.config.items() if k != "_name_or_path"}
        config["_class_name"] = type(student.vae).__name__
        for graph in VAE_GRAPHS[0 if options.with_vae_encoder else 1 :]:
            _write_json(folder / graph / "config.json", config)
        index["vae"] = ["diffusers", type(student.vae).__name__]
    tokenizer = None
    if student.text_encoder is not None and student.tokenizer_folder is not None:
        for name, encoder in _text_encoders(student.text_encoder).items():
            config = encoder.config.to_diff_dict()
            config.pop("_name_or_path", None)
            _write_json(folder / name / "config.json", config)
            index[name] = ["transformers", type(encoder).__name__]
        shapes = shapes_of(student, options)
        length, chunks = shapes.tokens, shapes.text_chunks
        write_tokenizer(student.tokenizer_folder, folder / "tokenizer", length // chunks)
        index["tokenizer"] = ["transformers", "CLIPTokenizer"]
        tokenizer = open_tokenizer(folder / "tokenizer" / "tokenizer.json", length, chunks)
    _write_json(folder / "model_index.json", index)
    return tokenizer


def _text_encoders(text_encoder: Any) -> dict[str, Any]:
    """The text encoders by the names of their folders: SDXL has two."""
    if isinstance(text_encoder, PairedTextEncoder):
        return {"text_encoder": text_encoder.first, "text_encoder_2": text_encoder.second}
    return {"text_encoder": text_encoder}


def write_reference(
    student: Student,
    options: ExportOptions,
    tokenizer: Tokenizer | None,
    folder: Path,
    recorder: RangeRecorder,
    observer: Observer,
) -> Capture:
    """Run the student in float32, `recorder` watching; what graphs are held against is kept."""
    name = "run student in fp32"
    with stage(observer, name):
        captured = capture(student, options, tokenizer, recorder, observer.steps_of(name))
        captured.reference.save(folder / REFERENCE_FILE)
    return captured


def new_manifest(
    student: Student,
    options: ExportOptions,
    graphs: Mapping[str, GraphRecord],
    folder: Path,
    tools: Sequence[str] = TOOLS,
) -> Manifest:
    """The manifest of what lies in `folder`; parity and compiled forms are still to come."""
    shapes = shapes_of(student, options)
    latents: tuple[int | str, ...] = shapes.latents
    text: tuple[int | str, ...] = shapes.text
    if options.dynamic_batch:
        latents, text = (BATCH, *latents[1:]), (BATCH, *text[1:])
    in_graphs = {name for record in graphs.values() for name in record.files}
    others = [name for name in files_below(folder) if name not in in_graphs]
    return Manifest(
        format_version=FORMAT_VERSION,
        created_by=f"tiue-export {__version__}",
        source=student.source,
        plan=exported_plan(student, options),
        latent_shape=latents,
        text_shape=text,
        text_chunks=shapes.text_chunks,
        pooled_rows=pooled_rows(student.unet),
        vae_scale=shapes.vae_scale,
        vae_scaling_factor=shapes.vae_scaling_factor,
        precision=options.precision,
        hoisted=options.hoist,
        upsampling=options.upsampling,
        graphs=graphs,
        files=file_records(folder, others),
        tools={name: importlib.import_module(name).__version__ for name in tools},
    )


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, sort_keys=True, default=str) + "\n", "utf-8")

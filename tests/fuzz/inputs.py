"""Every kind of file that the program reads: a small valid one, and what reads it."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow
import torch
from fake_runtime import FakeRuntime
from micro_models import write_micro_pipeline, write_micro_unet
from original_names import part, save, vae_names, write_whole_file
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from tiue_export.benchmarks.synthetic import write_ldm_file, write_synthetic_pipeline
from tiue_export.bundle.archive import pack_bundle, unpack_bundle
from tiue_export.bundle.manifest import Compiled, CompiledGraph, Manifest
from tiue_export.bundle.read import (
    MANIFEST_FILE,
    Bundle,
    file_record,
    open_bundle,
    records_below,
    vae_tile_px,
)
from tiue_export.checkpoint.config_file import read_config
from tiue_export.checkpoint.lora_file import read_adapters
from tiue_export.checkpoint.single_file import vae_from_file
from tiue_export.checkpoint.tokenizer_files import tokenizer_of
from tiue_export.drawing.picture import picture_from_file
from tiue_export.drawing.pipeline import Pipeline
from tiue_export.drawing.tokenizer import open_tokenizer
from tiue_export.export.coreml.recipe import read_recipe
from tiue_export.export.dry_run import plan_export
from tiue_export.graphs.options import ExportOptions
from tiue_export.methods.load import load_student
from tiue_export.methods.scheduler import plan_from_config
from tiue_export.proof.calibration import read_index
from tiue_export.proof.half_range import AUDIT_FILE, OverflowAudit
from tiue_export.proof.latency_record import read_record
from tiue_export.proof.parity import load_reference
from tiue_export.proof.quantization_plan import read_plan
from tiue_export.sampling.key_step_options import FasterOptions
from tiue_export.sampling.noise import noise_from_file
from tiue_export.student.embedding import add_embedding
from tiue_export.train.config import read_config as read_training
from tiue_export.train.prompts import read_prompts

from . import changes

APPS = "tiue_export.apps"
inspection = importlib.import_module(f"{APPS}.inspection")
bulk_plan = importlib.import_module(f"{APPS}.draw.bulk.plan")
prompt_file = importlib.import_module(f"{APPS}.draw.prompt_file")
prompt_table = importlib.import_module(f"{APPS}.draw.bulk.prompt_table")
runtime_choice = importlib.import_module(f"{APPS}.draw.runtime_choice")
tables = importlib.import_module(f"{APPS}.report.tables")

ROOT = Path(__file__).parents[2]
FORMAT1 = ROOT / "tests" / "bundle" / "format1" / "bundle"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TOKENS = 77


@dataclass(frozen=True)
class Input:
    """One file that is changed. `read` gets the folder that all files lie in."""

    kind: str
    file: str
    changes: changes.Changes
    read: Callable[[Path], object]


def write_valid(root: Path) -> None:
    """One valid file of each kind, as small as can be."""
    tokenizer = write_synthetic_pipeline(root / "tiny", "tiny") / "tokenizer"
    write_micro_pipeline(root / "pipeline", write_micro_unet(root / "micro"), tokenizer)
    unet = root / "sharded" / "unet"
    unet.mkdir(parents=True)
    shutil.copy(root / "pipeline" / "unet" / "config.json", unet)
    shutil.copytree(root / "pipeline" / "scheduler", root / "sharded" / "scheduler")
    shutil.copy(root / "pipeline" / "unet" / WEIGHTS, unet / "part.safetensors")
    _write_json(
        unet / f"{WEIGHTS}.index.json", {"metadata": {}, "weight_map": {"a": "part.safetensors"}}
    )
    _write_single_file(root / "single.safetensors", root / "pipeline" / "unet" / "config.json")
    _write_bundle(root / "bundle")
    pack_bundle(open_bundle(root / "bundle"), root / "bundle.tar")
    _write_lora(root / "lora")
    write_whole_file(root / "tiny", root / "whole.safetensors", form="open_clip")
    save(vae_names(part(root / "tiny", "vae")), root / "vae.safetensors")
    save_file({"<cat-toy>": torch.ones(2, 32)}, root / "learned_embeds.safetensors")
    _write_tables(root)
    noise = np.zeros((1, 4, 8, 8), np.float32)
    np.save(root / "latents.npy", noise)
    Image.new("RGB", (64, 64)).save(root / "control.png")
    _write_json(root / "calibration" / "calibration.json", _CALIBRATION)
    _write_json(root / "plan.json", _QUANTIZATION)
    shutil.copy(ROOT / "benchmarks" / "results" / "cpu-avx2-fp32-taesd.json", root / "record.json")
    _write_json(root / "recipe.json", {"format": 1, "bits": {"unet_encoder": {"a": 4}}})
    _write_json(root / "choice.json", _CHOICE)
    (root / "distill.toml").write_text(_DISTILL)


INPUTS: tuple[Input, ...]  # below the functions that read
_CALIBRATION = {
    "format_version": 1,
    "created_by": "t",
    "student": "s",
    "graphs_sha256": "g",
    "seed": 0,
    "precision": "fp32",
    "runtime": "ort",
    "batch": 1,
    "prompts_sha256": "p",
    "prompts": ["a", "b"],
    "tensors": {"sample": [1, 4, 8, 8]},
    "shards": [
        {"file": "s.safetensors", "first": 0, "runs": 2, "record": {"size_bytes": 1, "sha256": "a"}}
    ],
}
_LAYER = {
    "graph": "unet_decoder",
    "name": "l",
    "op": "Conv",
    "mode": "w8a8",
    "why": "psnr",
    "flops": 10,
    "activation": "x",
    "activation_scale": 0.5,
    "psnr_db": 60.0,
    "unit": "u",
}
_QUANTIZATION = {
    "format_version": 1,
    "created_by": "t",
    "student": "s",
    "calibration": "c",
    "ranges": "r",
    "samples": 4,
    "target_psnr_db": 40.0,
    "total_flops": 100,
    "layers": [_LAYER],
    "folds": [{"graph": "unet_decoder", "reader": "l", "exponents": "1 -2 3"}],
}
_CHOICE = {
    "runtime": "ort",
    "bundle": "b",
    "bundle_identity": "i",
    "measured_at": "now",
    "circumstances": {"cpu": "x"},
    "trials": [{"runtime": "ort", "latency_ms": 1.5}],
}
_DISTILL = "\n".join(
    (
        *('teacher = "t"', 'prompts = "p.txt"', 'out = "run"', "steps = 4", "batch = 8"),
        *('method = "tiue"', "micro_batch = 2", "guidance = 4.5", 'precision = "fp32"'),
        *('sample_prompts = ["a", "b"]', "plain_attention = true", "seed = 0", 'preset = "sd15"'),
    )
)
_AUDIT = {
    "inputs": "one prompt",
    "graphs": [
        {
            "graph": "unet_decoder",
            "measured": 3,
            "in_half": 2,
            "hot": 1,
            "islands": [
                {
                    "module": "up/attn",
                    "cause": {
                        "graph": "unet_decoder",
                        "module": "up/attn",
                        "op": "mm",
                        "max_abs": 70000.0,
                        "in_half": True,
                    },
                }
            ],
            "max_abs_in_half": 5.0,
            "largest": [
                {
                    "graph": "unet_decoder",
                    "module": "up/attn/to_q",
                    "op": "mm",
                    "max_abs": 70000.0,
                    "in_half": True,
                }
            ],
        }
    ],
}


def _write_json(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def _write_single_file(path: Path, config: Path) -> None:
    """In the names of original checkpoints."""
    write_ldm_file(path.with_name("pipeline"), path)
    metadata = {"unet_config": config.read_text(), "tiue_steps": "4"}
    save_file(load_file(path), path, metadata)


def _write_bundle(folder: Path) -> None:
    """The bundle of format 1 in today's format, with a compiled form and an audit beside it."""
    shutil.copytree(FORMAT1, folder)
    manifest = open_bundle(folder).manifest
    _write_json(folder / AUDIT_FILE, _AUDIT)
    graphs = {}
    for graph in manifest.graphs:
        form = folder / "openvino" / graph / "model.bin"
        form.parent.mkdir(parents=True)
        form.write_bytes(b"compiled")
        files = records_below(folder, f"openvino/{graph}")
        graphs[graph] = CompiledGraph(f"openvino/{graph}/model.bin", "i", files, {"build_s": 1.5})
    compiled = Compiled("openvino", "2026.4", {"device": "CPU"}, {"fast": True}, graphs)
    files = {**manifest.files, AUDIT_FILE: file_record(folder / AUDIT_FILE)}
    whole = replace(manifest, files=files, compiled={"openvino": compiled})
    (folder / MANIFEST_FILE).write_text(whole.to_json())


def _write_lora(folder: Path) -> None:
    folder.mkdir()
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    adapter = {
        f"{name}.lora_down.weight": torch.ones(2, 32),
        f"{name}.lora_up.weight": torch.ones(32, 2),
        f"{name}.alpha": torch.tensor(2.0),
    }
    recorded = json.dumps({"unet.lora_alpha": 4, "unet.alpha_pattern": {"a.b": 3}})
    save_file(adapter, folder / "lora.safetensors", {"lora_adapter_metadata": recorded})
    _write_json(folder / "adapter_config.json", {"lora_alpha": 4, "alpha_pattern": {"a.b": 8}})


def _write_tables(root: Path) -> None:
    rows = [{"id": f"r{i}", "prompt": f"a fox {i}", "seed": i, "kind": "animal"} for i in range(3)]
    head = "\t".join(rows[0])
    lines = ["\t".join(map(str, row.values())) for row in rows]
    (root / "table.tsv").write_text("\n".join([head, *lines]) + "\n")
    (root / "table.csv").write_text("prompt,kind\na fox,animal\nan owl,bird\n")
    (root / "table.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (root / "prompts.txt").write_text("a fox\nan owl\n")
    parquet.write_table(pyarrow.Table.from_pylist(rows), root / "table.parquet")


# What reads each of them: the functions that the commands call.


def _student(folder: str) -> Callable[[Path], object]:
    """Loaded, and looked at as by `--dry-run`."""
    return lambda root: plan_export(load_student(root / folder), ExportOptions())


def _planned(scheduler: str) -> Callable[[Path], object]:
    options = FasterOptions(scheduler=scheduler, steps=6, key_steps=(0, 1, 3))

    def read(root: Path) -> object:
        path = root / "pipeline" / "scheduler" / "scheduler_config.json"
        return plan_from_config(read_config(path), options)

    return read


def _shown_bundle(root: Path) -> None:
    """As `inspect` prints it, to a terminal that takes no lone surrogate."""
    for as_json in (False, True):
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")):
            inspection.run(root / "bundle", as_json)


def _drawn_bundle(root: Path) -> None:
    """By a runtime that knows of a bundle what its manifest says."""
    bundle = open_bundle(root / "bundle")
    vae_tile_px(bundle.manifest)
    with Pipeline.open(bundle, FakeRuntime(bundle)) as pipeline:
        pipeline("a fox")


def _shown_audit(root: Path) -> None:
    path = root / "bundle" / AUDIT_FILE
    audit = OverflowAudit.from_json(path.read_bytes().decode("utf-8", "replace"), str(path))
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")):
        tables.console.print(tables.overflow_table(audit.graphs, rows=3))


def _unpacked(root: Path) -> None:
    out = root / "unpacked"
    try:
        unpack_bundle(root / "bundle.tar", out)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _drawn_from(name: str) -> Callable[[Path], object]:
    """A table's rows as far as the file of a picture that records them."""

    def read(root: Path) -> None:
        jobs = bulk_plan.plan_jobs(prompt_table.read_rows(root / name), 1, 0)
        bulk_plan.BulkPlan(jobs, 8, 8).sha256()
        tokenize = open_tokenizer(FORMAT1 / "tokenizer" / "tokenizer.json", TOKENS)
        for each in jobs:
            tokenize.cut_note(each.job.prompt)
            tokenize([each.job.prompt])
            json.dumps({"columns": dict(each.columns)}, default=str, ensure_ascii=False).encode()

    return read


def _tokens(root: Path) -> object:
    path = root / "bundle" / "tokenizer" / "tokenizer.json"
    return open_tokenizer(path, TOKENS)(["a fox"])


def _reference(root: Path) -> object:
    manifest = Manifest.from_json((root / "bundle" / MANIFEST_FILE).read_text(), MANIFEST_FILE)
    return load_reference(Bundle(root / "bundle", manifest))


def _choice(root: Path) -> object:
    path = root / "choice.json"
    return runtime_choice.RuntimeChoice.from_json(path.read_bytes().decode("utf-8", "replace"), "c")


CONFIG = changes.json_file
INPUTS = (
    Input("UNet configuration", "pipeline/unet/config.json", CONFIG, _student("pipeline")),
    Input("VAE configuration", "pipeline/vae/config.json", CONFIG, _student("pipeline")),
    Input("text configuration", "pipeline/text_encoder/config.json", CONFIG, _student("pipeline")),
    Input("schedule", "pipeline/scheduler/scheduler_config.json", CONFIG, _student("pipeline")),
    *(
        Input(
            f"schedule ({name})",
            "pipeline/scheduler/scheduler_config.json",
            CONFIG,
            _planned(name),
        )
        for name in ("ddim", "dpmpp", "pndm")
    ),
    Input("weights", f"pipeline/unet/{WEIGHTS}", changes.safetensors_file, _student("pipeline")),
    Input(
        "text weights",
        "pipeline/text_encoder/model.safetensors",
        changes.safetensors_file,
        _student("pipeline"),
    ),
    Input(
        "single file",
        "single.safetensors",
        changes.single_file,
        lambda root: load_student(root / "single.safetensors", root / "pipeline"),
    ),
    Input(
        "whole file",
        "whole.safetensors",
        changes.safetensors_file,
        lambda root: load_student(root / "whole.safetensors", root / "tiny"),
    ),
    Input(
        "VAE in one file",
        "vae.safetensors",
        changes.safetensors_file,
        lambda root: vae_from_file(root / "vae.safetensors"),
    ),
    Input(
        "learned words",
        "learned_embeds.safetensors",
        changes.safetensors_file,
        lambda root: add_embedding(
            load_student(root / "tiny"), root / "learned_embeds.safetensors"
        ),
    ),
    Input("shard index", f"sharded/unet/{WEIGHTS}.index.json", CONFIG, _student("sharded")),
    *(
        Input(
            f"tokenizer ({name})",
            f"pipeline/tokenizer/{name}",
            form,
            lambda root: tokenizer_of(root / "pipeline" / "tokenizer", TOKENS)(["a fox"]),
        )
        for name, form in (
            ("vocab.json", CONFIG),
            ("merges.txt", changes.text_file),
            ("tokenizer_config.json", CONFIG),
        )
    ),
    Input("manifest", f"bundle/{MANIFEST_FILE}", CONFIG, _shown_bundle),
    Input("sealed manifest", f"bundle/{MANIFEST_FILE}", changes.sealed_manifest, _shown_bundle),
    Input("manifest, drawn", f"bundle/{MANIFEST_FILE}", changes.sealed_manifest, _drawn_bundle),
    Input("audit", f"bundle/{AUDIT_FILE}", CONFIG, _shown_audit),
    Input("bundle's tokens", "bundle/tokenizer/tokenizer.json", CONFIG, _tokens),
    Input(
        "reference",
        "bundle/parity/reference.safetensors",
        changes.safetensors_file,
        _reference,
    ),
    Input("archive", "bundle.tar", changes.archive, _unpacked),
    Input(
        "LoRA",
        "lora/lora.safetensors",
        changes.safetensors_file,
        lambda root: read_adapters(root / "lora" / "lora.safetensors"),
    ),
    Input(
        "LoRA configuration",
        "lora/adapter_config.json",
        CONFIG,
        lambda root: read_adapters(root / "lora" / "lora.safetensors"),
    ),
    Input(
        "training configuration",
        "distill.toml",
        changes.toml_file,
        lambda root: read_training(root / "distill.toml"),
    ),
    Input("prompts", "prompts.txt", changes.text_file, _drawn_from("prompts.txt")),
    Input("table .tsv", "table.tsv", changes.text_file, _drawn_from("table.tsv")),
    Input("table .csv", "table.csv", changes.text_file, _drawn_from("table.csv")),
    Input("table .jsonl", "table.jsonl", changes.json_lines, _drawn_from("table.jsonl")),
    Input("table .parquet", "table.parquet", changes.changed_bytes, _drawn_from("table.parquet")),
    *(
        Input(f"training {name}", name, form, lambda root, name=name: read_prompts(root / name))
        for name, form in (
            ("prompts.txt", changes.text_file),
            ("table.csv", changes.text_file),
            ("table.tsv", changes.text_file),
            ("table.jsonl", changes.json_lines),
            ("table.parquet", changes.changed_bytes),
        )
    ),
    Input(
        "latents",
        "latents.npy",
        changes.array_file,
        lambda root: noise_from_file(root / "latents.npy", (1, 4, 8, 8)),
    ),
    Input(
        "picture",
        "control.png",
        changes.changed_bytes,
        lambda root: picture_from_file(root / "control.png", (64, 64)),
    ),
    Input(
        "calibration",
        "calibration/calibration.json",
        CONFIG,
        lambda root: read_index(root / "calibration").wanted_runs,
    ),
    Input("int8 plan", "plan.json", CONFIG, lambda root: read_plan(root / "plan.json")),
    Input("bench record", "record.json", CONFIG, lambda root: read_record(root / "record.json")),
    Input("Core ML recipe", "recipe.json", CONFIG, lambda root: read_recipe(root / "recipe.json")),
    Input("runtime choice", "choice.json", CONFIG, _choice),
)

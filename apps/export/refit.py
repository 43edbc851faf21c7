"""Other weights for the engines of a bundle: what decided its graphs is read from its manifest."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from tiue_export.bundle.manifest import Manifest
from tiue_export.bundle.read import MANIFEST_FILE, Bundle, open_bundle, vae_tile_px
from tiue_export.errors import UsageError
from tiue_export.export.trt.bundle import check_refittable, refit_from
from tiue_export.specs import VAE_DECODER
from tiue_export.system.tensorrt_flavor import FOLDERS

from ..options.checkpoint import SourceOptions
from ..options.graphs import ExportRequest
from ..options.group import refuse
from ..options.trt import EngineOptions
from ..report.stages import stage_bar
from ..report.tables import console, print_json
from .onnx import export_checkpoint, print_exported
from .trt import give_memory_back, print_engines

_OF_ANY_SOURCE = ("dry_run", "as_json")
# What an export of the new checkpoint needs to be told; all else is as the bundle has it.
_OF_A_CHECKPOINT = (
    *_OF_ANY_SOURCE,
    *("base", "vae", "family", "prediction", "lora", "embedding", "allow_other_steps"),
    *("no_audit", "audit_prompts", "allow_parity_loss", "out", "force"),
)


def run(source: SourceOptions, engine: EngineOptions, weights: str, export: ExportRequest) -> None:
    """Export the new student where `weights` is a checkpoint, then refit, and print the engines."""
    is_bundle = (Path(weights) / MANIFEST_FILE).is_file()
    old = _check(source, engine, weights, export, is_bundle=is_bundle)
    compiled, _ = check_refittable(old)  # before the minutes that an export takes
    start, folder = time.perf_counter(), FOLDERS[compiled.backend]
    if is_bundle:
        new = open_bundle(weights)
    else:
        instead = ("trt", "--bundle", str(old.root), "--refit-from")
        like, precision = options_of(old.manifest, export), old.manifest.precision
        exported = export_checkpoint(weights, like, precision, instead)
        if exported is None:
            _print_plan(old, None, tuple(compiled.graphs), as_json=export.as_json)
            return
        if not export.as_json:
            print_exported(exported, as_json=False, is_last=False)
        give_memory_back()
        new = exported.bundle
    if export.dry_run:
        _print_plan(old, new, tuple(compiled.graphs), as_json=export.as_json)
        return
    with stage_bar(quiet=export.as_json) as bar:
        bar.expect(len(old.manifest.graphs))
        refitted = refit_from(old, new, bar.observer())
    names = tuple(refitted.manifest.compiled[folder].graphs)
    seconds = time.perf_counter() - start
    print_engines(refitted, folder, names, seconds, as_json=export.as_json)


def options_of(manifest: Manifest, export: ExportRequest) -> ExportRequest:
    """The options that graphs like those of a bundle are exported with."""
    vae_precision, vae_tile = _vae(manifest)
    naive = manifest.hoisted == "none"
    return replace(
        export,
        steps=manifest.plan.steps,
        fan_out=str(manifest.plan.fan_out) if manifest.plan.fan_out else None,
        height=manifest.height_px,
        width=manifest.width_px,
        batch=str(manifest.batch or 1),
        dynamic_batch=manifest.batch is None,
        hoist_into=None if naive else manifest.hoisted,
        no_hoist=naive,
        upsampling=manifest.upsampling,
        vae_precision=vae_precision,
        vae_tile=vae_tile,
        max_prompt_tokens=manifest.max_prompt_tokens,
    )


def _vae(manifest: Manifest) -> tuple[str | None, int | None]:
    """What `--vae-precision` and `--vae-tile` were, as far as the VAE's graph tells."""
    record = manifest.graphs.get(VAE_DECODER)
    if record is None:
        return None, None
    # Without a word the audit decides, as it did for the bundle.
    precision = None if record.precision == manifest.precision else record.precision
    return precision, vae_tile_px(manifest)


def _check(
    source: SourceOptions,
    engine: EngineOptions,
    weights: str,
    export: ExportRequest,
    *,
    is_bundle: bool,
) -> Bundle:
    """The bundle whose engines are given other weights; what has no effect on them is refused."""
    if source.bundle is None or source.ckpt is not None:
        raise UsageError(
            "--refit-from takes engines that are there",
            "Name their bundle: --bundle BUNDLE --refit-from NEW.",
        )
    refuse(
        f"no part of --refit-from: the engines of {source.bundle} are kept as they were built",
        "Leave it out, or build engines of the new student: trt --ckpt.",
        engine,
    )
    refuse(
        f"for a checkpoint, and {weights} is a bundle, whose graphs are used as they are"
        if is_bundle
        else f"decided by {source.bundle}: its engines take graphs like its own",
        "Leave it out.",
        export,
        usable=_OF_ANY_SOURCE if is_bundle else _OF_A_CHECKPOINT,
    )
    old = open_bundle(source.bundle)
    if is_bundle:
        return old
    if old.manifest.plan.merged_timesteps:
        raise UsageError(
            f"{old.root} has merged rows, whose threshold it does not keep",
            "Export the new student yourself with the same --merge-below, and name that bundle.",
        )
    if not old.manifest.plan.one_pass:
        raise UsageError(
            f"{old.root} draws in a loop (Faster Diffusion); its export has options of its own",
            "Export the new model yourself with the same options, and name that bundle.",
        )
    return old


def _print_plan(old: Bundle, new: Bundle | None, graphs: tuple[str, ...], *, as_json: bool) -> None:
    """What would be refitted; after the plan of an export, which is the JSON object, one line."""
    if as_json:
        if new is not None:
            print_json({"bundle": str(new.root), "engines_of": str(old.root), "refit": graphs})
        return
    whose = "its" if new is None else f"{new.root}'s"
    console.print(
        f"then {whose} weights go into the engines of {old.root}: {', '.join(graphs)}"
        + ("" if new is None else " (nothing was written)"),
        markup=False,
        soft_wrap=True,
    )

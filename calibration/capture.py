"""Prompts -> calibration data: real text embeddings, samples and encoder features of a bundle.

The graphs run on any runtime, one drawing at a time, as drawing does; a drawing's last decoder run
feeds nothing and is left out, so that of a plan of one pass the decoder is not needed. Memory is
the graphs and one shard.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tiue_export.bundle.chain import TOKENS
from tiue_export.bundle.read import Bundle
from tiue_export.drawing.tokenizer import Tokenizer, tokenizer_of_bundle
from tiue_export.errors import BundleError, ResourceError, UsageError
from tiue_export.proof.calibration import (
    INDEX_FILE,
    CalibrationData,
    CalibrationIndex,
    CaptureOptions,
    CapturePlan,
    drawing_noises,
    new_index,
    open_calibration,
    prompts_sha256,
    read_index,
    run_bytes,
    shipped_prompts,
    verify_shards,
    write_index,
    write_shard,
)
from tiue_export.registry.backends import open_runtime
from tiue_export.registry.support import require_support
from tiue_export.sampling.noise import check_seeds
from tiue_export.sampling.sampler import combined, encoder_feeds, sampled_outputs
from tiue_export.specs import (
    TEXT_ENCODER,
    UNET_ENCODER,
    UNET_GRAPHS,
    Array,
    Feeds,
    Runtime,
    check_finite,
    step_limit,
)
from tiue_export.system.command_line import command_line
from tiue_export.system.disk_errors import disk_errors
from tiue_export.system.lock import lock_beside, sole_process

# NVIDIA's own recipes calibrate image models on 32 or 64 prompts.
_USUAL_COUNT = 64
_FULL = (errno.ENOSPC, errno.EDQUOT)


def capture(
    bundle: Bundle,
    root: Path,
    options: CaptureOptions,
    *,
    force: bool = False,
    on_run: Callable[[int, int], None] = lambda done, wanted: None,
) -> CalibrationData:
    """Capture into `root`, or go on where an earlier capture of the same stopped.

    `on_run` gets the runs that are done and wanted. Raises `UsageError` for prompts that are not
    there, `BundleError` for a folder in the way, `ResourceError` when the disk is full.
    """
    plan = plan_capture(bundle, options)
    with disk_errors(root):
        root.parent.mkdir(parents=True, exist_ok=True)
    with sole_process(lock_beside(root), f"capturing into {root}"):
        return _capture(bundle, root, options, plan, force, on_run)


def _capture(
    bundle: Bundle,
    root: Path,
    options: CaptureOptions,
    plan: CapturePlan,
    force: bool,
    on_run: Callable[[int, int], None],
) -> CalibrationData:
    index = _begin(root, new_index(bundle, plan.prompts, options.seed, options.runtime), force)
    wanted, size_bytes = index.wanted_runs, run_bytes(bundle)
    _check_space(root, (wanted - index.captured_runs) * size_bytes)
    on_run(index.captured_runs, wanted)
    if index.captured_runs < wanted:
        per_shard = max(1, options.shard_bytes // (size_bytes * index.passes))
        runtime = open_runtime(options.runtime, bundle, options.runtime_options)
        try:
            while index.captured_runs < wanted:
                index = _next_shard(bundle, runtime, root, index, per_shard, on_run)
        finally:
            runtime.close()
    return open_calibration(root, bundle)


def plan_capture(bundle: Bundle, options: CaptureOptions) -> CapturePlan:
    """What a capture will hold; what cannot be captured is refused here, before any work."""
    require_support("calibrate", bundle)
    bundle.spec(TEXT_ENCODER)
    prompts = shipped_prompts() if options.prompts is None else options.prompts
    count = min(_USUAL_COUNT, len(prompts)) if options.count is None else options.count
    if not 1 <= count <= len(prompts):
        raise UsageError(
            f"--count is {count}; expected 1 to {len(prompts)}, the number of prompts",
            "Give a longer list with --prompts FILE.",
        )
    batch = bundle.manifest.batch or 1
    check_seeds(options.seed, count + batch)
    for prompt in prompts[:count]:
        if not prompt.isprintable():
            raise UsageError(
                f"the prompt {prompt[:40]!r} holds control characters: the file is no text",
                "Write one prompt a line, in UTF-8.",
            )
    runs = -(-count // batch) * len(bundle.manifest.plan.passes)
    return CapturePlan(prompts[:count], runs, runs * run_bytes(bundle))


def _begin(root: Path, fresh: CalibrationIndex, force: bool) -> CalibrationIndex:
    if (root / INDEX_FILE).is_file():
        old = read_index(root)
        kept = _continued(old, fresh)
        if kept is not None:
            verify_shards(root, kept)
            return kept
        if not force:
            raise BundleError(
                f"{root} holds calibration data of {_difference(old, fresh)}",
                "Choose another --out, or pass --force to replace it.",
            )
        _clear(root, old)
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise BundleError(
            f"{root} exists and is no calibration folder; it is never replaced",
            "Choose another --out.",
        )
    root.mkdir(parents=True, exist_ok=True)
    _with_disk_errors(root, 0, fresh.wanted_runs, lambda: write_index(root, fresh))
    return fresh


def _continued(old: CalibrationIndex, fresh: CalibrationIndex) -> CalibrationIndex | None:
    """`old` with the prompts of `fresh`, if the one is the beginning of the other."""
    grown = replace(
        old, prompts=fresh.prompts, prompts_sha256=prompts_sha256(fresh.prompts), shards=()
    )
    same = replace(grown, tensors={}, created_by="", runtime="") == replace(
        fresh, created_by="", runtime=""
    )
    if not same or fresh.prompts[: len(old.prompts)] != old.prompts:
        return None
    # A last run that was filled up with a repeated prompt is captured anew.
    ragged = len(old.prompts) % old.batch and len(fresh.prompts) > len(old.prompts)
    shards = old.shards
    while ragged and shards and shards[-1].first + shards[-1].runs >= old.wanted_runs:
        shards = shards[:-1]
    return replace(grown, shards=shards)


def _difference(old: CalibrationIndex, fresh: CalibrationIndex) -> str:
    if old.student != fresh.student:
        return "another student, schedule, hoisting, upsampling or size"
    if old.graphs_sha256 != fresh.graphs_sha256:
        return f"another bundle of this student ({old.precision})"
    if old.seed != fresh.seed:
        return f"seed {old.seed}, not {fresh.seed}"
    return "other prompts"


def _clear(root: Path, index: CalibrationIndex) -> None:
    """Remove our own files: the index first, so that nothing half-deleted opens."""
    (root / INDEX_FILE).unlink()
    for shard in index.shards:
        (root / shard.file).unlink(missing_ok=True)
    shutil.rmtree(root / "analysis", ignore_errors=True)


def _check_space(root: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(root).free
    if needed_bytes > free_bytes:
        raise ResourceError(
            f"the capture needs {needed_bytes / 1e6:,.0f} MB more; the disk of {root} has "
            f"{free_bytes / 1e6:,.0f} MB",
            "Free some space, choose another --out, or a smaller --count.",
        )


def _next_shard(
    bundle: Bundle,
    runtime: Runtime,
    root: Path,
    index: CalibrationIndex,
    per_shard: int,
    on_run: Callable[[int, int], None],
) -> CalibrationIndex:
    tokenizer = tokenizer_of_bundle(bundle)
    done, wanted = index.captured_runs, index.wanted_runs
    drawings = range(index.captured_drawings, wanted // index.passes)[:per_shard]
    runs: list[dict[str, Array]] = []
    for number in drawings:
        runs += _drawing(bundle, runtime, tokenizer, index, number)
        on_run(done + len(runs), wanted)
    return _with_disk_errors(root, done, wanted, lambda: write_shard(root, index, runs))


def _drawing(
    bundle: Bundle, runtime: Runtime, tokenizer: Tokenizer, index: CalibrationIndex, number: int
) -> list[dict[str, Array]]:
    """A batch of pictures up to its last encoder run: what both graphs are fed in each pass."""
    wanted = {tensor.name for graph in UNET_GRAPHS for tensor in bundle.spec(graph).inputs}
    plan = bundle.manifest.plan
    runs: list[dict[str, Array]] = []

    def run(graph: str, pool: Feeds) -> dict[str, Array]:
        outputs = runtime.run(graph, bundle.spec(graph).select(pool))
        check_finite(graph, outputs)
        if graph == UNET_ENCODER:
            timesteps = np.array(plan.passes[len(runs)].timesteps, np.float32)
            fed = {**pool, **outputs, "timesteps": timesteps}
            runs.append({k: v.astype(np.float32) for k, v in fed.items() if k in wanted})
        return outputs

    (text,) = run(TEXT_ENCODER, {TOKENS: drawing_tokens(tokenizer, index, number)}).values()
    noises = drawing_noises(bundle, index, number)
    before = replace(plan, passes=plan.passes[:-1]).bounded(step_limit(runtime), len(text))
    outputs = sampled_outputs(before, run, noises, text)
    last = plan.passes[-1]
    # The graphs of one pass scale the noise themselves.
    sample = noises[0] if plan.one_pass else combined(last.input, noises, outputs)
    run(UNET_ENCODER, encoder_feeds(last, sample, text))
    return runs


def drawing_tokens(tokenizer: Tokenizer, index: CalibrationIndex, number: int) -> Array:
    """Tokens (B, L) of a drawing's prompts; a batch that they do not fill repeats the last."""
    start = number * index.batch
    chosen = list(index.prompts[start : start + index.batch])
    return tokenizer(chosen + chosen[-1:] * (index.batch - len(chosen)))


def _with_disk_errors(
    root: Path, done: int, wanted: int, write: Callable[[], CalibrationIndex | None]
) -> CalibrationIndex:
    """Turn a full disk into an error that says what was kept."""
    try:
        result = write()
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise ResourceError(
            f"the disk of {root} is full after {done} of {wanted} runs; those are kept",
            "Free some space; the same command goes on from there.",
        ) from error
    return result or read_index(root)


def choose_drawings(data: CalibrationData, held_out: int) -> tuple[Sequence[int], Sequence[int]]:
    """Drawings for ranges, and the last `held_out` to judge by, which no range has seen."""
    count = data.index.captured_drawings
    if count <= held_out:
        raise UsageError(
            f"{data.root} has {count} drawing(s); expected more than the {held_out} held out to "
            "judge by",
            "Capture more: "
            + command_line(
                *("calibrate", "BUNDLE", "--out", "FOLDER"),
                *("--count", 4 * held_out * data.index.batch),
            ),
        )
    ranged = count - held_out
    return range(ranged), range(ranged, count)

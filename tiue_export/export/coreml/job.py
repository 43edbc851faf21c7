"""One graph of a Core ML export, start to finish.

The student's part is run in float32 for what the package is to be held against, put into the
device's layout, converted, compressed, and freed; then the package on disk is executed. Arrays
that later graphs need lie as .npz files in the job's work folder.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tiue_export.bundle.chain import (
    LATENTS,
    NOISE,
    ONE_PASS,
    SCALED_LATENTS,
    SOURCE_PICTURE,
    TOKENS,
    chain_of,
    scaled_latents,
)
from tiue_export.bundle.manifest import Manifest, ParityRecord
from tiue_export.drawing.tokenizer import open_tokenizer
from tiue_export.errors import ParityError
from tiue_export.export.coreml.compress import activation_ranges, compress
from tiue_export.export.coreml.convert import Conversion, convert, quiet_coremltools, silently
from tiue_export.export.coreml.layout import with_layout
from tiue_export.export.coreml.mil.evaluator import Evaluation, MilProgram
from tiue_export.export.coreml.mil.package import MilPackage
from tiue_export.export.coreml.profiles import CoremlPlan, function_named
from tiue_export.export.own_student import Size, fp32_options
from tiue_export.graphs.build import Graph, build_graphs, run_graph
from tiue_export.proof.half_range import HALF_MAX
from tiue_export.proof.parity import for_gain, parity_record
from tiue_export.sampling.noise import noise_from_seed
from tiue_export.specs import (
    TEXT_ENCODER,
    UNET_DECODER,
    UNET_ENCODER,
    UNET_GRAPHS,
    VAE_DECODER,
    VAE_ENCODER,
    VAE_GRAPHS,
    Array,
)
from tiue_export.student.model import Student
from tiue_export.system.memory import return_freed_memory

# Beyond half of what half precision holds, an operation stays in float32: another prompt may reach
# further than ours.
_LARGE = HALF_MAX / 2
_ROUNDS = 3
_MODEL_FILE = "Data/com.apple.CoreML/model.mlmodel"
# What the manifest's parity table calls a graph's output, as `parity.measure_runtime` does.
_SUBJECTS = {
    TEXT_ENCODER: "encoder_hidden_states",
    UNET_ENCODER: "encoder features",
    UNET_DECODER: "latents",
    VAE_ENCODER: "latent_parameters",
    VAE_DECODER: "picture",
}
# In a loop the decoder's outputs are rows, and a text is embedded for each half of the guidance.
_LOOP_SUBJECTS = {**_SUBJECTS, TEXT_ENCODER: "prompt_embeds", UNET_DECODER: "outputs"}


@dataclass(frozen=True)
class GraphJob:
    """What one graph's package is to be. `package` is written, `work` holds what passes between.

    `sizes` are (height, width) in pixels; the first is the package's default. `gate_db` replaces
    the gate of a recipe that was searched for a PSNR.
    """

    graph: str
    student: Student
    manifest: Manifest
    plan: CoremlPlan
    sizes: tuple[Size, ...]
    package: Path
    work: Path
    metadata: Mapping[str, Any]
    bits: Mapping[str, int] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    tokenizer: Path | None = None
    gate_db: float | None = None


@dataclass(frozen=True)
class GraphResult:
    """What was made of a job. Seconds, bytes, and what the evaluator saw."""

    ops: Mapping[str, int]
    convert_s: float
    verify_s: float
    cpu_s: float
    size_bytes: int
    max_abs: float
    max_abs_op: str
    float32_ops: tuple[str, ...]
    parity: tuple[ParityRecord, ...]


def run_job(job: GraphJob) -> GraphResult:
    """Make and prove one package. Raises every error that the steps raise."""
    start, cpu_start = time.perf_counter(), time.process_time()
    ops, float32_ops = _make(job)
    converted = time.perf_counter()
    return_freed_memory()
    evaluations = {size: _evaluate(job, size) for size in job.sizes}
    records = [_judged(job, size, evaluations[size]) for size in job.sizes]
    worst = max(
        (record for each in evaluations.values() for record in each.records),
        key=lambda record: record.max_abs,
    )
    return GraphResult(
        ops=ops,
        convert_s=converted - start,
        verify_s=time.perf_counter() - converted,
        cpu_s=time.process_time() - cpu_start,
        size_bytes=sum(f.stat().st_size for f in job.package.rglob("*") if f.is_file()),
        max_abs=worst.max_abs,
        max_abs_op=f"{worst.op} {worst.name}",
        float32_ops=float32_ops,
        parity=tuple(records),
    )


# ---- making


def _make(job: GraphJob) -> tuple[dict[str, int], tuple[str, ...]]:
    """Write the package; operations by type, and those that stay in float32 for their range."""
    parts: dict[Size, Path] = {}
    ops: dict[str, int] = {}
    float32_ops: frozenset[str] = frozenset()
    for size in job.sizes:
        part = job.work / f"{job.graph}-{size[0]}x{size[1]}.mlpackage"
        package = job.package if len(job.sizes) == 1 else part
        ops, float32_ops = _make_size(job, size, package, float32_ops)
        parts[size] = package
    if len(parts) > 1:
        merge_functions(parts, job.package)
        for package in parts.values():
            shutil.rmtree(package)
    return ops, tuple(sorted(float32_ops))


def _make_size(
    job: GraphJob, size: Size, package: Path, large: frozenset[str]
) -> tuple[dict[str, int], frozenset[str]]:
    """Convert one size until no value comes near half precision's limit, then compress it."""
    plan, compression = job.plan, job.plan.compression_of(job.graph)
    plain = package if compression.kind == "none" else job.work / f"plain-{package.name}"
    graph = _graph(job, size)
    _capture(job, graph, size)
    module = with_layout(graph, plan.attention, plan.linear, plan.decoder_batch)
    metadata = {**job.metadata, "height_px": size[0], "width_px": size[1]}
    conversion = Conversion(graph.spec, module, graph.example, plan, metadata, large)
    for _ in range(_ROUNDS):
        ops = convert(conversion, plain)
        if plan.precision == "fp32":
            break
        found = _too_large(plain, _feeds(job, size)) - conversion.float32_ops
        if not found:
            break
        conversion = replace(conversion, float32_ops=conversion.float32_ops | found)
        shutil.rmtree(plain)
    if compression.kind != "none":
        ranges = None
        if compression.kind == "w8a8":
            ranges = activation_ranges(plain, _samples(job, size))
        ops = compress(plain, package, compression, bits=job.bits, ranges=ranges)
        shutil.rmtree(plain)
    return ops, conversion.float32_ops


def _too_large(package: Path, feeds: Mapping[str, Array]) -> frozenset[str]:
    """Operations in half precision whose values come near its limit, or went beyond.

    Found in float32, where a value that is too large stays visible; looked for only if the run in
    half precision gives cause.
    """
    program = MilProgram.open(package)
    half = program.run(feeds, "fp16")
    if half.first_nonfinite is None and half.max_abs < _LARGE:
        return frozenset()
    records = program.run(feeds, "fp32").records
    return frozenset(r.name for r in records if r.max_abs >= _LARGE and r.op != "input")


@silently
def merge_functions(parts: Mapping[Size, Path], package: Path) -> None:
    """Packages of several sizes -> one package with a function for each; equal weights once."""
    with quiet_coremltools() as ct:
        merged = ct.utils.MultiFunctionDescriptor()
        for size, part in parts.items():
            merged.add_function(str(part), "main", function_named(*size))
        merged.default_function_name = function_named(*next(iter(parts)))
        ct.utils.save_multifunction(merged, str(package))
    # coremltools 9.0 drops what the packages said of themselves.
    whole, first = MilPackage.open(package).spec, MilPackage.open(next(iter(parts.values()))).spec
    whole.description.metadata.CopyFrom(first.description.metadata)
    (package / _MODEL_FILE).write_bytes(whole.SerializeToString())


def _graph(job: GraphJob, size: Size) -> Graph:
    only = UNET_GRAPHS if job.graph in UNET_GRAPHS else (job.graph,)
    graphs = build_graphs(job.student, fp32_options(job.manifest, size), only=only)
    graph = next(graph for graph in graphs if graph.spec.name == job.graph)
    return graph if job.manifest.plan.one_pass else graph.at_steps(job.plan.decoder_batch)


# ---- arrays that pass between graphs


def _capture(job: GraphJob, graph: Graph, size: Size) -> None:
    """Add the float32 student's outputs to the pool, where the bundle's reference has them not."""
    pool, chain = load_pool(job.work, "student", size), chain_of(job.manifest.plan)
    outputs = {
        spec.name: pool[value]
        for spec in graph.spec.outputs
        if (value := chain.value(job.graph, spec.name)) in pool
    }
    if len(outputs) < len(graph.spec.outputs):
        outputs = run_graph(graph, _named_as_taken(job, pool))[1]
    save_pool(job.work, f"expected-{job.graph}", size, outputs)
    if job.graph in VAE_GRAPHS:
        return
    more = chain.values(job.graph, outputs)
    if LATENTS in more and SCALED_LATENTS not in pool:
        more[SCALED_LATENTS] = scaled_latents(more[LATENTS], job.manifest.vae_scaling_factor)
    save_pool(job.work, "student", size, {**pool, **more})


def _feeds(job: GraphJob, size: Size) -> dict[str, Array]:
    """Captured inputs; the decoder gets the features that the encoder's package made.

    So its record is that of the UNet as a whole, as on the device.
    """
    pool = load_pool(job.work, "student", size)
    if job.graph == UNET_DECODER:
        pool |= load_pool(job.work, "features", size)
    return _named_as_taken(job, pool)


def _named_as_taken(job: GraphJob, pool: Mapping[str, Array]) -> dict[str, Array]:
    """The pool under the names of the graph's inputs: a VAE encoder's picture has the noise's."""
    picture = {"sample": pool[SOURCE_PICTURE]} if job.graph == VAE_ENCODER else {}
    return {**pool, **picture}


def start_pool_of_loop(reference: Mapping[str, Array], steps: int, size: Size, work: Path) -> None:
    """What the graphs of a loop begin with: the bundle's reference, for `steps` steps at once.

    The reference's decoder run has steps of its own: as many are taken, the last one repeated.
    """
    pool = {name: array for name, array in reference.items() if name != "outputs"}
    listed = pool["timesteps"]
    pool["timesteps"] = listed[np.minimum(np.arange(steps), len(listed) - 1)]
    save_pool(work, "student", size, pool)


def start_pool(
    manifest: Manifest, reference: Mapping[str, Array], size: Size, work: Path, *, own: bool
) -> None:
    """What all graphs of one size begin with: the bundle's reference, or new noise of that size.

    `own`: this is the size that the reference was made at, so that its latents and picture serve.
    """
    size_free = ("input_ids", "encoder_hidden_states")
    pool = dict(reference) if own else {k: v for k, v in reference.items() if k in size_free}
    if not own:
        scale = manifest.vae_scale
        shape = (manifest.batch or 1, 4, size[0] // scale, size[1] // scale)
        pool["sample"] = noise_from_seed(0, shape)
        if SOURCE_PICTURE in reference:  # of that size: repeated and cut
            picture = reference[SOURCE_PICTURE]
            height, width = (
                -(-side // own) for side, own in zip(size, picture.shape[2:], strict=True)
            )
            tiled = np.tile(picture, (1, 1, height, width))
            pool[SOURCE_PICTURE] = tiled[:, :, : size[0], : size[1]]
    rows = manifest.batch or 1
    save_pool(work, "student", size, {name: array[:rows] for name, array in pool.items()})


def save_pool(work: Path, name: str, size: Size, arrays: Mapping[str, Array]) -> None:
    """Write arrays by name for the jobs that come after."""
    keyed: dict[str, Any] = dict(arrays)
    np.savez(work / f"{name}-{size[0]}x{size[1]}.npz", **keyed)


def load_pool(work: Path, name: str, size: Size) -> dict[str, Array]:
    """What `save_pool` wrote."""
    with np.load(work / f"{name}-{size[0]}x{size[1]}.npz") as stored:
        return {key: stored[key] for key in stored.files}


def _samples(job: GraphJob, size: Size) -> Iterator[dict[str, Array]]:
    """Inputs of this graph for each calibration prompt, from the float32 student."""
    options = fp32_options(job.manifest, size)
    built = build_graphs(job.student, options, only=(TEXT_ENCODER, *UNET_GRAPHS))
    graphs = {graph.spec.name: graph for graph in built}
    rows = options.batch
    assert job.tokenizer is not None  # checked where the options were
    tokenize = open_tokenizer(job.tokenizer, job.manifest.text_tokens, job.manifest.text_chunks)
    shape = load_pool(job.work, "student", size)["sample"].shape
    for index, prompt in enumerate(job.prompts):
        pool = {TOKENS: tokenize([prompt] * rows), NOISE: noise_from_seed(index, shape)}
        pool |= ONE_PASS.values(TEXT_ENCODER, run_graph(graphs[TEXT_ENCODER], pool)[1])
        if job.graph == UNET_DECODER:
            pool |= run_graph(graphs[UNET_ENCODER], pool)[1]
        yield pool


# ---- proving


def _evaluate(job: GraphJob, size: Size) -> Evaluation:
    """Run the finished package as the device would store its numbers."""
    function = None if len(job.sizes) == 1 else function_named(*size)
    precision = "fp32" if job.plan.precision == "fp32" else "fp16"
    program = MilProgram.open(job.package, function)
    evaluation = program.run(_feeds(job, size), precision)  # type: ignore[arg-type]
    bad = evaluation.first_nonfinite
    # Masks may be infinite by design; what is made of them is finite again.
    if bad is not None and bad.op not in ("select", "const"):
        raise ParityError(
            f"{job.package.name} is not usable: {bad.op} {bad.name!r} gives {bad.nonfinite} "
            "non-finite values on a real prompt",
            "Try --precision fp32; please report the student it happened with.",
        )
    if job.graph == UNET_ENCODER:
        features = {name: array.astype(np.float32) for name, array in evaluation.outputs.items()}
        save_pool(job.work, "features", size, features)
    return evaluation


def _judged(job: GraphJob, size: Size, evaluation: Evaluation) -> ParityRecord:
    """The worst output's record. Features of a compressed encoder are reported, and judged by what
    the decoder makes of them: the gates are for latents."""
    expected = load_pool(job.work, f"expected-{job.graph}", size)
    hop = f"Core ML {job.plan.precision}"
    kind: str | None = job.plan.gate_of(job.graph)
    compression = job.plan.compression_of(job.graph)
    if compression.kind != "none":
        hop += f" {compression.name}"
        kind = None if job.graph == UNET_ENCODER else kind
    shown = "" if len(job.sizes) == 1 else f" {size[0]}x{size[1]}"
    subjects = _SUBJECTS if job.manifest.plan.one_pass else _LOOP_SUBJECTS
    records = [
        parity_record(
            hop,
            f"{subjects[job.graph]}{shown}",
            expected[name],
            evaluation.outputs[name].astype(np.float32),
            kind,
            str(job.metadata.get("parity_inputs", "")),
        )
        for name in expected
    ]
    worst = min(records, key=lambda record: record.value)
    if job.gate_db is not None and job.graph == UNET_DECODER:
        return replace(worst, gate=job.gate_db)
    return for_gain(worst, job.manifest.plan) if job.graph == UNET_DECODER else worst

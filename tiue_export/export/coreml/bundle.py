"""Bundle and its checkpoint -> the same bundle with Core ML packages, each proven by executing it.

Core ML reads no ONNX: packages come from the student itself, through torch.export. Every graph is
made in a process of its own, so that memory is given back whole and a crash is one message.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tiue_export._version import __version__
from tiue_export.bundle.manifest import Compiled, CompiledGraph, FileRecord, Manifest, ParityRecord
from tiue_export.bundle.read import Bundle, file_records
from tiue_export.bundle.write import add_compiled, compiled_folder, form_identity
from tiue_export.errors import BundleError, ResourceError, UsageError
from tiue_export.export.coreml.job import (
    GraphJob,
    GraphResult,
    run_job,
    start_pool,
    start_pool_of_loop,
)
from tiue_export.export.coreml.profiles import (
    CoremlOptions,
    CoremlPlan,
    check_limit,
    check_loop,
    plan_coreml,
)
from tiue_export.export.coreml.recipe import MixedRecipe, RecipeJob, find_recipe
from tiue_export.export.coreml.swift import check_swift, write_swift_resources
from tiue_export.export.own_student import Size, StudentPlace
from tiue_export.proof.gates import weakest
from tiue_export.proof.parity import load_reference, require_passed
from tiue_export.registry.packages import require
from tiue_export.registry.support import require_support
from tiue_export.specs import TEXT_ENCODER, UNET_DECODER, UNET_ENCODER, UNET_GRAPHS
from tiue_export.system.progress import Observer, stage

FOLDER = "coreml"
RECIPE_FILE = "recipe.json"
_TOKENIZER = "tokenizer/tokenizer.json"
_POLL_S = 0.25
_IF_LOST = (
    "Choose a gentler --compress (or --target-psnr), --precision fp32, or accept the loss "
    "with --allow-parity-loss (the manifest then says so)."
)
T = TypeVar("T")
Progress = Callable[[float, str], None]


def compile_coreml(
    bundle: Bundle,
    place: StudentPlace,
    options: CoremlOptions | None = None,
    *,
    force: bool = False,
    allow_parity_loss: bool = False,
    in_process: bool = False,
    observer: Observer | None = None,
) -> Bundle:
    """Make, compress and prove a package of every graph; returns the bundle with all of them.

    `place` is the checkpoint that the bundle was made from. `in_process` makes all graphs in this
    process: faster for small students, and their memory adds up.

    Raises `UsageError` for options that do not go together, `BundleError` when there are packages
    already (unless `force`), `CheckpointError` for another student's checkpoint, `ParityError` when
    a gate fails (unless `allow_parity_loss`); then the bundle stays as it was.
    """
    options, observer = options or CoremlOptions(), observer or Observer()
    plan = plan_for(bundle.manifest, options)
    require("Core ML export", ("coremltools", "sklearn"), "coreml")
    if FOLDER in bundle.manifest.compiled and not force:
        raise BundleError(
            f"{bundle.root} has Core ML packages already", "Pass --force to make them again."
        )
    sizes = _sizes(bundle, options)
    _check_bundle(bundle, plan, options)
    with compiled_folder(bundle, FOLDER) as folder, _work_folder(folder) as work:
        export = _Export(bundle, place, options, plan, sizes, folder, work, in_process, observer)
        recipe = _recipe(export)
        results = {}
        for graph in bundle.manifest.graphs:
            results[graph] = _make(export, graph, recipe)
            if not allow_parity_loss:  # at once: the other graphs may take many minutes
                require_passed(list(results[graph].parity), _IF_LOST)
        shutil.rmtree(work)
        return _listed(export, results, recipe)


@dataclass(frozen=True)
class _Export:
    """What stays the same while one set of packages is made."""

    bundle: Bundle
    place: StudentPlace
    options: CoremlOptions
    plan: CoremlPlan
    sizes: tuple[Size, ...]
    folder: Path
    work: Path
    in_process: bool
    observer: Observer

    def run(self, job: Callable[[Any], T], request: Any, progress: Path | None = None) -> T:
        """`job(request)` in a child process of its own, or here.

        coremltools writes packages into the temporary folder and removes them in an exit handler,
        which children do not run: at full size that is 2 GB an export. So each job has its own.
        """
        with tempfile.TemporaryDirectory(prefix="tiue-coreml-") as folder:
            if self.in_process:
                return _with_temporary_files_in(folder, job, request)
            return _in_child(folder, job, request, progress, self.observer.on_progress)


def _sizes(bundle: Bundle, options: CoremlOptions) -> tuple[Size, ...]:
    """The sizes to make, the bundle's own first: it is the one that the contract is for."""
    own = bundle.manifest.height_px, bundle.manifest.width_px
    return (own, *dict.fromkeys(size for size in options.sizes if size != own))


def plan_for(manifest: Manifest, options: CoremlOptions) -> CoremlPlan:
    """The plan for a bundle. Raises what `plan_coreml` raises.

    A package takes one number of steps, and the groups of a loop have many lengths: one step at a
    time, in the two rows of guidance, wastes none, so there it is the default.
    """
    plan = plan_coreml(options)
    if manifest.plan.one_pass or options.decoder_batch is not None:
        return plan
    return replace(plan, decoder_batch=1)


def _check_loop(bundle: Bundle, options: CoremlOptions) -> None:
    """Refuse what packages of a model in a loop cannot be, or cannot be for this bundle."""
    check_loop(options)
    if len(_sizes(bundle, options)) > 1:
        own = f"{bundle.manifest.height_px}x{bundle.manifest.width_px}"
        raise UsageError(
            f"--size differs from the {own} of {bundle.root}; a loop's packages have its size",
            "Leave it out, or export at that size.",
        )


def _check_bundle(bundle: Bundle, plan: CoremlPlan, options: CoremlOptions) -> None:
    manifest = bundle.manifest
    require_support("coreml", bundle)
    if not manifest.plan.one_pass:
        _check_loop(bundle, options)
    elif plan.decoder_batch < manifest.plan.rows and manifest.hoisted == "none":
        raise UsageError(
            f"--decoder-batch {plan.decoder_batch} needs a bundle with the time-independent part "
            "hoisted; this one was exported with --no-hoist",
            "Export the bundle without --no-hoist, or pass --decoder-batch 4.",
        )
    if options.swift_bundle:
        check_swift(bundle)
    if plan.compress == "w8a8" and TEXT_ENCODER not in manifest.graphs:
        raise UsageError(
            f"w8a8 is calibrated on prompts, and {bundle.root} has no text encoder",
            "Export the bundle with --base and the pipeline folder that holds it.",
        )
    for graph, record in manifest.graphs.items():
        size_bytes = sum(file.size_bytes for file in record.files.values())
        # ONNX stores little but weights.
        check_limit(plan, graph, size_bytes // (4 if record.precision == "fp32" else 2))
    unknown = sorted(set(options.recipe) - set(UNET_GRAPHS))
    if unknown:
        raise UsageError(f"the recipe is for {', '.join(unknown)}; expected {UNET_GRAPHS}")


@contextlib.contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """Beside the packages, so that a full disk shows early; gone before they are put in place."""
    work = Path(tempfile.mkdtemp(prefix="work-", dir=folder))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _recipe(export: _Export) -> MixedRecipe | None:
    """Start the captured arrays, and get the recipe: the user's, or one found for the target."""
    reference, manifest = load_reference(export.bundle), export.bundle.manifest
    if not manifest.plan.one_pass:
        steps, size = export.plan.decoder_batch, export.sizes[0]
        start_pool_of_loop(reference.arrays, steps, size, export.work)
        return MixedRecipe(bits=export.options.recipe) if export.options.recipe else None
    for index, size in enumerate(export.sizes):
        start_pool(manifest, reference.arrays, size, export.work, own=index == 0)
    options = export.options
    if options.recipe:
        return MixedRecipe(bits=options.recipe)
    if options.target_psnr_db is None and options.target_mb is None:
        return None
    progress = export.work / "progress.json"
    with stage(export.observer, "find bits per layer", in_child=True) as running:
        recipe = export.run(
            find_recipe,
            RecipeJob(
                export.place,
                manifest,
                export.plan,
                export.sizes[0],
                export.work,
                options.target_psnr_db,
                options.target_mb,
                progress,
            ),
            progress,
        )
        running.peak_memory_bytes = recipe.peak_memory_bytes
    return recipe


def _make(export: _Export, graph: str, recipe: MixedRecipe | None) -> GraphResult:
    """One graph's package, in its own process."""
    manifest = export.bundle.manifest
    tokenizer = export.bundle.root / _TOKENIZER
    job = GraphJob(
        graph=graph,
        place=export.place,
        manifest=manifest,
        plan=export.plan,
        sizes=export.sizes if graph != TEXT_ENCODER else export.sizes[:1],
        package=export.folder / f"{graph}.mlpackage",
        work=export.work,
        metadata=_metadata(export, graph),
        bits={} if recipe is None else recipe.bits.get(graph, {}),
        prompts=export.options.prompts,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        gate_db=export.options.target_psnr_db,
    )
    with stage(export.observer, f"convert {graph}", in_child=True) as running:
        result = export.run(run_job, job)
        running.peak_memory_bytes, running.size_bytes = result.peak_memory_bytes, result.size_bytes
    return result


def _metadata(export: _Export, graph: str) -> dict[str, Any]:
    """What each package says of itself: enough to run it without our manifest."""
    manifest, plan = export.bundle.manifest, export.plan
    schedule = manifest.plan
    loop = {} if manifest.plan.one_pass else {"key_steps": list(manifest.plan.key_steps)}
    return {
        **loop,
        "created_by": f"tiue-export {__version__}",
        "graph": graph,
        "source": manifest.source.name,
        "source_sha256": manifest.source.sha256,
        "licence": manifest.source.licence,
        "timesteps": list(schedule.timesteps),
        "noise_coefficient": schedule.latents.noise,
        "output_coefficients": list(schedule.latents.outputs),
        "prediction_type": schedule.prediction_type,
        "vae_scaling_factor": manifest.vae_scaling_factor,
        "compute_unit": plan.compute_unit,
        "profile": plan.profile,
        "compression": plan.compression_of(graph).name,
        "parity_inputs": load_reference(export.bundle).inputs,
    }


# ---- child processes


def _with_temporary_files_in(folder: str, job: Callable[[Any], T], request: Any) -> T:
    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        return job(request)
    finally:
        tempfile.tempdir = before


def _in_child(
    folder: str, job: Callable[[Any], T], request: Any, progress: Path | None, tell: Progress
) -> T:
    """Run in a fresh process that is forked from one which has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiue_export.export.coreml.job"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        future = pool.submit(_with_temporary_files_in, folder, job, request)
        try:
            return _wait(future, progress, tell)
        except BrokenProcessPool as error:
            raise ResourceError(
                "the process that converts was killed, most likely because memory ran out",
                "Close other programs; a smaller --height and --width needs less.",
            ) from error


def _wait(future: Future[T], progress: Path | None, tell: Progress) -> T:
    while True:
        try:
            return future.result(timeout=_POLL_S)
        except StillRunning:
            if future.done():
                raise  # the job itself timed out on something
            if progress is not None and progress.is_file():
                fraction, detail = json.loads(progress.read_text("utf-8"))
                tell(float(fraction), str(detail))


# ---- the manifest


def _listed(
    export: _Export, results: Mapping[str, GraphResult], recipe: MixedRecipe | None
) -> Bundle:
    """Put the packages in place and list them."""
    plan, version = export.plan, importlib.metadata.version("coremltools")
    extra: dict[str, list[str]] = {graph: [] for graph in results}
    if recipe is not None:
        recipe.save(export.folder / RECIPE_FILE)
        extra[UNET_DECODER].append(RECIPE_FILE)
    if export.options.swift_bundle:
        written = write_swift_resources(export.bundle, list(results), plan, export.folder)
        extra[UNET_ENCODER] += written
    graphs = {
        graph: _compiled_graph(export, graph, result, extra[graph], version)
        for graph, result in results.items()
    }
    gates = (plan.gate_of(graph) for graph in results)
    compiled = Compiled(
        backend="coreml",
        version=version,
        target={"deployment": plan.target, "compute_unit": plan.compute_unit},
        flags={
            **{key: value for key, value in asdict(plan).items() if value is not None},
            "gate": weakest(plan.precision, *gates),
            "sizes": ",".join(f"{height}x{width}" for height, width in export.sizes),
        },
        graphs=graphs,
    )
    records: list[ParityRecord] = [r for each in results.values() for r in each.parity]
    compiled = replace(compiled, parity=tuple(records))
    return add_compiled(export.bundle, FOLDER, export.folder, compiled)


def _compiled_graph(
    export: _Export, graph: str, result: GraphResult, extra: list[str], version: str
) -> CompiledGraph:
    package = export.folder / f"{graph}.mlpackage"
    inside = [p.relative_to(export.folder).as_posix() for p in package.rglob("*") if p.is_file()]
    records = file_records(export.folder, [*inside, *extra])
    files: dict[str, FileRecord] = {f"{FOLDER}/{name}": r for name, r in records.items()}
    common = [name for name, _ in list(result.ops.items())[:3]]
    return CompiledGraph(
        path=f"{FOLDER}/{graph}.mlpackage/Manifest.json",
        identity=_identity(export, graph, version),
        files=files,
        report={
            "convert_s": round(result.convert_s, 2),
            "verify_s": round(result.verify_s, 2),
            "cpu_s": round(result.cpu_s, 2),
            "peak_memory_bytes": result.peak_memory_bytes,
            "size_bytes": result.size_bytes,
            "ops": sum(result.ops.values()),
            "most_frequent_ops": ", ".join(f"{result.ops[name]} {name}" for name in common),
            "max_abs_activation": round(result.max_abs, 4),
            "max_abs_op": result.max_abs_op,
            "float32_ops": len(result.float32_ops),
            "compression": export.plan.compression_of(graph).name,
        },
    )


def _identity(export: _Export, graph: str, version: str) -> str:
    options = export.options
    return form_identity(
        export.bundle,
        graph,
        plan=asdict(export.plan),
        sizes=export.sizes,
        recipe={name: dict(bits) for name, bits in options.recipe.items()},
        targets=[options.target_psnr_db, options.target_mb],
        prompts=options.prompts,
        version=version,
    )

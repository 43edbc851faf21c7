"""Bundle and its student -> the same bundle with Core ML packages, each proven by executing it.

Core ML reads no ONNX: packages come from the student itself, through torch.export.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from tiue_export._version import __version__
from tiue_export.bundle.manifest import Compiled, Manifest, ParityRecord
from tiue_export.bundle.read import Bundle, files_below, vae_tile_px
from tiue_export.errors import ParityError, UsageError
from tiue_export.export.backend import (
    Backend,
    Convert,
    GraphForm,
    Workshop,
    compile_form,
    form_identity,
)
from tiue_export.export.contract import GRAPH_GROUPS
from tiue_export.export.coreml.job import (
    GraphJob,
    GraphResult,
    run_job,
    start_pool,
    start_pool_of_loop,
)
from tiue_export.export.coreml.profiles import (
    RECIPE,
    CoremlOptions,
    CoremlPlan,
    check_limit,
    check_loop,
    check_whole_decoder,
    gentler,
    plan_coreml,
)
from tiue_export.export.coreml.recipe import MixedRecipe, RecipeSearch, find_recipe
from tiue_export.export.coreml.swift import check_swift, write_swift_resources
from tiue_export.export.own_student import Size, as_exported, fp32_options
from tiue_export.graphs.build import build_graphs
from tiue_export.graphs.shapes import shapes_of
from tiue_export.proof.gates import accept_loss, weakest
from tiue_export.proof.parity import load_reference
from tiue_export.registry.packages import require
from tiue_export.registry.support import require_support
from tiue_export.specs import TEXT_ENCODER, UNET_DECODER, UNET_ENCODER, UNET_GRAPHS
from tiue_export.student.model import Student
from tiue_export.system.memory import return_freed_memory
from tiue_export.system.progress import Observer, stage

FOLDER = "coreml"
RECIPE_FILE = "recipe.json"
_TOKENIZER = "tokenizer/tokenizer.json"


def compile_coreml(
    bundle: Bundle,
    student: Student,
    options: CoremlOptions | None = None,
    *,
    force: bool = False,
    allow_parity_loss: bool = False,
    observer: Observer | None = None,
) -> Bundle:
    """Make, compress and prove a package of every graph; see `compile_form`.

    `student` is the one that the bundle was made from: `CheckpointError` for another one. Raises
    `UsageError` for options that do not go together. Where the profile's own compression costs more
    than its gate allows, the packages are made again with a gentler one, and `observer` is told.
    """
    options, observer = options or CoremlOptions(), observer or Observer()
    backend = _backend_for(bundle, student, options)
    make = functools.partial(
        compile_form,
        bundle,
        force=force,
        allow_parity_loss=allow_parity_loss,
        observer=observer,
    )
    try:
        return make(backend)
    except ParityError as error:
        compress = gentler(backend.plan, error.hops).get("compress")
        if compress is None or options.compress or backend.plan.compress == RECIPE:
            raise
        observer.on_note(f"{error.message}: made again with --compress {compress}")
    return make(_backend_for(bundle, student, replace(options, compress=compress)))


def check_coreml(bundle: Bundle, student: Student, options: CoremlOptions) -> None:
    """Refuse options that a bundle's packages cannot have; it need not be written yet."""
    _backend_for(bundle, student, options).check(bundle)


def _backend_for(bundle: Bundle, student: Student, options: CoremlOptions) -> CoremlBackend:
    require_support("coreml", bundle)
    own = as_exported(student, bundle.manifest)
    return CoremlBackend(own, options, plan_for(bundle.manifest, options))


@dataclass(frozen=True)
class CoremlBackend(Backend):
    """Packages from the student; each is proven by the evaluator as soon as it is made."""

    student: Student
    options: CoremlOptions
    plan: CoremlPlan
    runtime: ClassVar[str] = "coreml"
    title: ClassVar[str] = "Core ML packages"
    reads_onnx: ClassVar[bool] = False
    folder: ClassVar[str] = FOLDER

    def if_lost(self, failed: ParityRecord) -> str:
        """Gentler compression, then whole precision."""
        instead = gentler(self.plan, [failed.hop])
        return accept_loss(
            " ".join(f"--{name} {value}" for name, value in instead.items() if value)
        )

    def check(self, bundle: Bundle) -> None:
        """Refuse options that this bundle's packages cannot have."""
        require("Core ML export", ("coremltools", "sklearn"), "coreml")
        _check_bundle(bundle, self.plan, self.options)
        for size in _sizes(bundle, self.options):
            _check_size(self.student, bundle.manifest, size)
        if self.plan.limit_bytes is not None:
            size = bundle.manifest.height_px, bundle.manifest.width_px
            for group in GRAPH_GROUPS:
                options = fp32_options(bundle.manifest, size)
                for graph in build_graphs(self.student, options, only=group):
                    check_limit(self.plan, graph.spec.name, graph.weight_bytes // 4)

    def form(self, bundle: Bundle) -> Compiled:
        """For the plan's deployment target; the coarsest gate of its graphs is the form's."""
        plan = self.plan
        gates = (plan.gate_of(graph) for graph in bundle.manifest.graphs)
        sizes = _sizes(bundle, self.options)
        return Compiled(
            backend="coreml",
            version=_version(),
            target={"deployment": plan.target, "compute_unit": plan.compute_unit},
            flags={
                **{key: value for key, value in asdict(plan).items() if value is not None},
                "gate": weakest(plan.precision, *gates),
                "sizes": ",".join(f"{height}x{width}" for height, width in sizes),
            },
            graphs={},
        )

    def identity(self, bundle: Bundle, graph: str) -> str:
        """By everything that was asked for, and coremltools' version."""
        options = self.options
        return form_identity(
            bundle,
            graph,
            plan=asdict(self.plan),
            sizes=_sizes(bundle, options),
            recipe={name: dict(bits) for name, bits in options.recipe.items()},
            targets=[options.target_psnr_db, options.target_mb],
            prompts=options.prompts,
            version=_version(),
        )

    @contextlib.contextmanager
    def converter(self, workshop: Workshop) -> Iterator[Convert]:
        """Captured arrays in a folder of their own, the bits of each layer where they are mixed."""
        with _work_folder(workshop.folder) as work:
            export = _Export(self, workshop, work, _sizes(workshop.bundle, self.options))
            recipe = export.recipe()
            yield functools.partial(export.convert, recipe=recipe, extra=export.extra_files(recipe))


@dataclass(frozen=True)
class _Export:
    """What stays the same while one set of packages is made."""

    backend: CoremlBackend
    workshop: Workshop
    work: Path
    sizes: tuple[Size, ...]

    def recipe(self) -> MixedRecipe | None:
        """Start the captured arrays; the bits of each layer: the user's, or found for a target."""
        bundle, plan, options = self.workshop.bundle, self.backend.plan, self.backend.options
        reference, manifest = load_reference(bundle), bundle.manifest
        if not manifest.plan.one_pass:
            start_pool_of_loop(reference.arrays, plan.decoder_batch, self.sizes[0], self.work)
            return MixedRecipe(bits=options.recipe) if options.recipe else None
        for index, size in enumerate(self.sizes):
            start_pool(manifest, reference.arrays, size, self.work, own=index == 0)
        if options.recipe:
            return MixedRecipe(bits=options.recipe)
        if options.target_psnr_db is None and options.target_mb is None:
            return None
        targets = options.target_psnr_db, options.target_mb
        search = RecipeSearch(
            self.backend.student, manifest, plan, self.sizes[0], self.work, *targets
        )
        with stage(self.workshop.observer, "find bits per layer"):
            return find_recipe(search, self.workshop.observer.on_progress)

    def extra_files(self, recipe: MixedRecipe | None) -> dict[str, tuple[str, ...]]:
        """Write what goes along with the packages; files by the graph that lists them."""
        bundle, folder = self.workshop.bundle, self.workshop.folder
        extra: dict[str, tuple[str, ...]] = {}
        if recipe is not None:
            recipe.save(folder / RECIPE_FILE)
            extra[UNET_DECODER] = (RECIPE_FILE,)
        if self.backend.options.swift_bundle:
            graphs = list(bundle.manifest.graphs)
            extra[UNET_ENCODER] = tuple(
                write_swift_resources(bundle, graphs, self.backend.plan, folder)
            )
        return extra

    def convert(
        self, graph: str, recipe: MixedRecipe | None, extra: Mapping[str, tuple[str, ...]]
    ) -> GraphForm:
        """One graph's package, made and proven."""
        bundle, folder, options = self.workshop.bundle, self.workshop.folder, self.backend.options
        tokenizer = bundle.root / _TOKENIZER
        job = GraphJob(
            graph=graph,
            student=self.backend.student,
            manifest=bundle.manifest,
            plan=self.backend.plan,
            sizes=self.sizes if graph != TEXT_ENCODER else self.sizes[:1],
            package=folder / f"{graph}.mlpackage",
            work=self.work,
            metadata=_metadata(bundle, self.backend.plan, graph),
            bits={} if recipe is None else recipe.bits.get(graph, {}),
            prompts=options.prompts,
            tokenizer=tokenizer if tokenizer.is_file() else None,
            gate_db=options.target_psnr_db,
        )
        result = run_job(job)
        return_freed_memory()
        package = f"{graph}.mlpackage"
        return GraphForm(
            path=f"{package}/Manifest.json",
            files=(*files_below(folder, package), *extra.get(graph, ())),
            report=_report(result, self.backend.plan.compression_of(graph).name),
            parity=result.parity,
        )


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


def _check_size(student: Student, manifest: Manifest, size: Size) -> None:
    """Refuse a size that the student cannot have, by the option that gave it."""
    try:
        shapes_of(student, fp32_options(manifest, size))
    except UsageError as error:
        raise UsageError(f"--size {size[0]}x{size[1]}: {error.message}", error.next_step) from None


def _check_bundle(bundle: Bundle, plan: CoremlPlan, options: CoremlOptions) -> None:
    manifest, several = bundle.manifest, len(_sizes(bundle, options)) > 1
    if not manifest.plan.one_pass:
        check_loop(options)
        if several:
            own = f"{manifest.height_px}x{manifest.width_px}"
            raise UsageError(
                f"--size differs from the {own} of {bundle.root}; a loop's packages have its size",
                "Leave it out, or export at that size.",
            )
    elif manifest.hoisted == "none":
        check_whole_decoder(plan.decoder_batch, manifest.plan.rows)
    if several and vae_tile_px(manifest) is not None:
        raise UsageError(
            f"several --size, and the VAE of {bundle.root} decodes tiles of one size",
            "Give one size, or export again without --vae-tile.",
        )
    if options.swift_bundle:
        check_swift(bundle)
    if plan.compress == "w8a8" and TEXT_ENCODER not in manifest.graphs:
        raise UsageError(
            f"w8a8 is calibrated on prompts, and {bundle.root} has no text encoder",
            "Export the bundle with --base and the pipeline folder that holds it.",
        )
    unknown = sorted(set(options.recipe) - set(UNET_GRAPHS))
    if unknown:
        raise UsageError(f"the recipe is for {', '.join(unknown)}; expected {UNET_GRAPHS}")


@contextlib.contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """Beside the packages, so that a full disk shows early; gone before they are put in place.

    coremltools' temporary files lie there too: it removes them when the process ends.
    """
    work = Path(tempfile.mkdtemp(prefix="work-", dir=folder))
    before, tempfile.tempdir = tempfile.tempdir, str(work)
    try:
        yield work
    finally:
        tempfile.tempdir = before
        shutil.rmtree(work, ignore_errors=True)


def _metadata(bundle: Bundle, plan: CoremlPlan, graph: str) -> dict[str, Any]:
    """What each package says of itself: enough to run it without our manifest."""
    manifest = bundle.manifest
    loop = {} if manifest.plan.one_pass else {"key_steps": list(manifest.plan.key_steps)}
    return {
        **loop,
        "created_by": f"tiue-export {__version__}",
        "graph": graph,
        "source": manifest.source.name,
        "source_sha256": manifest.source.sha256,
        "licence": manifest.source.licence,
        "timesteps": list(manifest.plan.timesteps),
        "noise_coefficient": manifest.plan.latents.noise,
        "output_coefficients": list(manifest.plan.latents.outputs),
        "prediction_type": manifest.plan.prediction_type,
        "vae_scaling_factor": manifest.vae_scaling_factor,
        "compute_unit": plan.compute_unit,
        "profile": plan.profile,
        "compression": plan.compression_of(graph).name,
        "parity_inputs": load_reference(bundle).inputs,
    }


def _report(result: GraphResult, compression: str) -> dict[str, str | int | float]:
    common = [name for name, _ in list(result.ops.items())[:3]]
    return {
        "convert_s": round(result.convert_s, 2),
        "verify_s": round(result.verify_s, 2),
        "cpu_s": round(result.cpu_s, 2),
        "size_bytes": result.size_bytes,
        "ops": sum(result.ops.values()),
        "most_frequent_ops": ", ".join(f"{result.ops[name]} {name}" for name in common),
        "max_abs_activation": round(result.max_abs, 4),
        "max_abs_op": result.max_abs_op,
        "float32_ops": len(result.float32_ops),
        "compression": compression,
    }


def _version() -> str:
    return importlib.metadata.version("coremltools")

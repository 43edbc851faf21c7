"""Core ML packages: natively on macOS, and by the evaluator of saved packages everywhere.

The evaluator executes the very files that a Mac or an iPhone would load, on the CPU, slowly: it is
for proofs and for trying a bundle without a Mac. What runs is in the runtime's device: "evaluator
fp16", or a compute unit of Core ML.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from tiue_export.bundle.read import Bundle
from tiue_export.errors import BundleError, RuntimeFailure, UsageError, unknown_name
from tiue_export.export.coreml.mil.package import MilPackage, TensorType
from tiue_export.proof.gates import GATES_PSNR_DB, weakest
from tiue_export.registry.packages import require
from tiue_export.specs import (
    STEPS,
    UNET_DECODER,
    UNET_ENCODER,
    Array,
    Feeds,
    GraphSpec,
    RuntimeOptions,
    axis_size,
    check_finite,
)
from tiue_export.system.command_line import command_line

from .device import CoremlDevice, PackageFile, missing_core_ml, open_device

_FOLDER = "coreml"
_EVALUATOR = "evaluator"
_METADATA_KEY = "com.tiue-export"
# --device to coremltools' name of a compute unit; Apple's own spelling is understood too.
_UNITS = {
    "all": "ALL", "cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "ane": "CPU_AND_NE",
    "npu": "CPU_AND_NE", "cpu_only": "CPU_ONLY", "cpu_and_gpu": "CPU_AND_GPU",
    "cpu_and_ne": "CPU_AND_NE",
}  # fmt: skip
_PRECISIONS = ("fp16", "fp32")


class _Model(Protocol):
    """One graph, ready to run: feeds by name to outputs by name, in the package's own types."""

    def run(self, feeds: Feeds) -> dict[str, Array]: ...


class _Engine(Protocol):
    """What loads packages and runs them."""

    device: str

    def load(self, package: PackageFile) -> _Model: ...

    def placement(self, package: PackageFile) -> dict[str, int]: ...


class CoremlRuntime:
    """One model per graph, loaded on first use and kept."""

    name = "coreml"

    def __init__(self, bundle: Bundle, engine: _Engine, precision: str, low_memory: bool) -> None:
        self.device, self.precision = engine.device, precision
        self._bundle, self._engine, self._keep = bundle, engine, not low_memory
        self._packages: dict[str, PackageFile] = {}
        self._models: dict[str, _Model] = {}
        self._closed = False

    def run(self, graph: str, feeds: Feeds) -> dict[str, Array]:
        """Run one graph; outputs are fresh arrays, finite, and fit the bundle's contract."""
        if self._closed:
            raise RuntimeFailure("the coreml runtime is closed", "Open it again.")
        spec, package = self._bundle.spec(graph), self._package(graph)
        pool, rows = spec.select(feeds), None
        limit = self.step_limit() if graph == UNET_DECODER else None
        if limit is not None:
            pool, rows = _filled_up(spec, pool, limit)
        if graph not in self._models:
            self._models[graph] = self._engine.load(package)
        outputs = self._models[graph].run({name: pool[name] for name in package.inputs})
        if not self._keep:
            self._models.clear()
        fresh = {
            tensor.name: np.array(outputs[tensor.name][:rows], tensor.dtype)
            for tensor in spec.outputs
        }
        check_finite(graph, fresh)
        return fresh

    def batch_range(self) -> tuple[int, int]:
        """Packages are made for one batch."""
        rows = int(self._package(UNET_ENCODER).inputs["sample"].shape[0])
        batch = rows // self._bundle.manifest.plan.copies
        return batch, batch

    def step_limit(self) -> int | None:
        """How many steps of a loop the decoder's package takes at once; None: it has no loop."""
        if self._bundle.manifest.plan.one_pass:
            return None
        return int(self._package(UNET_DECODER).inputs["timesteps"].shape[0])

    def placement(self) -> dict[str, dict[str, int]]:
        """By graph, how many ops Core ML plans to run on which unit; empty where it cannot say."""
        found = {
            graph: self._engine.placement(self._package(graph))
            for graph in self._bundle.manifest.compiled[_FOLDER].graphs
        }
        return {graph: units for graph, units in found.items() if units}

    def close(self) -> None:
        """Drop all models and their memory."""
        self._models.clear()
        self._closed = True

    def _package(self, graph: str) -> PackageFile:
        if graph not in self._packages:
            self._packages[graph] = package_of(self._bundle, graph)
        return self._packages[graph]


def _filled_up(spec: GraphSpec, pool: Feeds, steps: int) -> tuple[dict[str, Array], int]:
    """A loop's decoder feeds with the last timestep repeated up to `steps`; the rows that count.

    Raises `RuntimeFailure` for more steps than the package takes.
    """
    given = pool["timesteps"]
    if len(given) > steps:
        raise RuntimeFailure(
            f"{spec.name}: {len(given)} steps were asked for at once; this package takes {steps}"
        )
    (outputs,) = spec.outputs
    rows = axis_size(outputs.shape[0], {STEPS: len(given)})
    filled = np.concatenate([given, np.repeat(given[-1:], steps - len(given))])
    return {**pool, "timesteps": filled}, rows


class EvaluatorEngine:
    """Runs packages in torch; fp16 rounds where the package is in half precision."""

    def __init__(self, precision: str) -> None:
        self.device = f"{_EVALUATOR} {precision}"
        self._precision = precision

    def load(self, package: PackageFile) -> _Model:
        """Read the program; its weights stay on disk."""
        return _Evaluated(package, self._precision)

    def placement(self, package: PackageFile) -> dict[str, int]:
        """Nothing: where Core ML would run what, only Core ML knows."""
        return {}


class _Evaluated:
    def __init__(self, package: PackageFile, precision: str) -> None:
        from tiue_export.export.coreml.mil.evaluator import MilProgram

        self._graph, self._precision = package.graph, precision
        self._program = MilProgram.open(package.path, package.function)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Evaluate; an overflow is blamed on the op where it began."""
        evaluation = self._program.run(feeds, "fp32" if self._precision == "fp32" else "fp16")
        culprit = evaluation.first_nonfinite
        for name, array in evaluation.outputs.items():
            if culprit is not None and not np.isfinite(array).all():
                raise RuntimeFailure(
                    f'{self._graph}: output "{name}" holds non-finite values; they begin at op '
                    f'{culprit.op} "{culprit.name}" with {culprit.nonfinite} of them',
                    "Half precision holds up to 65504. Run it with --precision fp32, or convert "
                    "it again so: tiue-export coreml --ckpt STUDENT --precision fp32 --out BUNDLE"
                    if self._precision == "fp16"
                    else "The weights themselves overflow: check the checkpoint.",
                )
        return evaluation.outputs


class NativeEngine:
    """Runs packages on Core ML, each on the unit asked for or else on the one it recommends."""

    def __init__(self, device: CoremlDevice, unit: str | None, recommended: Mapping[str, str]):
        self.device = unit or "+".join(sorted(set(recommended.values())))
        self._device, self._unit, self._recommended = device, unit, recommended

    def load(self, package: PackageFile) -> _Model:
        """Compile, load and warm up."""
        return self._device.load(package, self._unit_of(package))

    def placement(self, package: PackageFile) -> dict[str, int]:
        """How many ops run where, as Core ML plans it."""
        return self._device.placement(package, self._unit_of(package))

    def _unit_of(self, package: PackageFile) -> str:
        return self._unit or self._recommended[package.graph]


def open_runtime(bundle: Bundle, options: RuntimeOptions) -> CoremlRuntime:
    """Open natively on macOS on `options.device` (auto: what each package recommends; all, cpu,
    gpu, ane), elsewhere, or with --device evaluator, in the evaluator in `options.precision`.
    """
    if _FOLDER not in bundle.manifest.compiled:
        raise BundleError(
            f"{bundle.root} has no Core ML packages",
            f"Make them: {_make_line(bundle)}",
        )
    asked = options.device.lower()
    if asked not in ("auto", _EVALUATOR, *_UNITS):
        raise unknown_name("device", options.device, ("auto", _EVALUATOR, *_UNITS))
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"--threads is {options.threads}; expected 1 or more")
    if options.precision not in ("auto", *_PRECISIONS):
        raise unknown_name("precision", options.precision, ("auto", *_PRECISIONS))
    if asked == _EVALUATOR or (platform.system() != "Darwin" and asked in ("auto", "cpu")):
        return _evaluated(bundle, options)
    if missing := missing_core_ml():
        raise RuntimeFailure(
            f"no --device {options.device} here: {missing}",
            "Use --device evaluator, which runs the packages on the CPU, or go to a Mac.",
        )
    for option, value in (("precision", options.precision), ("threads", options.threads)):
        if value not in ("auto", None):
            raise UsageError(
                f"Core ML takes no --{option}: the package and the device decide it",
                "Leave it out, or use --device evaluator.",
            )
    device = open_device()
    engine = NativeEngine(device, _UNITS.get(asked), recommended_units(bundle))
    return CoremlRuntime(bundle, engine, _precisions(bundle)[1], options.low_memory)


def _evaluated(bundle: Bundle, options: RuntimeOptions) -> CoremlRuntime:
    require("the evaluator of Core ML packages", ("torch",), "export")
    computed, coarsest = _precisions(bundle)
    if options.precision == "fp16" and computed == "fp32":
        raise UsageError(
            "these packages compute in fp32; there is nothing to round to fp16",
            "Leave --precision out.",
        )
    if options.threads is not None:
        from tiue_export.export.coreml.mil.evaluator import set_threads

        set_threads(options.threads)
    precision = computed if options.precision == "auto" else options.precision
    return CoremlRuntime(bundle, EvaluatorEngine(precision), coarsest, options.low_memory)


def _make_line(bundle: Bundle) -> str:
    return command_line("coreml", "--ckpt", "STUDENT", "--bundle", bundle.root)


def package_of(bundle: Bundle, graph: str) -> PackageFile:
    """The package of one graph, and the function in it that takes the bundle's shapes.

    Raises `BundleError` where the package does not fit the bundle's contract.
    """
    form = bundle.manifest.compiled[_FOLDER].graphs.get(graph)
    if form is None:
        raise BundleError(
            f"{bundle.root} has no Core ML package of {graph}",
            f"Make them again: {_make_line(bundle)} --force",
        )
    path = bundle.root / form.path
    while path.suffix != ".mlpackage" and path != bundle.root:
        path = path.parent  # the manifest names a file in the package
    package, spec = MilPackage.open(path), bundle.spec(graph)
    default = package.default_function()
    names = sorted(package.functions(), key=lambda name: (name != default, name))
    fitting = [name for name in names if not _misfits(spec, package, name)]
    if not fitting:
        raise BundleError(
            f"{path} does not fit the bundle: {_misfits(spec, package, names[0])[0]}",
            f"Make it again: {_make_line(bundle)} --force",
        )
    function = fitting[0] if len(names) > 1 else None
    # The manifest may list more with a graph, such as what a Swift program needs.
    files = {name: record for name, record in form.files.items() if f"/{path.name}/" in f"/{name}"}
    return PackageFile(graph, path, function, package.inputs(fitting[0]), files)


def recommended_units(bundle: Bundle) -> dict[str, str]:
    """By graph, the compute unit that was recommended when its package was made."""
    compiled = bundle.manifest.compiled[_FOLDER]
    general = str(compiled.flags.get("compute_unit", "ALL"))
    found = {}
    for graph in compiled.graphs:
        written = MilPackage.open(package_of(bundle, graph).path).metadata().get(_METADATA_KEY)
        own = json.loads(written).get("compute_unit") if written else None
        found[graph] = str(own or general)
    unknown = sorted(set(found.values()) - set(_UNITS.values()))
    if unknown:
        raise BundleError(f"{bundle.root}: unknown compute unit {unknown[0]!r}")
    return found


def _misfits(spec: GraphSpec, package: MilPackage, function: str) -> list[str]:
    """What of a function the bundle's contract of the graph cannot feed or does not get."""
    takes, gives = package.inputs(function), package.outputs(function)
    known = {tensor.name: tensor.shape for tensor in spec.inputs}
    found = [
        f'its input "{name}" has shape {kind.shape}, the bundle\'s {known.get(name)}'
        for name, kind in takes.items()
        if not _agree(known.get(name), kind)
    ]
    return found + [
        f'it gives no output "{tensor.name}" of shape {tensor.shape}'
        for tensor in spec.outputs
        if tensor.name not in gives or not _agree(tensor.shape, gives[tensor.name])
    ]


def _agree(shape: tuple[int | str, ...] | None, kind: TensorType) -> bool:
    return (
        shape is not None
        and len(shape) == len(kind.shape)
        and all(
            isinstance(ours, str) or isinstance(theirs, str) or ours == theirs
            for ours, theirs in zip(shape, kind.shape, strict=True)
        )
    )


def _precisions(bundle: Bundle) -> tuple[str, str]:
    """What the packages compute in, and the coarser of that and how their weights are stored."""
    flags = bundle.manifest.compiled[_FOLDER].flags
    computed, gate = str(flags.get("precision")), str(flags.get("gate", flags.get("precision")))
    if computed not in _PRECISIONS or gate not in GATES_PSNR_DB:
        raise BundleError(
            f"{bundle.root}: the manifest gives its Core ML packages no precision that is known: "
            f"{computed}, {gate}",
            f"Make them again: {_make_line(bundle)} --force",
        )
    return computed, weakest(computed, gate)

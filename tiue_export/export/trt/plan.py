"""What a TensorRT build will do, resolved from options, bundle and machine before any work.

Everything that cannot be honoured is refused here, by name. Loads without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tiue_export.bundle.engine_identity import Flags, graph_identity, rtx_target, tensorrt_target
from tiue_export.bundle.manifest import Compiled
from tiue_export.bundle.read import Bundle
from tiue_export.errors import RuntimeFailure, UsageError, unknown_name
from tiue_export.export.backend import graphs_to_make
from tiue_export.export.trt.build_process import EngineRequest
from tiue_export.proof.quantization_plan import QUANTIZED, W8A8
from tiue_export.registry.packages import require
from tiue_export.sampling.plan import check_decoder_rows
from tiue_export.sampling.sampler import pieces
from tiue_export.specs import BATCH, STEPS, TensorSpec, axis_size
from tiue_export.system.cache_folder import user_cache_folder
from tiue_export.system.command_line import command_line
from tiue_export.system.tensorrt_flavor import Device, Flavor, load_flavor, this_device

_LEVELS = range(6)
_PRECISIONS = ("fp16", "fp32", "int8")


@dataclass(frozen=True)
class TrtOptions:
    """What the user chose for a build.

    `compute_capabilities` ("8.6") are what RTX builds for; none means this GPU, or Ampere and newer
    where there is none. `precision` None takes the bundle's, as TensorRT takes it from the ONNX.
    `batch` is (min, opt, max) images. `workspace_mb` 0 means what free memory allows.
    `max_decoder_rows` bounds a loop's decoder runs; None takes the plan's longest group.
    """

    flavor: str = "auto"
    compute_capabilities: tuple[str, ...] = ()
    precision: str | None = None
    batch: tuple[int, int, int] | None = None
    max_decoder_rows: int | None = None
    optimization_level: int = 3
    workspace_mb: int = 0
    version_compatible: bool = False
    hardware_compatible: bool = False
    refit: bool = False
    rebuild: bool = False

    def __post_init__(self) -> None:
        if self.precision not in (None, *_PRECISIONS):
            raise unknown_name("precision", str(self.precision), _PRECISIONS)
        if self.optimization_level not in _LEVELS:
            raise UsageError(
                f"--optimization-level is {self.optimization_level}; expected 0 to {_LEVELS[-1]}",
                "3 is TensorRT's own choice; 1 builds fastest.",
            )
        if self.workspace_mb < 0:
            raise UsageError(f"--workspace-mb is {self.workspace_mb}; expected 0 or more")
        check_decoder_rows(self.max_decoder_rows)
        if self.batch is not None:
            smallest, usual, largest = self.batch
            if not 1 <= smallest <= usual <= largest:
                raise UsageError(
                    f"--batch is {smallest}:{usual}:{largest}; expected min <= opt <= max, all at "
                    "least 1",
                    "Write --batch 1, or --batch 1:2:4.",
                )


@dataclass(frozen=True)
class TrtPlan:
    """What a build will do: for whom, with what, and which graphs lack a valid engine.

    `decoder_steps` is (min, opt, max) of a loop's decoder runs, None for a distilled student.
    """

    flavor: Flavor
    device: Device | None
    target: Mapping[str, str]
    flags: Flags
    batch: tuple[int, int, int]
    identities: Mapping[str, str]
    to_build: tuple[str, ...]
    decoder_steps: tuple[int, int, int] | None = None

    def request(self, bundle: Bundle, graph: str, plan: Path) -> EngineRequest:
        """What the child process is asked for, to write the engine of `graph` to `plan`."""
        flags = self.flags
        cache = _timing_cache(self.flavor, self.device)
        return EngineRequest(
            onnx=str(bundle.graph_path(graph).resolve()),
            plan=str(plan),
            flavor=self.flavor.name,
            profile=_profile(bundle.spec(graph).inputs, self.batch, self.decoder_steps),
            optimization_level=int(flags["optimization_level"]),
            workspace_mb=int(flags["workspace_mb"]),
            version_compatible=bool(flags["version_compatible"]),
            hardware_compatible=bool(flags["hardware_compatible"]),
            refit=bool(flags["refit"]),
            tf32=bool(flags["tf32"]),
            must_be_half=_float_part(bundle, graph) != "fp32",
            must_be_int8=bundle.manifest.graphs[graph].precision == W8A8,
            float32_modules=bundle.manifest.graphs[graph].float32_modules,
            compute_capabilities=_listed(self.target) if self.flavor.name == "rtx" else (),
            timing_cache=None if cache is None else str(cache),
        )

    @property
    def form(self) -> Compiled:
        """What the engines will be, still without them."""
        return Compiled(self.flavor.name, self.flavor.version, self.target, self.flags, {})


def plan_trt(bundle: Bundle, options: TrtOptions) -> TrtPlan:
    """Resolve the options against the bundle and this machine, without building anything.

    Raises `MissingExtraError`, `UsageError` for what cannot be honoured, `RuntimeFailure` where
    the GPU is missing that a build needs, `BundleError` for a bundle without its ONNX files.
    """
    flavor, device, target = resolve_target(options)
    _check_precision(bundle, options)
    batch, decoder_steps = _batch(bundle, options), _decoder_steps(bundle, options)
    precision = bundle.manifest.precision
    flags: dict[str, str | bool | int | float] = {
        "precision": "int8" if _is_quantized(bundle) else precision,
        "batch": ":".join(map(str, batch)),
        "optimization_level": options.optimization_level,
        "workspace_mb": options.workspace_mb,
        "version_compatible": options.version_compatible,
        "hardware_compatible": options.hardware_compatible,
        "refit": options.refit,
        # TF32 keeps 10 bits of a product: fine beside half, not in what is meant to be exact.
        "tf32": precision != "fp32",
    }
    if decoder_steps is not None:
        flags["decoder_steps"] = ":".join(map(str, decoder_steps))
    identities = {
        name: graph_identity(record, flavor.name, flavor.version, target, flags)
        for name, record in bundle.manifest.graphs.items()
    }
    existing = bundle.manifest.compiled.get(flavor.folder)
    to_build = graphs_to_make(existing, identities, force=options.rebuild)
    for name in to_build:
        bundle.graph_path(name)
    return TrtPlan(flavor, device, target, flags, batch, identities, to_build, decoder_steps)


def resolve_target(options: TrtOptions) -> tuple[Flavor, Device | None, dict[str, str]]:
    """Which TensorRT will build, on which GPU, and what for; all that needs no bundle to be known.

    Raises what `plan_trt` raises.
    """
    flavor, device = load_flavor(options.flavor), this_device()
    extra = "trt-rtx" if flavor.name == "rtx" else "trt"
    require("building TensorRT engines", ("polygraphy",), extra)
    return flavor, device, _target(flavor, device, options)


def _check_precision(bundle: Bundle, options: TrtOptions) -> None:
    have = "int8" if _is_quantized(bundle) else bundle.manifest.precision
    if options.precision == "int8" and have != "int8":
        raise UsageError(
            f"--precision is int8, but the graphs of {bundle.root} are {have}: int8 needs measured "
            "ranges",
            f"{int8_lines(bundle.root)}, then name INT8 here.",
        )
    if options.precision not in (None, have):
        raise UsageError(
            f"--precision is {options.precision}, but the graphs of {bundle.root} are {have}; "
            "TensorRT takes the precision from them",
            f"Export again: tiue-export onnx --ckpt STUDENT --precision {options.precision} "
            "--out BUNDLE",
        )


def int8_lines(bundle: Path | str) -> str:
    """The commands from a float bundle to one in int8, for engines whose speed is unknown here."""
    capture = command_line("calibrate", bundle, "--out", "DATA")
    quantize = command_line("quantize", bundle, "--calibration", "DATA", "--any-speed", "--out")
    return f"{capture}, then {quantize} INT8"


def _is_quantized(bundle: Bundle) -> bool:
    return any(graph.precision in QUANTIZED for graph in bundle.manifest.graphs.values())


def _float_part(bundle: Bundle, graph: str) -> str:
    """The precision of a graph, or of what is not quantized in it."""
    own = bundle.manifest.graphs[graph].precision
    return bundle.manifest.precision if own in QUANTIZED else own


def _batch(bundle: Bundle, options: TrtOptions) -> tuple[int, int, int]:
    fixed = bundle.manifest.batch
    if fixed is None:
        return options.batch or (1, 1, 1)
    if options.batch not in (None, (fixed, fixed, fixed)):
        asked = ":".join(map(str, dict.fromkeys(options.batch or ())))
        again = "--dynamic-batch" if ":" in asked else f"--batch {asked}"
        raise UsageError(
            f"--batch is {asked}, but the graphs of {bundle.root} take {fixed}",
            f"Export again: tiue-export onnx --ckpt STUDENT {again} --out BUNDLE",
        )
    return fixed, fixed, fixed


def _decoder_steps(bundle: Bundle, options: TrtOptions) -> tuple[int, int, int] | None:
    """Decoder runs of one step, and most of all of the longest piece: most steps are in such."""
    plan = bundle.manifest.plan
    if plan.one_pass:
        if options.max_decoder_rows is not None:
            raise UsageError(
                f"--max-decoder-rows is for a model in a loop; {bundle.root} is a distilled "
                "student, whose decoder takes all its steps at once",
                "Leave it out.",
            )
        return None
    rows_per_step = plan.copies * (bundle.manifest.batch or 1)
    rows = options.max_decoder_rows or plan.max_decoder_rows
    longest = max(
        len(piece) for group in plan.passes for piece in pieces(group, rows, rows_per_step)
    )
    return 1, longest, longest


def _profile(
    inputs: tuple[TensorSpec, ...],
    batch: tuple[int, int, int],
    decoder_steps: tuple[int, int, int] | None,
) -> dict[str, list[list[int]]]:
    """Min, opt and max shape of each input with an open axis: the batch, or a loop's steps."""
    sizes = [
        {BATCH: size, STEPS: steps}
        for size, steps in zip(batch, decoder_steps or (1, 1, 1), strict=True)
    ]
    return {
        spec.name: [[axis_size(side, each) for side in spec.shape] for each in sizes]
        for spec in inputs
        if any(isinstance(side, str) for side in spec.shape)
    }


def _target(flavor: Flavor, device: Device | None, options: TrtOptions) -> dict[str, str]:
    if flavor.name == "rtx":
        return _rtx_target(flavor, device, options)
    if options.compute_capabilities:
        raise UsageError(
            f"--sm is for the rtx flavour; {flavor.title} builds for the GPU it runs on",
            "Leave it out, or pass --flavor rtx.",
        )
    if device is None:
        raise RuntimeFailure(
            f"{flavor.title} builds on the GPU that will run the engine; none was found here",
            "Run this command on the device (`bundle pack` carries the bundle there), or build for "
            "RTX cards without a GPU: --flavor rtx --sm 86,89,120",
        )
    return tensorrt_target(device)


def _rtx_target(flavor: Flavor, device: Device | None, options: TrtOptions) -> dict[str, str]:
    asked, known = tuple(sorted(set(options.compute_capabilities))), flavor.compute_capabilities
    for name, given in (
        ("--version-compatible", options.version_compatible),
        ("--hardware-compatible", options.hardware_compatible),
    ):
        if given:
            raise UsageError(
                f"{name} does not exist for {flavor.title}",
                "Its engines run on every GPU that --sm names; build again for a new version.",
            )
    unknown = [each for each in asked if each not in known]
    if unknown:
        raise UsageError(
            f"{flavor.title} cannot build for compute capability {', '.join(unknown)}; it can for "
            f"{', '.join(known)}",
            "Jetson and data-centre GPUs need the tensorrt flavour, built on the device.",
        )
    if not asked and device is not None and device.compute_capability in known:
        asked = (device.compute_capability,)
    if options.refit:
        _check_rtx_refit(flavor, device, asked)
    return rtx_target(tuple(sorted(asked, key=known.index)))


def _check_rtx_refit(flavor: Flavor, device: Device | None, asked: tuple[str, ...]) -> None:
    # Tried with 1.7.1: without a driver a refittable build ends in "CHECK(status == CUDA_SUCCESS)
    # failed", for several targets in "CHECK(sm_vers_.size() == 1) failed".
    if device is None:
        raise RuntimeFailure(
            f"{flavor.title} builds refittable engines only where a GPU and its driver are",
            "Leave out --refit: these engines are built anew in seconds.",
        )
    if len(asked) != 1:
        raise UsageError(
            f"{flavor.title} builds refittable engines for one --sm, got "
            f"{', '.join(asked) or 'none'}",
            f"Pass --sm {device.compute_capability.replace('.', '')}, or leave out --refit.",
        )


def _listed(target: Mapping[str, str]) -> tuple[str, ...]:
    listed = target["compute_capabilities"]
    return () if listed.endswith("+") else tuple(listed.split(","))


def _timing_cache(flavor: Flavor, device: Device | None) -> Path | None:
    """One file for each TensorRT, GPU and CUDA; RTX times nothing when it builds."""
    if flavor.name == "rtx" or device is None:
        return None
    words = [flavor.version, device.name, device.compute_capability, f"cuda{device.cuda}"]
    name = "-".join(words).replace(" ", "_").replace("/", "_")
    folder = user_cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.timing"

"""The child process that makes ONE TensorRT engine: `python -m` this module.

It takes a request (JSON, its argument), tells of its progress in JSON lines on standard output and
ends with one of the exit codes below. A process of its own, because a build needs all the memory
there is: torch costs gigabytes that a Jetson does not have, and an out-of-memory that kills the
process must not kill the export.

Polygraphy (NVIDIA's, >= 0.53.6) makes the builder configuration, the profiles and the build, keeps
the timing cache under a lock, and knows what each TensorRT version takes; CreateConfigRTX does the
same for TensorRT-RTX. Parsing uses the plain API, where Polygraphy stands in the way: its loader
creates the builder with a logger of its own, which prints, and turns parser errors into one line
without node names, which is what somebody with an unsupported operator needs. What Polygraphy's
defaults would get wrong is passed explicitly: its networks are weakly typed on TensorRT 10, and it
clears TF32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import mmap
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tiue_export.errors import TiueError
from tiue_export.export.trt.precision import engine_census, network_census
from tiue_export.system.machine import available_memory_bytes
from tiue_export.system.memory import peak_memory_bytes
from tiue_export.system.tensorrt_flavor import Device, Flavor, load_flavor, this_device

OK, FAILED, OUT_OF_MEMORY, NOT_PARSED, NOT_HALF, NO_GPU, NOT_INT8 = 0, 1, 13, 14, 15, 16, 17
# The switch that Polygraphy reads when it is imported.
POLYGRAPHY_RTX = "POLYGRAPHY_USE_TENSORRT_RTX"
_MEMORY_ERROR = re.compile(
    r"out of memory|outofmemory|bad_alloc|memoryallocation|insufficient memory|cannot allocate "
    r"memory|memory is insufficient|nvmapmemalloc|failed_allocation|failed to map segment|"
    r"requested amount of gpu memory|"
    # What a thread without room for its stack is refused with (EAGAIN).
    r"resource temporarily unavailable",
    re.IGNORECASE,
)
_INTERVAL_S = 0.1
_MEGABYTE = 1 << 20
# Kept free of the builder's tactics: what a desktop, a display and the runtime itself take.
_SHARE_OF_GPU_MEMORY = 0.8
_SHARE_OF_UNIFIED_MEMORY = 0.5


@dataclass(frozen=True)
class EngineRequest:
    """What to build. Paths are absolute; `profile` maps an input to its min, opt and max shape.

    `workspace_mb` 0 means what free memory allows. `refit_plan` asks for no build but for that
    plan with the weights of `onnx`. `compute_capabilities` are RTX's; none is Ampere and newer.
    """

    onnx: str
    plan: str
    flavor: str
    profile: Mapping[str, list[list[int]]] = field(default_factory=dict)
    optimization_level: int = 3
    workspace_mb: int = 0
    version_compatible: bool = False
    hardware_compatible: bool = False
    refit: bool = False
    tf32: bool = False
    must_be_half: bool = False
    must_be_int8: bool = False
    float32_modules: tuple[str, ...] = ()
    compute_capabilities: tuple[str, ...] = ()
    timing_cache: str | None = None
    refit_plan: str | None = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> EngineRequest:
        data = json.loads(text)
        for name in ("compute_capabilities", "float32_modules"):
            data[name] = tuple(data[name])
        return EngineRequest(**data)


class EngineFailure(Exception):
    """A build that did not succeed: the exit code says how, the message why."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Channel:
    """JSON lines to the parent; TensorRT calls from several threads."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._lock = file, threading.Lock()
        self.broken = False

    def send(self, event: str, **fields: object) -> None:
        """Write one event; a parent that is gone is remembered in `broken`."""
        with self._lock:
            try:
                self._file.write(json.dumps({"event": event, **fields}) + "\n")
                self._file.flush()
            except (OSError, ValueError):
                self.broken = True


class PhaseTree:
    """One number out of the builder's nested phases: the part of the outermost one that is done."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[str | None, int]] = {}
        self._done: dict[str, int] = {}
        self._best = 0.0

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        self._open[phase] = (parent, max(1, steps))
        self._done[phase] = 0

    def step(self, phase: str, step: int) -> None:
        if phase in self._open:
            self._done[phase] = max(self._done[phase], step + 1)

    def finish(self, phase: str) -> None:
        self._open.pop(phase, None)
        self._done.pop(phase, None)

    @property
    def fraction(self) -> float:
        """From 0 to 1; never falls, although the builder opens phases that it did not announce."""
        roots = [name for name, (parent, _) in self._open.items() if parent not in self._open]
        current = max((self._fraction(name, set()) for name in roots), default=0.0)
        self._best = min(1.0, max(self._best, current))
        return self._best

    def _fraction(self, phase: str, above: set[str]) -> float:
        _, steps = self._open[phase]
        # A builder may reuse a name below itself; `above` ends that.
        children = [
            name
            for name, (parent, _) in self._open.items()
            if parent == phase and name not in {*above, phase}
        ]
        inside = max((self._fraction(name, {*above, phase}) for name in children), default=0.0)
        return min(1.0, (self._done[phase] + inside) / steps)


def is_memory_error(text: str) -> bool:
    """Whether a message of TensorRT, CUDA, C++ or the system says that memory ran out."""
    return _MEMORY_ERROR.search(text) is not None


def main(arguments: list[str]) -> int:
    """Read the request, make the engine, tell the parent; the exit code says how it ended."""
    # Ctrl-C reaches the whole process group; in here the builder would sit it out.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    request = EngineRequest.from_json(arguments[0])
    channel = Channel(_own_stdout())
    try:
        result = make_engine(request, channel)
    except EngineFailure as failure:
        channel.send("error", text=str(failure))
        return failure.exit_code
    except TiueError as error:
        channel.send("error", text=error.message, next_step=error.next_step)
        # A library that cannot be loaded for want of memory looks like one that is not there.
        return OUT_OF_MEMORY if is_memory_error(error.message) else FAILED
    except MemoryError:
        channel.send("error", text="memory ran out")
        return OUT_OF_MEMORY
    except Exception as error:  # Polygraphy's, TensorRT's and cuda-python's share no base class
        text = f"{type(error).__name__}: {error}"
        channel.send("error", text=text)
        return OUT_OF_MEMORY if is_memory_error(text) else FAILED
    channel.send("result", **result)
    return OK


def _own_stdout() -> IO[str]:
    # The libraries print to standard output, from C++ too: they get standard error in its place.
    kept = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(kept, "w", encoding="utf-8")


def make_engine(request: EngineRequest, channel: Channel) -> dict[str, Any]:
    """Build or refit, write the plan; what the parent puts into its report."""
    if request.flavor == "rtx":
        os.environ[POLYGRAPHY_RTX] = "1"
    flavor, device = load_flavor(request.flavor), this_device()
    logger = _logger(flavor.trt, channel)
    start = time.perf_counter()
    if request.refit_plan is None:
        report = _build(request, flavor, device, logger, channel)
    else:
        report = _refit(request, flavor, device, logger)
    if "torch" in sys.modules:
        raise EngineFailure(FAILED, "torch was imported into the engine's process")
    return {
        **report,
        "build_seconds": round(time.perf_counter() - start, 3),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _build(
    request: EngineRequest, flavor: Flavor, device: Device | None, logger: Any, channel: Channel
) -> dict[str, Any]:
    builder, network, parser = parse(request.onnx, flavor, logger)
    census = network_census(network, request.float32_modules)
    if request.must_be_half and census.mostly_float:
        raise EngineFailure(
            NOT_HALF,
            f"{census.products.get('float', 0) - census.audited} of "
            f"{sum(census.products.values()) - census.audited} convolutions and matrix products "
            "came out in float",
        )
    if request.must_be_int8 and not census.products.get("int8"):
        raise EngineFailure(
            NOT_INT8, "none of its convolutions and matrix products has both inputs in int8"
        )
    workspace_bytes = request.workspace_mb * _MEGABYTE or free_workspace_bytes(device)
    channel.send("workspace", megabytes=workspace_bytes // _MEGABYTE)
    plan = _serialize(request, flavor, (builder, network, parser), workspace_bytes, logger, channel)
    with open(request.plan, "wb") as file:
        file.write(memoryview(plan))
    del plan, network, parser, builder
    report: dict[str, Any] = {**census.report(), "workspace_mb": workspace_bytes // _MEGABYTE}
    if device is not None:
        # What cannot be opened here (another GPU, too little memory) can still be a sound plan.
        with contextlib.suppress(MemoryError, RuntimeError):
            report |= _inspect(request.plan, flavor, logger)
    return report


def parse(onnx: str, flavor: Flavor, logger: Any) -> tuple[Any, Any, Any]:
    """(builder, strongly typed network, parser) of an ONNX file with its data beside it."""
    trt = flavor.trt
    builder = trt.Builder(logger)
    # Required on 10.x; 11 is always strongly typed and ignores the flag.
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    # Plugins for norms would need cuDNN and do not exist on newer GPUs.
    parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)
    if not parser.parse_from_file(onnx):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        lines = [_parser_error(error, flavor) for error in errors]
        raise EngineFailure(
            NOT_PARSED,
            f"{flavor.title} cannot read {Path(onnx).parent.name}/{Path(onnx).name}: "
            + ("; ".join(lines) or "the parser gave no reason"),
        )
    return builder, network, parser


def _parser_error(error: Any, flavor: Flavor) -> str:
    text = f"{error.code().name.lower().replace('_', ' ')}: {error.desc().strip()}"
    if not flavor.has("ParserError.node_name"):
        return f"node {error.node()}: {text}"
    name, operator = error.node_name(), error.node_operator()
    return f'node "{name}" ({operator}): {text}' if name or operator else text


def _serialize(
    request: EngineRequest,
    flavor: Flavor,
    parsed: tuple[Any, Any, Any],
    workspace_bytes: int,
    logger: Any,
    channel: Channel,
) -> Any:
    """The plan, as TensorRT's host memory."""
    from polygraphy.backend.trt import EngineBytesFromNetwork
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    builder, network, _ = parsed
    with warnings.catch_warnings():
        # Polygraphy gives every build an empty timing cache, which RTX calls deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        config = _config(request, flavor, workspace_bytes, channel)(builder, network)
    if not request.tf32:
        config.clear_flag(flavor.trt.BuilderFlag.TF32)
    build = EngineBytesFromNetwork(parsed, config, save_timing_cache=request.timing_cache)
    try:
        return build()
    except PolygraphyException as error:
        text = "; ".join(logger.errors) or str(error)
        if channel.broken:
            raise EngineFailure(FAILED, "the process that asked for the engine is gone") from error
        code = OUT_OF_MEMORY if is_memory_error(" ".join(logger.messages)) else FAILED
        raise EngineFailure(code, text) from error


def _config(
    request: EngineRequest, flavor: Flavor, workspace_bytes: int, channel: Channel
) -> Callable[[Any, Any], Any]:
    """Polygraphy's loader of the builder configuration."""
    from polygraphy.backend.trt import CreateConfig, Profile

    trt = flavor.trt
    profile = Profile()
    for name, (smallest, usual, largest) in request.profile.items():
        profile.add(name, smallest, usual, largest)
    options: dict[str, Any] = {
        "profiles": [profile],
        "builder_optimization_level": request.optimization_level,
        "refittable": request.refit,
        "version_compatible": request.version_compatible,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "progress_monitor": _progress_monitor(trt, channel),
    }
    if workspace_bytes:
        options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: workspace_bytes}
    if request.hardware_compatible:
        options["hardware_compatibility_level"] = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if flavor.name == "rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        pairs = [tuple(map(int, each.split("."))) for each in request.compute_capabilities]
        loader: Callable[[Any, Any], Any] = CreateConfigRTX(
            compute_capabilities=pairs or None, **options
        )
        return loader
    # Without tf32=True Polygraphy clears what TensorRT sets; `_serialize` clears it when asked to.
    cache = request.timing_cache
    other: Callable[[Any, Any], Any] = CreateConfig(tf32=True, load_timing_cache=cache, **options)
    return other


def _refit(
    request: EngineRequest, flavor: Flavor, device: Device | None, logger: Any
) -> dict[str, Any]:
    if device is None:
        raise EngineFailure(NO_GPU, "refitting opens the engine, which needs its GPU and driver")
    trt = flavor.trt
    engine = _open(str(request.refit_plan), flavor, logger)
    if engine is None or not engine.refittable:
        reason = "; ".join(logger.errors) or "it was built without --refit"
        raise EngineFailure(FAILED, f"{request.refit_plan} cannot be refitted: {reason}")
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(request.onnx):
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise EngineFailure(NOT_PARSED, "; ".join(errors) or "the weights do not fit the engine")
    missing = refitter.get_missing_weights()
    if missing or not refitter.refit_cuda_engine():
        named = f"; without values: {', '.join(missing[:5])}" if missing else ""
        raise EngineFailure(FAILED, f"{'; '.join(logger.errors) or 'refitting failed'}{named}")
    with open(request.plan, "wb") as file:
        file.write(memoryview(engine.serialize()))
    return {}


def _inspect(plan: str, flavor: Flavor, logger: Any) -> dict[str, Any]:
    """What the engine inspector says of the built plan, where the GPU allows to open it here."""
    engine = _open(plan, flavor, logger)
    if engine is None:  # built for another GPU than the one in this machine
        return {}
    report: dict[str, Any] = {"scratch_memory_bytes": int(engine.device_memory_size_v2)}
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(flavor.trt.LayerInformationFormat.JSON)
    census = engine_census(text)
    if census is not None:
        report |= {f"engine_layers_{kind}": count for kind, count in sorted(census.layers.items())}
        report["engine_layers_reformat"] = census.casts
    return report


def _open(plan: str, flavor: Flavor, logger: Any) -> Any:
    runtime = flavor.trt.Runtime(logger)
    # Version-compatible plans carry their own runtime. This one was hashed, or made here just now.
    runtime.engine_host_code_allowed = True
    # Mapped, not read: pages of the file do not count against the memory of a small board.
    with open(plan, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return runtime.deserialize_cuda_engine(content)


def free_workspace_bytes(device: Device | None) -> int:
    """The limit for the builder's scratch memory; 0 (the builder's own) where there is no GPU."""
    if device is None:
        return 0
    if device.unified_memory:
        return int((available_memory_bytes() or 0) * _SHARE_OF_UNIFIED_MEMORY)
    try:
        from cuda.bindings import runtime as cudart
    except ImportError:
        from cuda import cudart
    error, free, _ = cudart.cudaMemGetInfo()
    return 0 if int(error) else int(free * _SHARE_OF_GPU_MEMORY)


def _logger(trt: Any, channel: Channel) -> Any:
    """A TensorRT logger that keeps errors and tells the parent of warnings, each once."""

    class EngineLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.messages: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            failed = severity in (trt.Logger.INTERNAL_ERROR, trt.Logger.ERROR)
            if failed:
                self.errors.append(text.strip())
            if (failed or severity == trt.Logger.WARNING) and text not in self.messages:
                self.messages.append(text)
                channel.send("log", text=text.strip())

    return EngineLogger()


def _progress_monitor(trt: Any, channel: Channel) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._tree, self._told = PhaseTree(), 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._tree.start(phase_name, parent_phase, num_steps)
            self._tell(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tree.step(phase_name, step)
            self._tell(phase_name)
            return not channel.broken  # False cancels: nobody waits for the engine any more

        def phase_finish(self, phase_name: str) -> None:
            self._tree.finish(phase_name)

        def _tell(self, phase: str) -> None:
            now = time.monotonic()
            if now - self._told >= _INTERVAL_S:
                self._told = now
                channel.send("progress", fraction=round(self._tree.fraction, 4), phase=phase)

    return Monitor()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Bundle -> the same bundle with TensorRT engines in it: one child process per graph.

A valid engine of equal identity is kept; anything else is built again. Engines are listed in the
manifest as they are finished, so a build that is killed goes on where it stopped. Loads without
torch: a Jetson builds from an ONNX bundle.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, ClassVar

from tiue_export.bundle.engine_identity import check_engine, compiled_for, graph_identity
from tiue_export.bundle.manifest import Compiled, ParityRecord
from tiue_export.bundle.read import Bundle
from tiue_export.errors import (
    BundleError,
    ParityError,
    ResourceError,
    RuntimeFailure,
    TiueError,
    UsageError,
)
from tiue_export.export.backend import Backend, Convert, GraphForm, Workshop, compile_form
from tiue_export.export.trt.build_process import (
    NO_GPU,
    NOT_HALF,
    NOT_INT8,
    NOT_PARSED,
    OK,
    OUT_OF_MEMORY,
    POLYGRAPHY_RTX,
    EngineRequest,
    is_memory_error,
)
from tiue_export.export.trt.plan import TrtOptions, TrtPlan, plan_trt
from tiue_export.system.child_process import child_command
from tiue_export.system.command_line import command_line
from tiue_export.system.progress import Observer
from tiue_export.system.tensorrt_flavor import FOLDERS, Flavor, load_flavor, this_device

CHILD = "tiue_export.export.trt.build_process"
_KILLED = -9
# Of the builder's many warnings those that mean wrong pictures, such as "Running layernorm after
# self-attention with FP16 Reduce or Pow may cause overflow" (NVIDIA/TensorRT#4355).
_ABOUT_NUMBERS = re.compile(r"overflow|accuracy|precision loss|\bnan\b", re.IGNORECASE)
_LEAST_WORKSPACE_MB = 64


def compile_trt(
    bundle: Bundle,
    options: TrtOptions | None = None,
    observer: Observer | None = None,
    *,
    force: bool = False,
    allow_parity_loss: bool = False,
) -> Bundle:
    """Build the engines that the bundle lacks for this request, with `force` all; returns it so.

    Nothing of an engine is lost by measure, so there is no loss to allow: its layers are in the
    precision that was asked for, or it is refused.
    Raises what `plan_trt` raises, `ParityError` when a graph of an fp16 bundle would run in float,
    `ResourceError` when memory runs out at the easiest settings too, `RuntimeFailure` when TensorRT
    fails. A failure leaves the bundle openable, with the engines that were finished.
    """
    options = options or TrtOptions()
    plan = plan_trt(bundle, options)
    return compile_form(
        bundle,
        TrtBackend(plan),
        force=force or options.rebuild,
        allow_parity_loss=allow_parity_loss,
        observer=observer,
    )


def refit_from(bundle: Bundle, new: Bundle, observer: Observer | None = None) -> Bundle:
    """Put the weights of `new` into the engines of `bundle`; the engines go into `new`.

    For a fine-tuned student of the same shape, whose ONNX bundle is `new`: seconds in place of a
    build. Needs engines built with `refit`, and the GPU they were built for, as refitting opens
    them. Raises `BundleError` when there are none or the graphs differ, `RuntimeFailure` without
    the GPU.
    """
    compiled, plans = check_refittable(bundle)
    _check_same_graphs(bundle, new)
    return compile_form(new, RefitBackend(compiled, plans), force=True, observer=observer)


@dataclass(frozen=True)
class TrtBackend(Backend):
    """Engines by a plan that was checked; precision is proven in the builder, layer by layer.

    They open on the GPU they are for, which need not be here: no runtime proves them.
    """

    plan: TrtPlan
    runtime: ClassVar[str] = "trt"
    title: ClassVar[str] = "TensorRT engines"
    verb: ClassVar[str] = "build"
    in_child: ClassVar[bool] = True

    def if_lost(self, failed: ParityRecord) -> str:
        """Other graphs."""
        return "Export again: tiue-export onnx --ckpt STUDENT --precision fp16 --out BUNDLE"

    resumes: ClassVar[bool] = True

    @property
    def folder(self) -> str:
        """One for each flavour of TensorRT."""
        return self.plan.flavor.folder

    def form(self, bundle: Bundle) -> Compiled:
        """For the plan's target, with its flags."""
        return self.plan.form

    def identity(self, bundle: Bundle, graph: str) -> str:
        """The plan's."""
        return self.plan.identities[graph]

    @contextlib.contextmanager
    def converter(self, workshop: Workshop) -> Iterator[Convert]:
        """A child process for each attempt at an engine."""

        def build(name: str) -> GraphForm:
            request = self.plan.request(workshop.bundle, name, workshop.folder / f"{name}.plan")
            return _engine(name, _build(name, request, workshop.observer))

        yield build


@dataclass(frozen=True)
class RefitBackend(Backend):
    """Engines that are there, by graph in `plans`, with the weights of another bundle."""

    compiled: Compiled
    plans: Mapping[str, Path]
    runtime: ClassVar[str] = "trt"
    title: ClassVar[str] = "TensorRT engines"
    verb: ClassVar[str] = "refit"
    in_child: ClassVar[bool] = True

    def if_lost(self, failed: ParityRecord) -> str:
        """Other engines."""
        return "Build engines for the new student itself."

    @property
    def folder(self) -> str:
        """That of the engines."""
        return FOLDERS[self.compiled.backend]

    def form(self, bundle: Bundle) -> Compiled:
        """That of the engines: refitting changes weights alone."""
        return replace(self.compiled, graphs={}, parity=())

    def graphs(self, bundle: Bundle) -> tuple[str, ...]:
        """Those that have an engine."""
        return tuple(self.plans)

    def identity(self, bundle: Bundle, graph: str) -> str:
        """As if the engine had been built from the new weights."""
        record, of = bundle.manifest.graphs[graph], self.compiled
        return graph_identity(record, of.backend, of.version, of.target, of.flags)

    @contextlib.contextmanager
    def converter(self, workshop: Workshop) -> Iterator[Convert]:
        """A child process for each engine."""
        yield lambda name: self._refit(workshop, name)

    def _refit(self, workshop: Workshop, name: str) -> GraphForm:
        request = EngineRequest(
            str(workshop.bundle.graph_path(name).resolve()),
            str(workshop.folder / f"{name}.plan"),
            self.compiled.backend,
            refit_plan=str(self.plans[name].resolve()),
        )
        try:
            report = _run(name, request, workshop.observer)
        except _OutOfMemory as failure:
            raise _memory_error(name, request, failure) from failure
        # The layers are those of the engine it came from.
        proof = {
            key: value
            for key, value in self.compiled.graphs[name].report.items()
            if "build" not in key and key not in ("convert_s", "peak_memory_bytes")
        }
        return _engine(name, {**proof, **report, "refitted": 1})


def check_refittable(bundle: Bundle) -> tuple[Compiled, dict[str, Path]]:
    """The engines of a bundle, if they can be given other weights on this machine."""
    flavor = _flavor_of_engines(bundle)
    compiled = compiled_for(bundle, flavor.name)
    if compiled.flags.get("refit") is not True:
        raise BundleError(
            f"the engines of {bundle.root} were built without --refit: their weights are fixed",
            "Build engines for the new student itself: leave out --refit-from.",
        )
    device = this_device()
    if device is None:
        raise RuntimeFailure(
            "refitting opens the engines, which needs their GPU and its driver; none was found",
            "Run this command on the device.",
        )
    plans = {name: check_engine(bundle, compiled, name, flavor, device) for name in compiled.graphs}
    return compiled, plans


def easier(request: EngineRequest, workspace_mb: int) -> EngineRequest | None:
    """The next rung down after memory ran out with `workspace_mb`, or None at the bottom.

    One optimization level less (fewer tactics are tried) and half the workspace; from level 1 on
    half the workspace alone. 0 means that no limit was set, as where RTX builds without a GPU.
    """
    half = max(_LEAST_WORKSPACE_MB, workspace_mb // 2) if workspace_mb else 0
    if request.optimization_level > 1:
        level = request.optimization_level - 1
        return replace(request, optimization_level=level, workspace_mb=half)
    return replace(request, workspace_mb=half) if half < workspace_mb else None


def _build(name: str, request: EngineRequest, observer: Observer) -> dict[str, Any]:
    """Build one engine, with easier settings each time memory runs out; its report."""
    attempts = 0
    while True:
        attempts += 1
        try:
            report = _run(name, request, observer)
        except _OutOfMemory as failure:
            lower = easier(request, failure.workspace_mb)
            if lower is None:
                raise _memory_error(name, request, failure) from failure
            observer.on_note(_what_changed(name, request, lower, failure))
            request = lower
        else:
            settings = {"optimization_level": request.optimization_level, "attempts": attempts}
            return {**report, **settings}


class _OutOfMemory(Exception):
    def __init__(self, text: str, workspace_mb: int) -> None:
        super().__init__(text)
        self.workspace_mb = workspace_mb


def _run(name: str, request: EngineRequest, observer: Observer) -> dict[str, Any]:
    """One child process, from its request to its report."""
    told: dict[str, dict[str, Any]] = {"workspace": {"megabytes": request.workspace_mb}}
    warnings = 0
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        with _child(request, log) as process:
            assert process.stdout is not None
            for line in process.stdout:
                event = json.loads(line)
                kind = event.pop("event")
                told[kind] = event
                if kind == "progress":
                    observer.on_progress(event["fraction"], f"{name}: {event['phase']}")
                elif kind == "log":
                    warnings += 1
                    if _ABOUT_NUMBERS.search(event["text"]):
                        observer.on_note(f"{name}: TensorRT warns: {event['text'][:300]}")
            code = process.wait()
        log.seek(0)
        last_lines = log.read()[-2000:].strip().splitlines()[-3:]
    if code == OK and "result" in told:
        return {**told["result"], "builder_warnings": warnings}
    error = told.get("error", {})
    text = error.get("text") or "; ".join(last_lines) or f"its process ended with {code}"
    if code in (OUT_OF_MEMORY, _KILLED) or (code < 0 and is_memory_error(text)):
        # The kernel's out-of-memory killer leaves no message.
        reason = text if code != _KILLED else "the system killed the builder"
        raise _OutOfMemory(reason, told["workspace"]["megabytes"])
    raise _failure(name, code, text, error.get("next_step"))


@contextlib.contextmanager
def _child(request: EngineRequest, log: IO[str]) -> Iterator[subprocess.Popen[str]]:
    # Lazy loading keeps kernels that are never run out of GPU memory.
    environment = {**os.environ, "CUDA_MODULE_LOADING": "LAZY"}
    environment.pop(POLYGRAPHY_RTX, None)
    process = subprocess.Popen(
        child_command(CHILD, request.to_json()),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        encoding="utf-8",
        env=environment,
    )
    with process:
        try:
            yield process
        except BaseException:
            process.kill()  # leaving the block waits for it
            raise


def _failure(name: str, code: int, text: str, next_step: str | None) -> TiueError:
    if code == NOT_HALF:
        return ParityError(
            f"{name}: {text}, but the bundle says fp16: no engine was made",
            "Export again: tiue-export onnx --ckpt STUDENT --precision fp16 --out BUNDLE",
        )
    if code == NOT_INT8:
        return ParityError(
            f"{name}: {text}, but the bundle says w8a8: no engine was made",
            "Quantize again with this version of tiue-export.",
        )
    if code == NOT_PARSED:
        return BundleError(text, "Export again with this version, or use a newer TensorRT.")
    if code == NO_GPU:
        return RuntimeFailure(f"{name}: {text}", "Run this command on the device.")
    if os.strerror(errno.ENOSPC) in text:
        return ResourceError(
            f"the disk is full: TensorRT could not build {name}",
            "Free some space. Engines that were finished are kept: the same command goes on from "
            "there.",
        )
    return RuntimeFailure(
        f"TensorRT could not build {name}: {text[:600]}",
        next_step or "Try --optimization-level 1; `tiue-export doctor` shows versions and GPU.",
    )


def _memory_error(name: str, request: EngineRequest, failure: _OutOfMemory) -> ResourceError:
    limit = f" and {failure.workspace_mb} MB of workspace" if failure.workspace_mb else ""
    # NvMapMemAlloc fails on Jetson although memory is free: boards report that only a restart helps
    # (audio.cpp#12).
    fragmented = "nvmap" in str(failure).lower()
    return ResourceError(
        f"memory ran out while building {name}, at optimization level "
        f"{request.optimization_level}{limit}: {str(failure)[:300]}",
        "Restart the device: its GPU memory is in pieces."
        if fragmented
        else "Close other programs (on a Jetson the desktop too) or add swap. Engines that were "
        "finished are kept: the same command goes on from there.",
    )


def _what_changed(
    name: str, request: EngineRequest, lower: EngineRequest, failure: _OutOfMemory
) -> str:
    changes = []
    if lower.optimization_level != request.optimization_level:
        levels = f"{request.optimization_level} -> {lower.optimization_level}"
        changes.append(f"optimization level {levels}")
    if lower.workspace_mb:
        changes.append(f"workspace {failure.workspace_mb} -> {lower.workspace_mb} MB")
    reason = str(failure)[:120]
    return f"{name}: memory ran out ({reason}); trying again with {', '.join(changes)}"


def _engine(name: str, report: Mapping[str, Any]) -> GraphForm:
    file = f"{name}.plan"
    return GraphForm(file, (file,), report, peak_memory_bytes=int(report["peak_memory_bytes"]))


def _flavor_of_engines(bundle: Bundle) -> Flavor:
    found = [name for name, folder in FOLDERS.items() if folder in bundle.manifest.compiled]
    if not found:
        raise BundleError(
            f"{bundle.root} has no TensorRT engines to refit",
            f"Build them: {command_line('trt', '--bundle', bundle.root, '--refit')}",
        )
    return load_flavor(found[0] if len(found) == 1 else "auto")


def _check_same_graphs(bundle: Bundle, new: Bundle) -> None:
    if bundle.root.resolve() == new.root.resolve():
        raise UsageError("--refit-from names the bundle itself; expected another student's")
    for name, record in bundle.manifest.graphs.items():
        other = new.manifest.graphs.get(name)
        if other is None:
            differs = "is missing"
        elif other.precision != record.precision:
            differs = f"is {other.precision} in place of {record.precision}"
        elif (other.inputs, other.outputs) != (record.inputs, record.outputs):
            differs = "has other inputs or outputs"
        else:
            continue
        raise BundleError(
            f"{new.root} does not fit the engines of {bundle.root}: {name} {differs}",
            "Export the new student with the same options, or build engines for it.",
        )

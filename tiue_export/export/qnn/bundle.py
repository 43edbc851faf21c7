"""Bundle -> the same bundle with context binaries for one HTP: qnn-v75/GRAPH.onnx and its binary.

Qualcomm's compiler makes them on x86-64 Linux, in half precision, from the ONNX files; each is then
run in Qualcomm's emulator on the bundle's captured inputs. GRAPH.onnx is a small ONNX file whose
only node is the compiled graph: any ONNX Runtime with the QNN provider opens it, on Android too.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tiue_export.bundle.chain import LATENTS
from tiue_export.bundle.manifest import Compiled, Manifest, ParityRecord
from tiue_export.bundle.read import Bundle
from tiue_export.bundle.write import link_or_copy
from tiue_export.errors import (
    ResourceError,
    RuntimeFailure,
    TiueError,
    UnsupportedModelError,
    UsageError,
)
from tiue_export.export.backend import (
    Backend,
    Convert,
    GraphForm,
    Workshop,
    compile_form,
    form_identity,
)
from tiue_export.proof.conditioning import measure_conditioning
from tiue_export.proof.gates import accept_loss
from tiue_export.proof.parity import load_reference
from tiue_export.registry.backends import open_runtime
from tiue_export.registry.packages import require
from tiue_export.sampling.plan import steps_within
from tiue_export.specs import CONTROLNET, STEPS, UNET_GRAPHS, RuntimeOptions
from tiue_export.system.child_process import child_command
from tiue_export.system.command_line import command_line
from tiue_export.system.owned_path import temporary_folder
from tiue_export.system.progress import Observer
from tiue_export.system.qnn_provider import NEEDS, qnn_versions
from tiue_export.system.snapdragon import DEFAULT_SOC, SOCS

from .compile_process import OK, CompileRequest

CHILD = "tiue_export.export.qnn.compile_process"
# Not 1: what it makes of some decoders crashes the emulator (SDK 2.51), and cannot be proven.
OPTIMIZATIONS = (2, 3)
TIMESTEPS = 1000  # of the schedule: rows of the table that they are looked up in
_KILLED = -9
# As the provider names what it cannot take.
_UNSUPPORTED = re.compile(r"name: (?P<name>[^,]*), type: (?P<type>\w+)")
_NO_ROOM = "Failed to write context cache file"
_NO_MEMORY = re.compile(r"MEM_ALLOC|bad_alloc|out of memory", re.IGNORECASE)


def folder_of(soc: str) -> str:
    """Where the form for a chip lies in a bundle: one for each HTP architecture."""
    return f"qnn-{SOCS[soc].htp}"


@dataclass(frozen=True)
class QnnOptions:
    """For which chip (`SOCS`); `optimization` 2 compiles fastest, 3 runs fastest."""

    soc: str = DEFAULT_SOC
    optimization: int = 3

    def __post_init__(self) -> None:
        if self.optimization not in OPTIMIZATIONS:
            raise UsageError(
                f"--optimization is {self.optimization}; expected 2 or 3",
                "Leave it out for 3, the longest search.",
            )


def compile_qnn(
    bundle: Bundle,
    options: QnnOptions | None = None,
    *,
    force: bool = False,
    allow_parity_loss: bool = False,
    observer: Observer | None = None,
) -> Bundle:
    """Compile every graph and prove it in the emulator on the bundle's reference; see
    `compile_form`.
    """
    return compile_form(
        bundle,
        QnnBackend(options or QnnOptions()),
        force=force,
        allow_parity_loss=allow_parity_loss,
        observer=observer,
    )


@dataclass(frozen=True)
class QnnBackend(Backend):
    """A child process compiles each graph; the emulator proves all of them."""

    options: QnnOptions
    runtime: ClassVar[str] = "qnn"
    verb: ClassVar[str] = "compile"
    in_child: ClassVar[bool] = True

    @property
    def title(self) -> str:  # type: ignore[override]
        """With the architecture: a bundle may have several."""
        return f"contexts for HTP {SOCS[self.options.soc].htp}"

    @property
    def folder(self) -> str:
        """One for each HTP architecture."""
        return folder_of(self.options.soc)

    def if_lost(self, failed: ParityRecord) -> str:
        """Half precision is all there is."""
        return accept_loss()

    def check(self, bundle: Bundle) -> None:
        """Qualcomm's package must be there, and a table hold the timesteps."""
        require("compiling for Snapdragon", NEEDS, "qnn")
        if not bundle.manifest.plan.one_pass:
            require("compiling a model in several passes", ("onnx",), "export")
            _check_timesteps(bundle)

    def form(self, bundle: Bundle) -> Compiled:
        """Contexts for one architecture, in half precision."""
        soc = SOCS[self.options.soc]
        target = {"htp": soc.htp, "soc": self.options.soc, "soc_model": str(soc.model)}
        flags: dict[str, str | bool | int | float] = {"precision": "fp16"}
        flags["optimization"] = self.options.optimization
        flags["decoder_steps"] = decoder_steps(bundle.manifest)
        return Compiled("qnn", sdk_version(), target, flags, {})

    def identity(self, bundle: Bundle, graph: str) -> str:
        """By the ONNX files, the chip, the search and Qualcomm's version."""
        form = self.form(bundle)
        return form_identity(
            bundle, graph, version=form.version, target=dict(form.target), flags=dict(form.flags)
        )

    @contextlib.contextmanager
    def converter(self, workshop: Workshop) -> Iterator[Convert]:
        """Qualcomm's compiler, in a process of its own."""
        yield lambda graph: self._compile(workshop, graph)

    def trials(self) -> tuple[RuntimeOptions, ...]:
        """The emulator, or the processor itself where this is one."""
        return (RuntimeOptions(device=SOCS[self.options.soc].htp),)

    def conclude(self, bundle: Bundle, records: Sequence[ParityRecord]) -> list[ParityRecord]:
        """Whether the prompt still counts, which published NPU packages were found to lose."""
        latents = next((record for record in records if record.subject == LATENTS), None)
        if latents is None:
            return []
        exact = open_runtime("ort", bundle, RuntimeOptions(device="cpu"))
        try:
            record = measure_conditioning(bundle, exact, latents, load_reference(bundle))
        finally:
            exact.close()
        return [] if record is None else [record]

    def _compile(self, workshop: Workshop, graph: str) -> GraphForm:
        with _source(workshop, graph) as source:
            return self._made(workshop, graph, source)

    def _made(self, workshop: Workshop, graph: str, source: Path) -> GraphForm:
        soc = SOCS[self.options.soc]
        context = workshop.folder / f"{graph}.onnx"
        request = CompileRequest(
            onnx=str(source.resolve()),
            context=str(context.resolve()),
            htp=soc.htp[1:],
            model=soc.model,
            optimization=self.options.optimization,
            sizes={STEPS: decoder_steps(workshop.bundle.manifest)},
        )
        report = compiled(workshop.bundle, graph, request)
        files = sorted(file.name for file in workshop.folder.glob(f"{graph}*"))
        peak = int(report.pop("peak_memory_bytes"))
        return GraphForm(context.name, files, report, peak_memory_bytes=peak)


def _check_timesteps(bundle: Bundle) -> None:
    """Refuse what a table of timesteps does not hold: rectified flow's time is continuous."""
    for timestep in bundle.manifest.plan.timesteps:
        if not (float(timestep).is_integer() and 0 <= timestep < TIMESTEPS):
            raise UnsupportedModelError(
                f"{bundle.root} draws at timestep {timestep:g}; an HTP looks timesteps up, whole "
                f"ones below {TIMESTEPS}",
                "Other processors run it: " + command_line("openvino", "--bundle", bundle.root),
            )


def decoder_steps(manifest: Manifest) -> int:
    """How many steps of a loop a decoder's context takes at once: 1, or what the plan allows.

    An HTP has no open axes, and its compiler takes many times as long for more rows.
    """
    plan = manifest.plan
    if plan.one_pass or plan.max_decoder_rows is None:
        return 1
    longest = max(one.rows for one in plan.passes)
    return min(longest, steps_within(plan.max_decoder_rows, plan.copies * (manifest.batch or 1)))


def sdk_version() -> str:
    """Of Qualcomm's SDK in the plug-in: what a context needs at least where it runs."""
    return qnn_versions()[1]


@contextlib.contextmanager
def _source(workshop: Workshop, graph: str) -> Iterator[Path]:
    """The ONNX file to compile: the bundle's own, or a copy that looks its timesteps up."""
    bundle = workshop.bundle
    own = bundle.graph_path(graph)
    if bundle.manifest.plan.one_pass or graph not in (*UNET_GRAPHS, CONTROLNET):
        yield own
        return
    import onnx

    from .time_table import put_time_table

    with temporary_folder(workshop.folder) as folder:
        model = onnx.load(own, load_external_data=False)
        put_time_table(model, TIMESTEPS)
        for file in bundle.manifest.graphs[graph].files:  # weights: links where the disk has them
            if bundle.root / file != own:
                link_or_copy(bundle.root / file, folder / Path(file).name)
        copy = folder / own.name
        onnx.save(model, copy)
        yield copy


def compiled(bundle: Bundle, graph: str, request: CompileRequest) -> dict[str, Any]:
    """One child process, from its request to its report.

    Raises `UnsupportedModelError` for operations that no HTP runs, `ResourceError` without memory,
    `OSError` on a full disk, `RuntimeFailure` for what else the compiler says.
    """
    done = subprocess.run(
        child_command(CHILD, request.to_json()),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    answer = json.loads(lines[-1]) if lines else {}
    if done.returncode == OK and answer:
        return dict(answer)
    last = done.stderr.strip().splitlines()[-1:]
    text = str(answer.get("error") or "".join(last) or f"its process ended with {done.returncode}")
    if _NO_ROOM in text:
        raise OSError(errno.ENOSPC, text)
    raise failure_of(bundle, graph, done.returncode, text, done.stderr)


def failure_of(bundle: Bundle, graph: str, code: int, text: str, log: str) -> TiueError:
    """The error for a compiler that ended with `code`, saying `text` and, natively, `log`."""
    unsupported = {match["type"]: match["name"] for match in _UNSUPPORTED.finditer(log)}
    if unsupported:
        operations = ", ".join(f"{kind} ({name})" for kind, name in unsupported.items())
        return UnsupportedModelError(
            f"{graph} has operations that the HTP does not run: {operations}",
            "Other processors run them: " + command_line("openvino", "--bundle", bundle.root),
        )
    if code == _KILLED or _NO_MEMORY.search(text):
        reason = "the system killed the compiler" if code == _KILLED else text
        return ResourceError(
            f"{graph}: memory ran out while it was compiled ({reason})",
            "Free memory, or export again with --max-decoder-rows 1, for smaller graphs.",
        )
    return RuntimeFailure(
        f"Qualcomm's compiler {sdk_version()} failed in {graph}: {text}",
        "Check `tiue-export doctor`; tested with onnxruntime-qnn 2.7.0.",
    )

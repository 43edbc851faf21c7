"""Bundle -> the same bundle with context binaries for one HTP: qnn-v75/GRAPH.onnx and its binary.

Qualcomm's compiler makes them on x86-64 Linux from the ONNX files, in half precision or quantized
first; each is then run in Qualcomm's emulator on the bundle's captured inputs. GRAPH.onnx is a
small ONNX file whose only node is the compiled graph: any ONNX Runtime with the QNN provider opens
it, on Android too.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tiue_export.bundle.chain import LATENTS
from tiue_export.bundle.manifest import Compiled, Manifest, ParityRecord
from tiue_export.bundle.read import Bundle
from tiue_export.bundle.write import link_or_copy
from tiue_export.errors import UnsupportedModelError, UsageError
from tiue_export.export.backend import (
    Backend,
    Convert,
    GraphForm,
    Workshop,
    compile_form,
    form_identity,
)
from tiue_export.proof.calibration import prompts_sha256
from tiue_export.proof.conditioning import measure_conditioning
from tiue_export.proof.gates import accept_loss
from tiue_export.proof.parity import UNET, WHOLE, load_reference
from tiue_export.proof.quantization_plan import FLOAT, QuantizationPlan, require_same_student
from tiue_export.registry.backends import open_runtime
from tiue_export.registry.packages import require
from tiue_export.sampling.plan import steps_within
from tiue_export.specs import (
    CONTROLNET,
    STEPS,
    TEXT_ENCODER,
    UNET_GRAPHS,
    VAE_DECODER,
    RuntimeOptions,
)
from tiue_export.system.command_line import command_line
from tiue_export.system.owned_path import temporary_folder
from tiue_export.system.progress import Observer, stage
from tiue_export.system.qnn_provider import NEEDS, qnn_versions
from tiue_export.system.snapdragon import SOCS

from .calibration_feeds import feeds_files, record_feeds
from .child import COMPILE, QUANTIZE, ask
from .compile_process import CompileRequest
from .options import NOTHING, QnnOptions, folder_of
from .quantize_process import QuantizeRequest

TIMESTEPS = 1000  # of the schedule: rows of the table that they are looked up in


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
    options, observer = options or QnnOptions(), observer or Observer()
    bundle = compile_form(
        bundle,
        QnnBackend(options),
        force=force,
        allow_parity_loss=allow_parity_loss,
        observer=observer,
    )
    if options.prove == NOTHING:
        words = ("parity", bundle.root, "--runtime", "qnn", "--device", SOCS[options.soc].htp)
        observer.on_note(f"no context was run: prove them with {command_line(*words)}")
    return bundle


@dataclass(frozen=True)
class QnnBackend(Backend):
    """A child process compiles each graph; the emulator proves all of them."""

    options: QnnOptions
    runtime: ClassVar[str] = "qnn"
    verb: ClassVar[str] = "compile"
    in_child: ClassVar[bool] = True
    keeps_finished: ClassVar[bool] = True

    @property
    def title(self) -> str:  # type: ignore[override]
        """With the architecture: a bundle may have several."""
        return f"contexts for HTP {SOCS[self.options.soc].htp}"

    @property
    def folder(self) -> str:
        """One for each HTP architecture."""
        return folder_of(self.options.soc)

    def if_lost(self, failed: ParityRecord) -> str:
        """More bits, where there are some."""
        finer = {"w8a8": "--precision w8a16, or a --plan that keeps more layers in half"}
        finer["w8a16"] = "--precision fp16"
        return accept_loss(finer.get(self.options.precision, ""))

    def check(self, bundle: Bundle) -> None:
        """Qualcomm's package must be there, a table hold the timesteps, and what is quantized draw
        pictures.
        """
        require("compiling for Snapdragon", NEEDS, "qnn")
        if self.options.format.quantized:
            require("quantizing", ("onnx", "onnxruntime"), "export")
            _check_quantizable(bundle, self.options)
        if not bundle.manifest.plan.one_pass:
            require("compiling a model in several passes", ("onnx",), "export")
            _check_timesteps(bundle)

    def form(self, bundle: Bundle) -> Compiled:
        """Contexts for one architecture, in one number format."""
        options, soc = self.options, SOCS[self.options.soc]
        target = {"htp": soc.htp, "soc": options.soc, "soc_model": str(soc.model)}
        flags: dict[str, str | bool | int | float] = {"precision": options.precision}
        flags["optimization"] = options.optimization
        flags["decoder_steps"] = decoder_steps(bundle.manifest)
        if options.format.quantized:
            flags["calibration_prompts"] = len(options.prompts)
            flags["calibration_sha256"] = prompts_sha256(options.prompts)
        if options.plan is not None:
            flags["plan_sha256"] = hashlib.sha256(options.plan.to_json().encode()).hexdigest()
        return Compiled("qnn", sdk_version(), target, flags, {})

    def identity(self, bundle: Bundle, graph: str) -> str:
        """By the ONNX files, the chip, the search and Qualcomm's version."""
        form = self.form(bundle)
        return form_identity(
            bundle, graph, version=form.version, target=dict(form.target), flags=dict(form.flags)
        )

    @contextlib.contextmanager
    def converter(self, workshop: Workshop) -> Iterator[Convert]:
        """ONNX Runtime's quantization and Qualcomm's compiler, each in a process of its own."""
        if not self.options.format.quantized:
            yield lambda graph: self._compile(workshop, graph)
            return
        with temporary_folder(workshop.folder) as feeds:
            prompts = self.options.prompts
            with stage(workshop.observer, f"draw {len(prompts)} prompts"):
                on_prompt = workshop.observer.steps_of("draw prompts")
                steps = decoder_steps(workshop.bundle.manifest)
                record_feeds(workshop.bundle, prompts, feeds, steps, on_prompt)
            yield lambda graph: self._quantize(workshop, graph, feeds)

    def trials(self) -> tuple[RuntimeOptions, ...]:
        """The emulator, or the processor itself where this is one."""
        if self.options.prove == NOTHING:
            return ()
        return (RuntimeOptions(device=SOCS[self.options.soc].htp),)

    def scope(self) -> str:
        """What was asked for: an emulator takes hours for all of Stable Diffusion."""
        return UNET if self.options.prove == UNET else WHOLE

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

    def _quantize(self, workshop: Workshop, graph: str, feeds: Path) -> GraphForm:
        layers = () if self.options.plan is None else self.options.plan.layers
        kept = [each.name for each in layers if each.graph == graph and each.mode == FLOAT]
        with _source(workshop, graph) as source, temporary_folder(workshop.folder) as folder:
            request = QuantizeRequest(
                onnx=str(source.resolve()),
                quantized=str(folder.resolve() / f"{graph}.onnx"),
                feeds=feeds_files(feeds, graph),
                precision=self.options.precision,
                half=kept,
                sizes={STEPS: decoder_steps(workshop.bundle.manifest)},
            )
            report = ask(workshop.bundle, graph, QUANTIZE, request)
            return self._made(workshop, graph, Path(request.quantized), report)

    def _compile(self, workshop: Workshop, graph: str) -> GraphForm:
        with _source(workshop, graph) as source:
            return self._made(workshop, graph, source, {})

    def _made(
        self, workshop: Workshop, graph: str, source: Path, before: dict[str, Any]
    ) -> GraphForm:
        """Compile `source`; the report tells of what was done `before` too."""
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
        report = ask(workshop.bundle, graph, COMPILE, request)
        files = sorted(file.name for file in workshop.folder.glob(f"{graph}*"))
        peaks = [int(each.pop("peak_memory_bytes")) for each in (before, report) if each]
        return GraphForm(context.name, files, {**before, **report}, peak_memory_bytes=max(peaks))


def _check_quantizable(bundle: Bundle, options: QnnOptions) -> None:
    """Refuse what cannot be drawn to measure ranges on, or has graphs in half already."""
    manifest = bundle.manifest
    lacking = [name for name in (TEXT_ENCODER, VAE_DECODER) if name not in manifest.graphs]
    if lacking:
        raise UsageError(
            f"{options.precision} is calibrated by drawing, and {bundle.root} has no {lacking[0]}",
            "Export the bundle with --base and the pipeline folder that holds it.",
        )
    if CONTROLNET in manifest.graphs:
        raise UsageError(
            f"{options.precision} is calibrated by drawing prompts, and {bundle.root} has a "
            "ControlNet, which needs pictures too",
            "Leave --precision out: half precision needs no calibration.",
        )
    halves = [name for name, graph in manifest.graphs.items() if graph.precision != "fp32"]
    if halves:
        raise UsageError(
            f"{halves[0]} of {bundle.root} is in {manifest.graphs[halves[0]].precision}; "
            f"{options.precision} is made of float32 graphs",
            "Export the bundle again with --precision fp32, and without --vae-precision.",
        )
    if options.plan is not None:
        require_same_student(options.plan, manifest, str(bundle.root))
        _check_layers(bundle, options.plan)


def _check_layers(bundle: Bundle, plan: QuantizationPlan) -> None:
    """Refuse a plan that keeps layers in float which are not there: they would be quantized."""
    import onnx

    for graph in UNET_GRAPHS:
        model = onnx.load(bundle.graph_path(graph), load_external_data=False)
        known = {node.name for node in model.graph.node}
        for layer in plan.layers:
            if layer.graph == graph and layer.mode == FLOAT and layer.name not in known:
                raise UsageError(
                    f"the plan keeps {layer.name} in float, which {graph} does not have",
                    "Correct its name, or make the plan again: quantize --plan-only --save-plan.",
                )


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

"""Student -> verified ONNX bundle: export every graph, capture the reference, measure each hop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tiue_export.bundle.chain import LATENTS, SCALED_LATENTS, chain_of, scaled_latents
from tiue_export.bundle.manifest import GraphRecord, ParityRecord
from tiue_export.bundle.read import (
    MANIFEST_FILE,
    Bundle,
    open_bundle,
    records_below,
)
from tiue_export.bundle.write import check_target, new_bundle
from tiue_export.drawing.vae_tiles import first_tile, tile_size
from tiue_export.export.contract import (
    GRAPH_GROUPS,
    gentler_options,
    new_manifest,
    write_parts,
    write_reference,
)
from tiue_export.export.onnx.write import MODEL_FILE, OPSET, onnx_from_graph
from tiue_export.graphs.build import Graph, build_graphs, taking_pictures
from tiue_export.graphs.options import ExportOptions
from tiue_export.graphs.shapes import with_vae_precision
from tiue_export.proof.gates import accept_loss, weakest
from tiue_export.proof.half_range import (
    AUDIT_FILE,
    Float32Parts,
    OverflowAudit,
    float32_parts,
    node_path,
)
from tiue_export.proof.parity import (
    JUDGED_VALUES,
    for_gain,
    measure_graph,
    measure_loop,
    parity_record,
    require_passed,
    with_dtypes,
)
from tiue_export.reference.capture import Capture, measure_half_arithmetic
from tiue_export.reference.half_audit import RangeRecorder, audit_student
from tiue_export.registry.backends import open_runtime
from tiue_export.registry.packages import require
from tiue_export.specs import (
    RUNNING_ORDER,
    UNET_DECODER,
    VAE_DECODER,
    VAE_ENCODER,
    VAE_GRAPHS,
    Runtime,
    RuntimeOptions,
)
from tiue_export.student.model import Student
from tiue_export.system.memory import return_freed_memory
from tiue_export.system.progress import Observer, stage

_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy")


def export_onnx(
    student: Student,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    force: bool = False,
    allow_parity_loss: bool = False,
    audit: bool = True,
    audit_prompts: Sequence[str] = (),
    observer: Observer | None = None,
) -> Bundle:
    """Export `student` to a bundle at `out` and return it, verified.

    An fp16 export first audits for overflow, in the float32 run that captures the reference and on
    `audit_prompts`, and keeps in float32 what half precision might not carry. Every graph is run by
    ONNX Runtime on captured inputs and held against the fp32 student; a gate that fails raises
    `ParityError` and leaves nothing, unless `allow_parity_loss`.
    """
    options, observer = options or ExportOptions(), observer or Observer()
    require("checking an export", ("onnxruntime",), "export")
    check_target(out, force=force)
    student = taking_pictures(student, options)
    options = with_vae_precision(student, options)
    with new_bundle(out, force=force) as folder:
        tokenizer = write_parts(student, options, folder)
        recorder = RangeRecorder(student, options, _audited(options) if audit else ())
        captured = write_reference(student, options, tokenizer, folder, recorder, observer)
        found = None
        if recorder.watched:
            if audit_prompts:
                with stage(observer, f"audit on {len(audit_prompts)} prompts"):
                    list(audit_student(student, options, tokenizer, audit_prompts, recorder))
            found = _audit(recorder, captured.reference.inputs, audit_prompts, folder)
            options = replace(options, float32=_joined(options.float32, recorder))
        graphs, modules = _export_graphs(student, options, folder, found, observer)
        bundle = Bundle(folder, new_manifest(student, options, graphs, folder, _TOOLS))
        records = [*captured.hops, *_measure(bundle, captured, modules, observer)]
        if not allow_parity_loss:
            require_passed(records, accept_loss(gentler_options(options)))
        lost = any(not record.passed for record in records)
        manifest = replace(bundle.manifest, parity=tuple(records), parity_loss_allowed=lost)
        (folder / MANIFEST_FILE).write_text(manifest.to_json(), "utf-8")
    return open_bundle(out)


def _audited(options: ExportOptions) -> tuple[str, ...]:
    """The graphs whose precision an audit decides; a VAE precision that was chosen stands."""
    if options.precision != "fp16":
        return ()
    chosen = options.vae_precision != "auto"
    return tuple(name for name in RUNNING_ORDER if not (chosen and name in VAE_GRAPHS))


def _audit(
    recorder: RangeRecorder, inputs: str, prompts: Sequence[str], folder: Path
) -> OverflowAudit:
    """Write and return the audit's summary."""
    more = f"; {len(prompts)} more prompt(s)" if prompts else ""
    graphs = tuple(recorder.ranges(name).audit() for name in recorder.watched)
    audit = OverflowAudit(inputs + more, graphs)
    (folder / AUDIT_FILE).parent.mkdir(parents=True, exist_ok=True)
    (folder / AUDIT_FILE).write_text(audit.to_json(), "utf-8")
    return audit


def _joined(chosen: Float32Parts, recorder: RangeRecorder) -> Float32Parts:
    """What the caller keeps in float32, and what the audit found."""
    found = float32_parts(recorder.ranges(name) for name in recorder.watched)
    names = {*chosen.modules, *found.modules}
    return Float32Parts(
        {name: chosen.of(name) | found.of(name) for name in names}, chosen.tensors | found.tensors
    )


def _export_graphs(
    student: Student,
    options: ExportOptions,
    folder: Path,
    audit: OverflowAudit | None,
    observer: Observer,
) -> tuple[dict[str, GraphRecord], dict[str, Graph]]:
    """Write every graph; returns their records, and the modules of those in half precision."""
    largest = {} if audit is None else {g.graph: g.max_abs_in_half for g in audit.graphs}
    records, modules = {}, {}
    for group in GRAPH_GROUPS:
        for graph in build_graphs(student, options, only=group):
            name = graph.spec.name
            record = _export_graph(graph, folder, observer)
            records[name] = replace(record, max_abs_in_half=largest.get(name))
            if graph.precision != "fp32":
                modules[name] = graph
    return records, modules


def _export_graph(graph: Graph, folder: Path, observer: Observer) -> GraphRecord:
    name = graph.spec.name
    with stage(observer, f"export {name}") as running:
        onnx_from_graph(graph, folder / name)
        files = records_below(folder, name)
        running.size_bytes = sum(record.size_bytes for record in files.values())
    return GraphRecord(
        path=f"{name}/{MODEL_FILE}",
        inputs=graph.spec.inputs,
        outputs=graph.spec.outputs,
        precision=graph.precision,
        opset=OPSET,
        files=files,
        float32_modules=tuple(sorted(map(node_path, graph.float32))),
    )


def _measure(
    bundle: Bundle, captured: Capture, modules: dict[str, Graph], observer: Observer
) -> list[ParityRecord]:
    """Each graph on the student's own inputs, and all graphs as one chain from the token ids on.

    One graph is open at a time, and serves both: at full size two would not fit beside torch.
    `modules` are run by torch in their own half precision: ONNX Runtime's CPU provider has few
    half-precision kernels and computes most of an fp16 graph in float32, so it alone would prove
    the weights but neither the arithmetic nor the range. It has no bf16 kernels at all.
    """
    known, inputs = captured.reference.arrays, captured.reference.inputs
    overall, links = bundle.manifest.precision, chain_of(bundle.manifest.plan)
    graphs: list[ParityRecord] = []
    chain: list[ParityRecord] = []
    pool = dict(known)
    for name, (feeds, expected) in captured.graph_io.items():
        precision = bundle.manifest.graphs[name].precision
        kind, spec = weakest(overall, precision), bundle.spec(name)
        with stage(observer, f"verify {name}"):
            if name in modules:
                graphs.append(measure_half_arithmetic(modules.pop(name), feeds, expected, inputs))
                return_freed_memory()
            if precision == "bf16":
                continue
            with _ort(bundle) as runtime:
                typed, hop = with_dtypes(spec, feeds), f"ONNX {precision}"
                graphs.append(measure_graph(runtime, spec, typed, expected, hop, kind, inputs))
                if not bundle.manifest.plan.one_pass or name == VAE_ENCODER:
                    continue  # its chain is the loop below, or it stands before all chains
                outputs = runtime.run(name, with_dtypes(spec, pool))
        values = links.values(name, outputs)
        pool.update(values)
        for value in JUDGED_VALUES:
            if value in values:
                hop, made = f"ONNX {overall} chain", values[value].astype("float32")
                record = parity_record(hop, value, known[value], made, kind, inputs)
                chain.append(for_gain(record, bundle.manifest.plan))
        if LATENTS in values and VAE_DECODER in bundle.manifest.graphs:
            scaled = scaled_latents(values[LATENTS], bundle.manifest.vae_scaling_factor)
            pool[SCALED_LATENTS] = first_tile(scaled, tile_size(bundle.spec(VAE_DECODER)))
    if not bundle.manifest.plan.one_pass:
        with stage(observer, "verify loop"), _ort(bundle) as runtime:
            hop = f"ONNX {overall}"
            on_step = observer.steps_of("verify loop")
            chain.append(measure_loop(bundle, runtime, captured.reference, hop, on_step))
    judged = (
        for_gain(record, bundle.manifest.plan) if record.subject == UNET_DECODER else record
        for record in graphs
    )
    return [*judged, *chain]


@contextmanager
def _ort(bundle: Bundle) -> Iterator[Runtime]:
    runtime = open_runtime("ort", bundle, RuntimeOptions(device="cpu", low_memory=True))
    try:
        yield runtime
    finally:
        runtime.close()

"""Float bundle + captured data -> quantized bundle: plan, graphs, verdict; or a reason why not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tiue_export.bundle.read import Bundle, open_bundle
from tiue_export.bundle.write import new_bundle
from tiue_export.errors import UsageError, unknown_name
from tiue_export.export.openvino import OpenvinoOptions, compile_openvino
from tiue_export.proof.calibration import CalibrationData
from tiue_export.proof.quantization import (
    BACKENDS,
    FASTER,
    KINDS,
    ONNX,
    OPENVINO,
    PARTS,
    SMALLER,
    TEXT,
    UNET,
    VAE,
    MeasuredPlan,
    Point,
    Quantized,
    QuantizeOptions,
    Verdict,
)
from tiue_export.proof.quantization_plan import (
    W8A8,
    WEIGHTS,
    QuantizationPlan,
    joined,
    read_plan,
    require_same_student,
)
from tiue_export.registry.packages import require
from tiue_export.registry.support import require_support
from tiue_export.specs import Feeds
from tiue_export.system.command_line import command_line
from tiue_export.system.progress import Observer, stage

from .analysis import Analyser
from .capture import choose_drawings
from .openvino_int8 import (
    INT4,
    NncfOptions,
    require_nncf,
    write_nncf_graphs,
)
from .parts import Part, part_named
from .quantized_bundle import (
    add_verdict,
    write_quantized_graphs,
)
from .verdict import (
    judge,
    require_worth,
    with_parity,
)


def quantize(
    bundle: Bundle,
    data: CalibrationData,
    out: Path,
    options: QuantizeOptions,
    *,
    force: bool = False,
    observer: Observer | None = None,
) -> Quantized:
    """Make `out` from `bundle`, or raise and leave nothing.

    Raises `ParityError` below the gate (unless `allow_loss`), `RegressionError` when it is not
    faster, or for weights alone not smaller (unless `allow_slower`).
    """
    observer = observer or Observer()
    check_quantize(bundle, options)
    with new_bundle(out, force=force) as folder:
        with stage(observer, "plan"):
            measured = _plan(bundle, data, options, observer)
        plan = measured.plan
        with stage(observer, "write graphs"):
            draft = _write(bundle, plan, data, options, folder, observer)
        with stage(observer, "judge"):
            verdict = _judge(bundle, draft, plan, data, options)
        require_worth(verdict, allow_loss=options.allow_loss, allow_slower=options.allow_slower)
        curve = [dataclasses.asdict(point) for point in measured.curve]
        facts = {**verdict.to_data(), "curve": curve}
        add_verdict(draft, facts, with_parity(draft.manifest, verdict))
    return Quantized(open_bundle(out), plan, verdict, measured.curve)


def make_plan(
    bundle: Bundle, data: CalibrationData, options: QuantizeOptions, observer: Observer
) -> MeasuredPlan:
    """The plan alone, without writing a bundle."""
    check_quantize(bundle, options)
    return _plan(bundle, data, options, observer)


def check_quantize(bundle: Bundle, options: QuantizeOptions) -> None:
    """Refuse what cannot be made of a bundle. Raises what `quantize` raises before any work."""
    if options.backend not in BACKENDS:
        raise unknown_name("backend", options.backend, BACKENDS)
    if options.kind not in (*KINDS, INT4):
        raise unknown_name("kind", options.kind, (*KINDS, INT4))
    if not options.parts:
        raise UsageError(f"--parts is empty; expected {', '.join(PARTS)} or several")
    for part in options.parts:
        if part not in PARTS:
            raise unknown_name("part", part, PARTS)
        if not set(PARTS[part]) <= bundle.manifest.graphs.keys():
            raise UsageError(
                f"{bundle.root} has no {PARTS[part][0]}: there is nothing to quantize of --parts "
                f"{part}",
                f"Leave {part} out of --parts.",
            )
    require_support("quantize", bundle)
    if options.kind == INT4 and options.backend == ONNX:
        raise UsageError(
            "4-bit weights need a newer opset than TensorRT 10.3 reads; they are made for OpenVINO",
            "Add --backend openvino.",
        )
    if options.backend == OPENVINO:
        require_nncf(bundle)
    elif options.judged.runtime == OPENVINO and OPENVINO not in bundle.manifest.compiled:
        raise UsageError(
            f"{bundle.root} has no OpenVINO graphs to compare with",
            "Make them first: " + command_line("openvino", "--bundle", bundle.root),
        )
    if options.backend == OPENVINO and options.judged.runtime != OPENVINO:
        raise UsageError(
            f"a bundle of the openvino backend does not run on {options.judged.runtime}",
            "Leave --runtime out, or make ONNX graphs: --backend onnx.",
        )
    require("quantizing", ("onnx", "onnxruntime", "psutil"), "export")


def _plan(
    bundle: Bundle, data: CalibrationData, options: QuantizeOptions, observer: Observer
) -> MeasuredPlan:
    if options.plan is not None:
        plan = read_plan(options.plan)
        require_same_student(plan, bundle.manifest, str(bundle.root))
        return MeasuredPlan(plan, ())
    kind = WEIGHTS if options.kind == INT4 else options.kind
    plans: list[QuantizationPlan] = []
    points: list[Point] = []
    for part in (name for name in (TEXT, UNET, VAE) if name in options.parts):
        of_part = replace(options.analysis, kind=WEIGHTS if part == TEXT else kind)
        analysis = Analyser(bundle, data, of_part, observer, part).run()
        plans.append(analysis.plan)
        # One curve: what it is of is said by its first part that has one.
        if analysis.selection and not points:
            points = analysis.selection.points
    return MeasuredPlan(joined(plans), tuple(points))


def _write(
    bundle: Bundle,
    plan: QuantizationPlan,
    data: CalibrationData,
    options: QuantizeOptions,
    folder: Path,
    observer: Observer,
) -> Bundle:
    if options.backend == OPENVINO:
        ranged, _ = choose_drawings(data, options.analysis.held_out)

        def feeds(graph: str) -> Iterator[Feeds]:
            part = Part(part_named(graph), bundle, data, options.analysis.threads)
            return part.runs(graph, ranged)

        wanted = NncfOptions(options.kind, feeds)
        return write_nncf_graphs(bundle, plan, wanted, folder, observer)
    draft = write_quantized_graphs(bundle, plan, folder, options.scales)
    if options.judged.runtime != OPENVINO:
        return draft
    weights = str(bundle.manifest.compiled["openvino"].flags["weights"])
    # Its own gates would be those of the reference; the verdict decides on more data.
    return compile_openvino(
        draft, OpenvinoOptions(weights, ("fp32",)), allow_parity_loss=True, observer=observer
    )


def _judge(
    bundle: Bundle,
    draft: Bundle,
    plan: QuantizationPlan,
    data: CalibrationData,
    options: QuantizeOptions,
) -> Verdict:
    _, held_out = choose_drawings(data, options.analysis.held_out)
    # Weights alone cost their unpacking: what they save is memory.
    must_be = FASTER if any(layer.mode == W8A8 for layer in plan.layers) else SMALLER
    judged = replace(options.judged, must_be=None if options.any_speed else must_be)
    return judge(bundle, draft, plan, data, held_out, judged)

"""Checkpoint -> Student ready to export: loaded for its method, key steps measured where asked."""

from __future__ import annotations

from collections.abc import Callable

from tiue_export.graphs.build import taking_pictures
from tiue_export.graphs.options import ExportOptions
from tiue_export.graphs.shapes import shapes_of
from tiue_export.methods.faster import faster_options, with_plan
from tiue_export.methods.load import CheckpointRequest, check_method, load_for_method
from tiue_export.methods.method import AUTO, SamplingOptions
from tiue_export.reference.sharing_cost import auto_options
from tiue_export.registry.support import check_support
from tiue_export.student.model import Student


def check_request(
    verb: str,
    request: CheckpointRequest,
    method: str | None,
    options: SamplingOptions,
    graphs: ExportOptions,
) -> None:
    """Refuse what `verb` cannot make of this request, before anything is read."""
    chosen = check_method(method, options, request.controlnet)
    steered = {"controlnet"} if request.controlnet is not None else set()
    own = frozenset() if chosen is None else chosen.features
    features = own | graphs.features | steered
    for step in (verb, "onnx"):  # what was asked for is refused before a step on the way
        check_support(step, features, request.ckpt)


def load_to_export(
    request: CheckpointRequest,
    method: str | None,
    options: SamplingOptions,
    graphs: ExportOptions,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Student:
    """`load_for_method`, and with key steps "auto" those that cost this model least at its size.

    Raises `UsageError` for a size that the model cannot have.
    """
    student = taking_pictures(load_for_method(request, method, options, on_stage), graphs)
    shapes_of(student, graphs)
    if options.key_steps != AUTO:
        return student

    def tell(done: int, total: int) -> None:
        on_stage(f"key steps: {done} of {total}")

    size = graphs.height, graphs.width
    chosen = auto_options(student, faster_options(options), options.budget, tell, size)
    return with_plan(student, chosen)

"""`tiue-export audit`: how near a student's values come to the limit of half precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from tiue_export.checkpoint.container import check_checkpoint_path
from tiue_export.errors import UsageError
from tiue_export.proof.half_range import GraphAudit, OverflowAudit
from tiue_export.registry.packages import EXPORT_NEEDS, require

from .draw.prompt_file import prompts_in
from .options.audit import AuditRequest
from .report.tables import console, island_lines, overflow_table, print_json


def run(request: AuditRequest) -> None:
    """Audit on the prompts and print each graph's table as it is finished, or one JSON object."""
    require("auditing", EXPORT_NEEDS, "export")
    check_checkpoint_path(request.ckpt)
    if request.top < 1:
        raise UsageError(f"--top is {request.top}; expected 1 or more")
    prompts = _prompts(request)
    graphs: list[GraphAudit] = []
    for graph in _audits(request, prompts):
        graphs.append(graph)
        if not request.as_json:
            console.print(overflow_table([graph], request.top))
            for line in island_lines([graph]):
                console.print(line, markup=False, soft_wrap=True)
    if request.as_json:
        audit = OverflowAudit(f"{len(prompts)} prompt(s), seeded noise", tuple(graphs))
        print_json(dataclasses.asdict(audit))


def _prompts(request: AuditRequest) -> list[str]:
    from tiue_export.proof.parity import PROMPTS

    return prompts_in(request.prompts) or list(PROMPTS)


def _audits(request: AuditRequest, prompts: list[str]) -> Iterator[GraphAudit]:
    from tiue_export.checkpoint.tokenizer_files import tokenizer_of
    from tiue_export.graphs.options import ExportOptions
    from tiue_export.graphs.shapes import shapes_of
    from tiue_export.methods.load import load_student
    from tiue_export.reference.half_audit import audit_student

    options = ExportOptions(height=request.height, width=request.width, hoist=request.hoist)
    student = load_student(
        request.ckpt,
        request.base,
        family=request.family,
        steps=request.steps,
        allow_other_steps=request.allow_other_steps,
        vae=request.vae,
        prediction=request.prediction,
    )
    tokenizer = None
    if student.tokenizer_folder is not None:
        tokenizer = tokenizer_of(student.tokenizer_folder, shapes_of(student, options).tokens)
    for ranges in audit_student(student, options, tokenizer, prompts):
        yield ranges.audit(request.top)

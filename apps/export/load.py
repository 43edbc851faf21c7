"""The checkpoint as its method wants it: a distilled student, or a model in a loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..options.checkpoint import AUTO
from ..options.graphs import ExportRequest

if TYPE_CHECKING:
    from tiue_export.student.model import Student


def load(ckpt: str, export: ExportRequest, on_stage: Callable[[str], None]) -> Student:
    """Load, and merge adapters; `on_stage` hears what is being read."""
    export.check_method()
    return (_load_loop if export.in_loop else _load_student)(ckpt, export, on_stage)


def _load_student(ckpt: str, export: ExportRequest, on_stage: Callable[[str], None]) -> Student:
    from tiue_export.student.load import load_student

    student = load_student(
        ckpt,
        export.base,
        family=export.family,
        steps=export.steps,
        allow_other_steps=export.allow_other_steps,
        vae=export.vae,
        on_stage=on_stage,
    )
    return _with_loras(student, export.lora, on_stage)


def _load_loop(ckpt: str, export: ExportRequest, on_stage: Callable[[str], None]) -> Student:
    from tiue_export.methods.teacher import load_teacher, with_controlnet, with_plan
    from tiue_export.sampling.plan_options import FasterOptions

    auto = export.key_steps == AUTO
    chosen = {
        "scheduler": export.scheduler,
        "steps": export.steps,
        "key_steps": None if auto else export.key_steps,
        "inject": export.inject,
        "guidance": export.guidance,
        "max_decoder_rows": export.max_decoder_rows,
    }
    options = FasterOptions(**{k: v for k, v in chosen.items() if v is not None})  # type: ignore[arg-type]
    teacher = load_teacher(
        ckpt,
        export.base,
        options,
        family=export.family,
        vae=export.vae,
        on_stage=on_stage,
    )
    teacher = _with_loras(teacher, export.lora, on_stage)
    if export.controlnet is not None:
        on_stage("ControlNet")
        teacher = with_controlnet(teacher, Path(export.controlnet))
    if auto:
        from tiue_export.reference.sharing_cost import auto_options

        def told(done: int, total: int) -> None:
            on_stage(f"key steps: {done} of {total}")

        options = auto_options(teacher, options, export.budget, told)
    return with_plan(teacher, options)


def _with_loras(
    student: Student, given: tuple[str, ...], on_stage: Callable[[str], None]
) -> Student:
    if given:
        from tiue_export.checkpoint.lora_file import lora_from
        from tiue_export.student.lora import merge_lora

        for text in given:
            path, scale = lora_from(text)
            on_stage(f"LoRA {path.name}")
            student = merge_lora(student, path, scale)
    return student

"""The shared options that say what is exported: a distilled student, or a model in a loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tiue_export.errors import UsageError, unknown_name
from tiue_export.sampling.plan import check_scheduler

if TYPE_CHECKING:
    from tiue_export.student.model import Student

METHODS = ("tiue", "faster")
AUTO = "auto"
_OF_FASTER = (
    "scheduler",
    "key_steps",
    "inject",
    "guidance",
    "max_decoder_rows",
    "budget",
    "controlnet",
)


@dataclass(frozen=True)
class MethodRequest:
    """`--method` and what belongs to it; None is what was not given."""

    method: str = "tiue"
    scheduler: str | None = None
    key_steps: str | None = None
    inject: str | None = None
    guidance: float | None = None
    max_decoder_rows: int | None = None
    budget: float | None = None
    controlnet: str | None = None
    lora: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse unknown names, and options of one method beside the other."""
        if self.method not in METHODS:
            raise unknown_name("method", self.method, METHODS)
        if self.scheduler is not None:
            check_scheduler(self.scheduler)
        if self.method == "faster":
            if self.budget is not None and self.key_steps != AUTO:
                raise UsageError(
                    "--budget is for --key-steps auto, which chooses within it",
                    "Add --key-steps auto, or leave --budget out.",
                )
            return
        for option in _OF_FASTER:
            if getattr(self, option) is not None:
                flag = "--" + option.replace("_", "-")
                raise UsageError(
                    f"{flag} is for --method faster; a distilled student draws in one pass",
                    f"Add --method faster for an ordinary model, or leave {flag} out.",
                )


@dataclass(frozen=True)
class LoadRequest:
    """What both methods load from: the checkpoint and the options that read it."""

    ckpt: str
    base: str | None = None
    vae: str | None = None
    family: str | None = None
    steps: int | None = None
    allow_other_steps: bool = False


def load(asked: LoadRequest, method: MethodRequest, on_stage: Callable[[str], None]) -> Student:
    """The checkpoint as the method wants it, adapters merged."""
    from tiue_export.student.load import load_student

    method.check()
    if method.method == "tiue":
        student = load_student(
            asked.ckpt,
            asked.base,
            family=asked.family,
            steps=asked.steps,
            allow_other_steps=asked.allow_other_steps,
            vae=asked.vae,
            on_stage=on_stage,
        )
        return _with_loras(student, method.lora, on_stage)
    from tiue_export.methods.teacher import load_teacher, with_controlnet, with_plan
    from tiue_export.sampling.plan_options import FasterOptions

    auto = method.key_steps == AUTO
    given = {
        "scheduler": method.scheduler,
        "steps": asked.steps,
        "key_steps": None if auto else method.key_steps,
        "inject": method.inject,
        "guidance": method.guidance,
        "max_decoder_rows": method.max_decoder_rows,
    }
    options = FasterOptions(**{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
    teacher = load_teacher(
        asked.ckpt,
        asked.base,
        options,
        family=asked.family,
        vae=asked.vae,
        on_stage=on_stage,
    )
    teacher = _with_loras(teacher, method.lora, on_stage)
    if method.controlnet is not None:
        on_stage("ControlNet")
        teacher = with_controlnet(teacher, Path(method.controlnet))
    if auto:
        from tiue_export.reference.sharing_cost import auto_options

        def told(done: int, total: int) -> None:
            on_stage(f"key steps: {done} of {total}")

        options = auto_options(teacher, options, method.budget, told)
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

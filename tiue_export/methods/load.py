"""Checkpoint -> Student with the plan that its method derives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from tiue_export.checkpoint.container import check_container
from tiue_export.checkpoint.lora_file import lora_from
from tiue_export.methods.faster import FasterDiffusion, check_controlnet, with_controlnet
from tiue_export.methods.method import (
    Method,
    SamplingOptions,
    foreign_option,
    method_named,
    refuse_foreign_options,
)
from tiue_export.methods.tiue import Tiue, check_assumed
from tiue_export.sampling.plan import Plan
from tiue_export.student.load import CheckpointFacts, load_model
from tiue_export.student.lora import merge_lora
from tiue_export.student.model import Student

METHODS: Mapping[str, Method] = MappingProxyType({"tiue": Tiue(), "faster": FasterDiffusion()})
DEFAULT_METHOD = "tiue"


@dataclass(frozen=True)
class CheckpointRequest:
    """What is loaded: the checkpoint, what replaces or completes its parts, adapters."""

    ckpt: str
    base: str | None = None
    vae: str | None = None
    family: str | None = None
    lora: tuple[str, ...] = ()
    controlnet: str | None = None


def check_method(
    name: str | None, options: SamplingOptions, controlnet: str | None = None
) -> Method:
    """The method by its name (None: the default), once all that was given means something to it."""
    method = method_named(name or DEFAULT_METHOD, METHODS)
    refuse_foreign_options(method, options, METHODS)
    if controlnet is not None and not method.takes_controlnet:
        takers = [other for other in METHODS.values() if other.takes_controlnet]
        raise foreign_option("--controlnet", method, takers)
    method.check(options)
    return method


def load_for_method(
    request: CheckpointRequest,
    method: str | None,
    options: SamplingOptions,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Student:
    """The checkpoint as a method wants it, adapters merged, a ControlNet added.

    Without a `method` it is taken for a TiUE student, unless its scheduler says that it is none.
    """
    chosen = check_method(method, options, request.controlnet)
    check_additions(request)

    def plan_of(checkpoint: CheckpointFacts) -> Plan:
        if method is None:
            check_assumed(checkpoint)
        return chosen.plan(checkpoint, options)

    student = load_model(
        request.ckpt,
        request.base,
        plan_of,
        family=request.family,
        vae=request.vae,
        on_stage=on_stage,
    )
    return completed(student, request, on_stage)


def check_additions(request: CheckpointRequest) -> None:
    """Refuse adapters and a ControlNet that are not there, before the model is loaded."""
    for text in request.lora:
        check_container(lora_from(text)[0])
    if request.controlnet is not None:
        check_controlnet(Path(request.controlnet))


def completed(
    student: Student, request: CheckpointRequest, on_stage: Callable[[str], None]
) -> Student:
    """A loaded model with the request's adapters merged and its ControlNet added."""
    for text in request.lora:
        path, scale = lora_from(text)
        on_stage(f"LoRA {path.name}")
        student = merge_lora(student, path, scale)
    if request.controlnet is not None:
        on_stage("ControlNet")
        student = with_controlnet(student, Path(request.controlnet))
    return student


def load_student(
    path: str | Path,
    base: str | Path | None = None,
    *,
    family: str | None = None,
    steps: int | None = None,
    allow_other_steps: bool = False,
    without: Collection[str] = (),
    vae: str | Path | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Student:
    """Load a TiUE student in its checkpoint's own dtype, memory-mapped, in eval mode.

    `steps` is K; a checkpoint that records its K (`tiue_steps` in scheduler_config.json or in the
    safetensors metadata) refuses another unless `allow_other_steps`. The other arguments and the
    errors are those of `load_model`.
    """
    options = SamplingOptions(steps=steps, allow_other_steps=allow_other_steps)
    return load_model(
        path,
        base,
        lambda checkpoint: Tiue().plan(checkpoint, options),
        family=family,
        without=without,
        vae=vae,
        on_stage=on_stage,
    )

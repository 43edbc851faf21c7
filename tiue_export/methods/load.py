"""Checkpoint -> Student with the plan that its method derives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from tiue_export.checkpoint.container import check_container
from tiue_export.checkpoint.embedding_file import embedding_from
from tiue_export.checkpoint.lora_file import lora_from
from tiue_export.methods.faster import FasterDiffusion, check_controlnet, with_controlnet
from tiue_export.methods.few_step import FewStep
from tiue_export.methods.method import (
    Method,
    SamplingOptions,
    foreign_option,
    method_named,
    refuse_foreign_options,
)
from tiue_export.methods.recognition import recognition
from tiue_export.methods.tiue import Tiue, check_assumed
from tiue_export.sampling.few_step import METHOD
from tiue_export.sampling.recipes import recipe_named
from tiue_export.student.embedding import add_embedding
from tiue_export.student.load import CheckpointFacts, PlanChoice, load_model
from tiue_export.student.lora import merge_lora
from tiue_export.student.model import Student

METHODS: Mapping[str, Method] = MappingProxyType(
    {method.name: method for method in (Tiue(), FewStep(), FasterDiffusion())}
)
DEFAULT_METHOD = "tiue"
# What a checkpoint may be taken for by its own marks, where nobody says.
_RECOGNISED = (DEFAULT_METHOD, METHOD)


@dataclass(frozen=True)
class CheckpointRequest:
    """What is loaded: the checkpoint, what replaces or completes its parts, adapters, tokens."""

    ckpt: str
    base: str | None = None
    vae: str | None = None
    family: str | None = None
    prediction: str | None = None
    lora: tuple[str, ...] = ()
    embedding: tuple[str, ...] = ()
    controlnet: str | None = None


def check_method(
    name: str | None, options: SamplingOptions, controlnet: str | None = None
) -> Method | None:
    """The method by its name, once all that was given means something to it.

    None: the checkpoint will tell, and what was given means something to a method it may tell.
    """
    if name is None and options.recipe is not None:
        name = METHOD
    method = method_named(name or DEFAULT_METHOD, METHODS)
    known = (method,) if name is not None else tuple(METHODS[each] for each in _RECOGNISED)
    refuse_foreign_options(known, options, METHODS)
    if controlnet is not None and not any(each.takes_controlnet for each in known):
        takers = [other for other in METHODS.values() if other.takes_controlnet]
        raise foreign_option("--controlnet", method, takers)
    for each in known if name is not None else ():
        each.check(options)
    return None if name is None else method


def load_for_method(
    request: CheckpointRequest,
    method: str | None,
    options: SamplingOptions,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Student:
    """The checkpoint as a method wants it, adapters merged, tokens and a ControlNet added.

    Without a `method` its own marks tell: a few-step student by its scheduler, else a TiUE student,
    unless its scheduler says that it is none.
    """
    named = check_method(method, options, request.controlnet)
    check_additions(request)
    student = load_model(
        request.ckpt,
        request.base,
        lambda checkpoint: with_adapter_note(
            plan_choice(checkpoint, named, options), request.lora, checkpoint.name
        ),
        family=request.family,
        vae=request.vae,
        prediction=request.prediction,
        on_stage=on_stage,
    )
    return completed(student, request, on_stage)


def plan_choice(
    checkpoint: CheckpointFacts, named: Method | None, options: SamplingOptions
) -> PlanChoice:
    """The plan by the method that was named, else by the one that the checkpoint tells."""
    mark = None
    method = named or METHODS[DEFAULT_METHOD]
    if named is None:
        told = recognition(checkpoint)
        if told is None:
            check_assumed(checkpoint)
        else:
            method, mark = METHODS[METHOD], told[1]
        refuse_foreign_options((method,), options, METHODS)
        method.check(options)
    plan = method.plan(checkpoint, options)
    notes: tuple[str, ...] = ()
    if mark is not None:
        count = "one step" if plan.steps == 1 else f"{plan.steps} steps"
        notes = (
            f"taken for recipe {plan.recipe} in {count} by {mark}; else say --recipe "
            f"NAME, or --method {' or '.join(name for name in METHODS if name != METHOD)}",
        )
    if plan.noises > 1 and any(one.rows > 1 for one in plan.passes):
        # Measured on the emoji family's LCM: top-1 97 % with every step's own encoder, 2 % at 0,2.
        notes += (
            "steps that add fresh noise share an encoder that never saw it: expect broken pictures "
            "(docs/few-step.md); a tcd recipe with --eta 0 adds none",
        )
    if plan.one_pass and not plan.recipe and checkpoint.recorded_steps is None:
        notes = (
            f"the checkpoint records no K and is taken for a student of K={plan.steps}; a model "
            "that is not distilled draws with --method faster, a few-step student with --recipe "
            "NAME",
        )
    return PlanChoice(plan, notes)


def with_adapter_note(choice: PlanChoice, lora: tuple[str, ...], name: str) -> PlanChoice:
    """Say where a student that is an adapter was named and no adapter was given."""
    recipe = choice.plan.recipe
    if not recipe or lora or recipe_named(recipe).form != "lora":
        return choice
    note = (
        f"recipe {recipe} is of an adapter: none was given by --lora, so {name} must hold it "
        "merged already"
    )
    return replace(choice, notes=(*choice.notes, note))


def check_additions(request: CheckpointRequest) -> None:
    """Refuse adapters, tokens and a ControlNet that are not there, before the model is loaded."""
    for text in request.lora:
        check_container(lora_from(text)[0])
    for text in request.embedding:
        check_container(embedding_from(text)[0])
    if request.controlnet is not None:
        check_controlnet(Path(request.controlnet))


def completed(
    student: Student, request: CheckpointRequest, on_stage: Callable[[str], None]
) -> Student:
    """A loaded model with the request's adapters merged, its tokens and its ControlNet added."""
    for text in request.lora:
        path, scale = lora_from(text)
        on_stage(f"LoRA {path.name}")
        student = merge_lora(student, path, scale)
    for text in request.embedding:
        path, token = embedding_from(text)
        on_stage(f"embedding {path.name}")
        student = add_embedding(student, path, token)
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
    recipe: str | None = None,
    without: Collection[str] = (),
    vae: str | Path | None = None,
    prediction: str | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Student:
    """Load a student in its checkpoint's own dtype, memory-mapped, in eval mode.

    A TiUE student, or with `recipe` the few-step student of that name (`tiue-export recipes`).
    `steps` is K; a checkpoint that records its K (`tiue_steps` in scheduler_config.json or in the
    safetensors metadata) refuses another unless `allow_other_steps`, as a recipe does. The other
    arguments and the errors are those of `load_model`.
    """
    method = METHODS[DEFAULT_METHOD if recipe is None else METHOD]
    options = SamplingOptions(steps=steps, allow_other_steps=allow_other_steps, recipe=recipe)
    return load_model(
        path,
        base,
        lambda checkpoint: plan_choice(checkpoint, method, options),
        family=family,
        without=without,
        vae=vae,
        prediction=prediction,
        on_stage=on_stage,
    )

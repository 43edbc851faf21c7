"""A picture brought back: its parameters, and whether this studio would draw it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiue_export.drawing.picture import parameters_from_png
from tiue_export.errors import UsageError, first_line
from tiue_export.sampling.noise import MAX_SEED

from .choices import Choice, Offer
from .drawing import NOT_STEERED, Steering

# Text chunks are small; what claims more was not written by us.
_LONGEST_PROMPT = 4000


@dataclass(frozen=True)
class Recovered:
    """What to put into the form. `notes` say why the picture may come out differently."""

    prompt: str
    seed: int
    choice: Choice | None
    parameters: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    steering: Steering = NOT_STEERED


def recover(path: Path, offer: Offer) -> Recovered:
    """Read the parameters of a PNG; raises `UsageError` for files that carry none of ours."""
    try:
        parameters = parameters_from_png(path)
    except Exception as error:  # PIL and json raise many kinds on damaged or foreign files
        raise UsageError(f"{path.name} cannot be read as a PNG: {first_line(error)}") from error
    if parameters is None:
        raise UsageError(
            f"{path.name} carries no parameters",
            "Use a PNG as it was downloaded; screenshots and converted pictures lose them.",
        )
    prompt, seed = parameters.get("prompt"), parameters.get("seed")
    notes = []
    if not isinstance(prompt, str) or len(prompt) > _LONGEST_PROMPT:
        raise UsageError(f"{path.name} carries parameters, but no prompt")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
        notes.append("it has no seed: its noise was given as a file")
        seed = 0
    choice = _same_choice(parameters, offer)
    if choice is None:
        model = f"{parameters.get('model')} ({parameters.get('model_hash')})"
        notes.append(f"drawn by {model}, {parameters.get('size')}: none of the bundles here")
    elif choice.precision != parameters.get("precision"):
        notes.append(f"drawn in {parameters.get('precision')}, here in {choice.precision}")
    if parameters.get("prompt_weights"):
        notes.append("its brackets were weights (--prompt-weights); here they are letters")
    return Recovered(prompt, seed, choice, parameters, tuple(notes), _steering(parameters))


def _steering(parameters: Mapping[str, Any]) -> Steering:
    negative, guidance = parameters.get("negative_prompt"), parameters.get("guidance")
    if isinstance(guidance, bool) or not isinstance(guidance, (int, float)):
        guidance = None
    return Steering(
        negative if isinstance(negative, str) and len(negative) <= _LONGEST_PROMPT else "",
        None if guidance is None else float(guidance),
    )


def _same_choice(parameters: Mapping[str, Any], offer: Offer) -> Choice | None:
    """Of the choices with the same weights and size, the one nearest in runtime and precision."""
    runtime = str(parameters.get("runtime")).partition(" ")[0]
    found = [
        choice
        for choice in offer.choices
        if choice.bundle.manifest.source.sha256[:10] == parameters.get("model_hash")
        and choice.size == parameters.get("size")
    ]
    found.sort(key=lambda c: (c.precision != parameters.get("precision"), c.runtime != runtime))
    return found[0] if found else None

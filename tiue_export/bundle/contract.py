"""What the graphs of a bundle take and give, as far as drawing relies on it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tiue_export.bundle.manifest import Manifest
from tiue_export.specs import (
    BATCH,
    CONTROLNET,
    RUNNING_ORDER,
    STEPS,
    TEXT_ENCODER,
    UNET_DECODER,
    UNET_ENCODER,
    VAE_DECODER,
    VAE_ENCODER,
    TensorSpec,
)

_DTYPES = ("float32", "float16", "int64")
_MOST_SIDES = 4
_LONGEST_SIDE = 1 << 20
_OPEN_SIDE = re.compile(rf"(\d{{1,4}}\*)?({BATCH}|{STEPS})")
_CHANNELS = 3


def contract_problem(manifest: Manifest) -> str | None:
    """The first graph or tensor that drawing could not use; None: all are as they must be."""
    outputs = "latents" if manifest.plan.one_pass else "outputs"
    for graph, record in manifest.graphs.items():
        if graph not in RUNNING_ORDER:
            return f"there is no graph {graph!r}; there are: {', '.join(RUNNING_ORDER)}"
        for kind, tensors, needed in (
            ("takes", record.inputs, _TAKES[graph]),
            ("gives", record.outputs, {outputs: 4} if graph == UNET_DECODER else _GIVES[graph]),
        ):
            problem = _tensors_problem(tensors, needed)
            if problem is not None:
                return f"{graph} {kind} {problem}"
        if graph == VAE_ENCODER and [len(spec.shape) for spec in record.outputs] != [4]:
            given = ", ".join(f"{spec.name} {spec.shape}" for spec in record.outputs)
            return f"{graph} gives {given}; expected one tensor of 4 sides"
    for spec in manifest.graphs[VAE_DECODER].outputs if VAE_DECODER in manifest.graphs else ():
        if spec.shape[1] != _CHANNELS:
            return f"{VAE_DECODER} gives {spec.shape}; expected {_CHANNELS} channels"
    return None


# Names and numbers of sides; other tensors are fed by the name that another graph gives them.
_TAKES: Mapping[str, Mapping[str, int]] = {
    TEXT_ENCODER: {"input_ids": 2},
    VAE_ENCODER: {"sample": 4},
    CONTROLNET: {"controlnet_cond": 4},
    UNET_ENCODER: {"sample": 4, "encoder_hidden_states": 3},
    UNET_DECODER: {},
    VAE_DECODER: {"latent_sample": 4},
}
_GIVES: Mapping[str, Mapping[str, int]] = {
    TEXT_ENCODER: {"last_hidden_state": 3},
    VAE_ENCODER: {},
    CONTROLNET: {},
    UNET_ENCODER: {},
    VAE_DECODER: {"sample": 4},
}


def _tensors_problem(tensors: tuple[TensorSpec, ...], needed: Mapping[str, int]) -> str | None:
    if not tensors:
        return "nothing"
    for spec in tensors:
        if spec.dtype not in _DTYPES:
            return f"{spec.name} as {spec.dtype!r}; expected {', '.join(_DTYPES)}"
        sides = needed.get(spec.name)
        if not 1 <= len(spec.shape) <= _MOST_SIDES or sides not in (None, len(spec.shape)):
            return f"{spec.name} {spec.shape}; expected {sides or f'1 to {_MOST_SIDES}'} sides"
        for number, side in enumerate(spec.shape):
            closed = isinstance(side, int) and 1 <= side <= _LONGEST_SIDE
            if not closed and (number or not _OPEN_SIDE.fullmatch(str(side))):
                return (
                    f"{spec.name} {spec.shape}; a side is 1 to {_LONGEST_SIDE:,}, the first may be "
                    f'"{BATCH}" or "{STEPS}"'
                )
    names = [spec.name for spec in tensors]
    lacking = [name for name in needed if names.count(name) != 1]
    return f"{', '.join(names)}; expected one {lacking[0]!r}" if lacking else None

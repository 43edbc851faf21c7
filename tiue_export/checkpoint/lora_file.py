"""A LoRA file -> its adapters by module path: diffusers, peft and kohya names, strictly read.

A LoRA adds scale * up @ down to a layer's weight, scale = alpha / rank (Hu et al. 2021). Where a
file says no alpha, it is the rank, as diffusers and kohya's trainer have it.

diffusers' own `lora_state_dict` is not used: it lets tensors through that it does not know, leaves
peft's own files as they are, and stops at a resnet layer in the names of original checkpoints
(diffusers 0.42, every layer of SD 1.5 and 2.1: 0 of 564 and KeyError; its other spellings agree).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiue_export.checkpoint.config_file import config_from, read_config
from tiue_export.checkpoint.tensors import read_weights
from tiue_export.errors import CheckpointError, UnsupportedModelError, UsageError

UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"
PARTS = (UNET, TEXT, TEXT_2)
# (mark in a tensor's name, what such a file is); looked for in this order.
_FOREIGN = (
    ("double_blocks", "a LoRA of Flux"),
    ("single_blocks", "a LoRA of Flux"),
    ("joint_blocks", "a LoRA of Stable Diffusion 3"),
    ("transformer.", "a LoRA of a diffusion transformer (Flux, Stable Diffusion 3 or the like)"),
    ("hada_", "a LoHa, not a LoRA"),
    ("lokr_", "a LoKr, not a LoRA"),
    ("oft_", "an OFT adapter, not a LoRA"),
    ("dora_scale", "a DoRA, not a LoRA"),
    ("lora_magnitude_vector", "a DoRA, not a LoRA"),
    ("lora_mid", "a LoCon with Tucker decomposition, not a LoRA"),
    ("diff_b", "a full difference of weights, not a LoRA"),
)
_SIDES = {
    "lora_A": "down",
    "lora_down": "down",
    "lora.down": "down",
    "lora_linear_layer.down": "down",
    "lora_B": "up",
    "lora_up": "up",
    "lora.up": "up",
    "lora_linear_layer.up": "up",
}
_ENDINGS = "|".join(map(re.escape, _SIDES))
_WEIGHT = re.compile(rf"(?P<module>.+)\.(?P<side>{_ENDINGS})(\.default)?\.weight")
# diffusers before 0.20: "attn1.processor.to_q_lora.down.weight".
_OLD = re.compile(r"(?P<module>.+)\.processor\.(?P<layer>to_\w+?)_lora\.(?P<side>down|up)\.weight")
_PREFIXES = ("base_model.model.", "model.")


@dataclass(frozen=True)
class Adapter:
    """What is added to one layer: down (r, in, ...), up (out, r, ...), scale alpha / r.

    `part` is "unet", "text_encoder" or SDXL's "text_encoder_2"; `layer` the path of its module, its
    dots as underscores: kohya's names do not tell the two apart.
    """

    part: str
    layer: str
    down: Tensor
    up: Tensor
    scale: float

    def delta(self) -> Tensor:
        """What is added to the weight at strength 1, in float32 and the weight's shape."""
        down, up = self.down.float(), self.up.float()
        product = up.flatten(1) @ down.flatten(1)
        return self.scale * product.view(len(up), *down.shape[1:])


def lora_from(text: str) -> tuple[Path, float]:
    """`--lora FILE[:SCALE]` -> file and strength, 1 unless given."""
    head, colon, tail = text.rpartition(":")
    if not colon or tail.endswith(".safetensors"):
        return Path(text), 1.0
    try:
        scale = float(tail)
    except ValueError as error:
        raise UsageError(
            f"--lora is {text!r}; expected FILE or FILE:SCALE",
            "Such as --lora style.safetensors:0.8",
        ) from error
    if not abs(scale) <= _LARGEST_SCALE:
        raise UsageError(f"--lora has scale {tail}; expected a number such as 0.8")
    return Path(head), scale


_LARGEST_SCALE = 100
_LARGEST_ALPHA = 1_000_000


def read_adapters(path: Path) -> list[Adapter]:
    """Every adapter of a file. Raises `CheckpointError` or `UnsupportedModelError`."""
    file = read_weights([path])
    for mark, kind in _FOREIGN:
        example = next((name for name in file.tensors if mark in name), None)
        if example is not None:
            raise UnsupportedModelError(
                f'{path} is {kind}: it holds "{example}"',
                "Give a LoRA of the model's own family: Stable Diffusion 1.x, 2.x or XL.",
            )
    sides: dict[tuple[str, str], dict[str, Tensor]] = {}
    alphas: dict[tuple[str, str], float] = {}
    unknown = []
    for name, tensor in file.tensors.items():
        if name.endswith(".alpha"):
            value = tensor.item() if tensor.numel() == 1 else tuple(tensor.shape)
            alphas[_place(name.removesuffix(".alpha"))] = _alpha(f"{path}: {name}", value)
        elif (found := _side_of(name)) is not None:
            module, side = found
            sides.setdefault(_place(module), {})[side] = tensor
        else:
            unknown.append(name)
    if unknown or not sides:
        raise CheckpointError(
            f"{path} is no LoRA"
            + (f': what is "{unknown[0]}"?' if unknown else ": it holds no adapter"),
            "A LoRA's tensors end in lora_A/lora_B, lora.down/lora.up or lora_down/lora_up.",
        )
    recorded = _recorded_alphas(path, file.metadata)
    return [
        _adapter(path, place, pair, alphas.get(place), recorded) for place, pair in sides.items()
    ]


def _adapter(
    path: Path,
    place: tuple[str, str],
    pair: Mapping[str, Tensor],
    alpha: float | None,
    recorded: Mapping[str, float],
) -> Adapter:
    part, layer = place
    if set(pair) != {"down", "up"}:
        raise CheckpointError(
            f"{path} is incomplete: {layer} has {' and '.join(pair)} only", "Download it again."
        )
    down, up = pair["down"], pair["up"]
    rank = len(down)
    fit = down.ndim >= 2 and up.ndim >= 2 and up.shape[1] == rank
    if not fit or 0 in (*down.shape, *up.shape) or up[0, 0].numel() != 1:
        raise CheckpointError(
            f"{path}: {layer} has down {tuple(down.shape)} and up {tuple(up.shape)}, whose ranks "
            "do not fit"
        )
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise CheckpointError(f"{path}: {layer} holds non-finite values")
    if alpha is None:
        alpha = recorded.get(layer, recorded.get(part, float(rank)))
    return Adapter(part, layer, down, up, alpha / rank)


def _side_of(name: str) -> tuple[str, str] | None:
    """(module, down or up) of a tensor's name."""
    old = _OLD.fullmatch(name)
    if old is not None:
        layer = "to_out.0" if old["layer"] == "to_out" else old["layer"]
        return f"{old['module']}.{layer}", old["side"]
    match = _WEIGHT.fullmatch(name)
    return None if match is None else (match["module"], _SIDES[match["side"]])


# SDXL's trainers number the text encoders.
_KOHYA = {"lora_unet_": UNET, "lora_te_": TEXT, "lora_te1_": TEXT, "lora_te2_": TEXT_2}


def _place(module: str) -> tuple[str, str]:
    """(part, layer) of a module's name in any of the spellings."""
    for start, part in _KOHYA.items():
        if module.startswith(start):
            return part, _layer(part, module.removeprefix(start))
    for part in PARTS:
        if module.startswith(f"{part}."):
            return part, _layer(part, module.removeprefix(f"{part}."))
    # peft's own files name no part: text layers are those of a transformer's encoder.
    part = TEXT if "self_attn" in module or ".mlp.fc" in module else UNET
    return part, _layer(part, module)


def _layer(part: str, module: str) -> str:
    for prefix in _PREFIXES:
        module = module.removeprefix(prefix)
    layer = module.replace(".", "_")
    # transformers 5 has dropped the level that older files name.
    return layer if part == UNET else layer.removeprefix("text_model_")


def _recorded_alphas(path: Path, metadata: Mapping[str, str]) -> dict[str, float]:
    """Alpha by part or layer: diffusers writes it as metadata, peft into adapter_config.json."""
    found: dict[str, float] = {}
    peft, inside = path.with_name("adapter_config.json"), f"{path}: lora_adapter_metadata"
    for where, config in (
        (inside, config_from(metadata.get("lora_adapter_metadata", "{}"), inside)),
        (str(peft), read_config(peft) if peft.is_file() else {}),
    ):
        named = [(part, f"{part}.") for part in PARTS]
        for part, prefix in (*named, (UNET, ""), (TEXT, "")):
            if (alpha := config.get(f"{prefix}lora_alpha")) is not None:
                if config.get(f"{prefix}use_rslora"):
                    raise UnsupportedModelError(
                        f"{path} is a rank-stabilised LoRA (use_rslora)",
                        "Fuse it into the model with peft first.",
                    )
                found.setdefault(part, _alpha(f"{where}: {prefix}lora_alpha", alpha))
                pattern = config.get(f"{prefix}alpha_pattern") or {}
                if not isinstance(pattern, dict):
                    raise CheckpointError(f"{where}: {prefix}alpha_pattern is no JSON object")
                found |= {_layer(part, name): _alpha(name, a) for name, a in pattern.items()}
    return found


def _alpha(where: str, value: Any) -> float:
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not known or not abs(value) <= _LARGEST_ALPHA:  # NaN is not
        raise CheckpointError(f"{where} is {str(value)[:40]!r}; expected a number such as 8")
    return float(value)

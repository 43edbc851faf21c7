"""Model families: the configurations that ship with the package, and how weights betray theirs.

A family file (families/NAME.json) holds the diffusers/transformers configuration of every part of
a pipeline. Head counts and the prediction type cannot be read off a weights file, so a bare
`.safetensors` needs them from here, from its own metadata or from a base pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from tiue_export.checkpoint.ldm_names import ldm_spellings
from tiue_export.errors import CheckpointError, UnsupportedModelError, unknown_name

Config = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
_FAMILIES = resources.files("tiue_export.checkpoint") / "families"


@dataclass(frozen=True)
class Family:
    """Configurations of one model family, as diffusers and transformers write them."""

    name: str
    title: str
    unet: Config
    scheduler: Config
    text_encoder: Config
    vae: Config
    text_encoder_2: Config | None = None


def family_names() -> tuple[str, ...]:
    """Names of the families that ship with the package."""
    return tuple(sorted(e.name[:-5] for e in _FAMILIES.iterdir() if e.name.endswith(".json")))


def load_family(name: str) -> Family:
    """Read one family file; an unknown name lists the known ones.

    A file may say which family it is "like", and hold what differs of each part alone.
    """
    if name not in family_names():
        raise unknown_name("family", name, family_names())
    parts = json.loads((_FAMILIES / f"{name}.json").read_text("utf-8"))
    if (like := parts.pop("like", None)) is not None:
        own = load_family(like)
        shared = {part: config for part in _PARTS if (config := getattr(own, part)) is not None}
        parts |= {part: config | parts.get(part, {}) for part, config in shared.items()}
    return Family(name=name, **parts)


_PARTS = ("unet", "scheduler", "text_encoder", "vae", "text_encoder_2")


def families_of(shapes: Shapes) -> tuple[str, ...]:
    """Families whose UNet has these first width, text width and projection kind, and whose blocks
    are nearest to these.

    `shapes` maps diffusers names, or LDM names and "conv_in.weight", to shapes. SD 2.x base and SD
    2.x differ in the prediction type alone, which no weight shows: then both are returned, the
    512 px epsilon model first.
    """
    configs = {name: load_family(name).unet for name in family_names()}
    misfits = {name: _misfit(config, shapes) for name, config in configs.items()}
    fitting = {name: misfit for name, misfit in misfits.items() if misfit is not None}
    return tuple(n for n, misfit in fitting.items() if misfit == min(fitting.values()))


def config_fits(config: Config, shapes: Shapes) -> bool:
    """Whether a UNet configuration and weights agree as no family and the weights do better."""
    misfit = _misfit(config, shapes)
    known = (_misfit(load_family(name).unet, shapes) for name in families_of(shapes))
    return misfit is not None and all(other is None or misfit <= other for other in known)


def _misfit(config: Config, shapes: Shapes) -> int | None:
    """How many resnets, attentions and their layers are in one and not in the other; None: other
    widths."""
    wanted = (
        config["block_out_channels"][0],
        config.get("cross_attention_dim", 1280),
        bool(config.get("use_linear_projection", False)),
    )
    width = shapes.get("conv_in.weight", (None,))[0]
    text = next((s[1] for k, s in shapes.items() if k.endswith("attn2.to_k.weight")), None)
    rank = next((len(s) for k, s in shapes.items() if k.endswith("proj_in.weight")), None)
    if wanted != (width, text, rank == 2):
        return None
    blocks = {name for name in shapes if name.endswith(_BLOCK_ENDS)}
    return min(len(blocks ^ known) for known in _block_weights(config))


_LAYER_END = ".attn2.to_k.weight"
_BLOCK_ENDS = (".conv1.weight", ".in_layers.2.weight", ".proj_in.weight", _LAYER_END)


def _block_weights(config: Config) -> list[set[str]]:
    """One weight of each resnet, attention and layer of it, in every spelling of a UNet's names."""
    depths = attention_depths(config)
    spellings = []
    for table in ldm_spellings(config):
        modules = {o: n for o, n in table.items() if o.endswith(".conv1") or ".attentions." in o}
        for names in (modules, modules.values()):
            weights = set()
            for own, name in zip(modules, names, strict=True):
                if ".attentions." not in own:
                    weights.add(f"{name}.weight")
                    continue
                layers = (f"{name}.transformer_blocks.{i}" for i in range(depths[own]))
                weights |= {f"{name}.proj_in.weight", *(layer + _LAYER_END for layer in layers)}
            spellings.append(weights)
    return spellings


def attention_depths(config: Config) -> dict[str, int]:
    """How many transformer layers each attention of a UNet has, by its diffusers name.

    As diffusers' UNet2DConditionModel reads `transformer_layers_per_block`, of which the up path
    takes the reverse unless `reverse_transformer_layers_per_block` says its own.
    """
    layers = config.get("layers_per_block", 2)
    down = _by_block(config.get("transformer_layers_per_block", 1), len(config["down_block_types"]))
    own = config.get("reverse_transformer_layers_per_block")
    up = down[::-1] if own is None else _by_block(own, len(config["up_block_types"]))
    depths = {}
    for path, blocks, count in (("down_blocks", down, layers), ("up_blocks", up, layers + 1)):
        for number, block in enumerate(blocks):
            for layer, depth in enumerate(_by_block(block, count)):
                depths[f"{path}.{number}.attentions.{layer}"] = depth
    middle = down[-1]
    depths["mid_block.attentions.0"] = middle if isinstance(middle, int) else middle[0]
    return depths


def _by_block(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


# What stands in the middle: resnets around an attention; one resnet, as in SSD-1B and Vega;
# nothing, as in BK-SDM-Small and -Tiny and SDXS-512.
_MIDDLE_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
_ATTENTION_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
# (key, value a UNet of Stable Diffusion 1.x, 2.x or XL has, what another value means)
_PLAIN_UNET: tuple[tuple[str, Any, str], ...] = (
    ("class_embed_type", None, "class conditions"),
    ("num_class_embeds", None, "class conditions"),
    ("encoder_hid_dim", None, "a projected text embedding, as in Kandinsky or DeepFloyd IF"),
    ("encoder_hid_dim_type", None, "a projected text embedding, as in Kandinsky or IP-Adapter"),
    ("resnet_time_scale_shift", "default", "scale-and-shift time conditioning"),
    ("time_embedding_type", "positional", "another time embedding"),
    ("time_embedding_act_fn", None, "an activated time embedding"),
    ("timestep_post_act", None, "an activated time embedding"),
    ("time_embedding_dim", None, "a time embedding of unusual width"),
    ("center_input_sample", False, "a centred input"),
    ("dual_cross_attention", False, "dual cross-attention"),
    ("mid_block_only_cross_attention", None, "cross-attention without self-attention"),
    ("attention_type", "default", "gated attention, as in GLIGEN"),
    ("cross_attention_norm", None, "a normalised text embedding"),
    ("resnet_skip_time_act", False, "unactivated time conditioning"),
    ("resnet_out_scale_factor", 1.0, "rescaled residual blocks"),
    ("conv_in_kernel", 3, "another input convolution"),
    ("conv_out_kernel", 3, "another output convolution"),
    ("out_channels", 4, "another latent space"),
)


# Vocabularies, widths and pixels are far below; libraries make lists as long as a number says.
_LARGEST_SIZE = 1_000_000


def check_sizes(config: Config, what: str) -> None:
    """Raise `CheckpointError` for a number that is no size of any network."""
    for key, value in config.items():
        for size in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(size, (int, float)) and not abs(size) <= _LARGEST_SIZE:
                raise CheckpointError(
                    f"{what} has {key} {str(size)[:40]}; expected at most {_LARGEST_SIZE:,}",
                    "Restore the config.json that belongs to these weights.",
                )


def check_unet_config(config: Config) -> None:
    """Raise `UnsupportedModelError`, naming the feature, unless this is an SD 1.x/2.x/XL UNet.

    Raises `CheckpointError` for numbers that no UNet has.
    """
    check_sizes(config, "the UNet configuration")
    channels = config.get("in_channels", 4)
    if channels != 4:
        known = _INPUT_CHANNELS.get(channels) if isinstance(channels, int) else None
        raise _not_plain(known or f"{channels} input channels")
    for key in ("block_out_channels", "down_block_types", "up_block_types"):
        if not isinstance(config.get(key), (list, tuple)) or not config[key]:
            raise UnsupportedModelError(
                f"the UNet configuration has {key} {config.get(key)!r}; expected a list",
                "Restore the config.json that belongs to these weights.",
            )
    layers = config.get("layers_per_block", 2)
    if type(layers) is not int:
        raise _not_plain(f"layers_per_block {layers!r}")
    for key, plain, meaning in _PLAIN_UNET:
        value = config.get(key, plain)
        if value != plain and not (plain in (None, False) and value in (None, False)):
            raise _not_plain(f"{meaning} ({key}={value!r})")
    middle = config.get("mid_block_type", _MIDDLE_BLOCKS[0])
    if middle not in _MIDDLE_BLOCKS:
        raise _not_plain(f"another middle block (mid_block_type={middle!r})")
    _check_added_conditions(config)
    try:
        understood = all(type(depth) is int for depth in attention_depths(config).values())
    except (TypeError, LookupError):
        understood = False
    if not understood:
        raise _not_plain(
            f"transformer_layers_per_block {config.get('transformer_layers_per_block')!r}"
        )
    for kind in (*config.get("down_block_types", ()), *config.get("up_block_types", ())):
        if kind not in _ATTENTION_BLOCKS:
            raise _not_plain(f"blocks of type {kind}")


# SDXL's UNets are told six numbers: the picture's original size, where it was cut, its size.
SIZE_CONDITIONS = 6
ADDED_CONDITIONS = "text_time"


def pooled_width(config: Mapping[str, Any]) -> int:
    """Width of the pooled text that a UNet takes beside the prompt's, as SDXL's do; 0 without."""
    if config.get("addition_embed_type") != ADDED_CONDITIONS:
        return 0
    sizes = SIZE_CONDITIONS * int(config["addition_time_embed_dim"])
    return int(config["projection_class_embeddings_input_dim"]) - sizes


def _check_added_conditions(config: Config) -> None:
    """Refuse conditions other than SDXL's, and the refiner's."""
    kind = config.get("addition_embed_type")
    if kind is None:
        return
    if kind != ADDED_CONDITIONS:
        raise _not_plain(f"other added conditions than SDXL's (addition_embed_type={kind!r})")
    width, total = (config.get(key) for key in ("addition_time_embed_dim", _ADDED_WIDTH))
    if type(width) is not int or type(total) is not int or width < 2:
        raise _not_plain(f"added conditions of no width ({_ADDED_WIDTH}={total!r})")
    text = config.get("cross_attention_dim")
    if total - (SIZE_CONDITIONS - 1) * width == text:  # an aesthetic score for two cuts
        raise _refiner()
    if type(text) is not int or not 0 < total - SIZE_CONDITIONS * width <= text:
        raise _not_plain(f"added conditions that do not fit its text ({_ADDED_WIDTH}={total})")


_ADDED_WIDTH = "projection_class_embeddings_input_dim"
_REFINER_WIDTH = 2560  # of its added conditions: 1280 of text and five numbers


def _refiner() -> UnsupportedModelError:
    return _not_plain(
        "it is an SDXL refiner, which draws on what the base began",
        prefix="",
        next_step="Give the base model: few-step students need no refiner.",
    )


_INPUT_CHANNELS = {
    5: "5 input channels, as depth-to-image has",
    8: "8 input channels, as InstructPix2Pix has",
    9: "9 input channels, as inpainting has",
}
_LORA = "a LoRA adapter, not a whole UNet"
_WORDS = "a file of learned words, not a whole UNet"
# (mark in a tensor's name, what it is)
_FOREIGN_NAMES: tuple[tuple[str, str], ...] = (
    ("controlnet_", "a ControlNet"),
    ("control_model.", "a ControlNet"),
    ("input_hint_block.", "a ControlNet"),
    ("lora_", _LORA),
    (".lora.", _LORA),
    ("emb_params", _WORDS),
    ("_custom_diffusion.", _WORDS),
    ("joint_blocks.", "a Stable Diffusion 3 transformer"),
    ("double_blocks.", "a Flux transformer"),
    ("single_transformer_blocks.", "a Flux transformer"),
    ("motion_modules.", "a video UNet (motion modules)"),
    ("temporal", "a video UNet (temporal layers)"),
)


def check_tensor_names(shapes: Shapes) -> None:
    """Raise `UnsupportedModelError` when the names or conv_in show another kind of model."""
    for mark, kind in _FOREIGN_NAMES:
        example = next((name for name in shapes if mark in name), None)
        if example is not None:
            raise _not_plain(
                f'it is {kind}: it holds "{example}"',
                prefix="",
                next_step=_NEXT_STEPS.get(kind, _OF_A_FAMILY),
            )
    for name in ("add_embedding.linear_1.weight", "label_emb.0.0.weight"):
        if shapes.get(name, ())[1:] == (_REFINER_WIDTH,):
            raise _refiner()
    conv_in = shapes.get("conv_in.weight")
    if conv_in is not None and len(conv_in) == 4 and conv_in[1] != 4:
        raise _not_plain(_INPUT_CHANNELS.get(conv_in[1], f"{conv_in[1]} input channels"))


_OF_A_FAMILY = "Give a model of Stable Diffusion 1.x, 2.x or XL, or a student distilled from one."
_NEXT_STEPS = {
    _LORA: "Name its model with --ckpt, and this file with --lora.",
    _WORDS: "Name its model with --ckpt, and this file with --embedding.",
}


def _not_plain(
    what: str, prefix: str = "the UNet has ", next_step: str = _OF_A_FAMILY
) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{prefix}{what}; expected a text-to-image UNet of Stable Diffusion 1.x, 2.x or XL",
        next_step,
    )

"""Names of UNet tensors in the CompVis/Stability ("LDM") layout and in diffusers' own.

Original checkpoints number their blocks in one flat list (input_blocks.0 .. 11, middle_block.0 ..
2, output_blocks.0 .. 11); diffusers nests them. The map below is a bijection built from the UNet's
configuration, so it serves both directions and nothing can be dropped unseen.
Source: the module lists of openaimodel.py in CompVis/stable-diffusion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LDM_PREFIX = "model.diffusion_model."
_ATTENDING_MIDDLE = "UNetMidBlock2DCrossAttn"
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_STEM = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
# Of SDXL's UNets alone: what is told beside the timestep.
_ADDED = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}


def ldm_spellings(unet_config: dict[str, Any]) -> list[dict[str, str]]:
    """The maps that files follow, `ldm_module_names` first.

    diffusers' script that writes original names (convert_diffusers_to_original_stable_diffusion.py)
    numbers every level as if it had the two resnets of Stable Diffusion's. That is how single files
    of UNets with one resnet a level are named, which no original code has written.
    """
    plain = ldm_module_names(unet_config)
    if int(unet_config.get("layers_per_block", 2)) != 1:
        return [plain]
    return [plain, ldm_module_names(unet_config, gaps=True)]


def ldm_module_names(unet_config: dict[str, Any], *, gaps: bool = False) -> dict[str, str]:
    """Map of diffusers module prefix -> LDM module prefix for one UNet configuration.

    `gaps`: one resnet a level, numbered as `ldm_spellings` says.
    """
    layers = int(unet_config.get("layers_per_block", 2))
    down, up = unet_config["down_block_types"], unet_config["up_block_types"]
    modules = {**_STEM, **(_ADDED if unet_config.get("addition_embed_type") else {})}

    def resnet(diffusers: str, ldm: str) -> None:
        modules.update(
            {f"{diffusers}.{ours}": f"{ldm}.{theirs}" for ours, theirs in _RESNET.items()}
        )

    position = 1
    for block, kind in enumerate(down):
        for layer in range(layers):
            resnet(f"down_blocks.{block}.resnets.{layer}", f"input_blocks.{position}.0")
            if kind.startswith("CrossAttn"):
                modules[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{position}.1"
            position += 1
        position += gaps
        if block < len(down) - 1:
            modules[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{position}.0.op"
            position += 1
    middle = unet_config.get("mid_block_type", _ATTENDING_MIDDLE)
    if middle is not None:
        resnet("mid_block.resnets.0", "middle_block.0")
    if middle == _ATTENDING_MIDDLE:
        modules["mid_block.attentions.0"] = "middle_block.1"
        resnet("mid_block.resnets.1", "middle_block.2")
    position = 0
    for block, kind in enumerate(up):
        attends = kind.startswith("CrossAttn")
        for layer in range(layers + 1):
            resnet(f"up_blocks.{block}.resnets.{layer}", f"output_blocks.{position}.0")
            if attends:
                modules[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{position}.1"
            if layer == layers and block < len(up) - 1:
                index = 2 if (block > 0 if gaps else attends) else 1
                place = f"output_blocks.{position + gaps}.{index}.conv"
                modules[f"up_blocks.{block}.upsamplers.0.conv"] = place
            position += 1
        position += gaps
    return modules


def ldm_names(
    diffusers_names: list[str], unet_config: dict[str, Any], *, gaps: bool = False
) -> dict[str, str]:
    """Map of LDM tensor name (without prefix) -> diffusers tensor name, for the names given."""
    modules = ldm_module_names(unet_config, gaps=gaps)
    mapped = {ldm_name(name, modules): name for name in diffusers_names}
    if None in mapped:
        raise KeyError(mapped[None])
    return {name: own for name, own in mapped.items() if name is not None}


def ldm_name(name: str, modules: Mapping[str, str]) -> str | None:
    """A diffusers name of a tensor or layer in LDM words, by `ldm_module_names`; None: no place."""
    parts = name.split(".")
    # The longest known module prefix wins; attention interiors keep their names.
    for cut in range(len(parts), 0, -1):
        module = modules.get(".".join(parts[:cut]))
        if module is not None:
            return ".".join([module, *parts[cut:]])
    return None

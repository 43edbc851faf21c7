"""A pipeline folder as one file in the names of the first code: CompVis' and Stability's."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tiue_export.benchmarks.synthetic import write_ldm_file

Tensors = dict[str, torch.Tensor]
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
VAE = "first_stage_model."
# Of AutoencoderKL: (diffusers' name, ldm/modules/diffusionmodules/model.py's).
_VAE_NAMES = (
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
    ("group_norm", "norm"),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0", "proj_out"),
)
# Of CLIP's text transformer: (transformers' name, open_clip's).
_TEXT_NAMES = (
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^embeddings\.", ""),
    ("final_layer_norm", "ln_final"),
    ("layer_norm", "ln_"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    ("self_attn", "attn"),
)


def part(pipeline: Path, name: str) -> Tensors:
    """The weights of one part."""
    return load_file(next((pipeline / name).glob("*.safetensors")))


def vae_names(tensors: Tensors) -> Tensors:
    """An AutoencoderKL in the first code's names, whose attention is made of 1x1 convolutions."""
    named = {_changed(name, _VAE_NAMES): tensor for name, tensor in tensors.items()}
    return {
        name: tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
        for name, tensor in named.items()
    }


def clip_names(tensors: Tensors) -> Tensors:
    """A text encoder as transformers named it, under the name it has in Stable Diffusion 1.x."""
    return {CLIP + name.removeprefix("text_model."): t for name, t in tensors.items()}


def open_clip_names(tensors: Tensors, layers: int) -> Tensors:
    """The same as open_clip has it in Stable Diffusion 2.x, with one more layer, never run."""
    own = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    first = {n.replace("layers.0", f"layers.{layers}"): t for n, t in own.items() if ".0." in n}
    own |= {name: torch.full_like(tensor, 9.0) for name, tensor in first.items()}
    named = _open_clip(own)
    width = len(named["ln_final.weight"])
    named |= {"text_projection": torch.eye(width), "logit_scale": torch.tensor(4.6)}
    return {OPEN_CLIP + name: tensor for name, tensor in named.items()}


def sdxl_text_names(first: Tensors, second: Tensors) -> Tensors:
    """Both text encoders of SDXL, as Stability's file has them."""
    own = {name.removeprefix("text_model."): tensor for name, tensor in second.items()}
    projection = own.pop("text_projection.weight").T
    named = {**_open_clip(own), "text_projection": projection, "logit_scale": torch.tensor(4.6)}
    place = "conditioner.embedders.0.transformer.text_model."
    return {
        **{place + name.removeprefix("text_model."): tensor for name, tensor in first.items()},
        **{f"conditioner.embedders.1.model.{name}": tensor for name, tensor in named.items()},
    }


def _open_clip(own: Tensors) -> Tensors:
    named: Tensors = {}
    for name, tensor in own.items():
        if "q_proj" in name:
            parts = [own[name.replace("q_proj", each)] for each in ("q_proj", "k_proj", "v_proj")]
            joint = name.replace("q_proj.", "in_proj_")
            named[_changed(joint, _TEXT_NAMES)] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            named[_changed(name, _TEXT_NAMES)] = tensor
    return named


def write_whole_file(pipeline: Path, file: Path, *, form: str = "clip", **extra: torch.Tensor):
    """One file with UNet, text encoder (`form`: clip, open_clip, sdxl: both) and VAE; returns its
    tensors."""
    text = part(pipeline, "text_encoder")
    tensors = load_file(write_ldm_file(pipeline, file))
    if form == "sdxl":
        tensors |= sdxl_text_names(text, part(pipeline, "text_encoder_2"))
    else:
        tensors |= clip_names(text) if form == "clip" else open_clip_names(text, 2)
    tensors |= {VAE + name: t for name, t in vae_names(part(pipeline, "vae")).items()} | extra
    save(tensors, file)
    return tensors


def save(tensors: Tensors, file: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, metadata)
    return file


def _changed(name: str, table) -> str:
    for ours, theirs in table:
        name = re.sub(ours, theirs, name)
    return name

"""Students with seeded random weights: any family, any size, no download.

They draw no recognisable picture, but their activations stay of order 1, as trained weights keep
them, so parity, precision, memory and speed can be measured on them at full size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tiue_export.checkpoint.family import load_family
from tiue_export.checkpoint.ldm_names import LDM_PREFIX, ldm_names
from tiue_export.checkpoint.parts import VAES, quiet_libraries
from tiue_export.sampling.ddim import DEFAULT_STEPS
from tiue_export.student.pipeline_folder import write_model_index, write_scheduler

from .vocabulary import write_tokenizer

# Last layers of residual branches: kept small, so that depth does not amplify.
_RESIDUAL = ("conv2", "to_out.0", "ff.net.2", "proj_out", "out_proj", "fc2")
_RESIDUAL_GAIN = 0.4
# What differs from the tiny SDXL's UNet in small copies of its relatives' shapes.
SMALL_SDXL_SHAPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sdxl": {},
        "ssd-1b": {
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [1, [2], [3]],
            "reverse_transformer_layers_per_block": [[3, 4], [2, 1], 1],
        },
        "vega": {
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [1, [1], [2]],
            "reverse_transformer_layers_per_block": [[2, 2], [1, 1], 1],
        },
    }
)
PROMPT_WORDS = """
a an the of in on at with and over under beside near photo photograph picture painting drawing
watercolor sketch portrait landscape red green blue yellow orange purple pink black white
brown grey golden silver light dark bright soft morning evening night sunset snow rain clouds sky
fox cat dog horse bird fish owl bear lion tiger rabbit elephant monkey astronaut robot castle house
mountain river lake forest tree flower garden city street bridge boat train car apple cup table
chair window moon stars planet sitting standing riding flying running sleeping eating reading fresh
old young small large tiny giant highly detailed cinematic studio digital art style sharp focus"""


def write_synthetic_pipeline(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    steps: int | None = DEFAULT_STEPS,
) -> Path:
    """Write a whole diffusers pipeline of `family` with random weights; returns `folder`.

    UNet, text encoder, VAE, tokenizer and scheduler, of SDXL the second text encoder and tokenizer
    too, as safetensors in `dtype`. `steps` is the K that a student records; None makes an ordinary
    model. Equal arguments give equal files.
    """
    config = load_family(family)
    generator = torch.Generator().manual_seed(seed)
    second = config.text_encoder_2
    parts: list[tuple[str, Callable[[], Any]]] = [
        ("unet", lambda: UNet2DConditionModel.from_config(config.unet)),
        ("text_encoder", lambda: CLIPTextModel(CLIPTextConfig(**config.text_encoder))),
        ("vae", lambda: VAES[config.vae["_class_name"]].from_config(config.vae)),
    ]
    if second is not None:
        pooling = CLIPTextConfig(**second)
        parts.append(("text_encoder_2", lambda: CLIPTextModelWithProjection(pooling)))
    for part, model in parts:
        built = _on_cpu(model, dtype)
        fill(built, generator)
        with quiet_libraries():
            built.save_pretrained(folder / part, safe_serialization=True)
        del built
    first, words = config.text_encoder, [PROMPT_WORDS]
    openclip = first["hidden_size"] == _OPENCLIP_WIDTH
    write_tokenizer(folder / "tokenizer", words, first, of_openclip=openclip)
    if second is not None:
        write_tokenizer(folder / "tokenizer_2", words, second, of_openclip=True)
    write_scheduler(folder, config.scheduler, steps)
    write_model_index(folder, config.scheduler, config.vae["_class_name"], paired=bool(second))
    return folder


_OPENCLIP_WIDTH = 1024  # of SD 2.x


def write_ldm_file(pipeline: Path, file: Path) -> Path:
    """Write a pipeline folder's UNet as one `.safetensors` in LDM names; returns `file`."""
    tensors = load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    config = json.loads((pipeline / "unet" / "config.json").read_text("utf-8"))
    table = ldm_names(list(tensors), config)
    save_file({LDM_PREFIX + ldm: tensors[name] for ldm, name in table.items()}, file)
    return file


@torch.no_grad()
def fill(model: nn.Module, generator: torch.Generator) -> None:
    """Fill a model with seeded weights: fan-in scaling, damped residual branches, lively norms."""
    for name, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                parameter.normal_(1.0 if kind == "weight" else 0.0, 0.1, generator=generator)
            elif parameter.ndim < 2:
                parameter.normal_(0.0, 0.05, generator=generator)
            elif isinstance(module, nn.Embedding):
                parameter.normal_(0.0, 0.5, generator=generator)
            else:
                gain = _RESIDUAL_GAIN if name.endswith(_RESIDUAL) else 1.0
                std = gain / math.sqrt(parameter[0].numel())
                parameter.normal_(0.0, std, generator=generator)


def _on_cpu(build: Any, dtype: torch.dtype) -> Any:
    """Build in `dtype` without initialising, which takes long for 865 M weights."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = build()
        model = model.to_empty(device="cpu")
    finally:
        torch.set_default_dtype(previous)
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return model.eval()

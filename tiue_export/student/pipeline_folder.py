"""Write models as a diffusers pipeline folder, the form every checkpoint command accepts."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tiue_export.checkpoint.parts import quiet_libraries
from tiue_export.checkpoint.tokenizer_files import write_with_pad
from tiue_export.errors import UsageError
from tiue_export.sampling.fan_out import FanOut
from tiue_export.student.load import FAN_OUT_KEY, STEPS_KEY
from tiue_export.student.paired_text_encoder import PairedTextEncoder
from tiue_export.system.new_folder import new_folder


def write_pipeline(
    folder: Path,
    *,
    unet: Any,
    text_encoder: Any,
    vae: Any,
    tokenizer: Path,
    scheduler_config: dict[str, Any],
    dtype: torch.dtype = torch.float16,
    steps: int | None = None,
    fan_out: FanOut | None = None,
    licence: str | None = None,
    force: bool = False,
) -> Path:
    """Write `folder` whole or not at all; returns it.

    Weights are stored as `dtype` safetensors; a `PairedTextEncoder` is two parts. `tokenizer` is a
    tokenizer folder, copied. `steps` records a student's K, `fan_out` where its rows part; a
    teacher has neither. Raises `UsageError`
    when `folder` exists, unless `force`, and `ResourceError` when the disk is full.
    """

    def check() -> None:
        if folder.exists() and not force:
            raise UsageError(f"{folder} exists", "Choose another output or pass --force.")

    with new_folder(folder, check) as partial:
        paired = isinstance(text_encoder, PairedTextEncoder)
        texts = {"text_encoder": text_encoder}
        if paired:
            texts = {"text_encoder": text_encoder.first, "text_encoder_2": text_encoder.second}
            second_pad = text_encoder.second_pad
            write_with_pad(tokenizer, partial / "tokenizer_2", second_pad)
        for part, model in {"unet": unet, **texts, "vae": vae}.items():
            save_part(partial / part, model, dtype)
        shutil.copytree(tokenizer, partial / "tokenizer")
        write_scheduler(partial, scheduler_config, steps, fan_out)
        vae_class = type(vae).__name__
        write_model_index(partial, scheduler_config, vae_class, licence, paired=paired)
    return folder


def save_part(folder: Path, model: Any, dtype: torch.dtype) -> None:
    """One model's config.json and safetensors, from a copy in `dtype` laid out contiguously."""
    with quiet_libraries():
        stored = copy.deepcopy(model).to(dtype=dtype)
        for parameter in stored.parameters():
            parameter.data = parameter.data.contiguous()
        try:
            stored.save_pretrained(folder, safe_serialization=True)
        except SafetensorError as error:
            # safetensors words the system's errors, a full disk among them, as its own.
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
        _forget_origin(folder / "config.json")


def _forget_origin(config: Path) -> None:
    """Drop the path that a model was loaded from: nobody else has it, and it names its owner."""
    content = json.loads(config.read_text("utf-8"))
    if content.pop("_name_or_path", None) is not None:
        write_json(config, content)


def write_scheduler(
    folder: Path, config: dict[str, Any], steps: int | None, fan_out: FanOut | None = None
) -> None:
    """scheduler/scheduler_config.json, with K and the fan-out where the model has them."""
    content = {k: v for k, v in config.items() if k not in (STEPS_KEY, FAN_OUT_KEY)}
    if steps is not None:
        content[STEPS_KEY] = steps
    if fan_out:
        content[FAN_OUT_KEY] = str(fan_out)
    write_json(folder / "scheduler" / "scheduler_config.json", content)


def write_model_index(
    folder: Path,
    scheduler_config: dict[str, Any],
    vae_class: str,
    licence: str | None = None,
    *,
    paired: bool = False,
) -> None:
    """model_index.json, as diffusers' StableDiffusionPipeline reads it.

    `paired`: there are two text encoders, and StableDiffusionXLPipeline reads it.
    """
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", scheduler_config.get("_class_name", "DDIMScheduler")],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", vae_class],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    if paired:
        for key in ("safety_checker", "requires_safety_checker"):
            del index[key]
        index |= {
            "_class_name": "StableDiffusionXLPipeline",
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "image_encoder": [None, None],
            "force_zeros_for_empty_prompt": True,
        }
    if licence is not None:
        index["license"] = licence
    write_json(folder / "model_index.json", index)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Indented JSON; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", "utf-8")

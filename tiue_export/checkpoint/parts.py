"""Text encoder and VAE of the libraries' own classes, strict and quiet: from folders or tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, ModelMixin
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from tiue_export.checkpoint.config_file import read_config
from tiue_export.checkpoint.family import Config, check_sizes
from tiue_export.checkpoint.tensors import check_state, common_dtype, read_weights, weight_files
from tiue_export.errors import CheckpointError, UnsupportedModelError, first_line

WEIGHTS_STEM = "diffusion_pytorch_model"
# The kinds of VAE that are understood, by the class name in their config.json.
VAES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


_TEXT_ENCODERS = (CLIPTextModel, CLIPTextModelWithProjection)


def load_text_encoder(folder: Path, *, pooled: bool = False) -> Any:
    """A CLIPTextModel in its own dtype; missing or non-finite weights are errors.

    `pooled`: SDXL's second, a CLIPTextModelWithProjection.
    """
    config = _config_of(folder)
    kind = config.get("model_type", "clip_text_model")
    if kind != "clip_text_model":
        raise UnsupportedModelError(
            f"{folder} holds a {kind}; expected a clip_text_model (CLIPTextModel)"
        )
    return _from_pretrained(_TEXT_ENCODERS[pooled], folder, "model")


def load_vae(folder: Path) -> Any:
    """An AutoencoderKL or AutoencoderTiny with four latent channels, in its own dtype."""
    config = _config_of(folder)
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in VAES:
        raise UnsupportedModelError(f"{folder} holds a {name}; expected {' or '.join(VAES)}")
    check_vae_config(config, str(folder))
    return _from_pretrained(VAES[name], folder, WEIGHTS_STEM)


def check_vae_config(config: Config, where: str) -> None:
    """Refuse the configuration of a VAE for other latents; `where` names it in errors."""
    if config.get("latent_channels", 4) != 4 or config.get("shift_factor"):
        raise UnsupportedModelError(
            f"the VAE in {where} has {config.get('latent_channels')} latent channels and "
            f"shift_factor {config.get('shift_factor')}; expected 4 and none"
        )
    factor = config.get("scaling_factor", 1.0)
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < 1e6:
        raise CheckpointError(
            f"the VAE in {where} has scaling_factor {factor!r}; expected a positive number",
            "Stable Diffusion 1.x and 2.x have 0.18215, XL has 0.13025, AutoencoderTiny has 1.0.",
        )


def load_controlnet(folder: Path, unet_config: Mapping[str, Any]) -> Any:
    """A ControlNetModel that fits a UNet, in its own dtype.

    Raises `UnsupportedModelError` for one of another family or kind.
    """
    config = _config_of(folder)
    if config.get("_class_name") != "ControlNetModel":
        raise UnsupportedModelError(
            f"{folder} holds a {config.get('_class_name')}; expected a ControlNetModel"
        )
    if unet_config.get("mid_block_type", "") is None:
        raise UnsupportedModelError(
            f"the ControlNet in {folder} adds to the output of a middle block, and this model has "
            "none",
            "Leave --controlnet out, or give a model with a middle block.",
        )
    if unet_config.get("addition_embed_type") is not None:
        raise UnsupportedModelError(
            f"{folder} would steer a model of SDXL; ControlNets are taken for Stable Diffusion 1.x "
            "and 2.x",
            "Leave --controlnet out.",
        )
    plain = {
        "controlnet_conditioning_channel_order": "rgb",
        "global_pool_conditions": False,
        "addition_embed_type": None,
        "class_embed_type": None,
        "conditioning_channels": 3,
    }
    for key in ("block_out_channels", "cross_attention_dim", "down_block_types"):
        plain[key] = unet_config.get(key)
    for key, wanted in plain.items():
        got = config.get(key, wanted)
        wanted, got = (list(v) if isinstance(v, (list, tuple)) else v for v in (wanted, got))
        if got != wanted:
            raise UnsupportedModelError(
                f"the ControlNet in {folder} has {key} {got!r}; this model needs {wanted!r}",
                "Give one of the model's own family: Stable Diffusion 1.x and 2.x differ.",
            )
    return _from_pretrained(ControlNetModel, folder, WEIGHTS_STEM)


def _config_of(folder: Path) -> Config:
    config = read_config(folder / "config.json")
    check_sizes(config, str(folder / "config.json"))
    return config


def _from_pretrained(kind: Any, folder: Path, stem: str) -> Any:
    """`from_pretrained` made strict: missing, unexpected or non-finite weights are errors."""
    files = weight_files(folder, stem)
    tensors = read_weights(files).tensors
    dtype = common_dtype(t for t in tensors.values() if t.is_floating_point())
    # transformers and diffusers do not call it the same.
    options: dict[str, Any] = {"dtype" if kind in _TEXT_ENCODERS else "torch_dtype": dtype}
    if files[0].name.endswith(".fp16.safetensors"):
        options["variant"] = "fp16"
    with quiet_libraries(), at_most(len(tensors)):
        try:
            model, report = kind.from_pretrained(
                folder,
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
                **options,
            )
        except Exception as error:
            raise CheckpointError(
                f"{folder} cannot be loaded as {kind.__name__}: {first_line(error)}",
                "Check that config.json belongs to these weights.",
            ) from error
    problems = {
        title: sorted(str(name) for name in report.get(key, ()))
        for title, key in (
            ("missing", "missing_keys"),
            ("unexpected", "unexpected_keys"),
            ("of another shape", "mismatched_keys"),
        )
    }
    # CLIP checkpoints older than transformers 4.31 store the position ids, which are no weight.
    problems["unexpected"] = [n for n in problems["unexpected"] if not n.endswith("position_ids")]
    state = {name: tensor for name, tensor in model.named_parameters() if not tensor.is_meta}
    for title, names in problems.items():
        if names:
            shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise CheckpointError(f"{folder} has {len(names)} {title} tensors: {shown}")
    check_state({name: tuple(t.shape) for name, t in state.items()}, state, str(folder))
    return model


def build(make: Callable[[], Any], tensors: Mapping[str, Tensor], what: str) -> Any:
    """The model that `make` builds, with these weights in their own dtype; `what` names it.

    Raises `CheckpointError` for missing, unexpected, mis-shaped and non-finite tensors.
    """
    with quiet_libraries(), torch.device("meta"), at_most(len(tensors)):
        model = make()
    state = dict(tensors)
    if isinstance(model, ModelMixin):  # before diffusers 0.15 its attention had other names
        model._fix_state_dict_keys_on_load(state)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    check_state(expected, state, what, "Download the file again, or save the model as a folder.")
    dtype = common_dtype(state.values())
    model.load_state_dict({n: t.to(dtype) for n, t in state.items()}, strict=True, assign=True)
    for name, buffer in model.named_buffers():  # CLIP's are in no state
        if name.endswith("position_ids"):
            owner = model.get_submodule(name.rpartition(".")[0])
            owner.position_ids = torch.arange(buffer.shape[-1])[None]
    return model.eval()


@contextmanager
def at_most(weights: int) -> Iterator[None]:
    """Stop building a network once it has far more parameters than there are weights for it.

    A configuration may ask for a billion layers, each built before the first is missed. Raises
    `ValueError` where the network is built.
    """
    most, made = 4 * weights + 1_000, 0

    def count(module: Any, name: str, parameter: Any) -> None:
        nonlocal made
        made += parameter is not None
        if made > most:
            raise ValueError(f"it has more than {most:,} parameters for {weights:,} weights")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep diffusers' and transformers' own loading and saving chatter off the terminal."""
    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
        if bars:
            transformers_logging.enable_progress_bar()

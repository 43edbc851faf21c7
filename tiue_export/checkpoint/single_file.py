"""What one file holds beside a UNet: text encoder, VAE, what the network predicts.

Original names are translated by diffusers' own converters, which drop what they do not know: so
what came through is compared with what was given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tiue_export.checkpoint.clip_tokenizer import OPENAI_PAD, OPENCLIP_PAD
from tiue_export.checkpoint.config_file import read_config
from tiue_export.checkpoint.family import Config, Family, family_names, load_family
from tiue_export.checkpoint.parts import build, check_vae_config
from tiue_export.checkpoint.tensors import MARKS, V_PREDICTION, UnetWeights, read_weights
from tiue_export.errors import CheckpointError, UnsupportedModelError, first_line, printable
from tiue_export.sampling.ddim import PREDICTION_TYPES

# Stability's newer configurations name the same text encoder otherwise.
_CONDITIONER, _CONDITION = "conditioner.embedders.0.", "cond_stage_model."
_CLIP, _OPEN_CLIP = f"{_CONDITION}transformer.", f"{_CONDITION}model."
# SDXL's second text encoder is OpenCLIP's, whole.
_SECOND = "conditioner.embedders.1.model."
_VAE = "first_stage_model."
# In a checkpoint of OpenCLIP beside the text transformer: no part of what Stable Diffusion runs.
_NOT_RUN = ("logit_scale", "attn_mask")
_PROJECTION = "text_projection"


_PARTS = ("text_encoder", "text_encoder_2", "vae")


@dataclass(frozen=True)
class FileParts:
    """The tensors of a file's other parts under their own names, empty where it has none.

    `others` are the names of tensors of no part.
    """

    path: Path
    text_encoder: Mapping[str, Tensor]
    text_encoder_2: Mapping[str, Tensor]
    vae: Mapping[str, Tensor]
    others: tuple[str, ...]

    @property
    def held(self) -> tuple[str, ...]:
        """The parts that it has."""
        return tuple(name for name in _PARTS if getattr(self, name))

    def without(self, parts: Collection[str]) -> FileParts:
        """The same less the parts that are not wanted."""
        left: dict[str, Any] = {name: {} for name in _PARTS if name.removesuffix("_2") in parts}
        return replace(self, **left)

    @property
    def pad_token(self) -> str:
        """What the text encoder was trained with as padding."""
        return OPENCLIP_PAD if _is_open_clip(self.text_encoder) else OPENAI_PAD

    @property
    def notes(self) -> tuple[str, ...]:
        """What is told of the tensors that nothing is made of."""
        if not self.others:
            return ()
        return (f"{len(self.others)} tensors of no part were left, such as {self.others[0]!r}",)


def file_parts(path: Path, others: Mapping[str, Tensor]) -> FileParts:
    """Sort the tensors that lie beside a UNet under original names."""
    named = {_renamed(name): tensor for name, tensor in others.items() if name not in MARKS}
    text = {name: t for name, t in named.items() if name.startswith((_CLIP, _OPEN_CLIP))}
    second = {
        name.replace(_SECOND, _OPEN_CLIP, 1): t
        for name, t in named.items()
        if name.startswith(_SECOND)
    }
    vae = {name.removeprefix(_VAE): t for name, t in named.items() if name.startswith(_VAE)}
    rest = [name for name in named if not name.startswith((_CLIP, _OPEN_CLIP, _SECOND, _VAE))]
    return FileParts(path, text, second, _without_training(vae), tuple(rest))


def _renamed(name: str) -> str:
    return name.replace(_CONDITIONER, _CONDITION, 1) if name.startswith(_CONDITIONER) else name


def _without_training(vae: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What trains a VAE may lie beside it: the loss's networks, averaged copies."""
    return {n: t for n, t in vae.items() if not n.startswith(("loss.", "model_ema."))}


def _is_open_clip(text: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(_OPEN_CLIP) for name in text)


def build_text_encoder(parts: FileParts) -> Any:
    """The file's own text encoder, in its own dtype; what is missing or unknown is named.

    Raises `UnsupportedModelError` for one of no known size.
    """
    what = f"the text encoder in {parts.path}"
    given = parts.text_encoder
    with _understood(what):
        if _is_open_clip(given):
            named = _from_open_clip(given)
        else:
            named = convert_ldm_clip_checkpoint(given)
    named = {name.removeprefix("text_model."): tensor for name, tensor in named.items()}
    # CLIP checkpoints older than transformers 4.31 store the position ids, which are no weight.
    named.pop("embeddings.position_ids", None)
    config = _text_config(what, named, lambda family: family.text_encoder)
    if _is_open_clip(given):
        # Stable Diffusion 2.x reads the layer before the last, which the file holds all the same.
        last = f"encoder.layers.{config['num_hidden_layers']}."
        named = {name: tensor for name, tensor in named.items() if not name.startswith(last)}
    return build(lambda: CLIPTextModel(CLIPTextConfig(**config)), named, what)


def build_text_encoder_2(parts: FileParts) -> Any:
    """The file's second text encoder, with its projection, as `build_text_encoder` builds one."""
    what = f"the second text encoder in {parts.path}"
    with _understood(what):
        named = _from_open_clip(parts.text_encoder_2)
        projection = parts.text_encoder_2.get(_OPEN_CLIP + _PROJECTION)
        named |= {} if projection is None else {"text_projection.weight": projection.T}
    own = {name.removeprefix("text_model."): tensor for name, tensor in named.items()}
    config = _text_config(what, own, lambda family: family.text_encoder_2)
    return build(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**config)), named, what)


def _text_config(
    what: str, named: Mapping[str, Tensor], part: Callable[[Family], Config | None]
) -> Config:
    """The configuration of a text encoder with this table of tokens."""
    table = named.get("embeddings.token_embedding.weight")
    return _config_of(
        what,
        "table of tokens",
        None if table is None else tuple(table.shape),
        part,
        lambda text: (text["vocab_size"], text["hidden_size"]),
    )


def _from_open_clip(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In transformers' names, less the projection; what diffusers' converter would drop keeps its
    own."""
    table = given.get(f"{_OPEN_CLIP}token_embedding.weight")
    width = 0 if table is None else table.shape[-1]
    # It cuts the joint projections by the size of text_projection, which some files lack.
    left = (*_NOT_RUN, _PROJECTION)
    own = {n: t for n, t in given.items() if n.removeprefix(_OPEN_CLIP) not in left}
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
    named: dict[str, Tensor] = convert_open_clip_checkpoint(model, own)
    kept = ("positional_embedding", "token_embedding.", "ln_final.", "transformer.")
    unknown = {n: t for n, t in own.items() if not n.removeprefix(_OPEN_CLIP).startswith(kept)}
    return {**named, **unknown}


def build_vae(
    tensors: Mapping[str, Tensor],
    path: Path,
    config: Config | None = None,
    *,
    of_sdxl: bool = False,
) -> Any:
    """A VAE of original or diffusers' names, in its own dtype; what does not fit is named.

    `config` is known where a config.json came along, else it is that of the family whose sizes the
    weights have; SDXL's has the sizes of Stable Diffusion 1.x and another scaling factor. Raises
    `UnsupportedModelError` where none has.
    """
    what = f"the VAE in {path}"
    if any(name.startswith("decoder.layers.") for name in tensors):
        config = config or dict(AutoencoderTiny().config)
        return build(lambda: AutoencoderTiny.from_config(config), dict(tensors), what)
    if config is None:
        sizes = [tensors.get(f"{half}.conv_in.weight") for half in ("encoder", "decoder")]
        config = _config_of(
            what,
            "first widths of its halves",
            tuple(width for t in sizes if t is not None for width in t.shape[:1]),
            lambda family: family.vae if (family.text_encoder_2 is not None) == of_sdxl else None,
            lambda vae: (vae["block_out_channels"][0], vae["block_out_channels"][-1]),
        )
    named = dict(tensors)
    if not any(name.startswith("decoder.up_blocks.") for name in named):
        with _understood(what):
            named = convert_ldm_vae_checkpoint(named, config)
        kept = {tensor.data_ptr() for tensor in named.values()}
        named |= {name: t for name, t in tensors.items() if t.data_ptr() not in kept}
    return build(lambda: AutoencoderKL.from_config(config), named, what)


@contextmanager
def _understood(what: str) -> Iterator[None]:
    """A converter takes shapes unchecked, and fails where one is not what it counts on."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{what} cannot be put into diffusers' names: {first_line(error)}",
            "Download or convert the file again.",
        ) from error


def _config_of(
    what: str,
    sizes: str,
    size: tuple[int, ...] | None,
    part: Callable[[Family], Config | None],
    size_of: Callable[[Config], tuple[int, ...]],
) -> Config:
    """The configuration of the first family whose part has this size: no file holds any."""
    parts = [part(load_family(name)) for name in family_names()]
    known = [c for c in parts if c is not None and c.get("_class_name") != "AutoencoderTiny"]
    found = next((config for config in known if size_of(config) == size), None)
    if found is None:
        listed = ", ".join(sorted({str(size_of(config)) for config in known}))
        raise UnsupportedModelError(
            f"{what} is of no known size: {sizes} {size or 'not there'}; known: {listed}",
            "Save the model as a diffusers folder, whose configurations say what it is.",
        )
    return found


def vae_from_file(path: Path, *, of_sdxl: bool = False) -> Any:
    """An AutoencoderKL or AutoencoderTiny from one `.safetensors`, original or diffusers' names.

    A whole checkpoint will do: its VAE is taken. `of_sdxl` says for which models; no weight does.
    Raises `UnsupportedModelError` for what is no VAE of theirs.
    """
    file = read_weights([path])
    tensors = file.tensors
    if any(name.startswith(_VAE) for name in tensors):
        tensors = file_parts(path, tensors).vae
    if not any(name.startswith("decoder.") for name in tensors):
        raise UnsupportedModelError(
            f'{path} holds no VAE: it holds "{next(iter(file.tensors))}"',
            "Expected names such as decoder.conv_in.weight or first_stage_model.decoder.*; "
            "of TAESD give the folder or file in diffusers' form, with both halves.",
        )
    made_for = file.metadata.get("modelspec.architecture", "")
    # Their sizes are the same, their scaling factors are not.
    if made_for and ("-xl-" in made_for) != of_sdxl:
        raise UnsupportedModelError(
            f"{path} is the VAE of another family: {made_for}",
            "Give one of SDXL, such as sdxl-vae-fp16-fix."
            if of_sdxl
            else "Give one of Stable Diffusion 1.x or 2.x, such as vae-ft-mse-840000-ema-pruned.",
        )
    beside = path.with_name("config.json")
    config = read_config(beside) if beside.is_file() else {}
    if "latent_channels" not in config:
        return build_vae(_without_training(tensors), path, of_sdxl=of_sdxl)
    check_vae_config(config, str(beside))
    return build_vae(_without_training(tensors), path, config)


_SPELLED = {"v": "v_prediction"} | {name: name for name in PREDICTION_TYPES}


def said_prediction(weights: UnetWeights) -> str | None:
    """What a file itself says that its network predicts: by a key "v_pred", or in its metadata.

    Raises `CheckpointError` for a word that is none.
    """
    if V_PREDICTION in weights.others:
        return "v_prediction"
    said = weights.metadata.get("modelspec.prediction_type")
    if said is not None and said not in _SPELLED:
        raise CheckpointError(
            f"{weights.path} says that its network predicts {printable(said, 50)!r}; expected one "
            f"of {', '.join(_SPELLED)}",
            "Mend its metadata, modelspec.prediction_type.",
        )
    return None if said is None else _SPELLED[said]

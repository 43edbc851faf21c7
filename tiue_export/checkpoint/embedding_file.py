"""A file of learned words: textual inversion, and the UNet's half of Custom Diffusion."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tiue_export.checkpoint.tensors import WeightFile, read_weights
from tiue_export.errors import CheckpointError, UsageError

# Custom Diffusion (Kumari et al. 2023) as diffusers saves it: layers that replace the UNet's own.
_CUSTOM = re.compile(r"(?P<block>.+)\.processor\.(?P<layer>to_\w+?)_custom_diffusion\.(?P<rest>.+)")
# A1111's and kohya's safetensors name no token: it is the file's name.
_NAMELESS = ("emb_params", "clip_l")
_OF_SDXL = ("clip_g", "clip_l")


@dataclass(frozen=True)
class Embedding:
    """A token and its vectors (N, D): the word in a prompt stands for N in a row.

    `second` are those of SDXL's second text encoder.
    """

    token: str
    vectors: Tensor
    second: Tensor | None = None


@dataclass(frozen=True)
class ReplacedWeights:
    """Weights of the UNet by name, in place of its own."""

    weights: dict[str, Tensor]


def embedding_from(text: str) -> tuple[Path, str | None]:
    """`--embedding FILE[:TOKEN]` -> file and token, None: the file's own."""
    head, colon, token = text.rpartition(":")
    if not colon or "/" in token or token.endswith(".safetensors"):
        return Path(text), None
    if not token or token.split() != [token]:
        raise UsageError(
            f"--embedding is {text!r}; expected FILE or FILE:TOKEN, a token without spaces",
            "Such as --embedding learned_embeds.safetensors:<cat-toy>",
        )
    return Path(head), token


def read_embedding(path: Path, token: str | None) -> Embedding | ReplacedWeights:
    """What a file holds; `token` replaces the name that it says itself.

    Raises `CheckpointError` or `UnsupportedModelError` for a file that is none of the two.
    """
    file = read_weights([path])
    names = list(file.tensors)
    if any("custom_diffusion" in name for name in names):
        if token is not None:
            raise UsageError(
                f"{path} holds Custom Diffusion's weights of the UNet, which have no token",
                f"Leave :{token} out; the words are in files of their own, such as <new1>.bin.",
            )
        return _replaced(file)
    second: Tensor | None = None
    if sorted(names) == list(_OF_SDXL):
        names, second = [_OF_SDXL[1]], _checked(path, _OF_SDXL[0], file.tensors[_OF_SDXL[0]])
    if len(names) != 1:
        raise CheckpointError(
            f"{path} is no textual inversion: it holds {len(names)} tensors, the first is "
            f'"{names[0]}"; expected one',
            "A LoRA is given by --lora, a whole model by --ckpt.",
        )
    (name,) = names
    vectors = _checked(path, name, file.tensors[name])
    if second is not None and len(second) != len(vectors):
        raise CheckpointError(
            f"{path} is no textual inversion: it holds {len(vectors)} vectors for one of SDXL's "
            f"text encoders and {len(second)} for the other; expected as many",
            "Download it again.",
        )
    own = path.stem if name in _NAMELESS else name
    chosen = token or own
    if chosen.split() != [chosen]:
        raise UsageError(
            f"{path} is of the token {chosen!r}; expected one without spaces",
            f"Give another: --embedding {path}:TOKEN",
        )
    return Embedding(chosen, vectors, second)


def _checked(path: Path, name: str, vectors: Tensor) -> Tensor:
    """The vectors (N, D) float32 of a file."""
    if vectors.ndim not in (1, 2) or 0 in vectors.shape or not torch.isfinite(vectors).all():
        raise CheckpointError(
            f"{path} is no textual inversion: {name} has shape {tuple(vectors.shape)} or is not "
            "finite; expected vectors (N, D)",
            "Download it again.",
        )
    return vectors.reshape(-1, vectors.shape[-1]).float()


def _replaced(file: WeightFile) -> ReplacedWeights:
    weights = {}
    for name, tensor in file.tensors.items():
        match = _CUSTOM.fullmatch(name.removeprefix("unet."))
        if match is None:
            raise CheckpointError(
                f'{file.path} is no file of Custom Diffusion: what is "{name}"?',
                "Expected names such as ...attn2.processor.to_k_custom_diffusion.weight.",
            )
        weights[f"{match['block']}.{match['layer']}.{match['rest']}"] = tensor
    return ReplacedWeights(weights)

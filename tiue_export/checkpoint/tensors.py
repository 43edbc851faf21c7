"""One weights file -> named tensors: safetensors only, memory-mapped, checked before use."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tiue_export.bundle.read import file_record
from tiue_export.checkpoint.container import check_container, refuse_pickle
from tiue_export.checkpoint.family import Config, Shapes, check_tensor_names
from tiue_export.checkpoint.ldm_names import LDM_PREFIX, ldm_names
from tiue_export.errors import CheckpointError, first_line
from tiue_export.system.file_name import is_file_name
from tiue_export.system.json_file import read_json

_WRAPPERS = ("_orig_mod.", "module.", "student.", "unet.", "diffusion_model.")
_FLOATS = {torch.float32, torch.float16, torch.bfloat16, torch.float64}
_LISTED = 10
# Tensors that say something and weigh nothing: the network predicts v, its schedule ends in noise.
V_PREDICTION, ZERO_SNR = MARKS = ("v_pred", "ztsnr")


@dataclass(frozen=True)
class WeightFile:
    """Tensors of one checkpoint under the names in the file, still memory-mapped."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def read_weights(paths: Iterable[Path]) -> WeightFile:
    """Open one `.safetensors` file, or all shards of one model."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    first: Path | None = None
    for path in paths:
        first = first or path
        check_container(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata.update(file.metadata() or {})
                tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} cannot be read as safetensors: {error}", "Download or copy it again."
            ) from error
    if first is None or not tensors:
        raise CheckpointError(f"{first or 'the checkpoint'} holds no tensors")
    return WeightFile(first, tensors, metadata)


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors file, its fp16 variant or its shards in a diffusers/transformers folder."""
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(read_json(index)["weight_map"].values()))
        except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is not a shard index: {first_line(error)}") from error
        foreign = [shard for shard in shards if not is_file_name(shard)]
        if foreign:
            raise CheckpointError(
                f"{index} names {foreign[0]!r} as a shard; expected a file beside it"
            )
        return [folder / shard for shard in shards]
    # What a training run left beside the weights, such as optimizer.bin, is not what is missed.
    for path in sorted(folder.iterdir(), key=lambda path: ("model" not in path.name, path.name)):
        refuse_pickle(path, f"{stem}.safetensors")
    raise CheckpointError(
        f"{folder} holds no {stem}.safetensors",
        "Point --ckpt at a diffusers folder saved with safe_serialization=True.",
    )


def sha256_of_files(paths: Iterable[Path], root: Path) -> str:
    """One digest over several files: the plain SHA-256 for one file, else of their listing."""
    digests = [(str(path.relative_to(root)), file_record(path).sha256) for path in paths]
    if len(digests) == 1:
        return digests[0][1]
    listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests))
    return hashlib.sha256(listing.encode()).hexdigest()


def sha256_of_folder(folder: Path, stem: str) -> str:
    """Of the weights `stem` in a diffusers/transformers folder."""
    return sha256_of_files(weight_files(folder, stem), folder)


@dataclass(frozen=True)
class UnetWeights:
    """A UNet's tensors under the names of the file less wrappers; `layout` diffusers or ldm.

    `others` are what lies beside the UNet, averaged copies left out.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    others: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    layout: str
    ema: bool
    notes: tuple[str, ...]


def unet_weights(file: WeightFile) -> UnetWeights:
    """Find the UNet in a checkpoint: its layout, wrapper prefixes and EMA copy.

    Names stay in the file's own layout; `named_for_diffusers` needs the configuration to
    translate LDM names. Everything that is set aside is told in `notes`.
    """
    marks = {name: tensor for name, tensor in file.tensors.items() if name in MARKS}
    named = {name: tensor for name, tensor in file.tensors.items() if name not in MARKS}
    prefix = _common_wrapper(list(named))
    tensors = {name[len(prefix) :]: tensor for name, tensor in named.items()}
    if any(name.startswith(LDM_PREFIX) for name in tensors):
        return _ldm_weights(WeightFile(file.path, {**tensors, **marks}, file.metadata))
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    check_tensor_names(shapes)
    layout = "ldm" if any(name.startswith("input_blocks.") for name in tensors) else "diffusers"
    notes = (f'names start with "{prefix}", which was removed',) if prefix else ()
    return UnetWeights(file.path, tensors, marks, file.metadata, layout, False, notes)


def _common_wrapper(names: list[str]) -> str:
    """The chain of wrapper prefixes that all names share ("module._orig_mod." and the like)."""
    prefix = ""
    while True:
        wrapper = next(
            (w for w in _WRAPPERS if all(name.startswith(prefix + w) for name in names)), None
        )
        if wrapper is None:
            return prefix
        prefix += wrapper


def _ldm_weights(file: WeightFile) -> UnetWeights:
    check_tensor_names({name: tuple(t.shape) for name, t in file.tensors.items()})
    plain = {
        name[len(LDM_PREFIX) :]: tensor
        for name, tensor in file.tensors.items()
        if name.startswith(LDM_PREFIX)
    }
    # LitEma stores each weight under its name less the dots (ldm/modules/ema.py).
    averaged = {
        name: file.tensors["model_ema.diffusion_model" + name.replace(".", "")]
        for name in plain
        if "model_ema.diffusion_model" + name.replace(".", "") in file.tensors
    }
    notes = []
    if averaged and len(averaged) != len(plain):
        raise CheckpointError(
            f"{file.path} has EMA weights for {len(averaged)} of {len(plain)} UNet tensors",
            "Save the checkpoint again with all EMA weights, or with none.",
        )
    if averaged:
        notes.append("the EMA weights were taken, the plain ones left")
    others = {
        name: tensor
        for name, tensor in file.tensors.items()
        if not name.startswith((LDM_PREFIX, "model_ema."))
    }
    tensors = averaged or plain
    check_tensor_names({name: tuple(t.shape) for name, t in tensors.items()})
    return UnetWeights(
        file.path, tensors, others, file.metadata, "ldm", bool(averaged), tuple(notes)
    )


def named_for_diffusers(
    weights: UnetWeights, names: list[str], config: Config
) -> dict[str, Tensor]:
    """The tensors under diffusers' names; what has no place keeps its own name."""
    if weights.layout == "diffusers":
        return dict(weights.tensors)
    table = ldm_names(names, config)
    if config.get("layers_per_block", 2) == 1:
        spaced = ldm_names(names, config, gaps=True)
        table = spaced if set(spaced) <= set(weights.tensors) else table
    return {table.get(name, name): tensor for name, tensor in weights.tensors.items()}


def ldm_signature_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The few shapes that tell a family, under diffusers' names, from LDM-named tensors."""
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if "input_blocks.0.0.weight" in shapes:
        shapes["conv_in.weight"] = shapes["input_blocks.0.0.weight"]
    return shapes


_WHOLE_UNET = "Check --family and --base, or that the file holds a whole UNet."


def check_state(
    expected: Shapes, tensors: Mapping[str, Tensor], what: str, next_step: str = _WHOLE_UNET
) -> None:
    """Raise `CheckpointError` listing missing, unexpected, mis-shaped and non-finite tensors."""
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    shaped = [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    problems = [
        _listing(title, names)
        for title, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shaped),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{what} does not fit the model: " + "; ".join(problems),
            next_step,
        )
    strange = [f"{n} ({t.dtype})" for n, t in tensors.items() if t.dtype not in _FLOATS]
    if strange:
        raise CheckpointError(
            f"{what}: {_listing('not float32, float16 or bfloat16', strange)}",
            "Export from the unquantized checkpoint.",
        )
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(
            f"{what}: {_listing('with NaN or infinite weights', broken)}",
            "The training run diverged or the file is damaged; take an earlier checkpoint.",
        )


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype all tensors share, or float32 when they are mixed or wider."""
    kinds = {tensor.dtype for tensor in tensors}
    return kinds.pop() if len(kinds) == 1 and kinds <= _FLOATS - {torch.float64} else torch.float32


def _listing(title: str, names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {title}: {shown}{more}"

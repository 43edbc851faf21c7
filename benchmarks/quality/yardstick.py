"""What picture quality is measured with: a feature network and its landmarks, as a folder.

The usual yardstick, Inception, is not to be had offline and knows no emoji. This network is small,
was trained on drawn pictures alone (examples/emoji_family/feature_network.py) and never saw a
generator. Its `features` tell name, layout, colours and sharpness apart; its `embedding` tells the
name alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn import functional

from tiue_export.errors import CheckpointError, UsageError, first_line
from tiue_export.specs import Array
from tiue_export.system.atomic_file import write_atomically
from tiue_export.system.disk_errors import disk_errors

FORMAT_VERSION = 1
FAMILY = "demo"
PICTURE_SIZE_PX = 128
FEATURE_WIDTH = 128

_WIDTHS = (32, 64, 128, 160)
_GROUPS = 8
_DESCRIPTION = "quality.json"
_NETWORK = "network.safetensors"
_LANDMARKS = "landmarks.safetensors"
_ALIGNMENT = "alignment.safetensors"
_REBUILD = "Copy the folder again, or write it again: python -m emoji_family.quality_files --help"


class _Residual(nn.Module):
    """Pre-activation residual block that halves the side: (N, C, H, W) -> (N, C', H/2, W/2)."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, width)
        self.conv1 = nn.Conv2d(width, out_width, 3, stride=2, padding=1)
        self.norm2 = nn.GroupNorm(_GROUPS, out_width)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        self.shortcut = nn.Conv2d(width, out_width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        active = functional.silu(self.norm1(hidden))
        change = self.conv2(functional.silu(self.norm2(self.conv1(active))))
        result: Tensor = self.shortcut(functional.avg_pool2d(active, 2)) + change
        return result


class FeatureNetwork(nn.Module):
    """Pictures (N, 3, 128, 128) in [-1, 1] -> features (N, 128) of zero mean and unit variance.

    0.8 M parameters; GroupNorm, so a picture's features do not depend on its batch.
    """

    def __init__(self) -> None:
        super().__init__()
        # Stride 4 from full resolution: sharpness shows in single pixels.
        self.stem = nn.Conv2d(3, _WIDTHS[0], 8, stride=4, padding=2)
        self.blocks = nn.Sequential(*(_Residual(a, b) for a, b in itertools.pairwise(_WIDTHS)))
        self.norm = nn.GroupNorm(_GROUPS, _WIDTHS[-1])
        self.project = nn.Linear(2 * _WIDTHS[-1], FEATURE_WIDTH)
        self.name = nn.Linear(FEATURE_WIDTH, FEATURE_WIDTH)

    def forward(self, pictures: Tensor) -> Tensor:
        hidden = functional.silu(self.norm(self.blocks(self.stem(pictures))))  # (N, 160, 4, 4)
        # The maximum beside the mean: one sharp corner must not drown in a flat ground.
        pooled = torch.cat((hidden.mean((2, 3)), hidden.amax((2, 3))), 1)
        return functional.layer_norm(self.project(pooled).float(), (FEATURE_WIDTH,))

    def embed(self, features: Tensor) -> Tensor:
        """Features (N, 128) -> unit vectors (N, 128), near those of pictures of the same name."""
        return functional.normalize(self.name(features).float())

    @torch.no_grad()
    def features_of(self, pictures: Array, batch: int = 64) -> Array:
        """Pictures (N, 128, 128, 3) uint8 -> features (N, 128) float32."""
        wanted = (PICTURE_SIZE_PX, PICTURE_SIZE_PX, 3)
        if pictures.ndim != 4 or pictures.shape[1:] != wanted or pictures.dtype != np.uint8:
            raise UsageError(
                f"pictures are {pictures.dtype} of shape {pictures.shape}; the feature network "
                f"takes uint8 (N, {', '.join(map(str, wanted))})"
            )
        rows = [np.zeros((0, FEATURE_WIDTH), np.float32)]
        for start in range(0, len(pictures), batch):
            rows.append(self(network_input(pictures[start : start + batch])).numpy())
        return np.concatenate(rows)

    @torch.no_grad()
    def embeddings_of(self, features: Array) -> Array:
        """Features (N, 128) -> unit vectors (N, 128) float32."""
        vectors: Array = self.embed(torch.from_numpy(features.astype(np.float32))).numpy()
        return vectors


def network_input(pictures: Array) -> Tensor:
    """Pictures (N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [-1, 1], channels last in memory."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True)
class Prompt:
    """A prompt of the fixed set: what it shows (index into `names`) and the ground it names."""

    text: str
    name: int
    ground: str | None


@dataclass(frozen=True)
class Alignment:
    """A CLIP-style pair of linear maps, applied.

    `text` (P, 128): unit vectors of the fixed prompts, from the demo text encoder's end-of-text
    state. `picture_map` (128, 128) takes a picture's features into the same space.
    """

    text: Array
    picture_map: Array
    held_out: Mapping[str, float] = field(default_factory=dict)

    def pictures(self, features: Array) -> Array:
        """Features (N, 128) -> unit vectors (N, 128)."""
        mapped = features.astype(np.float32) @ self.picture_map.T
        vectors: Array = mapped / np.linalg.norm(mapped, axis=1, keepdims=True)
        return vectors


@dataclass(frozen=True)
class QualityData:
    """The yardstick: network, prompts, and where real pictures lie in its feature space.

    `prototypes` (C, 128): mean unit embedding of several drawings of each of the C names.
    `reference` (R, C, 128): features of R real drawings of each name. `real` (S, P, 128): features
    of S others of each of the P prompts. All float32.
    `held_out` is the network's own accuracy on drawings that it was not trained on.
    """

    network: FeatureNetwork
    names: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    grounds: Mapping[str, tuple[int, int, int]]
    prototypes: Array
    reference: Array
    real: Array
    corpus_sha256: str
    held_out: Mapping[str, float]
    alignment: Alignment | None = None
    family: str = FAMILY

    def reference_of(self, names: Iterable[int]) -> Array:
        """Features (R * n, 128) of the real drawings of n names."""
        chosen: Array = self.reference[:, sorted(set(names))]
        return chosen.reshape(-1, chosen.shape[2])


def require_size(source: Path, height_px: int, width_px: int, next_step: str) -> None:
    """Refuse what draws pictures of another size than the feature network takes."""
    if (height_px, width_px) != (PICTURE_SIZE_PX, PICTURE_SIZE_PX):
        raise UsageError(
            f"{source} draws {width_px}x{height_px} px; the quality data judges "
            f"{PICTURE_SIZE_PX}x{PICTURE_SIZE_PX} px",
            next_step,
        )


def default_folder() -> Path:
    """Where the package carries the demo family's quality data."""
    return Path(str(resources.files("tiue_export"))) / "demo" / "quality"


def save_quality_data(data: QualityData, folder: Path) -> None:
    """Write the folder; weights and vectors as fp16 safetensors, the rest as quality.json."""
    description = {
        "format_version": FORMAT_VERSION,
        "family": data.family,
        "corpus_sha256": data.corpus_sha256,
        "held_out": dict(data.held_out),
        "alignment_held_out": None if data.alignment is None else dict(data.alignment.held_out),
        "grounds": {name: list(colour) for name, colour in data.grounds.items()},
        "names": list(data.names),
        "prompts": [dataclasses.astuple(prompt) for prompt in data.prompts],
    }
    landmarks = {"prototypes": data.prototypes, "reference": data.reference, "real": data.real}
    parts = {
        _NETWORK: save_tensors(_half(data.network.state_dict())),
        _LANDMARKS: save_tensors(_half(landmarks)),
    }
    if data.alignment is not None:
        maps = {"text": data.alignment.text, "picture_map": data.alignment.picture_map}
        parts[_ALIGNMENT] = save_tensors(_half(maps))
    # Last, because the reader looks for it first.
    parts[_DESCRIPTION] = (json.dumps(description, ensure_ascii=False) + "\n").encode()
    with disk_errors(folder / _DESCRIPTION):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in parts.items():
            write_atomically(folder / name, content)


def load_quality_data(folder: Path | None = None) -> QualityData:
    """Read a folder that `save_quality_data` wrote; the package's own by default.

    Raises `UsageError` when there is none, `CheckpointError` when it is damaged.
    """
    folder = default_folder() if folder is None else folder
    file = folder / _DESCRIPTION
    if not file.is_file():
        raise UsageError(
            f"{folder} holds no quality data: it has no {_DESCRIPTION}",
            "Give its folder with --data, or make one: python -m emoji_family.quality_files --help",
        )
    try:
        return _read(folder, json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"the quality data in {folder} is damaged: {type(error).__name__}: {first_line(error)}",
            _REBUILD,
        ) from error


def _read(folder: Path, description: dict[str, Any]) -> QualityData:
    version = description["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(f"format version {version}; this program reads {FORMAT_VERSION}")
    network = FeatureNetwork()
    network.load_state_dict(_wide(folder / _NETWORK))
    landmarks = _wide(folder / _LANDMARKS)
    alignment = None
    if description["alignment_held_out"] is not None:
        maps = {name: tensor.numpy() for name, tensor in _wide(folder / _ALIGNMENT).items()}
        alignment = Alignment(held_out=description["alignment_held_out"], **maps)
    data = QualityData(
        network=network.eval().requires_grad_(False),
        names=tuple(description["names"]),
        prompts=tuple(Prompt(*entry) for entry in description["prompts"]),
        grounds={name: (r, g, b) for name, (r, g, b) in description["grounds"].items()},
        corpus_sha256=description["corpus_sha256"],
        held_out=description["held_out"],
        alignment=alignment,
        family=description["family"],
        **{name: tensor.numpy() for name, tensor in landmarks.items()},
    )
    _check_counts(data)
    return data


def _check_counts(data: QualityData) -> None:
    expected = {
        "prototypes": (len(data.prototypes), len(data.names)),
        "reference": (data.reference.shape[1], len(data.names)),
        "real": (data.real.shape[1], len(data.prompts)),
    }
    if data.alignment is not None:
        expected["text"] = (len(data.alignment.text), len(data.prompts))
    for name, (got, wanted) in expected.items():
        if got != wanted:
            raise ValueError(f"{name} holds {got} rows; expected {wanted}")


def _half(arrays: Mapping[str, Tensor | Array]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(array).half().contiguous() for name, array in arrays.items()}


def _wide(file: Path) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in load_tensors(file.read_bytes()).items()}

"""Pictures as files: decoder output to 8 bits, and PNG with the parameters that made it."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tiue_export.specs import Array

if TYPE_CHECKING:
    from PIL.Image import Image

METADATA_KEY = "tiue"


def pixels_from_sample(sample: Array) -> Array:
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3), rounded as diffusers does."""
    pixels = np.clip(np.floor(127.5 * sample.astype(np.float32) + 128), 0, 255)
    rgb: Array = pixels.transpose(0, 2, 3, 1).astype(np.uint8)
    return rgb


def image_from_pixels(pixels: Array) -> Image:
    """uint8 (H, W, 3) -> PIL image."""
    from PIL import Image

    return Image.fromarray(pixels)


def save_png(image: Image, path: Path, parameters: Mapping[str, Any]) -> None:
    """Write a PNG whole or not at all, with its parameters in two text chunks.

    `tiue` holds them as JSON, `parameters` as the line that other image tools show.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps(parameters, ensure_ascii=False))
    info.add_itxt("parameters", _readable(parameters))
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        image.save(partial, format="PNG", pnginfo=info)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def parameters_from_png(path: Path) -> dict[str, Any] | None:
    """The parameters that `save_png` wrote, or None when the file carries none."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        text = getattr(image, "text", {}).get(METADATA_KEY)
    return None if text is None else dict(json.loads(text))


def _readable(parameters: Mapping[str, Any]) -> str:
    """The prompt, then "Name: value" pairs, as AUTOMATIC1111's web UI writes and reads them."""
    rest = ", ".join(
        f"{key.replace('_', ' ').capitalize()}: {value}"
        for key, value in parameters.items()
        if key != "prompt"
    )
    return f"{parameters.get('prompt', '')}\n{rest}"

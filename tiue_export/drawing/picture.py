"""Pictures as files: decoder output to 8 bits, and PNG with the parameters that made it."""

from __future__ import annotations

import io
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tiue_export.errors import UsageError, first_line
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


def picture_from_file(path: Path, size: tuple[int, int]) -> Array:
    """A picture file -> (3, H, W) float32 in [0, 1]; `size` is (width, height) in pixels.

    Raises `UsageError` for a file that is no picture, or of another size.
    """
    from PIL import Image

    if path.exists() and not path.is_file():  # a named pipe would be waited for without end
        raise UsageError(f"{path} cannot be read as a picture: it is no file")
    try:
        with Image.open(path) as image:
            rgb = np.asarray(image.convert("RGB"), np.float32)
    except Exception as error:  # Pillow raises SyntaxError, struct.error and more on damage
        raise UsageError(f"{path} cannot be read as a picture: {first_line(error)}") from error
    height, width = rgb.shape[:2]
    if (width, height) != size:
        raise UsageError(
            f"{path} is {width}x{height} px; the bundle draws {size[0]}x{size[1]}",
            f"Resize it, or export the bundle with --height {height} --width {width}.",
        )
    return rgb.transpose(2, 0, 1) / 255


def png_bytes(image: Image, parameters: Mapping[str, Any]) -> bytes:
    """A PNG file with its parameters in two text chunks; equal input gives equal bytes.

    `tiue` holds them as JSON, `parameters` as the line that other image tools show.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps(parameters, ensure_ascii=False))
    info.add_itxt("parameters", _readable(parameters))
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def save_png(image: Image, path: Path, parameters: Mapping[str, Any]) -> None:
    """Write `png_bytes` to a file, whole or not at all."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        partial.write_bytes(png_bytes(image, parameters))
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

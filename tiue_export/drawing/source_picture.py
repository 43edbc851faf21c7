"""Pictures to start from, and masks: any file of the usual kinds, at the size that is drawn.

What is done to a picture on the way (alpha laid on white, scaled, cut) is told in its notes.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from tiue_export.errors import UsageError, first_line
from tiue_export.specs import Array

if TYPE_CHECKING:
    from PIL.Image import Image

# A file, its bytes, a Pillow image, or an array as Pillow takes it: uint8 (H, W), (H, W, 3 or 4).
PictureSource = Union[str, Path, bytes, "Image", Array]

LARGEST_PX = 64_000_000  # 192 MB as RGB: a phone's largest, and no bomb
_KINDS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
_DRAWN_FROM = 0.5  # a mask's white


@dataclass(frozen=True)
class SourcePicture:
    """A picture at the size that is drawn: `pixels` (3, H, W) float32 in [-1, 1].

    `mask` (H, W) bool, True where is drawn anew; None: everywhere. `notes` say what was done to the
    files to make them so.
    """

    pixels: Array
    mask: Array | None = None
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Ten digits over picture and mask."""
        hashed = hashlib.sha256(self.pixels.tobytes())
        if self.mask is not None:
            hashed.update(np.packbits(self.mask).tobytes())
        return hashed.hexdigest()[:10]


def source_picture(
    picture: PictureSource, size: tuple[int, int], mask: PictureSource | None = None
) -> SourcePicture:
    """The picture, and its mask, at `size` (width, height) in pixels.

    Of another shape they are scaled to cover it and cut around the middle. A mask is white where is
    drawn anew, and as large as its picture. Raises `UsageError` for what is no picture, for one too
    large to be one, and for a mask of another size.
    """
    image, notes = _opened(picture, "the picture")
    given = image.size
    pixels: Array = np.asarray(_fitted(image, size), np.float32).transpose(2, 0, 1)
    pixels = pixels / 127.5 - 1
    if given != size:
        notes += (_fit_note(_name(picture, "the picture"), given, size),)
    if mask is None:
        return SourcePicture(np.ascontiguousarray(pixels), None, notes)
    drawn, more = _opened(mask, "the mask")
    if drawn.size != given:
        raise UsageError(
            f"{_name(mask, 'the mask')} is {_size(drawn.size)} px; expected {_size(given)}, as its "
            "picture",
            "Paint the mask over the picture itself: white where it shall be drawn anew.",
        )
    share = np.asarray(_fitted(drawn.convert("L"), size), np.float32) / 255
    where = share >= _DRAWN_FROM
    if not where.any():
        raise UsageError(
            f"{_name(mask, 'the mask')} has no white, so nothing would be drawn",
            "Paint white what shall be drawn anew, black what stays.",
        )
    return SourcePicture(np.ascontiguousarray(pixels), where, notes + more)


def latent_mask(mask: Array, scale: int) -> Array:
    """A mask (H, W) of pixels -> (1, 1, H / scale, W / scale) float32 of latents, 1 or 0.

    A latent is drawn anew where any of its pixels is: else the old would show along the border, in
    squares. diffusers takes the first pixel of each; where squares are whole, both say the same.
    """
    height, width = (side // scale for side in mask.shape)
    squares = mask.reshape(height, scale, width, scale).max(axis=(1, 3))
    latents: Array = np.asarray(squares, np.float32)[None, None]
    return latents


def pasted(picture: Array, source: Array, mask: Array, scale: int) -> Array:
    """A drawn picture (B, 3, H, W) inside of a mask (H, W), the source (3, H, W) outside.

    All that is inside is drawn; the border outside of it is soft, about as wide as the square of
    `scale` pixels that a latent is.
    """
    from PIL import Image, ImageFilter

    image = Image.fromarray(mask.astype(np.uint8) * 255)
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(scale / 2)), np.float32) / 255
    share = np.maximum(soft, mask)  # (H, W)
    mixed: Array = (share * picture + (1 - share) * source).astype(np.float32)
    return mixed


def _opened(source: PictureSource, what: str) -> tuple[Image, tuple[str, ...]]:
    """An RGB image, turned as its camera says, and what was done to it."""
    from PIL import Image, ImageOps

    name = _name(source, what)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # judged below
            with _image_of(source) as image:
                if image.width * image.height > LARGEST_PX:
                    raise UsageError(
                        f"{name} is {_size(image.size)} px; expected at most {LARGEST_PX:,} pixels",
                        "Make it smaller first.",
                    )
                image.load()
                turned = ImageOps.exif_transpose(image)
                return _in_rgb(turned, name)
    except UsageError:
        raise
    except Exception as error:  # Pillow raises SyntaxError, struct.error and more on damage
        raise UsageError(
            f"{name} cannot be read as a picture: {first_line(error)}",
            f"Give a file of one of these kinds: {', '.join(_KINDS)}.",
        ) from error


def _image_of(source: PictureSource) -> Image:
    from PIL import Image

    if isinstance(source, Image.Image):
        return source.copy()
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source), formats=_KINDS)
    path = Path(source)
    if not path.is_file():  # a named pipe would be waited for without end
        why = "it is no file" if path.exists() else "it is not there"
        raise UsageError(f"{path} cannot be read as a picture: {why}", "Check its path.")
    return Image.open(path, formats=_KINDS)


def _in_rgb(image: Image, name: str) -> tuple[Image, tuple[str, ...]]:
    """In RGB with 8 bits; what that changes is told."""
    from PIL import Image

    mode = image.mode
    if mode.startswith(("I", "F")):  # one channel of 16 or 32 bits
        values = np.nan_to_num(np.asarray(image, np.float64))
        largest = 65535.0 if mode.startswith("I") else 1.0
        if values.max(initial=0) > largest:
            largest = float(values.max())
        grey = np.clip(values / largest * 255 + 0.5, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB"), (f"{name} has more than 8 bits: rounded",)
    if "A" in image.getbands() or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        flat = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        alpha = np.asarray(image.convert("RGBA"))[:, :, 3]
        return flat, (f"{name} is transparent in places: laid on white",) if (
            alpha < 255
        ).any() else ()
    if mode == "CMYK":
        return image.convert("RGB"), (f"{name} is in CMYK: converted to RGB without a profile",)
    return image.convert("RGB"), ()


def _fitted(image: Image, size: tuple[int, int]) -> Image:
    """Scaled to cover `size` and cut around the middle."""
    from PIL import Image, ImageOps

    return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def _fit_note(name: str, given: tuple[int, int], size: tuple[int, int]) -> str:
    cut = given[0] * size[1] != given[1] * size[0]
    return f"{name} is {_size(given)} px: scaled to {_size(size)}{', its margins cut' * cut}"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _name(source: Any, what: str) -> str:
    return str(source) if isinstance(source, (str, Path)) else what

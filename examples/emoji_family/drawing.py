"""Pictures with captions: one emoji, somewhere on a coloured ground, a little turned or mirrored.

One picture per caption would teach a generator no diversity, so place, size, tilt, side and ground
are drawn per picture. The ground is in the caption of some pictures and left open in others: an
open prompt then has many right answers, and a named ground composes with every object.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from .corpus import Emoji

PICTURE_SIZE = 128
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "light blue": (186, 222, 250),
    "pink": (250, 196, 214),
    "light yellow": (253, 243, 186),
    "light green": (196, 236, 190),
    "lavender": (214, 200, 246),
    "orange": (248, 176, 110),
    "grey": (196, 198, 204),
    "dark blue": (32, 48, 96),
    "dark green": (28, 78, 58),
    "dark red": (110, 26, 36),
    "black": (18, 18, 20),
}
# A mirrored arrow, letter or clock is another thing than its caption says.
_DIRECTED_GROUPS = ("Symbols",)
_DIRECTED_NAMES = re.compile(
    r"left|right|clock|thirty|quarter moon|waxing|waning|letter|button|book|calendar|keyboard"
    r"|sign|sheet|newspaper|medal|banknote|zzz|points|globe|map|chart|receipt|card|pager|plate|notes?\b|document|page|scroll"
)
_NAMED_GROUND_SHARE = 0.6


@dataclass(frozen=True)
class Drawn:
    """A picture (128, 128, 3) uint8 and what was drawn: `ground` indexes BACKGROUNDS."""

    picture: npt.NDArray[np.uint8]
    ground: int
    caption: str


def draw(emoji: Emoji, generator: np.random.Generator, size: int = PICTURE_SIZE) -> Drawn:
    """One picture of `emoji`; all that varies comes from `generator`."""
    ground = int(generator.integers(len(BACKGROUNDS)))
    named = bool(generator.random() < _NAMED_GROUND_SHARE)
    scale = float(generator.uniform(0.72, 0.92))
    tilt = float(generator.uniform(-12, 12))
    mirrored = bool(generator.random() < 0.5) and not directed(emoji)
    shift = generator.uniform(-1, 1, size=2)
    picture = compose(emoji, ground, scale, tilt, mirrored, (shift[0], shift[1]), size)
    name = list(BACKGROUNDS)[ground] if named else None
    return Drawn(picture, ground, caption(emoji.name, name, bare=bool(generator.random() < 0.3)))


def compose(
    emoji: Emoji,
    ground: int,
    scale: float = 0.85,
    tilt_deg: float = 0.0,
    mirrored: bool = False,
    shift: tuple[float, float] = (0.0, 0.0),
    size: int = PICTURE_SIZE,
) -> npt.NDArray[np.uint8]:
    """The picture itself. `shift` is in [-1, 1] of the room that is left beside the sprite."""
    # "RGBa" is premultiplied: resampling straight alpha would draw dark rims.
    sprite = Image.fromarray(emoji.sprite).convert("RGBa")
    if mirrored:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = round(scale * size)
    sprite = sprite.resize((side, round(side * 128 / 136)), Image.Resampling.LANCZOS)
    turned = sprite.rotate(tilt_deg, Image.Resampling.BICUBIC, expand=True)
    left, top = (
        round((size - length) / 2 * (1 + part))
        for length, part in zip(turned.size, _within(shift, turned.size, size), strict=True)
    )
    canvas = Image.new("RGBA", (size, size), (*list(BACKGROUNDS.values())[ground], 255))
    canvas.alpha_composite(
        turned.convert("RGBA").crop((max(0, -left), max(0, -top), size - left, size - top)),
        (max(0, left), max(0, top)),
    )
    return np.asarray(canvas.convert("RGB"))


def caption(name: str, background: str | None = None, *, bare: bool = False) -> str:
    """ "a red apple", "a red apple on a light blue background"; `bare` leaves the article out."""
    text = name if bare else with_article(name)
    return text if background is None else f"{text} on {with_article(background)} background"


def with_article(name: str) -> str:
    """`name` after a or an; plurals and proper names stay as they are."""
    if name[0].isupper() or (name.endswith("s") and not name.endswith("ss")):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def directed(emoji: Emoji) -> bool:
    """Whether a mirror image would be another thing."""
    return emoji.group in _DIRECTED_GROUPS or bool(_DIRECTED_NAMES.search(emoji.name.lower()))


def _within(shift: tuple[float, float], lengths: tuple[int, int], size: int) -> tuple[float, float]:
    """No shift where a tilted sprite already fills the canvas."""
    across, down = shift
    return across if lengths[0] < size else 0.0, down if lengths[1] < size else 0.0

"""The pictures and names the demo family learns from: emoji of Noto Color Emoji, named by CLDR.

Everything comes from three Debian packages (fonts-noto-color-emoji, OFL 1.1; unicode-cldr-core and
unicode-data, Unicode licence), so the demo can be rebuilt offline from nothing.
"""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from tiue_export.errors import MissingExtraError

PACKAGES = ("fonts-noto-color-emoji", "unicode-cldr-core", "unicode-data")
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES = Path("/usr/share/unicode/cldr/common/annotations/en.xml")
GROUPS = Path("/usr/share/unicode/emoji/emoji-test.txt")

# The one size at which the font holds bitmaps, and the canvas those fill.
_FONT_SIZE = 109
SPRITE_SIZE = (136, 128)
_VARIATION_SELECTOR = "\ufe0f"
# Skin tones and hair styles are parts, not pictures.
_EXCLUDED_GROUPS = ("Component",)
# What the feature network tells apart: things, animals and food, 500 pictures.
_TOLD_APART_GROUPS = ("Animals & Nature", "Food & Drink", "Activities")
_TOLD_APART_SUBGROUPS = (
    "face-smiling",
    "musical-instrument",
    "sky & weather",
    "transport-air",
    "transport-ground",
    "transport-water",
)
# What the family draws: some of those. How many is a question of hours: after 290 sights of each at
# 128 px a fox had no eyes yet; after 900 it has, and guitars are still blots.
_DEMO_NAMES = Path(__file__).parent / "demo_names.txt"


@dataclass(frozen=True)
class Emoji:
    """One picture: `sprite` is (128, 136, 4) uint8 RGBA, `name` its CLDR short name."""

    character: str
    name: str
    group: str
    subgroup: str
    sprite: npt.NDArray[np.uint8]


def load_corpus() -> tuple[Emoji, ...]:
    """All single-character emoji that the font draws in colour, in the order of CLDR's file.

    Raises `MissingExtraError` naming the Debian packages when a source file is absent.
    """
    missing = [path for path in (FONT, NAMES, GROUPS) if not path.is_file()]
    if missing:
        raise MissingExtraError(
            f"the demo's pictures need {missing[0]}, which is not there",
            f"Run: apt-get install {' '.join(PACKAGES)}",
        )
    font = ImageFont.truetype(str(FONT), _FONT_SIZE)
    groups = _read_groups()
    corpus = []
    for character, name in _read_names():
        group, subgroup = groups.get(character, ("Component", ""))
        if len(character) != 1 or group in _EXCLUDED_GROUPS:
            continue
        canvas = Image.new("RGBA", SPRITE_SIZE, (0, 0, 0, 0))
        ImageDraw.Draw(canvas).text((0, 0), character, font=font, embedded_color=True)
        sprite = np.asarray(canvas)
        if sprite[..., 3].any():
            corpus.append(Emoji(character, name, group, subgroup, sprite))
    return tuple(corpus)


def demo_names() -> frozenset[str]:
    """The names of what the family draws."""
    lines = _DEMO_NAMES.read_text("utf-8").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def demo_corpus() -> tuple[Emoji, ...]:
    """The part of `load_corpus` that the family draws."""
    names = demo_names()
    return tuple(emoji for emoji in load_corpus() if emoji.name in names)


def told_apart() -> tuple[Emoji, ...]:
    """The part of `load_corpus` that the feature network tells apart; the demo's are among them."""
    return tuple(
        emoji
        for emoji in load_corpus()
        if emoji.group in _TOLD_APART_GROUPS or emoji.subgroup in _TOLD_APART_SUBGROUPS
    )


def fingerprint(corpus: tuple[Emoji, ...]) -> str:
    """sha256 over names and pixels: two machines with equal packages agree on it."""
    digest = hashlib.sha256()
    for emoji in corpus:
        digest.update(emoji.name.encode())
        digest.update(emoji.sprite.tobytes())
    return digest.hexdigest()


def _read_names() -> list[tuple[str, str]]:
    """(character, short name) of every annotation of type tts."""
    tree = ElementTree.parse(NAMES)
    return [
        (entry.get("cp", "").replace(_VARIATION_SELECTOR, ""), entry.text or "")
        for entry in tree.iter("annotation")
        if entry.get("type") == "tts"
    ]


def _read_groups() -> dict[str, tuple[str, str]]:
    """Character -> (group, subgroup), from Unicode's emoji-test.txt."""
    groups: dict[str, tuple[str, str]] = {}
    group = subgroup = ""
    for line in GROUPS.read_text("utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.partition(":")[2].strip()
        elif line and not line.startswith("#"):
            points = line.partition(";")[0].split()
            character = "".join(chr(int(point, 16)) for point in points)
            groups[character.replace(_VARIATION_SELECTOR, "")] = (group, subgroup)
    return groups

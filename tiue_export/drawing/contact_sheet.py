"""A contact sheet: prompts down, seeds across, each row under its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

_MARGIN_PX = 8
_TEXT_PX = 14
_MAX_WIDTH_PX = 4096


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image]]], titles: Sequence[str]) -> Image:
    """One row of equally sized pictures per (label, pictures); `titles` stand above the columns.

    The sheet is at most 4096 px wide: larger pictures are shrunk alike.
    """
    from PIL import Image, ImageDraw, ImageFont

    width, height = rows[0][1][0].size
    columns = max(len(pictures) for _, pictures in rows)
    room = (_MAX_WIDTH_PX - _MARGIN_PX) // columns - _MARGIN_PX
    scale = min(1.0, room / width)
    cell = (max(1, round(width * scale)), max(1, round(height * scale)))
    font = ImageFont.load_default(_TEXT_PX)
    wrapped = [_wrapped(title, cell[0], font) for title in titles]
    line = _TEXT_PX + _MARGIN_PX
    head = line * max((len(lines) for lines in wrapped), default=1)
    sheet = Image.new(
        "RGB",
        (
            _MARGIN_PX + columns * (cell[0] + _MARGIN_PX),
            head + _MARGIN_PX + len(rows) * (line + cell[1] + _MARGIN_PX),
        ),
        "white",
    )
    pen = ImageDraw.Draw(sheet)
    for column, lines in enumerate(wrapped):
        for number, text in enumerate(lines):
            place = (_left(column, cell), _MARGIN_PX + number * line)
            pen.text(place, text, fill="grey", font=font)
    for row, (label, pictures) in enumerate(rows):
        top = head + _MARGIN_PX + row * (line + cell[1] + _MARGIN_PX)
        pen.text((_MARGIN_PX, top), label, fill="black", font=font)
        for column, picture in enumerate(pictures):
            shrunk = picture if scale == 1.0 else picture.resize(cell, Image.Resampling.LANCZOS)
            sheet.paste(shrunk, (_left(column, cell), top + line))
    return sheet


def _wrapped(title: str, width_px: int, font: ImageFont | FreeTypeFont) -> list[str]:
    """Lines of whole words that stay within the column, so that titles never meet."""
    lines = [""]
    for word in title.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width_px or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _left(column: int, cell: tuple[int, int]) -> int:
    return _MARGIN_PX + column * (cell[0] + _MARGIN_PX)

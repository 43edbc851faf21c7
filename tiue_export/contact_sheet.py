"""A contact sheet: prompts down, seeds across, each row under its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

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
    line = _TEXT_PX + _MARGIN_PX
    sheet = Image.new(
        "RGB",
        (
            _MARGIN_PX + columns * (cell[0] + _MARGIN_PX),
            line + _MARGIN_PX + len(rows) * (line + cell[1] + _MARGIN_PX),
        ),
        "white",
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT_PX)
    for column, title in enumerate(titles):
        pen.text((_left(column, cell), _MARGIN_PX), title, fill="grey", font=font)
    for row, (label, pictures) in enumerate(rows):
        top = line + _MARGIN_PX + row * (line + cell[1] + _MARGIN_PX)
        pen.text((_MARGIN_PX, top), label, fill="black", font=font)
        for column, picture in enumerate(pictures):
            shrunk = picture if scale == 1.0 else picture.resize(cell, Image.Resampling.LANCZOS)
            sheet.paste(shrunk, (_left(column, cell), top + line))
    return sheet


def _left(column: int, cell: tuple[int, int]) -> int:
    return _MARGIN_PX + column * (cell[0] + _MARGIN_PX)

"""`tiue-export generate`."""

from __future__ import annotations

from ..options.generate import BulkOptions, DrawOptions
from ..options.group import command


@command
def generate(draw: DrawOptions, bulk: BulkOptions) -> None:
    """Draw pictures from a bundle: no torch needed.

    Example:  tiue-export generate fox "a red fox in the snow" --seed 7 --count 4

    Example:  tiue-export generate fox --prompts coco.tsv --format tar --workers 2 --out coco

    Example:  tiue-export generate teacher "a red fox" --steps 25 --key-steps uniform:1 --inject off
    """
    from ..draw.bulk.drawing_run import in_bulk
    from ..draw.bulk.drawing_run import run as draw_in_bulk
    from ..draw.generate import run

    if in_bulk(draw, bulk):
        draw_in_bulk(draw, bulk)
    else:
        run(draw)

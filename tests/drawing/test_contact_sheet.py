"""The contact sheet: every picture where a reader expects it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tiue_export.apps.draw.generate import run
from tiue_export.apps.options.generate import DrawOptions
from tiue_export.drawing.contact_sheet import contact_sheet
from tiue_export.errors import UsageError


def plain(colour: str, size: int = 32) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def places(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Bounding box (left, top, right, bottom) of a colour."""
    ys, xs = np.nonzero((np.asarray(sheet) == colour).all(-1))
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def test_rows_go_down_and_columns_across_at_full_size():
    sheet = contact_sheet(
        [("first", [plain("red"), plain("lime")]), ("second", [plain("blue"), plain("yellow")])],
        ["seed 0", "seed 1"],
    )
    red, lime, blue = (places(sheet, c) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    assert red[2] - red[0] == red[3] - red[1] == 32
    assert red[1] == lime[1]
    assert red[2] < lime[0]
    assert blue[0] == red[0]
    assert blue[1] > red[3]


def test_labels_are_drawn_above_their_row_and_never_over_a_picture():
    bare = contact_sheet([("", [plain("red", 64)])], [""])
    labelled = contact_sheet([("a red apple", [plain("red", 64)])], ["seed 0"])
    changed = np.nonzero((np.asarray(bare) != np.asarray(labelled)).any(-1))[0]
    assert changed.size > 0
    assert changed.max() < places(labelled, (255, 0, 0))[1]


def test_long_titles_wrap_within_their_columns():
    titles = ["teacher, 50 steps, guidance 2", "teacher, 4 steps, guidance 2"]
    sheet = contact_sheet([("", [plain("red", 96), plain("lime", 96)])], titles)
    red, lime = (places(sheet, c) for c in ((255, 0, 0), (0, 255, 0)))
    between = np.asarray(sheet)[:, red[2] : lime[0]]
    assert between.shape[1] > 0
    assert (between == 255).all()
    above = np.asarray(sheet)[: red[1], lime[0] : lime[2]]
    assert (above < 200).any()


def test_a_sheet_of_many_large_pictures_stays_within_4096_pixels():
    sheet = contact_sheet([("wide", [plain("red", 1024)] * 8)], [])
    assert sheet.width <= 4096
    box = places(sheet, (255, 0, 0))
    assert box[2] - box[0] <= 4096


def test_generate_writes_a_sheet_of_prompts_by_seeds(tiny_bundle, tmp_path, capsys):
    sheet = tmp_path / "new" / "sheet.png"
    prompts = ("a red fox", "an owl", "a cat")
    request = DrawOptions(
        tiny_bundle.root, prompts, count=2, out=tmp_path / "out", sheet=sheet, as_json=True
    )
    run(request)
    assert json.loads(capsys.readouterr().out)["sheet"] == str(sheet)
    drawn = sorted((tmp_path / "out").iterdir())
    with Image.open(drawn[-1]) as last, Image.open(sheet) as whole:
        assert whole.width > 2 * last.width
        assert whole.height > 3 * last.height
        corner = (whole.width - 8 - last.width, whole.height - 8 - last.height)
        box = (*corner, corner[0] + last.width, corner[1] + last.height)
        assert np.array_equal(np.asarray(whole.crop(box)), np.asarray(last))


@pytest.mark.parametrize(
    ("name", "says"), [("sheet.jpg", "expected a .png file"), ("there.png", "exists already")]
)
def test_a_sheet_that_cannot_be_written_is_refused_before_drawing(
    tiny_bundle, tmp_path, name, says
):
    (tmp_path / "there.png").touch()
    sheet: Path = tmp_path / name
    with pytest.raises(UsageError, match=says):
        run(DrawOptions(tiny_bundle.root, ("a fox",), out=tmp_path / "out", sheet=sheet))
    assert not (tmp_path / "out").exists()

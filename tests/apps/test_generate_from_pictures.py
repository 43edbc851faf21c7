"""`tiue-export generate --image`: pictures and masks from files, and every refusal in words."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tiue_export.drawing.picture import parameters_from_png


@pytest.fixture
def files(tmp_path):
    """A picture of another shape than the bundle's, and masks."""
    rows, columns = np.mgrid[0:96, 0:128]
    picture = np.stack([columns * 2, rows * 2, rows + columns], axis=-1).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "photo.png")
    mask = np.zeros((96, 128), np.uint8)
    mask[:48] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask[:48]).save(tmp_path / "small.png")
    Image.fromarray(mask * 0).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


def test_a_picture_is_started_from_and_what_was_done_to_it_is_told(run, picture_bundle, files):
    told = run(
        *("generate", picture_bundle.root, "a fox", "--image", files / "photo.png"),
        *("--strength", "0.5", "--out", files / "fox.png", "--time"),
    )
    assert told[0] == 0
    assert "vae_encoder" in told[1]
    notes = " ".join(told[2].split())
    assert "photo.png is 128x96 px: scaled to 64x64, its margins cut" in notes
    parameters = parameters_from_png(files / "fox.png")
    assert parameters is not None
    assert (parameters["strength"], parameters["steps"]) == (0.5, 2)


def test_a_mask_keeps_the_rest(run, picture_bundle, files):
    out = files / "fox.png"
    command = ("generate", picture_bundle.root, "a fox", "--image", files / "photo.png")
    told = run(*command, "--mask", files / "mask.png", "--out", out, "--json")
    assert told[0] == 0
    assert json.loads(told[1])["pictures"][0]["path"] == str(out)
    with Image.open(files / "photo.png") as photo:
        fitted = photo.crop((16, 0, 112, 96)).resize((64, 64), Image.Resampling.LANCZOS)
    with Image.open(out) as drawn:
        difference = np.abs(np.asarray(drawn, int) - np.asarray(fitted, int))
    assert difference[48:].max() <= 2
    assert difference[:32].mean() > 5


REFUSED = [
    (("--mask", "mask.png"), "--mask is of a drawing that starts from a picture"),
    (("--strength", "0.5"), "--strength is of a drawing that starts from a picture"),
    (("--sampled",), "--sampled is of a drawing that starts from a picture"),
    (("--image", "photo.png", "--strength", "0"), "--strength is 0; expected more than 0"),
    (("--image", "photo.png", "--strength", "1.5"), "--strength is 1.5; expected more than 0"),
    (
        ("--image", "photo.png", "--steps", "1", "--strength", "0.5"),
        "--strength 0.5 of 1 step leaves none to do",
    ),
    (("--image", "photo.png", "--mask", "small.png"), "is 128x48 px; expected 128x96"),
    (("--image", "photo.png", "--mask", "black.png"), "has no white, so nothing would be drawn"),
    (("--image", "none.png"), "cannot be read as a picture: it is not there"),
    (("--image", "text.png"), "cannot be read as a picture: cannot identify"),
    (("--image", "photo.png", "--inject", "on"), "--inject is for Faster Diffusion"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_cannot_be_is_refused_before_anything_is_drawn(
    run, picture_bundle, files, options, said
):
    placed = [files / word if word.endswith(".png") else word for word in options]
    out = files / "out"
    told = run("generate", picture_bundle.root, "a fox", *placed, "--out", out)
    assert told[0] != 0
    assert said in " ".join(told[2].split())
    assert "next:" in told[2]
    assert not out.exists()


def test_a_bundle_without_the_graph_says_how_to_have_it(run, few_step_bundle, files):
    told = run("generate", few_step_bundle.root, "a fox", "--image", files / "photo.png")
    assert told[0] != 0
    assert "has no VAE encoder" in told[2]
    assert "--with-vae-encoder" in told[2]


def test_a_picture_that_lies_there_is_not_replaced(run, picture_bundle, files):
    out = files / "fox.png"
    command = ("generate", picture_bundle.root, "a fox", "--image", files / "photo.png")
    assert run(*command, "--out", out)[0] == 0
    told = run(*command, "--out", out)
    assert told[0] != 0
    assert "exists already" in told[2]

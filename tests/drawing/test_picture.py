"""Decoder output to 8 bits, and PNG files that carry what made them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tiue_export.drawing.picture import (
    image_from_pixels,
    parameters_from_png,
    pixels_from_sample,
    save_png,
)


def red_square():
    return Image.new("RGB", (8, 8), (255, 0, 0))


@pytest.mark.parametrize(
    ("value", "pixel"),
    [
        (-1.0, 0),
        (-0.997, 0),
        (-0.996, 1),
        (-0.5, 64),
        (0.0, 128),
        (-0.004, 127),
        (0.5, 191),
        (0.999, 255),
        (1.0, 255),
        (1.001, 255),
        (-1.1, 0),
        (3e38, 255),
        (-3e38, 0),
    ],
)
def test_a_pixel_is_the_floor_of_127_and_a_half_x_plus_128_clipped(value, pixel):
    sample = np.full((1, 3, 1, 1), min(max(value, -1e30), 1e30), np.float32)
    pixels = pixels_from_sample(sample)
    assert pixels.dtype == np.uint8
    assert pixels.ravel().tolist() == [pixel] * 3


@settings(database=None, deadline=None)
@given(st.floats(-2, 2, width=32))
def test_rounding_never_errs_by_more_than_half_a_level(value):
    pixel = int(pixels_from_sample(np.full((1, 3, 1, 1), value, np.float32))[0, 0, 0, 0])
    exact = min(max(127.5 * value + 127.5, 0.0), 255.0)
    assert abs(pixel - exact) <= 0.5 + 1e-4


def test_pixels_equal_those_of_diffusers_but_for_the_last_bit_at_a_tie():
    import torch
    from diffusers.image_processor import VaeImageProcessor

    sample = np.random.RandomState(0).uniform(-1.2, 1.2, (2, 3, 128, 128)).astype(np.float32)
    images = VaeImageProcessor().postprocess(torch.from_numpy(sample), output_type="pil")
    expected = np.stack([np.asarray(image) for image in images]).astype(int)
    difference = np.abs(pixels_from_sample(sample) - expected)
    scaled = (127.5 * sample.astype(np.float64) + 128).transpose(0, 2, 3, 1)
    from_tie = np.abs(scaled - np.round(scaled))
    assert difference.max() <= 1
    assert (from_tie[difference == 1] < 1e-4).all()


def test_batch_channel_row_and_column_keep_their_places():
    sample = np.full((2, 3, 4, 5), -1.0, np.float32)
    sample[1, 2, 3, 4] = 1.0
    pixels = pixels_from_sample(sample)
    assert pixels.shape == (2, 4, 5, 3)
    assert np.argwhere(pixels).tolist() == [[1, 3, 4, 2]]
    image = image_from_pixels(pixels[1])
    assert (image.mode, image.size) == ("RGB", (5, 4))
    assert image.getpixel((4, 3)) == (0, 0, 255)


def test_half_precision_samples_are_rounded_in_float32():
    sample = np.linspace(-1, 1, 300, dtype=np.float16).reshape(1, 3, 10, 10)
    np.testing.assert_array_equal(
        pixels_from_sample(sample), pixels_from_sample(sample.astype(np.float32))
    )


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a red fox",
        "first line\nsecond line\r\n\ttabbed",
        "狐狸 في الثلج 🦊👩‍🚀 Straße",
        'quotes " and \\ and {"json": 1}',
        "nul \x00 and escape \x1b[31m",
        "x" * 100_000,
    ],
    ids=["empty", "plain", "newlines", "unicode", "quotes", "control", "long"],
)
def test_parameters_come_back_from_the_png_as_they_went_in(tmp_path, prompt):
    parameters = {"prompt": prompt, "seed": 0, "steps": 4, "scale": 0.5, "none": None}
    save_png(red_square(), tmp_path / "fox.png", parameters)
    assert parameters_from_png(tmp_path / "fox.png") == parameters


@settings(database=None, deadline=None, max_examples=50)
@given(st.text(), st.integers(0, 2**32 - 1))
def test_any_prompt_and_seed_come_back_from_the_png(tmp_path_factory, prompt, seed):
    path = tmp_path_factory.getbasetemp() / "any.png"
    save_png(red_square(), path, {"prompt": prompt, "seed": seed})
    assert parameters_from_png(path) == {"prompt": prompt, "seed": seed}


def test_the_picture_itself_is_stored_without_loss(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (8, 6, 3)).astype(np.uint8)
    save_png(image_from_pixels(pixels), tmp_path / "noise.png", {})
    with Image.open(tmp_path / "noise.png") as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_other_tools_find_the_prompt_and_the_settings_as_one_text(tmp_path):
    parameters = {"prompt": "a red fox", "seed": 0, "model_hash": "0b404e6faca3"}
    save_png(red_square(), tmp_path / "fox.png", parameters)
    with Image.open(tmp_path / "fox.png") as image:
        image.load()
        assert image.text["parameters"] == "a red fox\nSeed: 0, Model hash: 0b404e6faca3"
        assert json.loads(image.text["tiue"]) == parameters


def test_a_picture_without_our_metadata_has_no_parameters(tmp_path):
    red_square().save(tmp_path / "plain.png")
    red_square().save(tmp_path / "plain.jpg")
    assert parameters_from_png(tmp_path / "plain.png") is None
    assert parameters_from_png(tmp_path / "plain.jpg") is None


def test_saving_leaves_the_picture_and_nothing_else(tmp_path):
    save_png(red_square(), tmp_path / "fox.png", {"seed": 1})
    save_png(red_square(), tmp_path / "fox.png", {"seed": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["fox.png"]
    assert parameters_from_png(tmp_path / "fox.png") == {"seed": 2}


def test_a_picture_that_cannot_be_written_leaves_the_old_one_and_no_leftovers(tmp_path):
    save_png(red_square(), tmp_path / "fox.png", {"seed": 1})
    with pytest.raises(OSError, match="cannot write mode CMYK as PNG"):
        save_png(Image.new("CMYK", (8, 8)), tmp_path / "fox.png", {"seed": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["fox.png"]
    assert parameters_from_png(tmp_path / "fox.png") == {"seed": 1}


def test_a_target_that_cannot_be_replaced_leaves_no_leftovers(tmp_path):
    (tmp_path / "fox.png").mkdir()
    with pytest.raises(IsADirectoryError):
        save_png(red_square(), tmp_path / "fox.png", {})
    assert [path.name for path in tmp_path.iterdir()] == ["fox.png"]


def test_parameters_that_json_cannot_hold_leave_no_leftovers(tmp_path):
    with pytest.raises(TypeError):
        save_png(red_square(), tmp_path / "fox.png", {"seed": object()})
    assert list(tmp_path.iterdir()) == []

"""Any picture of the usual kinds may be started from; what is none is refused in words."""

from __future__ import annotations

import io
import os
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tiue_export.drawing.source_picture import (
    latent_mask,
    pasted,
    source_picture,
)
from tiue_export.errors import UsageError

SIZE = (16, 8)  # width, height


def noisy(height: int = 8, width: int = 16, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_a_picture_of_the_right_size_is_taken_value_by_value():
    source = source_picture(noisy(), SIZE)
    assert source.pixels.dtype == np.float32
    np.testing.assert_allclose((source.pixels.transpose(1, 2, 0) + 1) * 127.5, noisy(), atol=1e-4)
    assert (source.mask, source.notes) == (None, ())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_files_bytes_and_images_of_every_kind_are_one(kind, tmp_path):
    made = file_of(Image.fromarray(noisy()), kind)
    path = tmp_path / "picture"
    path.write_bytes(made)
    with Image.open(path) as image:
        expected = source_picture(image.convert("RGB"), SIZE).pixels
    for given_as in (path, str(path), made):
        np.testing.assert_array_equal(source_picture(given_as, SIZE).pixels, expected)


def test_another_shape_is_scaled_to_cover_and_cut_around_the_middle():
    wide = np.zeros((8, 64, 3), np.uint8)
    wide[:, 24:40] = 255  # the middle 16 columns
    source = source_picture(wide, SIZE)
    assert source.pixels.shape == (3, 8, 16)
    assert (source.pixels == 1).all()
    assert source.notes == ("the picture is 64x8 px: scaled to 16x8, its margins cut",)


def test_a_picture_of_the_same_shape_is_scaled_alone(tmp_path):
    path = tmp_path / "big.png"
    path.write_bytes(file_of(Image.fromarray(noisy(80, 160))))
    assert source_picture(path, SIZE).notes == (f"{path} is 160x80 px: scaled to 16x8",)


def test_a_camera_held_upright_is_heard():
    turned = Image.fromarray(noisy(16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    source = source_picture(file.getvalue(), SIZE)
    np.testing.assert_array_equal(
        source.pixels, source_picture(np.rot90(noisy(16, 8), -1).copy(), SIZE).pixels
    )


def test_alpha_is_laid_on_white_and_told():
    clear = noisy(channels=4)
    clear[:4, :, 3], clear[4:, :, 3] = 0, 255
    source = source_picture(clear, SIZE)
    assert (source.pixels[:, :4] == 1).all()
    np.testing.assert_array_equal(
        source.pixels[:, 4:], source_picture(clear[:, :, :3].copy(), SIZE).pixels[:, 4:]
    )
    assert source.notes == ("the picture is transparent in places: laid on white",)


def test_alpha_that_hides_nothing_is_not_spoken_of():
    solid = noisy(channels=4)
    solid[:, :, 3] = 255
    assert source_picture(solid, SIZE).notes == ()


def test_sixteen_bits_are_rounded_and_told():
    deep = np.linspace(0, 65535, 128).reshape(8, 16).astype(np.uint16)
    source = source_picture(file_of(Image.fromarray(deep)), SIZE)
    np.testing.assert_allclose((source.pixels[0] + 1) / 2, deep / 65535, atol=1 / 255)
    assert source.notes == ("the picture has more than 8 bits: rounded",)


def test_values_that_are_no_numbers_become_black():
    values = np.full((8, 16), 0.5, np.float32)
    values[0, 0] = np.nan
    source = source_picture(file_of(Image.fromarray(values), "TIFF"), SIZE)
    assert source.pixels[0, 0, 0] == -1
    assert np.isfinite(source.pixels).all()


def test_cmyk_is_converted_and_told():
    image = Image.fromarray(noisy()).convert("CMYK")
    source = source_picture(file_of(image, "JPEG"), SIZE)
    assert source.pixels.shape == (3, 8, 16)
    assert source.notes == ("the picture is in CMYK: converted to RGB without a profile",)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "YCbCr", "HSV", "LAB"])
def test_every_mode_becomes_rgb(mode):
    assert source_picture(Image.fromarray(noisy()).convert(mode), SIZE).pixels.shape == (3, 8, 16)


def png_that_claims(width: int, height: int) -> bytes:
    """A small file that unpacks to a picture of this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((8001, 8001), "8001x8001 px; expected at most 64,000,000 pixels"),
        ((60_000, 60_000), "exceeds limit"),  # Pillow's own
    ],
)
def test_a_bomb_is_refused_by_what_it_claims_before_it_is_unpacked(size, said):
    with pytest.raises(UsageError, match=said):
        source_picture(png_that_claims(*size), SIZE)


@pytest.mark.parametrize(
    "made", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"<svg></svg>", b"%PDF-1.4"]
)
def test_what_is_no_picture_says_which_kinds_are(made):
    with pytest.raises(UsageError, match="cannot be read as a picture") as error:
        source_picture(made, SIZE)
    assert "PNG, JPEG, WEBP" in error.value.next_step


def test_a_missing_file_and_a_pipe_are_told_apart(tmp_path):
    with pytest.raises(UsageError, match="it is not there"):
        source_picture(tmp_path / "none.png", SIZE)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="it is no file"):
        source_picture(tmp_path / "pipe", SIZE)


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(1, 400))
def test_a_damaged_file_opens_or_is_refused_and_nothing_else(place, value, cut):
    made = bytearray(file_of(Image.fromarray(noisy())))
    made[place % len(made)] = value
    for damaged in (bytes(made), bytes(made)[:-cut]):
        with suppress(UsageError):
            assert source_picture(damaged, SIZE).pixels.shape == (3, 8, 16)


def test_a_mask_is_cut_as_its_picture_is():
    wide, mask = noisy(8, 64), np.zeros((8, 64), np.uint8)
    mask[:, 24:32] = 255
    source = source_picture(wide, SIZE, mask)
    assert source.mask is not None
    np.testing.assert_array_equal(source.mask[0], [True] * 8 + [False] * 8)


def test_a_mask_of_another_size_than_its_picture_is_refused():
    with pytest.raises(UsageError, match="the mask is 8x8 px; expected 16x8, as its picture"):
        source_picture(noisy(), SIZE, noisy(8, 8, 1))


def test_a_mask_without_white_is_refused():
    with pytest.raises(UsageError, match="the mask has no white"):
        source_picture(noisy(), SIZE, np.full((8, 16), 127, np.uint8))


def test_latents_are_drawn_anew_where_any_of_their_pixels_is():
    mask = np.zeros((16, 16), bool)
    mask[0, 8] = mask[9, 1] = True
    np.testing.assert_array_equal(latent_mask(mask, 8), [[[[0, 1], [1, 0]]]])


def test_pasting_keeps_what_is_far_from_the_mask_and_what_is_inside():
    mask = np.zeros((64, 64), bool)
    mask[16:48, 16:48] = True
    drawn, source = np.ones((2, 3, 64, 64), np.float32), -np.ones((3, 64, 64), np.float32)
    mixed = pasted(drawn, source, mask, 8)
    assert (mixed[:, :, 16:48, 16:48] == 1).all()
    assert (mixed[:, :, :4] == -1).all()
    border = mixed[0, 0, 32, 48:64]  # from the mask's edge outwards: no step, no way back
    assert (np.diff(border) <= 0).all()
    assert np.abs(np.diff(border)).max() < 1.1


def test_the_digest_tells_pictures_and_masks_apart():
    mask = np.full((8, 16), 255, np.uint8)
    digests = {
        source_picture(noisy(), SIZE).digest,
        source_picture(noisy(), SIZE, mask).digest,
        source_picture(255 - noisy(), SIZE).digest,
    }
    assert len(digests) == 3

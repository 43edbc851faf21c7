"""Seed to noise: the same numbers for ever, and files that replace them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiue_export.errors import UsageError
from tiue_export.sampling.noise import MAX_SEED, noise_from_file, noise_from_seed, noises_from_seed

SHAPE = (1, 4, 6, 5)


def test_seed_zero_begins_with_the_values_numpy_froze():
    golden = np.float32([1.7640524, 0.4001572, 0.978738, 2.2408931])
    noise = noise_from_seed(0, SHAPE)
    assert noise.dtype == np.float32
    assert noise.shape == SHAPE
    np.testing.assert_array_equal(noise.ravel()[:4], golden)
    np.testing.assert_array_equal(
        noise[0], np.random.RandomState(0).standard_normal(SHAPE[1:]).astype(np.float32)
    )


@settings(database=None, deadline=None)
@given(st.integers(0, MAX_SEED))
def test_the_same_seed_gives_the_same_noise(seed):
    np.testing.assert_array_equal(noise_from_seed(seed, SHAPE), noise_from_seed(seed, SHAPE))


def test_seed_zero_is_a_seed_of_its_own():
    zero = noise_from_seed(0, SHAPE)
    assert not np.array_equal(zero, noise_from_seed(1, SHAPE))
    np.testing.assert_array_equal(zero, noise_from_seed(0, SHAPE))


def test_drawing_leaves_numpys_global_generator_alone():
    np.random.seed(7)
    expected = np.random.standard_normal(3)
    np.random.seed(7)
    noise_from_seed(3, SHAPE)
    np.testing.assert_array_equal(np.random.standard_normal(3), expected)


@settings(database=None, deadline=None)
@given(st.integers(0, MAX_SEED - 3))
def test_row_b_of_a_batch_is_the_noise_of_seed_plus_b(seed):
    batch = noise_from_seed(seed, (4, *SHAPE[1:]))
    for row in range(4):
        np.testing.assert_array_equal(batch[row : row + 1], noise_from_seed(seed + row, SHAPE))


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 10**30])
def test_a_seed_out_of_range_is_refused_with_the_range(seed):
    with pytest.raises(UsageError) as caught:
        noise_from_seed(seed, SHAPE)
    assert caught.value.message == f"seed {seed} is out of range; expected 0 to {MAX_SEED}"


def test_a_batch_whose_last_row_leaves_the_range_is_refused():
    noise_from_seed(MAX_SEED, SHAPE)
    noise_from_seed(MAX_SEED - 1, (2, *SHAPE[1:]))
    with pytest.raises(UsageError, match=f"expected 0 to {MAX_SEED - 1}"):
        noise_from_seed(MAX_SEED, (2, *SHAPE[1:]))


@given(st.integers(0, MAX_SEED - 2), st.integers(1, 4))
def test_a_picture_draws_all_its_noises_from_the_one_stream_of_its_seed(seed, count):
    noises = noises_from_seed(seed, count, (3, *SHAPE[1:]))
    assert noises.dtype == np.float32
    assert noises.shape == (count, 3, *SHAPE[1:])
    for row in range(3):
        stream = np.random.RandomState(seed + row)
        for noise in noises[:, row]:  # one draw after the other
            drawn = stream.standard_normal(SHAPE[1:]).astype(np.float32)
            np.testing.assert_array_equal(noise, drawn)


@given(st.integers(0, MAX_SEED - 1), st.integers(1, 4))
def test_the_initial_noise_does_not_depend_on_how_many_follow(seed, count):
    shape = (2, *SHAPE[1:])
    np.testing.assert_array_equal(
        noises_from_seed(seed, count, shape)[0], noise_from_seed(seed, shape)
    )


def test_many_noises_of_seeds_out_of_range_are_refused_too():
    with pytest.raises(UsageError, match=f"expected 0 to {MAX_SEED - 1}"):
        noises_from_seed(MAX_SEED, 3, (2, *SHAPE[1:]))


def saved(folder: Path, array) -> Path:
    path = folder / "latents.npy"
    np.save(path, array)
    return path


def test_a_file_of_one_image_may_leave_the_batch_axis_out(tmp_path):
    noise = noise_from_seed(5, SHAPE)
    np.testing.assert_array_equal(noise_from_file(saved(tmp_path, noise[0]), SHAPE), noise)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_file_of_the_requested_shape_comes_back_unchanged(tmp_path, batch):
    noise = noise_from_seed(5, (batch, *SHAPE[1:]))
    np.testing.assert_array_equal(noise_from_file(saved(tmp_path, noise), noise.shape), noise)


@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4"])
def test_other_float_types_and_orders_become_native_float32(tmp_path, dtype):
    noise = noise_from_seed(5, SHAPE)
    stored = noise.astype(dtype)
    loaded = noise_from_file(saved(tmp_path, np.asfortranarray(stored)), SHAPE)
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, stored.astype(np.float32))


@pytest.mark.parametrize(
    "shape", [(4, 6), (6, 5, 4), (4, 5, 6), (120,), (2, 4, 6, 5), (1, 1, 4, 6, 5), (0, 4, 6, 5), ()]
)
def test_a_wrong_shape_is_refused_naming_both_shapes(tmp_path, shape):
    path = saved(tmp_path, np.zeros(shape, np.float32))
    with pytest.raises(UsageError) as caught:
        noise_from_file(path, SHAPE)
    assert caught.value.message == f"{path} has shape {shape}; this request needs {SHAPE}"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_noise_is_refused(tmp_path, bad):
    noise = noise_from_seed(5, SHAPE)
    noise[0, 2, 3, 4] = bad
    path = saved(tmp_path, noise)
    with pytest.raises(UsageError) as caught:
        noise_from_file(path, SHAPE)
    assert caught.value.message == f"{path} holds non-finite values"


def test_values_beyond_float32_are_refused_as_non_finite(tmp_path):
    path = saved(tmp_path, np.full(SHAPE, 1e300))
    with pytest.raises(UsageError, match="holds non-finite values"):
        noise_from_file(path, SHAPE)


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex64", "U4"])
def test_an_array_of_another_kind_is_refused(tmp_path, dtype):
    path = saved(tmp_path, np.zeros(SHAPE, dtype))
    with pytest.raises(UsageError, match="does not hold one array of floating-point numbers"):
        noise_from_file(path, SHAPE)


def test_an_archive_of_arrays_is_refused(tmp_path):
    path = tmp_path / "latents.npz"
    np.savez(path, noise_from_seed(0, SHAPE))
    with pytest.raises(UsageError, match="does not hold one array of floating-point numbers"):
        noise_from_file(path, SHAPE)


def npy_bytes(folder: Path) -> bytes:
    return saved(folder, np.zeros(SHAPE, np.float32)).read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"not an array",
        lambda data: data[:7],
        lambda data: data[:40],
        lambda data: data[:-1],
        lambda data: data.replace(b"(1, 4, 6, 5)", b"((((4, 6, 5)"),
        lambda data: b"PK\x03\x04" + data,
    ],
    ids=["empty", "text", "cut magic", "cut header", "cut data", "bad header", "bad zip"],
)
def test_a_file_that_is_no_npy_is_refused_with_the_line_that_writes_one(tmp_path, damage):
    path = tmp_path / "latents.npy"
    path.write_bytes(damage(npy_bytes(tmp_path)))
    with pytest.raises(UsageError) as caught:
        noise_from_file(path, SHAPE)
    assert caught.value.message.startswith(f"{path} cannot be read as an .npy array: ")
    assert "numpy.save('latents.npy'" in caught.value.next_step


@pytest.mark.parametrize("name", ["absent.npy", "."])
def test_a_missing_file_or_a_folder_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match=r"cannot be read as an \.npy array"):
        noise_from_file(tmp_path / name, SHAPE)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path(self.mark),))


@pytest.mark.parametrize("wrap", [False, True], ids=["bare pickle", "object array"])
def test_a_pickle_is_refused_and_never_executed(tmp_path, wrap):
    bomb = Bomb()
    bomb.mark = str(tmp_path / "exploded")
    path = tmp_path / "latents.npy"
    if wrap:
        np.save(path, np.array([bomb], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(bomb))
    with pytest.raises(UsageError, match=r"cannot be read as an \.npy array"):
        noise_from_file(path, SHAPE)
    assert not (tmp_path / "exploded").exists()

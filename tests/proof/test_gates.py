"""Measures of parity: known values, and what must never count as passed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tiue_export.errors import ParityError
from tiue_export.proof.gates import IDENTICAL_DB, max_abs_error, psnr_db

MEASURES = [psnr_db, max_abs_error]
VALUES = arrays(np.float32, (3, 4), elements=st.floats(-100, 100, width=32))


def test_psnr_is_peak_over_rms_error_in_decibels():
    reference = np.array([1.0, -2.0, 0.5, 2.0])
    value = reference + np.array([0.02, -0.02, 0.02, -0.02])
    assert psnr_db(reference, value) == pytest.approx(40.0, abs=1e-9)


def test_psnr_weighs_one_large_error_by_the_mean_square():
    reference = np.array([10.0, 0.0, 0.0, 0.0])
    value = np.array([10.0, 0.0, 0.0, 1.0])
    assert psnr_db(reference, value) == pytest.approx(20 * math.log10(10 / 0.5), abs=1e-9)


def test_the_peak_is_that_of_the_reference_not_of_the_value():
    assert psnr_db(np.array([1.0]), np.array([101.0])) == pytest.approx(-40.0, abs=1e-9)
    assert psnr_db(np.array([-100.0]), np.array([0.0])) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("fill", [0.0, 1.5, -3e38])
def test_identical_arrays_reach_the_cap(fill):
    array = np.full((2, 3), fill, np.float32)
    assert psnr_db(array, array.copy()) == IDENTICAL_DB
    assert max_abs_error(array, array.copy()) == 0.0


def test_no_error_however_small_exceeds_the_cap():
    reference = np.array([1e300, 1e-10])
    assert psnr_db(reference, np.array([1e300, 0.0])) == IDENTICAL_DB


def test_a_zero_reference_against_anything_else_scores_nothing():
    assert psnr_db(np.zeros(4), np.array([0, 0, 0, 1e-30])) == 0.0


def test_half_precision_is_compared_in_double():
    reference = np.full(1000, 60000, np.float16)
    assert psnr_db(reference, reference.astype(np.float32) + 600) == pytest.approx(40.0, abs=1e-9)


def test_max_abs_error_is_the_largest_difference_of_either_sign():
    assert max_abs_error(np.array([1.0, 2.0, 3.0]), np.array([1.5, 2.0, -1.0])) == 4.0


@settings(database=None, deadline=None)
@given(VALUES, VALUES, st.integers(-20, 20))
def test_psnr_does_not_depend_on_the_unit(reference, value, exponent):
    scale = np.float64(2.0**exponent)
    assert psnr_db(reference * scale, value * scale) == pytest.approx(
        psnr_db(reference, value), abs=1e-9
    )


@settings(database=None, deadline=None)
@given(VALUES, VALUES)
def test_neither_measure_changes_its_arguments(reference, value):
    before = reference.copy(), value.copy()
    psnr_db(reference, value)
    max_abs_error(reference, value)
    np.testing.assert_array_equal(reference, before[0])
    np.testing.assert_array_equal(value, before[1])


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["reference", "value", "both"])
def test_non_finite_values_never_compare(measure, bad, side):
    pair = {"reference": np.ones(3), "value": np.ones(3)}
    for name in pair if side == "both" else [side]:
        pair[name][1] = bad
    with pytest.raises(ParityError) as caught:
        measure(pair["reference"], pair["value"])
    named = "reference" if side == "both" else side
    assert caught.value.message == f"the {named} holds non-finite values"


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (4,), ()])
def test_shapes_that_numpy_would_broadcast_never_compare(measure, shape):
    with pytest.raises(ParityError) as caught:
        measure(np.ones(3), np.ones(shape))
    assert caught.value.message == f"shapes differ: reference (3,), value {shape}"

"""The training losses against values worked out by plain Python, and what holds for any input."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from tiue_export.train.losses import (
    clip_loss,
    fake_score_loss,
    guided,
    noise_kl,
    vsd_gradient,
    vsd_loss,
)

LATENTS = arrays(np.float32, (2, 2, 1, 2), elements=st.floats(-4, 4, width=32))
SHARES = arrays(np.float32, (2,), elements=st.floats(0.0625, 0.9375, width=32))
# No deadline: the first example pays for what torch sets up, and the machine may be busy.
ANY = settings(
    max_examples=30,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def tensor(values: list[float], *shape: int) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


def plain_kl(values: list[float]) -> float:
    """0.5 * (mu^2 + s^2 - 1 - ln s^2) with the unbiased variance."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return 0.5 * (mean**2 + variance - 1 - math.log(variance))


# Guidance


def test_guidance_goes_beyond_the_conditional_prediction():
    conditional, unconditional = tensor([3.0, -1.0], 1, 2, 1, 1), tensor([1.0, 1.0], 1, 2, 1, 1)
    # 1 + 4.5 * (3 - 1) = 10 and 1 + 4.5 * (-1 - 1) = -8.
    assert guided(conditional, unconditional, 4.5).flatten().tolist() == [10.0, -8.0]


@given(LATENTS, LATENTS)
@ANY
def test_guidance_1_is_the_conditional_and_0_the_unconditional_prediction(first, second):
    conditional, unconditional = torch.from_numpy(first), torch.from_numpy(second)
    torch.testing.assert_close(guided(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guided(conditional, unconditional, 0.0), unconditional)


def test_guidance_on_half_predictions_is_computed_in_float32():
    half = torch.full((1, 4, 2, 2), 40_000.0, dtype=torch.float16)
    result = guided(half, -half, 4.5)
    assert result.dtype == torch.float32
    assert result.flatten()[0] == -40_000 + 4.5 * 80_000


# Variational score distillation


def test_the_vsd_gradient_weighs_the_difference_by_the_noise_variance():
    teacher, fake = tensor([2.0, 5.0], 2, 1, 1, 1), tensor([1.0, 9.0], 2, 1, 1, 1)
    # (1 - 0.25) * (2 - 1) = 0.75 and (1 - 0.9) * (5 - 9) = -0.4.
    gradient = vsd_gradient(teacher, fake, torch.tensor([0.25, 0.9]))
    assert gradient.flatten().tolist() == pytest.approx([0.75, -0.4])


def test_a_prediction_that_overflowed_gives_no_gradient_and_spoils_no_other():
    teacher = tensor([math.nan, math.inf, -math.inf, 3.0], 1, 4, 1, 1).requires_grad_()
    gradient = vsd_gradient(teacher, torch.ones(1, 4, 1, 1), torch.tensor([0.5]))
    assert gradient.flatten().tolist() == [0.0, 0.0, 0.0, 1.0]
    assert not gradient.requires_grad


@given(LATENTS, LATENTS)
@ANY
def test_the_gradient_of_the_vsd_loss_is_the_given_one_over_the_number_of_values(first, second):
    latents, gradient = torch.from_numpy(first).requires_grad_(), torch.from_numpy(second)
    loss = vsd_loss(latents, gradient)
    loss.backward()
    torch.testing.assert_close(latents.grad, gradient / gradient.numel(), atol=1e-7, rtol=1e-4)
    expected = sum(value * value for value in second.ravel().tolist()) / (2 * second.size)
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-4)


def test_no_gradient_reaches_the_scores_through_the_vsd_loss():
    latents = torch.ones(1, 4, 2, 2, requires_grad=True)
    scores = torch.ones(1, 4, 2, 2, requires_grad=True)
    vsd_loss(latents, 2 * scores).backward()
    assert scores.grad is None


# The fake score


def test_the_fake_score_loss_weighs_each_sample_by_its_alpha():
    predicted, noise = tensor([1.0, 2.0, 5.0, 1.0], 2, 2, 1, 1), tensor([0.0] * 4, 2, 2, 1, 1)
    # (0.5 * (1 + 4) + 0.1 * (25 + 1)) / 4
    assert float(fake_score_loss(predicted, noise, torch.tensor([0.5, 0.1]))) == pytest.approx(
        (2.5 + 2.6) / 4
    )


@given(LATENTS, LATENTS, SHARES)
@ANY
def test_the_fake_score_loss_is_the_published_form_with_square_roots(first, second, alphas):
    predicted, noise = torch.from_numpy(first), torch.from_numpy(second)
    root = torch.from_numpy(alphas).sqrt().view(-1, 1, 1, 1)
    published = (root * predicted - root * noise).square().mean()
    loss = fake_score_loss(predicted, noise, torch.from_numpy(alphas))
    torch.testing.assert_close(loss, published, atol=1e-6, rtol=1e-4)
    assert float(loss.detach()) >= 0


# The KL term


def test_the_kl_sums_over_steps_and_averages_over_the_batch():
    maps = [
        [0.0, 1.0, 2.0, 5.0],
        [-1.0, 1.0, 3.0, 4.0],
        [0.5, 0.25, -2.0, 1.0],
        [9.0, 1.0, 1.0, 2.0],
    ]
    outputs = tensor([value for values in maps for value in values], 4, 1, 2, 2)
    # K = 2, B = 2, step-major: rows 0 and 1 are step 0 of the two samples.
    expected = sum(plain_kl(values) for values in maps) / 2
    assert float(noise_kl(outputs, steps=2)) == pytest.approx(expected, rel=1e-5)


def test_the_kl_of_a_prediction_with_zero_mean_and_unit_variance_is_zero():
    draws = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = draws.mean((1, 2, 3), keepdim=True), draws.std((1, 2, 3), keepdim=True)
    outputs = ((draws - mean) / std).requires_grad_()
    loss = noise_kl(outputs, steps=3)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    loss.backward()
    assert float(outputs.grad.abs().max()) < 1e-6


def test_the_kl_gradient_is_the_published_one_at_the_published_batch():
    values = [0.3, -1.2, 2.0, 0.7]
    outputs = tensor(values * 8, 8, 1, 2, 2).requires_grad_()
    (0.8 * noise_kl(outputs, steps=1)).backward()
    mean = sum(values) / 4
    variance = sum((value - mean) ** 2 for value in values) / 3
    # 0.1 * (mu / N + (1 - 1 / s^2) (e - mu) / (N - 1)) for each of a device's 8 samples.
    expected = [0.1 * (mean / 4 + (1 - 1 / variance) * (value - mean) / 3) for value in values]
    assert outputs.grad[0].flatten().tolist() == pytest.approx(expected, rel=1e-4)


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 5))
@ANY
def test_the_kl_does_not_depend_on_how_the_batch_is_split(seed, steps, cut):
    batch = 6
    draws = torch.randn(steps, batch, 4, 2, 2, generator=torch.Generator().manual_seed(seed))
    whole = noise_kl(draws.flatten(0, 1), steps)
    parts = [draws[:, first:last] for first, last in pairwise((0, cut, batch))]
    split = sum(noise_kl(part.flatten(0, 1), steps) * part.shape[1] / batch for part in parts)
    torch.testing.assert_close(whole, split, atol=1e-5, rtol=1e-4)
    assert float(whole) >= 0


def test_the_kl_of_half_predictions_is_computed_in_float32():
    outputs = (100 * torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))).half()
    loss = noise_kl(outputs, steps=1)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(noise_kl(outputs.float(), steps=1)))


# The CLIP term


def test_the_clip_loss_is_what_the_mean_cosine_lacks_of_the_threshold():
    images, texts = tensor([1.0, 0.0, 3.0, 4.0], 2, 2), tensor([0.0, 2.0, 3.0, 4.0], 2, 2)
    # Cosines 0 and 1: mean 0.5.
    assert float(clip_loss(images, texts, 0.75)) == pytest.approx(0.25)
    assert float(clip_loss(images, texts, 0.35)) == 0


def test_pictures_that_fit_well_enough_are_not_pushed_further():
    images = torch.eye(3, requires_grad=True)
    clip_loss(images, torch.eye(3), 0.35).backward()
    assert float(images.grad.abs().max()) == 0


@given(st.integers(0, 10_000), st.floats(0.1, 20))
@ANY
def test_the_clip_loss_looks_at_directions_alone(seed, factor):
    generator = random.Random(seed)
    images = tensor([generator.gauss(0, 1) for _ in range(12)], 3, 4)
    texts = tensor([generator.gauss(0, 1) for _ in range(12)], 3, 4)
    scaled = clip_loss(factor * images, texts, 0.35)
    torch.testing.assert_close(scaled, clip_loss(images, texts, 0.35), atol=1e-5, rtol=1e-4)
    assert 0 <= float(scaled) <= 1.35 + 1e-5

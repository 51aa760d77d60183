from __future__ import annotations

import math

import pytest
import torch

from pcm_scheduler.noise_schedule import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    alphas_and_sigmas,
    convert_output,
    make_alphas_cumprod,
    make_betas,
    make_output,
    predict_x0_and_epsilon,
    rescale_zero_terminal_snr,
)

LEVELS = {"variance preserving": (0.6, 0.8), "flow": (0.3, 0.7), "variance exploding": (1.0, 14.6)}


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS.keys())
@pytest.mark.parametrize("source", PREDICTION_TYPES)
@pytest.mark.parametrize("target", PREDICTION_TYPES)
def test_round_trips_are_exact(level, source, target):
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64, generator=generator)
    alpha, sigma = level
    x = alpha * x0 + sigma * eps
    there = convert_output(make_output(x0, eps, alpha, sigma, source), x, alpha, sigma, source, target)
    got_x0, got_eps = predict_x0_and_epsilon(there, x, alpha, sigma, target)
    torch.testing.assert_close(got_x0, x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_eps, eps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_conversions_are_differentiable_and_take_a_level_per_sample(prediction_type):
    output = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([[0.6], [0.8]], dtype=torch.float64)
    sigma = (1 - alpha**2).sqrt()
    assert torch.autograd.gradcheck(lambda o, s: predict_x0_and_epsilon(o, s, alpha, sigma, prediction_type), (output, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    output, x = torch.randn(2, 64).to(dtype)
    x0, eps = predict_x0_and_epsilon(output, x, 0.0683, 0.9977, "epsilon")
    assert x0.dtype == eps.dtype == torch.float32
    torch.testing.assert_close(x0, (x.float() - 0.9977 * output.float()) / 0.0683)


def test_v_prediction_survives_alpha_zero():
    x0, eps = predict_x0_and_epsilon(torch.full((1,), -0.5), torch.full((1,), 2.0), 0.0, 1.0, "v_prediction")
    assert (x0.item(), eps.item()) == (0.5, 2.0)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_tables_equal_those_of_diffusers_bit_for_bit(beta_schedule):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(beta_schedule=beta_schedule, beta_start=0.00085, beta_end=0.012).alphas_cumprod
    ours = make_alphas_cumprod(make_betas(beta_schedule, 0.00085, 0.012, 1000))
    assert torch.equal(ours, theirs)


def test_zero_terminal_snr():
    betas = make_betas("scaled_linear", 0.00085, 0.012, 1000)
    table = make_alphas_cumprod(rescale_zero_terminal_snr(betas))
    assert table[-1] == 0
    assert table[0].item() == pytest.approx(1 - betas[0].item(), abs=1e-7)
    alphas, sigmas = alphas_and_sigmas(table)
    torch.testing.assert_close(alphas**2 + sigmas**2, torch.ones(1000, dtype=torch.float64))


@pytest.mark.parametrize("bad", [math.nan, -0.1, math.inf])
def test_bad_betas_are_named(bad):
    with pytest.raises(ValueError, match="number 2 of 4"):
        make_alphas_cumprod([0.1, 0.2, bad, 0.3])


def test_betas_above_one_warn_and_leave_the_rest_of_the_table_usable():
    """diffusers' own test suite builds such schedulers and steps below the bad betas."""
    with pytest.warns(UserWarning, match="number 1 of 2"):
        assert make_alphas_cumprod([0.1, 1.5])[0].item() == pytest.approx(0.9)


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="scaled_linear"):
        make_betas("cosine", 0.1, 0.2, 10)
    with pytest.raises(ValueError, match="v_prediction"):
        predict_x0_and_epsilon(torch.zeros(1), torch.zeros(1), 0.6, 0.8, "velocity")

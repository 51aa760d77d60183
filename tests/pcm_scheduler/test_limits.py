"""At the ends of what may be asked for: zero signal, ten thousand timesteps, a thousand steps, and numbers that are none."""

from __future__ import annotations

import warnings

import pytest
import torch

from pcm_scheduler import PCMScheduler
from pcm_scheduler.editing import sample_edit
from pcm_scheduler.operators import Luminance
from pcm_scheduler.sampling import sample_phased

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("prediction_type", "sign"), [("v_prediction", -1), ("sample", 1), ("flow", None)])
def test_from_zero_signal_the_first_jump_is_exact(prediction_type, sign, dtype):
    """At t = 999 with zero terminal SNR x_t is eps: x_s = alpha_s x_0 + sigma_s x_t, rounded once to the sample's dtype."""
    scheduler = PCMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    assert scheduler.alphas_cumprod[999] == 0
    assert scheduler.alphas_cumprod[998] > 0
    scheduler.set_timesteps(4)
    sample, output = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = scheduler.step(output, 999, sample)
    x0 = sample.double() - output.double() if sign is None else sign * output.double()
    alpha_s, sigma_s = scheduler.alphas_cumprod[739].double().sqrt(), (1 - scheduler.alphas_cumprod[739].double()).sqrt()
    exact = alpha_s * x0 + sigma_s * sample.double()
    unit = torch.finfo(dtype).eps / 2
    # one rounding to the dtype, and three of float32 before it
    room = unit * exact.abs() + 4 * 2.0**-24 * (x0.abs() + sample.double().abs() + output.double().abs()) + 2.0**-25
    assert ((got.prev_sample.double() - exact).abs() <= room).all()
    assert got.pred_original_sample.isfinite().all()


def test_an_epsilon_prediction_at_zero_signal_is_refused():
    scheduler = PCMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="timestep 999 alpha is 0"):
        scheduler.set_timesteps(4)


def gaussian_eps(x, alpha, sigma, mu=0.7, spread=0.4):
    """The ideal network's answer for data N(mu, spread^2)."""
    x0 = mu + alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * (x - alpha * mu)
    return (x - alpha * x0) / sigma


def run(scheduler, steps, noise):
    """Sampled with the ideal network in the noise's dtype; and the sum of what each step may round away, in units of u."""
    scheduler.set_timesteps(steps)
    x, room = noise, 0.0
    for t in scheduler.timesteps.tolist():
        alpha = scheduler.alphas_cumprod[t].double().sqrt().item()
        sigma = (1 - scheduler.alphas_cumprod[t].double()).sqrt().item()
        eps = gaussian_eps(x, alpha, sigma)
        after = scheduler.step(eps, t, x).prev_sample
        room += (x.abs() + after.abs() + eps.abs()).max().item()
        x = after
    return x, room


@pytest.mark.parametrize(
    ("betas", "coarse"), [({"beta_start": 0.000085, "beta_end": 0.0012}, 0.02), ({}, 0.1)], ids=["same schedule", "same betas"]
)
def test_a_thousand_steps_of_ten_thousand_timesteps(betas, coarse):
    """float32 stays within its roundings of float64, and float64 near the ODE's exact solution: with betas of the same size ten
    times as many timesteps add ten times as much noise, to an alpha of 10^-12, and each first-order step takes a larger part.

    Every step rounds a few times by u = 2^-24 what is of the size of x, eps and the next x, and the ideal network as often;
    the flow to the data contracts (the spread falls from 1 to 0.4), so the errors do no more than add up.
    """
    scheduler = PCMScheduler(num_train_timesteps=10_000, num_solver_steps=1000, **betas)
    scheduler.set_timesteps(1000)
    assert scheduler.timesteps.tolist() == [n * 10 - 1 for n in range(1000, 0, -1)]
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact, _ = run(scheduler, 1000, noise)
    got, room = run(scheduler, 1000, noise.float())
    assert (got.double() - exact).abs().max() <= 16 * 2.0**-24 * room
    assert (got.double() - exact).abs().max() < 2e-3
    alpha = scheduler.alphas_cumprod[-1].double().sqrt()
    solution = 0.7 + 0.4 * (noise - 0.7 * alpha) / (alpha**2 * 0.16 + 1 - alpha**2).sqrt()
    assert (exact - solution).abs().max() < coarse
    for few in (1, 4, 16):
        assert run(scheduler, few, noise.half())[0].isfinite().all()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_samples_that_are_not_finite_are_said_once_at_the_end(bad):
    scheduler = PCMScheduler()
    scheduler.set_timesteps(4)
    x = torch.ones(3, 4, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i, t in enumerate(scheduler.timesteps[:-1]):
            output = torch.ones(3, 4, 8, 8)
            output[1, 0, 0, 0] = bad if i == 1 else 1.0
            x = scheduler.step(output, t, x).prev_sample
    with pytest.warns(UserWarning, match=r"After 4 steps 1 of 3 samples are not finite \(in the batch: 1\)"):
        scheduler.step(torch.ones(3, 4, 8, 8), scheduler.timesteps[-1], x)


def test_a_float16_sample_that_overflows_is_said():
    scheduler = PCMScheduler()
    scheduler.set_timesteps(1)
    with pytest.warns(UserWarning, match="1 of 1 samples"):
        scheduler.step(torch.full((1, 4), 6e4, dtype=torch.float16), 999, torch.zeros(1, 4, dtype=torch.float16))


def test_other_hosts_are_told_too_and_an_edit_ends_all_the_same():
    with pytest.warns(UserWarning, match="After 1 step 2 of 2 samples"):
        sample_phased(lambda x, i: x * NAN, torch.ones(2, 3, 4, 4), [0.1, 1.0], [0.9, 0.0])
    operator = Luminance()
    measurement = operator.measure(torch.zeros(1, 3, 8, 8))
    with pytest.warns(UserWarning, match="After 1 step 1 of 1 samples"):
        sample_edit(lambda x, i: x * NAN, operator, measurement, torch.ones(1, 3, 8, 8), [0.1, 1.0], [0.9, 0.0])

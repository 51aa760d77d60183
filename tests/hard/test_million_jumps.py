"""A million jumps between random timesteps, from samples and predictions in half precision, against float64.

u = 2^-24 is float32's unit roundoff, and g(k) = k u / (1 - k u) bounds the relative error of k roundings in a row (Higham,
Accuracy and Stability of Numerical Algorithms, Lemma 3.1). Inputs in half precision are exact in float32 and in float64.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from pcm_scheduler import PCMScheduler
from pcm_scheduler.noise_schedule import (
    PREDICTION_TYPES,
    alphas_and_sigmas,
    make_alphas_cumprod,
    make_betas,
    make_output,
    predict_x0_and_epsilon,
    prediction_coefficients,
)
from pcm_scheduler.sampling import jump

pytestmark = pytest.mark.hard

COUNT = 1_000_000
HALVES = {torch.float16: (2.0**-11, 2.0**-25), torch.bfloat16: (2.0**-8, 2.0**-134)}
"""Unit roundoff, and half of the smallest number."""


def g(roundings: int) -> float:
    return roundings * 2.0**-24 / (1 - roundings * 2.0**-24)


def drawn(count, alpha, sigma, prediction_type, dtype, generator):
    """Samples at these levels, and predictions that are off by a tenth, as a network's are."""
    x0, eps, error = torch.randn(3, count, dtype=torch.float64, generator=generator)
    output = make_output(x0, eps, alpha, sigma, prediction_type) + 0.1 * error
    return (alpha * x0 + sigma * eps).to(dtype), output.to(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_formulas_of_training_and_sampling(prediction_type, dtype):
    """With levels in float32, per sample, as training has them.

    x_0 = c x + d F: a coefficient takes at most 4 roundings (v: two squares, their sum, a division), its product 1, the sum 1:
        |error of x_0| <= E0 = g(6) (|c x| + |d F|).
    eps = (x - alpha x_0) / sigma: product, difference and division, and alpha / sigma times what x_0 is wrong by:
        |error of eps| <= Ee = (alpha E0 + g(3) (|x| + alpha (|x_0| + E0))) / sigma.
    x_s = alpha_s x_0 + sigma_s eps: a product and the sum:
        |error of x_s| <= alpha_s E0 + sigma_s Ee + g(2) (alpha_s (|x_0| + E0) + sigma_s (|eps| + Ee)).
    """
    generator = torch.Generator().manual_seed(0)
    table = torch.stack(alphas_and_sigmas(make_alphas_cumprod(make_betas("scaled_linear", 0.00085, 0.012, 1000)))).float()
    t = torch.randint(1, 1000, (COUNT,), generator=generator)
    s = (torch.rand(COUNT, generator=generator, dtype=torch.float64) * t).long()
    (alpha, sigma), (alpha_s, sigma_s) = table[:, t], table[:, s].clone()
    ends = torch.rand(COUNT, generator=generator) < 0.1  # at sigma 0, as sampling does
    alpha_s[ends], sigma_s[ends] = 1.0, 0.0
    sample, output = drawn(COUNT, alpha.double(), sigma.double(), prediction_type, dtype, generator)

    x0, _ = predict_x0_and_epsilon(output, sample, alpha, sigma, prediction_type)
    got = jump(sample.float(), x0, alpha, sigma, alpha_s, sigma_s)
    assert got.dtype == torch.float32
    assert got.isfinite().all()

    x, f = sample.double(), output.double()
    a, b, a_s, b_s = alpha.double(), sigma.double(), alpha_s.double(), sigma_s.double()
    c, d = prediction_coefficients(prediction_type, a, b)[:2]
    exact_x0 = c * x + d * f
    exact_eps = (x - a * exact_x0) / b
    error0 = g(6) * ((c * x).abs() + (d * f).abs())
    size0 = exact_x0.abs() + error0
    error_eps = (a * error0 + g(3) * (x.abs() + a * size0)) / b
    bound = a_s * error0 + b_s * error_eps + g(2) * (a_s * size0 + b_s * (exact_eps.abs() + error_eps))
    share = ((got.double() - (a_s * exact_x0 + b_s * exact_eps)).abs() / bound).max().item()
    print(f"{prediction_type}, {dtype}: the largest error is {share:.2f} of the bound")
    assert 0.05 < share <= 1, "beyond the bound, or the bound says nothing"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_scheduler(prediction_type, dtype):
    """x_s = p x + q F with p and q from float64, in float32, returned in half precision with unit roundoff h and half of the
    smallest number e: a coefficient, a product and the sum are rounded, then the result:
        |error of x_s| <= h |x_s| + e + (1 + h) g(3) (|p x| + |q F|).
    p and q are differences, which may cancel; their own error in float64 is below 2^-48 of the terms' sizes.
    """
    unit, smallest = HALVES[dtype]
    generator = torch.Generator().manual_seed(0)
    scheduler = PCMScheduler(prediction_type=prediction_type)
    alphas, sigmas = (level.tolist() for level in alphas_and_sigmas(scheduler.alphas_cumprod))
    largest, steps, values = 0.0, 100, 250
    for _ in range(COUNT // steps // values):
        stops = torch.randperm(1000, generator=generator)[:steps].sort(descending=True).values.tolist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are not the grid's
            scheduler.set_timesteps(timesteps=stops)
        levels = [(alphas[t], sigmas[t]) for t in stops] + [(1.0, 0.0)]
        for i, t in enumerate(stops):
            (alpha, sigma), (alpha_s, sigma_s) = levels[i], levels[i + 1]
            sample, output = drawn(values, alpha, sigma, prediction_type, dtype, generator)
            got = scheduler.step(output, t, sample)
            assert got.prev_sample.dtype == dtype
            assert got.prev_sample.isfinite().all()
            x, f = sample.double(), output.double()
            c = prediction_coefficients(prediction_type, alpha, sigma)
            for found, (a, b) in (
                (got.pred_original_sample, (1.0, 0.0)),
                (got.prev_sample, (alpha_s, sigma_s)),
            ):
                p, q = a * c.x0_from_sample + b * c.eps_from_sample, a * c.x0_from_output + b * c.eps_from_output
                exact = p * x + q * f
                terms = abs(a) * (abs(c.x0_from_sample) * x.abs() + abs(c.x0_from_output) * f.abs())
                terms = terms + abs(b) * (abs(c.eps_from_sample) * x.abs() + abs(c.eps_from_output) * f.abs())
                rounded = g(3) * ((p * x).abs() + (q * f).abs()) + 2.0**-48 * terms
                bound = unit * exact.abs() + smallest + (1 + unit) * rounded
                largest = max(largest, ((found.double() - exact).abs() / bound).max().item())
    print(f"{prediction_type}, {dtype}: the largest error is {largest:.3f} of the bound")
    assert 0.5 < largest <= 1

"""The editing loop on models whose answer is known, without diffusers."""

from __future__ import annotations

import pytest
import torch
from gaussian_mixture import epsilon

from pcm_scheduler.editing import (
    Codec,
    Known,
    estimate_noise,
    invert,
    last_phase_steps,
    latent_mask,
    measured,
    nearby_noise,
    sample_edit,
    slerp,
)
from pcm_scheduler.operators import Downsample, Free, KeepRegion, Luminance
from pcm_scheduler.phases import PhaseGrid
from pcm_scheduler.sampling import sample_phased

WEIGHTS = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
MEAN = torch.tensor([0.1, -0.2, 0.15], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.6, 0.2], [0.6, 0.8, 0.3], [0.2, 0.3, 0.9]], dtype=torch.float64) * 0.04


def gaussian_consistency(sigmas):
    """f(x, sigma) of Gaussian data: the end of the probability-flow ODE, which scales every principal axis by itself."""
    variances, axes = torch.linalg.eigh(COVARIANCE)

    def denoise(sample, i):
        flat = sample.flatten(1) - MEAN
        scale = (variances / (variances + sigmas[i] ** 2)).sqrt()
        return (MEAN + (flat @ axes * scale) @ axes.T).view_as(sample)

    return denoise


def edited_gaussian(steps, count=20000, y=0.1):
    """Algorithm 4 on pixels of one colour each, their luminance given."""
    sigmas = [*torch.logspace(1, -2, steps).tolist(), 0.0]
    generator = torch.Generator().manual_seed(0)
    draw = lambda *_: torch.randn(count, 3, 1, 1, generator=generator, dtype=torch.float64)  # noqa: E731
    measurement = torch.full((count, 1, 1, 1), y, dtype=torch.float64)
    return sample_edit(
        gaussian_consistency(sigmas), Luminance(), measurement, sigmas[0] * draw(), [1.0] * (steps + 1), sigmas,
        eta=1.0, noise_sampler=draw,
    ).flatten(1)  # fmt: skip


def test_on_a_gaussian_the_luminance_is_exact_and_mean_and_variance_approach_the_posteriors():
    """Algorithm 4 does not sample the posterior; the bias of few steps is real, and falls with more of them."""
    variance = WEIGHTS @ COVARIANCE @ WEIGHTS
    gain = COVARIANCE @ WEIGHTS / variance
    mean = MEAN + gain * (0.1 - WEIGHTS @ MEAN)
    covariance = COVARIANCE - torch.outer(gain, WEIGHTS @ COVARIANCE)
    bias, spread = [], []
    for steps in (2, 8, 64):
        x = edited_gaussian(steps)
        assert (x @ WEIGHTS - 0.1).abs().max() < 1e-9
        bias.append((x.mean(0) - mean).norm().item())
        spread.append((torch.cov(x.T) - covariance).norm().item())
    print(f"bias of the mean at 2, 8, 64 steps {bias}, of the covariance {spread}")
    # 20,000 pictures: the mean is known to 0.2 / sqrt(20000) = 0.0014 along an axis
    assert bias[0] > bias[1] > bias[2]
    assert bias[2] < 0.25 * (mean - MEAN).norm()
    assert spread[2] < spread[0]


def test_measuring_nothing_is_plain_sampling():
    grid = PhaseGrid.even(4)
    sigmas = [5.0, 2.0, 0.7, 0.2, 0.0]
    x = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    denoise = gaussian_consistency(sigmas)
    nothing = x.new_zeros(4, 0)
    edited = sample_edit(denoise, Free(), nothing, x, [1.0] * 5, sigmas, projected=[False] * 4)
    plain = sample_phased(denoise, x, [1.0] * 5, sigmas)
    torch.testing.assert_close(edited, plain.clamp(-1, 1))
    assert last_phase_steps(grid, grid.stops(8)) == [False] * 6 + [True] * 2


def test_known_latents_are_at_the_level_of_every_step():
    """A denoiser is shown the given picture, noised to its level, where it is known."""
    sigmas, alphas = [0.9, 0.5, 0.1, 0.0], [0.4, 0.8, 0.99, 1.0]
    picture = torch.rand(1, 3, 4, 4) * 2 - 1
    kept = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    kept[..., :2] = True
    noise = torch.randn(1, 3, 4, 4)
    seen = []

    def denoise(sample, i):
        seen.append(sample)
        return torch.zeros_like(sample)

    operator = KeepRegion(kept)
    known = Known(picture, noise, kept.float())
    out = sample_edit(denoise, operator, operator.measure(picture), noise, alphas, sigmas, projected=[False] * 3, known=known)
    for sample, alpha, sigma in zip(seen, alphas, sigmas, strict=False):
        torch.testing.assert_close(sample[..., :2], (alpha * picture + sigma * noise)[..., :2])
    assert torch.equal(out[..., :2], picture[..., :2])


def test_a_latent_is_known_only_if_all_its_pixels_are_kept():
    kept = torch.ones(1, 1, 16, 24, dtype=torch.bool)
    kept[..., 7, 15] = False
    assert latent_mask(kept, 8).flatten().tolist() == [1, 0, 1, 1, 1, 1]


def test_of_any_size_the_pixels_behind_a_latent_are_those_that_the_codec_puts_there():
    """It continues pictures to the right and below, so that latent i is of pixels 8 i to 8 i + 7."""
    kept = torch.ones(1, 1, 9, 60, dtype=torch.bool)
    kept[..., 0, 39] = kept[..., 8, 56] = False
    assert latent_mask(kept, 8).squeeze().tolist() == [[1, 1, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0]]


def test_projected_steps_go_through_pixels_and_the_others_do_not():
    calls = []
    codec = Codec(lambda x: calls.append("encode") or x / 2, lambda z: calls.append("decode") or z * 2, 1)
    operator, y = Free(), torch.zeros(1, 0)
    steps = [0.9, 0.5, 0.1, 0.0], [0.4, 0.8, 0.99, 1.0]
    sample_edit(lambda x, i: x * 0, operator, y, torch.randn(1, 3, 2, 2), steps[1], steps[0], codec, [True, False, False])
    assert calls == ["decode", "encode", "decode"]


def test_a_callback_may_replace_the_sample():
    sigmas, alphas = [0.9, 0.5, 0.0], [0.4, 0.8, 1.0]
    seen = []

    def denoise(sample, i):
        seen.append(sample)
        return sample

    ones = torch.ones(1, 3, 2, 2)
    sample_edit(denoise, Free(), torch.zeros(1, 0), torch.zeros(1, 3, 2, 2), alphas, sigmas, callback=lambda i, x, x0: ones)
    assert torch.equal(seen[1], ones)


def test_inversion_comes_back_along_the_same_ode():
    """Data from a Gaussian mixture, whose eps is known: up and down the fine grid, nearer with more points."""

    def round_trip(points):
        sigmas = torch.logspace(-2, 1, points, dtype=torch.float64).tolist()
        data = torch.tensor([[1.0, -0.3], [-0.7, 1.1], [0.2, -1.2]], dtype=torch.float64)
        up = lambda x, i: x - sigmas[i] * epsilon(x, sigmas[i])  # noqa: E731
        noise = invert(up, data, [1.0] * points, sigmas)
        down = sigmas[::-1]
        back = sample_phased(lambda x, i: x - down[i] * epsilon(x, down[i]), noise, [1.0] * points, down)
        return (back - data).abs().max().item()

    errors = [round_trip(points) for points in (50, 200, 800)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.02


def test_noise_between_noises_is_noise():
    a, b = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(slerp(a, b, 0.0), a, atol=1e-5)
    assert torch.allclose(slerp(a, b, 1.0), b, atol=1e-5)
    assert torch.allclose(slerp(a, a, 0.3), a, atol=1e-5)
    assert slerp(a, b, 0.5).std().item() == pytest.approx(1, abs=0.03)  # 12,288 numbers: 0.006
    assert torch.allclose(nearby_noise(a, b, 0.0), a)
    assert torch.allclose(nearby_noise(a, b, 1.0), b, atol=1e-6)
    assert nearby_noise(a, b, 0.4).std().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("sigma", [0.05, 0.2, 0.5])
def test_the_level_of_noise_is_found_under_a_picture(sigma):
    y, x = torch.meshgrid(torch.linspace(0, 3, 97), torch.linspace(0, 3, 131), indexing="ij")
    picture = torch.stack([torch.sin(3 * x), torch.cos(2 * y), (x > 1.5).float()])[None]
    noisy = picture + sigma * torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    assert estimate_noise(noisy).item() == pytest.approx(sigma, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_measurements_alone(dtype):
    """In half precision weights far from what is kept are 0, and a picture has no value there; a resize is grey levels off."""
    kept = torch.zeros(1, 1, 256, 256, dtype=torch.bool)
    kept[..., :40] = True
    drawn = torch.Generator().manual_seed(0)
    for operator, size in ((KeepRegion(kept), 256), (Downsample((64, 64), (32, 32)), 64)):
        picture, truth = (2 * torch.rand(1, 3, size, size, generator=drawn) - 1 for _ in range(2))
        y = operator.measure(truth)
        plain = measured(picture, operator, y)
        with torch.autocast("cpu", dtype=dtype):
            operator.check(y)
            torch.testing.assert_close(measured(picture, operator, y), plain, rtol=0, atol=1e-5)

"""The tasks over an analytic denoiser: what hosts of either coordinates draw, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from pcm_scheduler.edit_tasks import (
    STRATEGIES,
    Strategy,
    colorization,
    denoising,
    draw,
    free,
    inpainting,
    outpainting,
    stroke_guided,
    super_resolution,
)
from pcm_scheduler.editing import PIXELS
from pcm_scheduler.noise_schedule import alphas_and_sigmas, make_alphas_cumprod, make_betas
from pcm_scheduler.phases import PhaseGrid

GRID = PhaseGrid.even(4)
ALPHAS, SIGMAS = alphas_and_sigmas(make_alphas_cumprod(make_betas("scaled_linear", 0.00085, 0.012, 1000)))
SIZE = (16, 24)


def pictures(count=2, size=SIZE):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, *size, generator=generator, dtype=torch.float64) * 2 - 1


def mask():
    soft = torch.zeros(1, 1, *SIZE, dtype=torch.float64)
    soft[..., 8:16] = 1
    return soft


EDITS = {
    "inpaint": lambda: inpainting(pictures(), mask()),
    "outpaint": lambda: outpainting(pictures(), left=3, bottom=5),
    "colorize": lambda: colorization(pictures()),
    "super_resolve": lambda: super_resolution(pictures(), 2),
    "stroke": lambda: stroke_guided(pictures()),
    "free": lambda: free(2, SIZE),
    "denoise": lambda: denoising(pictures(), 30.0, GRID, ratios()),
}


def ratios():
    stops = list(GRID.timesteps[1:])
    return (SIGMAS[stops] / ALPHAS[stops]).tolist()


def drawn(edit, steps, eta, alphas, sigmas, noises):
    """Of pixels with mean 0.2 and variance 0.09: the posterior mean is known at every level."""
    fresh = iter(noises[1:])

    def denoiser(x, i):
        gain = 0.09 * alphas[i] / (0.09 * alphas[i] ** 2 + sigmas[i] ** 2)
        return 0.2 + gain * (x - alphas[i] * 0.2)

    points = GRID.stops(steps, edit.strength)
    return draw(edit, denoiser, PIXELS, GRID, points, alphas, sigmas, noises[0], eta, lambda *_: next(fresh))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("name", EDITS)
def test_both_coordinates_draw_the_same_picture(name, eta):
    """diffusers' x_t and ComfyUI's x_t / alpha_t, in float64: the same up to rounding."""
    edit = EDITS[name]()
    steps = min(4, GRID.start_point(edit.strength))
    stops = [GRID.timesteps[n] for n in GRID.stops(steps, edit.strength)]
    alphas, sigmas = [*ALPHAS[stops].double().tolist(), 1.0], [*SIGMAS[stops].double().tolist(), 0.0]
    # Unit variance at every level, which float32 tables have up to their rounding.
    alphas = [math.sqrt(1 - sigma * sigma) for sigma in sigmas]
    generator = torch.Generator().manual_seed(1)
    noises = [torch.randn(2, 3, *edit.size, generator=generator, dtype=torch.float64) for _ in range(steps + 1)]
    ours = drawn(edit, steps, eta, alphas, sigmas, noises)
    theirs = drawn(edit, steps, eta, [1.0] * len(alphas), [s / a for a, s in zip(alphas, sigmas, strict=True)], noises)
    assert ours.shape == (2, 3, *edit.size)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    if not edit.measurement_noise:
        assert edit.operator.residual(ours, edit.measurement).max() < 1e-6


def test_denoising_starts_at_the_noises_own_level():
    """The first point of which sigma / alpha is at least the noise's."""
    edit = EDITS["denoise"]()
    point = GRID.start_point(edit.strength)
    assert ratios()[point - 1] >= 30 / 127.5 > ratios()[point - 2]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: inpainting(pictures(), torch.zeros(1, 1, *SIZE)), "nothing to draw"),
        (lambda: inpainting(pictures(), torch.ones(1, 1, *SIZE)), "nothing to keep"),
        (lambda: inpainting(pictures(), torch.cat([mask(), torch.ones(1, 1, *SIZE)])), "Mask 1 is black nowhere"),
        (lambda: inpainting(pictures(), torch.zeros(2, 1, *SIZE)), "All 2 masks are black everywhere"),
        (lambda: colorization(pictures(), torch.ones(1, 1, *SIZE)), "no luminance is kept"),
        (lambda: outpainting(pictures()), "at least one of them more"),
        (lambda: outpainting(pictures(), left=-1), "0 or more"),
        (lambda: super_resolution(pictures(), 1), "from 2"),
        (lambda: super_resolution(pictures(), 2, "cubic"), "mean or antialias"),
        (lambda: denoising(pictures(), 0.0, GRID, ratios()), "above 0"),
        (lambda: denoising(torch.zeros(1, 3, *SIZE), None, GRID, ratios()), "no noise to take out"),
        (lambda: Strategy("first"), "one of all, last phase, end"),
    ],
)
def test_what_makes_no_sense_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("known", [False, True])
def test_a_frame_with_a_black_mask_comes_back_as_it_was(known):
    """Bit for bit, beside one that is drawn; its mask has no more grey than a JPEG makes of black."""
    frames, black = pictures(), torch.full((1, 1, *SIZE), 0.01, dtype=torch.float64)
    edit = inpainting(frames, torch.cat([black, mask()]))
    edit = replace(edit, strategy=replace(edit.strategy, known=known))
    stops = [GRID.timesteps[n] for n in GRID.stops(4, edit.strength)]
    levels = [*(SIGMAS[stops] / ALPHAS[stops]).tolist(), 0.0]
    noises = torch.randn(5, 2, 3, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = drawn(edit, 4, 1.0, [1.0] * 5, levels, noises)
    assert torch.equal(ours[0], frames[0])
    assert (ours[1] - frames[1]).abs().mean() > 0.1


def test_every_measured_task_has_a_strategy():
    assert set(EDITS) - {"outpaint", "free"} == set(STRATEGIES)

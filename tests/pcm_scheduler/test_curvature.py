"""Curvature of the teacher's ODE, and phase edges from it, against what is known exactly."""

from __future__ import annotations

import math
from itertools import pairwise

import gaussian_mixture as gmm
import pytest
import torch

from pcm_scheduler.curvature import MEASURES, edges_by_curvature, measure_curvature
from pcm_scheduler.noise_schedule import alphas_and_sigmas, make_alphas_cumprod, make_betas
from pcm_scheduler.phases import PhaseGrid

ALPHAS, SIGMAS = alphas_and_sigmas(make_alphas_cumprod(make_betas("scaled_linear", 0.00085, 0.012, 1000)))
MEAN, SPREAD = 0.7, 0.5


def levels(grid: PhaseGrid) -> tuple[torch.Tensor, torch.Tensor]:
    timesteps = list(grid.timesteps)
    return ALPHAS[timesteps], SIGMAS[timesteps]


def gaussian(grid: PhaseGrid):
    """The posterior mean of x_0 for data from N(MEAN, SPREAD^2) in every coordinate."""
    alphas, sigmas = levels(grid)

    def denoiser(x, n):
        a, s = alphas[n].item(), sigmas[n].item()
        return MEAN + a * SPREAD**2 / (a**2 * SPREAD**2 + s**2) * (x - a * MEAN)

    return denoiser


def course(grid: PhaseGrid, of: str) -> torch.Tensor:
    """How a Gaussian's eps, or its x_0 the other way round, goes along the ODE, up to a factor and a constant; it rises.

    With r = sigma / alpha, the ODE is x / alpha = MEAN + c sqrt(SPREAD^2 + r^2), and so eps = c r / sqrt(SPREAD^2 + r^2) and
    x_0 = x / alpha - r eps = MEAN + c SPREAD^2 / sqrt(SPREAD^2 + r^2).
    """
    alphas, sigmas = levels(grid)
    r = sigmas / alphas
    return (r if of == "epsilon" else -(SPREAD**2) * torch.ones_like(r)) / (SPREAD**2 + r**2).sqrt()


def exact_gaussian_curvature(grid: PhaseGrid, noise: torch.Tensor, of: str) -> torch.Tensor:
    alphas, sigmas = levels(grid)
    c = (noise / alphas[-1] - MEAN) / (SPREAD**2 + (sigmas / alphas)[-1] ** 2).sqrt()
    return course(grid, of).diff() * c.square().flatten(1).mean(1).sqrt().mean()


@pytest.mark.parametrize(("of", "error_at_50"), [("epsilon", 0.02), ("sample", 0.06)])
def test_a_gaussians_curvature_is_the_analytic_one_to_first_order(of, error_at_50):
    """DDIM's steps, and with them the measure, are first order: five times the points, about a fifth of the error."""
    noise = torch.randn(16, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for n in (50, 250):
        grid = PhaseGrid.even(1, n)
        measured = measure_curvature(gaussian(grid), noise, grid, ALPHAS, SIGMAS, of)
        assert measured.shape == (n,)
        exact = exact_gaussian_curvature(grid, noise, of)
        errors.append(((measured - exact).abs().sum() / exact.sum()).item())
    assert errors[0] < error_at_50
    assert errors[0] / errors[1] == pytest.approx(5, abs=0.3)


@pytest.mark.parametrize("of", MEASURES)
def test_edges_of_a_gaussian_are_where_it_has_turned_equally(of):
    """Edges are at the points where eps, or x_0, is m/M of the way from end to end."""
    grid = PhaseGrid.even(1, 500)
    noise = torch.randn(16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    measured = measure_curvature(gaussian(grid), noise, grid, ALPHAS, SIGMAS, of)
    turned = course(grid, of)
    turned = (turned - turned[0]) / (turned[-1] - turned[0])
    for phases in (2, 4, 8):
        expected = [int((turned <= m / phases).sum()) - 1 for m in range(1, phases)]
        found = edges_by_curvature(measured, phases, 500).edge_indices[1:-1]
        # the measured shares are off by some 0.1 %, which can move an edge over one point at most
        assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True)), (found, expected)


def test_where_half_of_a_gaussians_bend_is():
    """What the module says of it."""
    grid = PhaseGrid.even(1, 500)
    halves = {}
    for of in MEASURES:
        whole = course(grid, of)
        halves[of] = grid.timesteps[int((whole <= (whole[0] + whole[-1]) / 2).sum()) - 1]
    assert halves == {"epsilon": 85, "sample": 297}


def test_x_0_changes_by_the_lower_points_sigma_over_alpha_times_what_eps_does():
    """A DDIM step leaves x_0 as it is; for any denoiser, one that bends wildly too."""
    grid = PhaseGrid.even(1, 20)
    alphas, sigmas = levels(grid)
    noise = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    of_epsilon, of_sample = (
        measure_curvature(lambda x, n: (3 * x + n).sin(), noise, grid, ALPHAS, SIGMAS, of) for of in MEASURES
    )
    torch.testing.assert_close(of_sample, of_epsilon * (sigmas / alphas)[:-1])


@pytest.mark.parametrize("of", MEASURES)
def test_a_straight_ode_has_no_curvature(of):
    """All data in one place: eps and x_0 are the same all along, to rounding."""
    grid = PhaseGrid.even(1)
    noise = torch.randn(4, 8, dtype=torch.float64)
    curvature = measure_curvature(lambda x, n: torch.full_like(x, 0.3), noise, grid, ALPHAS, SIGMAS, of)
    torch.testing.assert_close(curvature, torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-10)


def test_the_denoiser_is_asked_once_at_every_point_from_the_top():
    grid, points = PhaseGrid.even(3, 20), []

    def denoiser(x, n):
        points.append(n)
        return 0.1 * x

    measure_curvature(denoiser, torch.randn(2, 4), grid, ALPHAS.float(), SIGMAS.float())
    assert points == list(range(20, -1, -1))


def test_samples_are_averaged_and_size_does_not_matter():
    grid = PhaseGrid.even(1, 25)
    noise = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both, first, second = (measure_curvature(gaussian(grid), x, grid, ALPHAS, SIGMAS) for x in (noise, noise[:1], noise[1:]))
    torch.testing.assert_close(both, (first + second) / 2)
    tiled = measure_curvature(gaussian(grid), noise.repeat(1, 5).reshape(2, 5, 6), grid, ALPHAS, SIGMAS)
    torch.testing.assert_close(tiled, both)


def test_a_mixtures_phases_bend_equally():
    grid = PhaseGrid.even(1, 250)
    alphas, sigmas = levels(grid)

    def denoiser(x, n):
        a, s = alphas[n].item(), sigmas[n].item()
        return (x - s * gmm.epsilon(x / a, s / a)) / a

    noise = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    curvature = measure_curvature(denoiser, noise, grid, ALPHAS, SIGMAS)

    def spread(edges):
        shares = [curvature[a:b].sum() for a, b in pairwise(edges)]
        return (max(shares) - min(shares)).item() / curvature.sum().item()

    edges = edges_by_curvature(curvature, 4, 250).edge_indices
    assert spread(edges) <= 2 * (curvature.max() / curvature.sum()).item(), "an edge is off by more than its point"
    assert spread(edges) < spread(PhaseGrid.even(4, 250).edge_indices) / 5


# ------------------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e6])
@pytest.mark.parametrize("n", [1, 8, 40, 50, 125])
def test_constant_curvature_gives_the_even_grid(n, value):
    for phases in range(1, n + 1):
        curvature = torch.full((n,), value)
        assert edges_by_curvature(curvature, phases, n) == PhaseGrid.even(phases, n)
        finer = torch.full((4 * n,), value)
        assert edges_by_curvature(finer, phases, n) == PhaseGrid.even(phases, n)


@pytest.mark.parametrize("place", [1, 2, 20, 49, 50])
@pytest.mark.parametrize("phases", [2, 4, 8])
def test_curvature_in_one_place_crowds_the_edges_there(place, phases):
    """Entry `place - 1` bends between points place - 1 and place: there the edges are, as near as points allow."""
    curvature = torch.zeros(50)
    curvature[place - 1] = 1.0
    inner = edges_by_curvature(curvature, phases, 50).edge_indices[1:-1]
    assert len(inner) == phases - 1
    first = min(max(place - 1, 1), 50 - (phases - 1))
    assert inner == tuple(range(first, first + phases - 1))


def test_edges_where_the_shares_are_whole():
    grid = edges_by_curvature(torch.tensor([1.0, 1, 2, 4, 8, 0, 0, 8]), 3, 8, 16)
    assert grid.edge_indices == (0, 4, 7, 8)
    assert grid.edges == (0, 7, 13, 15)


def test_a_finer_measurement_is_summed_onto_the_grid():
    fine = torch.rand(250, generator=torch.Generator().manual_seed(0)).double() + 0.1
    assert edges_by_curvature(fine, 4, 50) == edges_by_curvature(fine.view(50, 5).sum(1), 4, 50)


def test_as_many_phases_as_points_have_one_each():
    curvature = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert edges_by_curvature(curvature, 50, 50).edge_indices == tuple(range(51))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: edges_by_curvature(torch.ones(49), 4, 50), r"\(50,\).*\(49,\)"),
        (lambda: edges_by_curvature(torch.ones(50, 1), 4, 50), "shape"),
        (lambda: edges_by_curvature(torch.ones(0), 4, 50), "shape"),
        (lambda: edges_by_curvature(-torch.ones(50), 4, 50), "not negative"),
        (lambda: edges_by_curvature(torch.full((50,), math.nan), 4, 50), "finite"),
        (lambda: edges_by_curvature(torch.ones(50), 51, 50), "nearest possible: 50"),
        (lambda: edges_by_curvature(torch.ones(48), 4, 48), "nearest possible"),
        (lambda: measure_curvature(lambda x, n: x, torch.ones(1, 1), PhaseGrid.even(1), ALPHAS[:9], SIGMAS), "1000"),
        (lambda: measure_curvature(lambda x, n: x, torch.ones(1, 1), PhaseGrid.even(1), ALPHAS, 0 * SIGMAS), "timestep 0"),
        (
            lambda: measure_curvature(lambda x, n: x, torch.ones(1, 1), PhaseGrid.even(1), ALPHAS, SIGMAS, of="eps"),
            "epsilon or sample; got 'eps'",
        ),
    ],
)
def test_bad_input_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()

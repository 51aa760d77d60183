"""The search for sampling times: known optima, its rules, and an analytic teacher."""

from __future__ import annotations

import math
from itertools import pairwise

import gaussian_mixture as gmm
import pytest
import torch

from pcm_scheduler.noise_schedule import alphas_and_sigmas, make_alphas_cumprod, make_betas
from pcm_scheduler.phases import PhaseGrid
from pcm_scheduler.sampling import sample_phased
from pcm_scheduler.time_search import search_timesteps

ALPHAS, SIGMAS = alphas_and_sigmas(make_alphas_cumprod(make_betas("scaled_linear", 0.00085, 0.012, 1000)))


def choices(grid: PhaseGrid, k: int) -> int:
    """How many stops keep to the phases: the further ones among all inner points, or all among the edges."""
    m, n = grid.num_phases, grid.num_solver_steps
    return math.comb(n - m, k - m) if k >= m else math.comb(m - 1, k - 1)


def allowed_optimum(grid: PhaseGrid, k: int, seed: int) -> tuple[int, ...]:
    """Some stops that keep to the phases, drawn evenly."""
    edges = grid.edges[1:]
    if k >= len(edges):
        kept, free = edges, [t for t in grid.timesteps[1:] if t not in edges]
    else:
        kept, free = edges[-1:], list(edges[:-1])
    order = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed)).tolist()
    return tuple(sorted((*kept, *(free[i] for i in order[: k - len(kept)])), reverse=True))


def quadratic(grid: PhaseGrid, k: int, optimum: tuple[int, ...]):
    """Distance of the stops that can move from where they should be: one minimum, and every stop has its own."""
    kept = set(grid.edges[1:]) if k >= grid.num_phases else {grid.edges[-1]}
    goal = [t for t in optimum if t not in kept]

    def score(timesteps):
        return sum((a - b) ** 2 for a, b in zip([t for t in timesteps if t not in kept], goal, strict=True))

    return score


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("k", "m", "n"),
    [(1, 1, 50), (4, 1, 50), (5, 4, 50), (8, 4, 50), (12, 4, 40), (3, 2, 20), (3, 8, 50), (5, 16, 125), (8, 1, 500)],
)
def test_a_quadratic_score_is_minimised_exactly(k, m, n, seed):
    grid = PhaseGrid.even(m, n)
    optimum = allowed_optimum(grid, k, seed)
    found = search_timesteps(grid, k, quadratic(grid, k, optimum))
    assert found.timesteps == optimum
    assert found.score == 0


@pytest.mark.parametrize(("k", "m", "most"), [(2, 1, 16), (4, 1, 60), (5, 4, 35), (8, 4, 120), (12, 4, 200)])
def test_few_of_the_possible_choices_are_tried(k, m, most, record_property, capsys):
    """`most` is about 40 % above what these three optima take; another order of search may take a few more or less."""
    grid = PhaseGrid.even(m)
    counts = []
    for seed in range(3):
        found = search_timesteps(grid, k, quadratic(grid, k, allowed_optimum(grid, k, seed)))
        counts.append(len(found.tried))
    record_property(f"evaluations at K={k}, M={m}", counts)
    with capsys.disabled():
        print(f"\nK={k}, M={m}: {counts} evaluations of {choices(grid, k)} choices")
    assert max(counts) <= most
    assert max(counts) < choices(grid, k)


def bumpy(timesteps):
    """A score with many local minima, as no metric is."""
    return sum(math.sin(0.37 * t * (i + 1)) + math.cos(0.011 * t * t) for i, t in enumerate(timesteps))


@pytest.mark.parametrize(("k", "m", "n"), [(4, 4, 50), (6, 4, 50), (9, 4, 50), (3, 4, 50), (2, 8, 40), (7, 3, 10), (10, 3, 10)])
@pytest.mark.parametrize(
    "score", [bumpy, lambda t: -bumpy(t), lambda t: 0.0, lambda t: math.inf], ids=["up", "down", "flat", "inf"]
)
def test_the_rules_hold_for_any_score(k, m, n, score):
    grid = PhaseGrid.even(m, n)
    asked, told = [], []

    def counted(timesteps):
        asked.append(timesteps)
        return score(timesteps)

    found = search_timesteps(grid, k, counted, callback=lambda *report: told.append(report))
    assert len(set(asked)) == len(asked), "the same stops were evaluated twice"
    assert [timesteps for timesteps, _ in found.tried] == asked
    assert told == [(i + 1, timesteps, value) for i, (timesteps, value) in enumerate(found.tried)]
    assert asked[0] == grid.sampling_timesteps(k)
    assert found.default_score == score(asked[0])
    assert found.score == score(found.timesteps) == min(value for _, value in found.tried)
    for timesteps in asked:
        assert len(timesteps) == k
        assert timesteps[0] == 999
        assert all(a > b for a, b in pairwise(timesteps))
        assert set(timesteps) <= set(grid.timesteps[1:])
        assert set(grid.edges[1:]) <= set(timesteps) if k >= m else set(timesteps) <= set(grid.edges)
    assert search_timesteps(grid, k, score) == found


def test_no_single_stop_of_the_result_can_be_moved_to_a_better_neighbour():
    grid = PhaseGrid.even(4)
    found = search_timesteps(grid, 7, bumpy)
    free = [t for t in grid.timesteps[1:] if t not in grid.edges]
    moved = 0
    for stop in set(found.timesteps) - set(grid.edges):
        for at in (free.index(stop) - 1, free.index(stop) + 1):
            if 0 <= at < len(free) and free[at] not in found.timesteps:
                other = tuple(sorted({*found.timesteps, free[at]} - {stop}, reverse=True))
                assert bumpy(other) >= found.score
                moved += 1
    assert moved >= 3


def test_further_stops_find_the_phase_that_needs_them():
    """The grid gives the fifth stop to the noisiest phase; here only the last phase profits from one, at its middle."""
    grid = PhaseGrid.even(4)
    assert grid.sampling_timesteps(5) == (999, 859, 739, 499, 239)
    found = search_timesteps(grid, 5, lambda timesteps: min(abs(t - 119) for t in timesteps))
    assert found.timesteps == (999, 739, 499, 239, 119)


def test_uneven_edges_stay_stops():
    grid = PhaseGrid.from_timesteps([999, 979, 19], 50)
    found = search_timesteps(grid, 5, lambda timesteps: -float(sum(timesteps)))
    assert found.timesteps == (999, 979, 959, 939, 19)


@pytest.mark.parametrize("k", [0, 51])
def test_impossible_numbers_of_steps_are_refused_before_the_score_is_asked(k):
    def never(timesteps):
        raise AssertionError("the score was asked")

    with pytest.raises(ValueError, match="1 to 50"):
        search_timesteps(PhaseGrid.even(4), k, never)


def test_a_score_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match=r"\(999, 739, 499, 239\) is not a number"):
        search_timesteps(PhaseGrid.even(4), 4, lambda timesteps: math.nan)


def distance_to_the_ode(grid: PhaseGrid, ideal: bool, seed: int, count: int = 64):
    """Root mean square distance of sampling's end from the ODE's, for a perfect phased network or for the teacher itself."""
    noise = torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    top = grid.timesteps[-1]
    ratio = (SIGMAS / ALPHAS).tolist()
    truth = gmm.solve(noise / ALPHAS[top], ratio[top], 0.0)

    def score(timesteps):
        alphas, sigmas = [*ALPHAS[list(timesteps)].tolist(), 1.0], [*SIGMAS[list(timesteps)].tolist(), 0.0]

        def denoiser(x, i):
            a, s = alphas[i], sigmas[i]
            target = max(edge for edge in grid.edges if edge < timesteps[i])
            edge = ratio[target] if target else 0.0
            eps = gmm.ideal_phase_epsilon(x / a, s / a, edge) if ideal else gmm.epsilon(x / a, s / a)
            return (x - s * eps) / a

        end = sample_phased(denoiser, noise, alphas, sigmas)
        return (end - truth).square().mean().sqrt().item()

    return score


@pytest.mark.parametrize(("k", "m", "ideal"), [(4, 1, False), (6, 1, False), (6, 4, False), (3, 2, True)])
def test_searched_times_come_nearer_to_the_exact_ode(k, m, ideal, record_property, capsys):
    """Never farther on the noise that was searched with, and nearer on other noise, since the gain is far above its spread."""
    grid = PhaseGrid.even(m)
    count = 8 if ideal else 256  # the perfect network solves an ODE at every step
    found = search_timesteps(grid, k, distance_to_the_ode(grid, ideal, 0, count))
    assert found.score <= found.default_score
    other = distance_to_the_ode(grid, ideal, 1, count)
    default, searched = other(grid.sampling_timesteps(k)), other(found.timesteps)
    record_property(f"distance at K={k}, M={m}, default and searched", (default, searched))
    with capsys.disabled():
        print(f"\nK={k}, M={m}: {default:.4f} by default, {searched:.4f} at {found.timesteps}, {len(found.tried)} evaluations")
    assert searched < default

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from pcm_scheduler.phases import PhaseGrid

T = 1000
DIVISORS = [n for n in range(1, T) if T % n == 0]


@pytest.mark.parametrize(
    ("steps", "phases", "edges"),
    [
        (50, 1, (0, 999)),
        (50, 2, (0, 499, 999)),
        (50, 4, (0, 239, 499, 739, 999)),
        (50, 8, (0, 119, 239, 359, 499, 619, 739, 859, 999)),
        (40, 4, (0, 249, 499, 749, 999)),
        (40, 8, (0, 124, 249, 374, 499, 624, 749, 874, 999)),
    ],
)
def test_edges_are_those_of_the_published_training_scripts(steps, phases, edges):
    assert PhaseGrid.even(phases, steps).edges == edges


@pytest.mark.parametrize(
    ("k", "timesteps"),
    [
        (1, (999,)),
        (2, (999, 499)),
        (3, (999, 739, 239)),
        (4, (999, 739, 499, 239)),
        (5, (999, 859, 739, 499, 239)),
        (8, (999, 859, 739, 619, 499, 359, 239, 119)),
    ],
)
def test_sampling_timesteps_of_four_phases(k, timesteps):
    assert PhaseGrid.even(4).sampling_timesteps(k) == timesteps


def check_alignment(grid: PhaseGrid, k: int, start: int, stops: tuple[int, ...]) -> None:
    assert len(stops) == k
    assert stops[0] == start
    assert stops[-1] >= 1
    assert all(a > b for a, b in pairwise(stops))
    edges = {e for e in grid.edge_indices if 0 < e < start} | {start}
    if k >= len(edges):
        assert edges <= set(stops), "a step crosses an edge"
    if k <= len(edges):
        assert set(stops) <= edges, "a stop is not an edge"


@pytest.mark.parametrize("n", DIVISORS)
def test_every_grid_keeps_the_alignment_rule(n):
    """Every N that divides 1000, every M <= N, every K <= N."""
    phases = range(1, n + 1) if n <= 125 else (1, 2, 3, 4, 7, 8, 16, 50, 99, n // 2, n // 2 + 1, n - 1, n)
    for m in phases:
        grid = PhaseGrid.even(m, n)
        steps = (
            range(1, n + 1)
            if n <= 50
            else sorted({1, 2, 3, m - 1, m, m + 1, 2 * m, 2 * m + 1, n // 3, n - 1, n} & set(range(1, n + 1)))
        )
        for k in steps:
            check_alignment(grid, k, n, grid.stops(k))


@pytest.mark.parametrize("m", [1, 3, 4, 8])
@pytest.mark.parametrize("strength", [0.02, 0.13, 0.3, 0.5, 0.75, 0.98])
def test_image_to_image_starts_on_the_grid_and_stays_aligned(m, strength):
    grid = PhaseGrid.even(m, 50)
    start = grid.start_point(strength)
    assert abs(start / 50 - strength) <= 0.5 / 50 + 1e-9
    for k in range(1, start + 1):
        check_alignment(grid, k, start, grid.stops(k, strength))


def test_spare_steps_go_to_the_noisiest_phases():
    grid = PhaseGrid.even(4)
    inside = [grid.phase(torch.tensor(grid.stops(k))).bincount(minlength=4).tolist() for k in (4, 5, 6, 7, 8, 9)]
    assert inside == [[1, 1, 1, 1], [1, 1, 1, 2], [1, 1, 2, 2], [1, 2, 2, 2], [2, 2, 2, 2], [2, 2, 2, 3]]


def test_all_points_are_used_when_every_phase_is_full():
    grid = PhaseGrid.from_timesteps([999, 979, 19], 50)
    assert grid.stops(50) == tuple(range(50, 0, -1))
    assert grid.stops(3) == (50, 49, 1)
    assert grid.stops(5)[:2] == (50, 49), "the one-point phase takes one step"


def test_phase_and_target_of_points():
    grid = PhaseGrid.even(4)
    n = torch.tensor([1, 12, 13, 25, 26, 37, 38, 50])
    assert grid.phase(n).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert grid.target(n).tolist() == [0, 0, 12, 12, 25, 25, 37, 37]
    assert grid.timestep(grid.target(n)).tolist() == [0, 0, 239, 239, 499, 499, 739, 739]


def test_explicit_edges_equal_even_ones_in_any_order():
    assert PhaseGrid.from_timesteps([239, 999, 739, 499]) == PhaseGrid.from_timesteps([0, 239, 499, 739, 999])
    assert PhaseGrid.from_timesteps([999, 739, 499, 239]) == PhaseGrid.even(4)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: PhaseGrid.even(4, 48), "50"),
        (lambda: PhaseGrid.even(4, 64), "50 or 100|nearest possible"),
        (lambda: PhaseGrid.even(4, 1000), "500"),
        (lambda: PhaseGrid.even(0), "nearest possible: 1"),
        (lambda: PhaseGrid.even(51), "nearest possible: 50"),
        (lambda: PhaseGrid.from_timesteps([999, 749]), "739 or 759"),
        (lambda: PhaseGrid.from_timesteps([739, 499]), "999"),
        (lambda: PhaseGrid.from_timesteps([999, 499, 499]), "repeated"),
        (lambda: PhaseGrid.even(4).stops(0), "1 to 50"),
        (lambda: PhaseGrid.even(4).stops(51), "1 to 50"),
        (lambda: PhaseGrid.even(4).stops(26, strength=0.5), "1 to 25 at strength 0.5"),
        (lambda: PhaseGrid.even(4).stops(4, strength=0.0), "strength"),
        (lambda: PhaseGrid.even(4.0), r"num_phases must be a whole number; got 4\.0"),
        (lambda: PhaseGrid.even(True), "num_phases must be a whole number; got True"),
        (lambda: PhaseGrid.even(4, 50.0), "num_solver_steps must be a whole number"),
        (lambda: PhaseGrid.even(10**9, 10**9), "puts no point"),  # before a billion edges are made
        (lambda: PhaseGrid.even(1, 50, 10**18), "at most 1000000"),  # and before its divisors are looked for
        (lambda: PhaseGrid.even(1, 50, 10**5000), "at most 1000000; got a number of 16610 bits"),
        (lambda: PhaseGrid.even(1, 0), "puts no point"),
        (lambda: PhaseGrid(50, 3), "edge_indices must be a sequence"),
        (lambda: PhaseGrid.from_timesteps("999"), "A member of phase_edges must be a whole number; got '9'"),
        (lambda: PhaseGrid.from_timesteps([999, None]), "A member of phase_edges"),
        (lambda: PhaseGrid.even(4).stops(4, strength=float("nan")), "strength must be a finite number"),
        (lambda: PhaseGrid.even(4).stops(4, strength="1"), "strength must be a finite number"),
        (lambda: PhaseGrid.even(4).stops(2.5), "num_inference_steps must be a whole number"),
    ],
)
def test_impossible_grids_name_what_is_possible(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_numbers_of_other_libraries_are_whole_too():
    grid = PhaseGrid(torch.tensor(50), [torch.tensor(0), torch.tensor(50)])
    assert grid == PhaseGrid.even(1)
    assert hash(grid) == hash(PhaseGrid.even(1))


def test_a_grid_of_many_points_takes_no_longer_than_it_is_large():
    """Ten thousand points and as many phases: a tenth of a second; with time by their product it was a minute."""
    grid = PhaseGrid.even(10_000, 10_000, 20_000)
    assert len(set(grid.stops(9_999))) == 9_999
    assert PhaseGrid.from_timesteps(grid.edges, 10_000, 20_000) == grid

"""Phase grids and schedulers of arbitrary numbers: a grid that is accepted keeps its rules, any other is refused in words."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch
from fuzzing import CASES, ROOM, floats, fuzz, in_memory, in_time, integers, refused, scalars
from hypothesis import strategies as st

from pcm_scheduler import PCMScheduler
from pcm_scheduler.phases import MOST_TIMESTEPS, PhaseGrid

pytestmark = pytest.mark.hard


def test_there_are_a_hundred_thousand_cases():
    """`fuzz` asserts for each subject that so many were run."""
    assert sum(CASES.values()) >= 100_000


possible = st.sampled_from([(50, 1000), (40, 1000), (8, 16), (1, 2), (500, 1000), (25, 100), (200, 1000), (50, 10_000)])
numbers = st.one_of(integers, floats, scalars, st.integers(0, 1000).map(torch.tensor))
edge_lists = st.one_of(
    st.lists(st.sampled_from([0, 19, 239, 499, 739, 749, 999]), max_size=6),
    st.lists(integers, max_size=5),
    st.lists(scalars, max_size=3),
    scalars,
)


@st.composite
def grids(draw):
    """How a grid is asked for: the constructor's name, and its arguments, of which some may be possible."""
    n, t = draw(possible)
    n, t = draw(st.sampled_from([n, n, n, draw(numbers)])), draw(st.sampled_from([t, t, t, draw(numbers)]))
    how = draw(st.sampled_from(["even", "from_timesteps", "constructor"]))
    first = draw(st.one_of(st.integers(1, 60), numbers) if how == "even" else edge_lists)
    return how, first, n, t, draw(st.one_of(st.floats(0, 1), floats, scalars)), draw(st.one_of(st.integers(1, 60), numbers))


def check_grid(case) -> None:
    how, first, n, t, strength, steps = case
    made = []

    def make():
        if how == "constructor":
            made.append(PhaseGrid(n, first, t))
        else:
            made.append(getattr(PhaseGrid, how)(first, n, t))

    if refused(make):
        return
    (grid,) = made
    assert type(grid.num_solver_steps) is type(grid.num_train_timesteps) is int
    assert 2 <= grid.num_train_timesteps <= MOST_TIMESTEPS
    assert grid.timesteps[-1] == grid.num_train_timesteps - 1
    assert grid.edges[0] == 0
    assert all(a < b for points in (grid.timesteps, grid.edges) for a, b in pairwise(points))
    assert PhaseGrid.from_timesteps(grid.edges, grid.num_solver_steps, grid.num_train_timesteps) == grid
    n = grid.num_solver_steps
    for k in range(1, n + 1) if n <= 50 else {1, 2, grid.num_phases, n // 3 + 1, n - 1, n}:
        stops = grid.stops(k)
        assert len(stops) == k
        assert stops[0] == grid.num_solver_steps
        assert stops[-1] >= 1
        assert all(a > b for a, b in pairwise(stops))
        if k <= grid.num_phases:
            assert set(stops) <= set(grid.edge_indices)
    asked = []
    if not refused(lambda: asked.append(grid.stops(steps, strength))):
        assert len(asked[0]) == steps
        assert all(a > b for a, b in pairwise(asked[0]))


def test_phase_grids():
    fuzz("phase grids", grids(), check_grid)


def test_the_largest_grid():
    """Half a million points, as many phases as half of them: time and memory grow no faster than these."""
    with in_memory(ROOM), in_time():
        check_grid(("even", 250_000, MOST_TIMESTEPS // 2, MOST_TIMESTEPS, 0.7, 300_000))


arguments = st.fixed_dictionaries(
    {},
    optional={
        "num_train_timesteps": st.one_of(st.sampled_from([1000, 100, 2]), numbers),
        "beta_start": st.one_of(st.floats(0, 1), numbers),
        "beta_end": st.one_of(st.floats(0, 1), numbers),
        "beta_schedule": st.one_of(st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]), scalars),
        "trained_betas": st.one_of(st.lists(floats, max_size=4), scalars, st.just([[0.1]]), st.just([0.1] * 1000)),
        "prediction_type": st.one_of(st.sampled_from(["epsilon", "v_prediction", "sample", "flow"]), scalars),
        "rescale_betas_zero_snr": st.booleans(),
        "num_phases": st.one_of(st.integers(1, 50), numbers),
        "phase_edges": edge_lists,
        "num_solver_steps": st.one_of(st.sampled_from([50, 40, 1]), numbers),
        "final_sigmas_type": st.one_of(st.sampled_from(["zero", "sigma_min"]), scalars),
        "timesteps": edge_lists,
    },
)
asked_steps = st.fixed_dictionaries(
    {},
    optional={
        "num_inference_steps": st.one_of(st.integers(1, 50), numbers),
        "timesteps": edge_lists,
        "strength": st.one_of(st.floats(0, 1), scalars),
    },
)


def check_scheduler(case) -> None:
    options, asked = case
    made = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of betas above 1, and of stops off the grid
        if refused(lambda: made.append(PCMScheduler(**options))):
            return
        (scheduler,) = made
        if refused(lambda: scheduler.set_timesteps(**asked)):
            return
    stops = scheduler.timesteps.tolist()
    assert stops
    assert all(a > b for a, b in pairwise(stops))
    assert 0 <= stops[-1] <= stops[0] < len(scheduler)
    assert scheduler.step(torch.zeros(1, 4, 2, 2), stops[0], torch.zeros(1, 4, 2, 2)).prev_sample.shape == (1, 4, 2, 2)


def test_schedulers():
    fuzz("schedulers", st.tuples(arguments, asked_steps), check_scheduler)

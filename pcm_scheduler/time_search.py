"""Sampling times optimised for a metric, on the points of the solver's grid and aligned to the phases.

    search = search_timesteps(PhaseGrid.even(4), 8, lambda timesteps: frechet_distance(draw(timesteps)))
    scheduler = PCMScheduler.from_config(config, num_phases=4, timesteps=list(search.timesteps))

Consistency Models (arXiv 2303.01469, beside Algorithm 1) find the times of multistep sampling greedily, one at a time, each
by ternary search on the metric. Here every evaluation has all K stops: the search begins with the grid's own and moves
one after the other, so that a stop is placed for the number of steps it is meant for, and the grid's own are never lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .phases import PhaseGrid

Timesteps = tuple[int, ...]
"""K timesteps, strictly decreasing, as `PhaseGrid.sampling_timesteps` gives them."""

SearchCallback = Callable[[int, Timesteps, float], None]
"""(number of evaluations so far, the timesteps just tried, their score); may raise to stop."""


@dataclass(frozen=True)
class TimestepSearch:
    """What a search found.

    Attributes:
        timesteps: the best of all that were tried; K integers, strictly decreasing.
        score: theirs, at most `default_score`.
        default_score: that of `grid.sampling_timesteps(K)`.
        tried: (timesteps, score) of every evaluation in order, each once; the grid's own stops are the first.
    """

    timesteps: Timesteps
    score: float
    default_score: float
    tried: tuple[tuple[Timesteps, float], ...]


def search_timesteps(
    grid: PhaseGrid,
    num_inference_steps: int,
    score: Callable[[Timesteps], float],
    callback: SearchCallback | None = None,
) -> TimestepSearch:
    """Move K stops over the grid's points until the score falls no further.

    The first stop stays at T - 1. With K >= M every phase edge stays a stop, so that no step crosses one, and the K - M
    further stops move, inside phases and from one phase to another. With K < M all stops are chosen among the edges.

    Stops move one at a time, the noisiest first, between the two next to it that move too. Ternary search assumes that
    the score has one minimum there; a stop on an edge's either side serves two different phases, so each phase is searched
    by itself and the best is taken. This goes on until no stop moves. Since the assumption may fail, the neighbours come
    last: each stop one free point up and down, and from a better one everything again. The result is then a minimum
    against every such single move, which need not be the least of all. A noisy score is minimised noise and all: score
    the result once more with other seeds.

    Deterministic if the score is. At K = 8, M = 4, N = 50 a quadratic score takes 70 to 90 evaluations of 163,185 possible
    ones; scores of several minima take more.

    Args:
        grid: that the adapter was trained on.
        num_inference_steps: K, in 1..N.
        score: of K timesteps, noisiest first; smaller is better, so negate a metric to be maximised. Infinite is allowed.
            Called once for each distinct choice.
        callback: called after every evaluation.

    Raises:
        ValueError: K out of range, or the score is not a number.
    """
    default = grid.stops(num_inference_steps)
    if num_inference_steps >= grid.num_phases:
        kept = set(grid.edge_indices[1:])
        runs: list[Sequence[int]] = [range(low + 1, high) for low, high in pairwise(grid.edge_indices)]
    else:
        kept = {grid.num_solver_steps}
        runs = [grid.edge_indices[1:-1]]
    free = [n for run in runs for n in run]
    scores: dict[Timesteps, float] = {}

    def timesteps_of(moving: tuple[int, ...]) -> Timesteps:
        return tuple(grid.timesteps[n] for n in sorted((*kept, *moving), reverse=True))

    def evaluate(moving: tuple[int, ...]) -> float:
        timesteps = timesteps_of(moving)
        if timesteps not in scores:
            value = float(score(timesteps))
            if math.isnan(value):
                raise ValueError(f"The score of timesteps {timesteps} is not a number.")
            scores[timesteps] = value
            if callback is not None:
                callback(len(scores), timesteps, value)
        return scores[timesteps]

    def with_stop(moving: tuple[int, ...], i: int, n: int) -> tuple[int, ...]:
        return (*moving[:i], n, *moving[i + 1 :])

    def place(moving: tuple[int, ...], i: int) -> tuple[int, ...]:
        """Stop i at its best place between its neighbours; where it is if nothing is better."""
        bounds = (grid.num_solver_steps, *moving, 0)
        above, below = bounds[i], bounds[i + 2]
        choices = [moving]
        for run in runs:
            options = [n for n in run if below < n < above]
            if options:
                best = _ternary_search(lambda n: evaluate(with_stop(moving, i, n)), options)
                choices.append(with_stop(moving, i, best))
        return min(choices, key=evaluate)  # the first of equals

    def neighbours(moving: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        for i, n in enumerate(moving):
            at = free.index(n)
            for other in (at + 1, at - 1):
                if 0 <= other < len(free) and free[other] not in moving:
                    yield with_stop(moving, i, free[other])

    moving: tuple[int, ...] = tuple(n for n in default if n not in kept)
    default_score = evaluate(moving)
    better: tuple[int, ...] | None = moving
    while better is not None:
        moving = better
        settled, i = 0, 0  # how many stops in a row have stayed where they were
        while settled < len(moving):
            placed = place(moving, i)
            settled = settled + 1 if placed == moving else 1
            moving, i = placed, (i + 1) % len(moving)
        better = next((other for other in neighbours(moving) if evaluate(other) < evaluate(moving)), None)
    return TimestepSearch(timesteps_of(moving), evaluate(moving), default_score, tuple(scores.items()))


def _ternary_search(value: Callable[[int], float], options: Sequence[int]) -> int:
    """The option of the smallest value, if the values fall to it and rise after it; else the smallest that was met."""
    values: dict[int, float] = {}

    def at(place: int) -> float:
        if place not in values:
            values[place] = value(options[place])
        return values[place]

    low, high = 0, len(options) - 1
    while high - low > 2:
        third = (high - low) // 3
        left, right = low + third, high - third
        if at(left) < at(right):
            high = right - 1
        elif at(left) > at(right):
            low = left + 1
        else:
            low, high = left, right
    return options[min([*range(low, high + 1), *values], key=at)]

"""The phase grid: where the solver's points are, where the phases' edges are, and where sampling stops.

Points of the solver's grid are numbered n = 0..N, with timesteps tau_0 = 0 and tau_n = n T/N - 1. The M phases meet
at edges e_0 = 0 < e_1 < ... < e_M = N. A point n belongs to phase m when e_m < n <= e_(m+1); its target is tau_(e_m).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from .checks import finite_number, shortened, whole_number

MOST_TIMESTEPS = 1_000_000
"""T of a grid, at most: a header may say any number, and tables are made of so many entries."""


def _solver_steps_of(num_train_timesteps: int) -> list[int]:
    """Every N that divides T with N < T, ascending."""
    low = [n for n in range(1, math.isqrt(num_train_timesteps) + 1) if num_train_timesteps % n == 0]
    return sorted({*low, *(num_train_timesteps // n for n in low)} - {num_train_timesteps})


def _check_solver_grid(num_solver_steps: int, num_train_timesteps: int) -> tuple[int, int]:
    """N and T as they are, for nothing may be made of so many points before they are known to be possible.

    Raises:
        ValueError: as `PhaseGrid`.
    """
    n, t = whole_number(num_solver_steps, "num_solver_steps"), whole_number(num_train_timesteps, "num_train_timesteps")
    if t < 2:
        raise ValueError(f"num_train_timesteps must be at least 2; got {shortened(t)}.")
    if t > MOST_TIMESTEPS:
        raise ValueError(f"num_train_timesteps must be at most {MOST_TIMESTEPS}; got {shortened(t)}.")
    if not 1 <= n < t or t % n:
        near = " or ".join(map(str, _nearest(n, _solver_steps_of(t))))
        raise ValueError(
            f"num_solver_steps={shortened(n)} puts no point at timestep {t - 1}, where sampling starts, or leaves no room "
            f"between points: it must divide num_train_timesteps={t} and be smaller. The nearest possible: {near}."
        )
    return n, t


def _whole_numbers(values: Sequence[int], name: str) -> tuple[int, ...]:
    """Refuses what has no members, and members that are no whole numbers, such as those of a text."""
    try:
        members = tuple(values)
    except TypeError as error:
        raise ValueError(f"{name} must be a sequence of whole numbers; got {shortened(values)}.") from error
    return tuple(whole_number(member, f"A member of {name}") for member in members)


def _nearest(value: int, options: Sequence[int], count: int = 2) -> list[int]:
    return sorted(sorted(options, key=lambda option: (abs(option - value), option))[:count])


@dataclass(frozen=True)
class PhaseGrid:
    """A solver grid of N points cut into M phases.

    Build it with `PhaseGrid.even` (M phases of equal length, edges floored) or `PhaseGrid.from_timesteps` (explicit edges).

    Attributes:
        num_solver_steps: N; divides T, N < T, so that the top point is T - 1, where sampling starts.
        edge_indices: e_0..e_M as point numbers, strictly increasing from 0 to N.
        num_train_timesteps: T, from 2 to `MOST_TIMESTEPS`.

    Raises:
        ValueError: a value that is no whole number, or N, T or the edges are none that go together; which are.
    """

    num_solver_steps: int
    edge_indices: tuple[int, ...]
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        n, t = _check_solver_grid(self.num_solver_steps, self.num_train_timesteps)
        edges = _whole_numbers(self.edge_indices, "edge_indices")
        if len(edges) < 2 or edges[0] != 0 or edges[-1] != n or any(a >= b for a, b in pairwise(edges)):
            raise ValueError(f"Edges must increase strictly from point 0 to point {n}; got {shortened(edges)}.")
        for name, value in (("num_solver_steps", n), ("num_train_timesteps", t), ("edge_indices", edges)):
            object.__setattr__(self, name, value)  # Python's own numbers, from whichever type they came

    @classmethod
    def even(cls, num_phases: int, num_solver_steps: int = 50, num_train_timesteps: int = 1000) -> PhaseGrid:
        """M phases of equal length up to flooring: e_m = floor(m N / M).

        Raises:
            ValueError: M is not in 1..N, or N does not divide T; the message names the nearest possible values.
        """
        n, t = _check_solver_grid(num_solver_steps, num_train_timesteps)
        phases = whole_number(num_phases, "num_phases")
        if not 1 <= phases <= n:
            raise ValueError(
                f"num_phases={shortened(phases)} cannot be cut from num_solver_steps={n} points; "
                f"the nearest possible: {min(max(phases, 1), n)}."
            )
        return cls(n, tuple(m * n // phases for m in range(phases + 1)), t)

    @classmethod
    def from_timesteps(
        cls, phase_edges: Sequence[int], num_solver_steps: int = 50, num_train_timesteps: int = 1000
    ) -> PhaseGrid:
        """Phases between explicit edges.

        Args:
            phase_edges: timesteps in any order, e.g. [999, 739, 499, 239]; the top T - 1 must be there, 0 may be left out.
            num_solver_steps: N.
            num_train_timesteps: T.

        Raises:
            ValueError: an edge is not a point of the grid, is repeated, or the top is missing; the message names the
                nearest points.
        """
        grid = cls.even(1, num_solver_steps, num_train_timesteps)
        edges = _whole_numbers(phase_edges, "phase_edges")
        points = {timestep: n for n, timestep in enumerate(grid.timesteps)}
        for edge in edges:
            if edge not in points:
                near = " or ".join(map(str, _nearest(edge, grid.timesteps)))
                raise ValueError(
                    f"Phase edge {shortened(edge)} is not a point of the grid of {num_solver_steps} solver steps; the nearest "
                    f"are {near}."
                )
        if len(set(edges)) != len(edges):
            raise ValueError(f"Phase edges are repeated: {shortened(list(edges))}.")
        if grid.timesteps[-1] not in edges:
            raise ValueError(
                f"Phase edges must contain {num_train_timesteps - 1}, where sampling starts; got {shortened(list(edges))}."
            )
        return cls(num_solver_steps, tuple(sorted({0, *(points[edge] for edge in edges)})), num_train_timesteps)

    @property
    def num_phases(self) -> int:
        """M."""
        return len(self.edge_indices) - 1

    @property
    def is_even(self) -> bool:
        """Whether `even` makes it."""
        return self == PhaseGrid.even(self.num_phases, self.num_solver_steps, self.num_train_timesteps)

    @cached_property
    def timesteps(self) -> tuple[int, ...]:
        """tau_0..tau_N, ascending, N + 1 integers."""
        spacing = self.num_train_timesteps // self.num_solver_steps
        return (0, *(n * spacing - 1 for n in range(1, self.num_solver_steps + 1)))

    @property
    def edges(self) -> tuple[int, ...]:
        """The edges' timesteps, ascending, M + 1 integers, e.g. (0, 239, 499, 739, 999)."""
        return tuple(self.timesteps[e] for e in self.edge_indices)

    def phase(self, n: torch.Tensor) -> torch.Tensor:
        """The phase m of points n: e_m < n <= e_(m+1). Integers of any shape, 1..N in, 0..M-1 out."""
        edges = torch.tensor(self.edge_indices, device=n.device)
        return torch.searchsorted(edges, n.contiguous(), right=False) - 1

    def target(self, n: torch.Tensor) -> torch.Tensor:
        """The point e_m that points n (1..N) of phase m jump to in training."""
        return torch.tensor(self.edge_indices, device=n.device)[self.phase(n)]

    def timestep(self, n: torch.Tensor) -> torch.Tensor:
        """tau_n as int64, for point numbers 0..N of any shape."""
        return torch.tensor(self.timesteps, device=n.device)[n]

    def start_point(self, strength: float) -> int:
        """The point nearest to `strength` of the way up, at least 1: where image-to-image starts.

        Raises:
            ValueError: strength is not in (0, 1].
        """
        share = finite_number(strength, "strength")
        if not 0 < share <= 1:
            raise ValueError(f"strength must be in (0, 1]; got {strength}.")
        return max(1, int(share * self.num_solver_steps + 0.5))

    def stops(self, num_inference_steps: int, strength: float = 1.0) -> tuple[int, ...]:
        """The points from which K sampling steps start, strictly decreasing; the last step ends at sigma 0.

        With K >= M no step crosses an edge; with K <= M every stop is an edge. Spare steps (K not a multiple of M) go
        one each to the noisiest phases that have an unused point. With strength < 1 the same rules hold on the part of
        the grid below the starting point, which counts as its uppermost edge.

        Args:
            num_inference_steps: K, in 1..N (in 1..start_point(strength)).
            strength: in (0, 1]; 1 starts from pure noise.

        Returns:
            K point numbers.

        Raises:
            ValueError: K or strength out of range.
        """
        start, k = self.start_point(strength), whole_number(num_inference_steps, "num_inference_steps")
        if not 1 <= k <= start:
            where = "" if start == self.num_solver_steps else f" at strength {strength}"
            raise ValueError(
                f"num_inference_steps={shortened(k)} is outside the grid: {self.num_solver_steps} solver steps allow 1 to "
                f"{start}{where}."
            )
        edges = [*(e for e in self.edge_indices if e < start), start]
        m = len(edges) - 1
        if k < m:
            return tuple(edges[(2 * m * (k - j) + k) // (2 * k)] for j in range(k))
        lengths = [b - a for a, b in pairwise(edges)]
        steps, left, roomy = [0] * m, k, list(reversed(range(m)))
        while left:  # one round gives a step to each phase that has room, the noisiest first
            roomy = [i for i in roomy if steps[i] < lengths[i]]
            for i in roomy[:left]:
                steps[i] += 1
            left -= len(roomy[:left])
        cuts = [e + j * length // q for e, length, q in zip(edges, lengths, steps, strict=False) for j in range(q)]
        return (start, *reversed(cuts[1:]))

    def sampling_timesteps(self, num_inference_steps: int, strength: float = 1.0) -> tuple[int, ...]:
        """The timesteps of `stops`: K integers, strictly decreasing."""
        return tuple(self.timesteps[n] for n in self.stops(num_inference_steps, strength))

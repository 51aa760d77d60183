"""The phase grid: where the solver's points are, where the phases' edges are, and where sampling stops.

Points of the solver's grid are numbered n = 0..N, with timesteps tau_0 = 0 and tau_n = n T/N - 1. The M phases meet
at edges e_0 = 0 < e_1 < ... < e_M = N. A point n belongs to phase m when e_m < n <= e_(m+1); its target is tau_(e_m).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch


def _solver_steps_of(num_train_timesteps: int) -> list[int]:
    """Every N that divides T with N < T, ascending."""
    return [n for n in range(1, num_train_timesteps) if num_train_timesteps % n == 0]


def _nearest(value: int, options: Sequence[int], count: int = 2) -> list[int]:
    return sorted(sorted(options, key=lambda option: (abs(option - value), option))[:count])


@dataclass(frozen=True)
class PhaseGrid:
    """A solver grid of N points cut into M phases.

    Build it with `PhaseGrid.even` (M phases of equal length, edges floored) or `PhaseGrid.from_timesteps` (explicit edges).

    Attributes:
        num_solver_steps: N; divides T, N < T, so that the top point is T - 1, where sampling starts.
        edge_indices: e_0..e_M as point numbers, strictly increasing from 0 to N.
        num_train_timesteps: T.
    """

    num_solver_steps: int
    edge_indices: tuple[int, ...]
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        n, t = self.num_solver_steps, self.num_train_timesteps
        possible = _solver_steps_of(t)
        if not possible:
            raise ValueError(f"num_train_timesteps must be at least 2; got {t}.")
        if n not in possible:
            near = " or ".join(map(str, _nearest(n, possible)))
            raise ValueError(
                f"num_solver_steps={n} puts no point at timestep {t - 1}, where sampling starts, or leaves no room between "
                f"points: it must divide num_train_timesteps={t} and be smaller. The nearest possible: {near}."
            )
        edges = self.edge_indices
        if len(edges) < 2 or edges[0] != 0 or edges[-1] != n or any(a >= b for a, b in pairwise(edges)):
            raise ValueError(f"Edges must increase strictly from point 0 to point {n}; got {edges}.")

    @classmethod
    def even(cls, num_phases: int, num_solver_steps: int = 50, num_train_timesteps: int = 1000) -> PhaseGrid:
        """M phases of equal length up to flooring: e_m = floor(m N / M).

        Raises:
            ValueError: M is not in 1..N, or N does not divide T; the message names the nearest possible values.
        """
        if not 1 <= num_phases <= num_solver_steps:
            raise ValueError(
                f"num_phases={num_phases} cannot be cut from num_solver_steps={num_solver_steps} points; "
                f"the nearest possible: {min(max(num_phases, 1), max(num_solver_steps, 1))}."
            )
        edges = tuple(m * num_solver_steps // num_phases for m in range(num_phases + 1))
        return cls(num_solver_steps, edges, num_train_timesteps)

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
        indices = {0}
        for edge in phase_edges:
            if edge not in grid.timesteps:
                near = " or ".join(map(str, _nearest(edge, grid.timesteps)))
                raise ValueError(
                    f"Phase edge {edge} is not a point of the grid of {num_solver_steps} solver steps; the nearest are {near}."
                )
            indices.add(grid.timesteps.index(edge))
        if len(set(phase_edges)) != len(phase_edges):
            raise ValueError(f"Phase edges are repeated: {list(phase_edges)}.")
        if num_solver_steps not in indices:
            raise ValueError(
                f"Phase edges must contain {num_train_timesteps - 1}, where sampling starts; got {list(phase_edges)}."
            )
        return cls(num_solver_steps, tuple(sorted(indices)), num_train_timesteps)

    @property
    def num_phases(self) -> int:
        """M."""
        return len(self.edge_indices) - 1

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
        if not 0 < strength <= 1:
            raise ValueError(f"strength must be in (0, 1]; got {strength}.")
        return max(1, int(strength * self.num_solver_steps + 0.5))

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
        start, k = self.start_point(strength), num_inference_steps
        if not 1 <= k <= start:
            where = "" if start == self.num_solver_steps else f" at strength {strength}"
            raise ValueError(
                f"num_inference_steps={k} is outside the grid: {self.num_solver_steps} solver steps allow 1 to {start}{where}."
            )
        edges = [*(e for e in self.edge_indices if e < start), start]
        m = len(edges) - 1
        if k < m:
            return tuple(edges[(2 * m * (k - j) + k) // (2 * k)] for j in range(k))
        lengths = [b - a for a, b in pairwise(edges)]
        steps = [0] * m
        while sum(steps) < k:  # one round gives a step to each phase that has room, the noisiest first
            for i in reversed(range(m)):
                if steps[i] < lengths[i] and sum(steps) < k:
                    steps[i] += 1
        cuts = [e + j * length // q for e, length, q in zip(edges, lengths, steps, strict=False) for j in range(q)]
        return (start, *reversed(cuts[1:]))

    def sampling_timesteps(self, num_inference_steps: int, strength: float = 1.0) -> tuple[int, ...]:
        """The timesteps of `stops`: K integers, strictly decreasing."""
        return tuple(self.timesteps[n] for n in self.stops(num_inference_steps, strength))

"""How far the student leaves the teacher's ODE, at every phase edge and at the end, from the same noise."""

from __future__ import annotations

from typing import Literal

import torch
from tqdm import tqdm

from pcm_scheduler.phases import PhaseGrid
from pcm_scheduler.sampling import sample_phased

from ..teacher import SOLVERS, Levels, Prediction

END = -1  # beside the edges' timesteps: sigma 0, where sampling ends

States = dict[int, torch.Tensor]
"""x (N, C, h, w) by timestep: at the phase edges that were visited below the top, and at `END`."""


@torch.no_grad()
def student_states(predict: Prediction, levels: Levels, noise: torch.Tensor, grid: PhaseGrid, steps: int) -> States:
    """Where K deterministic sampling steps come by.

    Args:
        predict: the student's x_0 from (x_n, n), after guidance.
        levels: of the grid's points, on the noise's device.
        noise: x at the top, (N, C, h, w).
        grid: the student's; with fewer steps than phases not every edge is visited.
        steps: K.
    """
    stops = grid.stops(steps)
    states: States = {}

    def visit(i: int, sample: torch.Tensor, x0: torch.Tensor) -> None:
        if i > 0 and stops[i] in grid.edge_indices:
            states[grid.timesteps[stops[i]]] = sample

    points = torch.tensor(stops, device=noise.device)
    states[END] = sample_phased(
        lambda sample, i: predict(sample, points[i].expand(len(sample))),
        noise,
        [*levels.alphas[points].tolist(), 1.0],
        [*levels.sigmas[points].tolist(), 0.0],
        callback=visit,
    )
    return states


@torch.no_grad()
def teacher_states(
    predict: Prediction,
    levels: Levels,
    noise: torch.Tensor,
    grid: PhaseGrid,
    solver: Literal["ddim", "euler", "heun", "dpmpp_2m"] = "heun",
) -> States:
    """The teacher's ODE solved through every point of a grid, and its x_0 at the last, tau_0.

    Args:
        predict: the teacher's x_0 from (x_n, n), after guidance.
        levels: of the grid's points, on the noise's device.
        noise: x at the top, (N, C, h, w).
        grid: fine, with the student's edges: `PhaseGrid.from_timesteps(student.edges[1:], num_solver_steps=500)`.
        solver: of one step; `heun` is of second order and runs the teacher twice.
    """
    states: States = {}
    sample = noise
    for point in tqdm(reversed(range(grid.num_solver_steps)), desc="teacher's ODE", total=grid.num_solver_steps, unit="step"):
        n = torch.full((len(noise),), point + 1, device=noise.device)
        sample = SOLVERS[solver](predict, levels, sample, n, n - 1)
        if point in grid.edge_indices:
            states[grid.timesteps[point]] = sample
    states[END] = predict(sample, torch.zeros(len(noise), dtype=torch.long, device=noise.device))
    return states


def ode_errors(student: States, teacher: States) -> dict[int, torch.Tensor]:
    """Root mean square difference of each picture, (N,) by timestep; 0 on the teacher's trajectory.

    In units of x_t, whose elements have variance about 1. The error at an edge is that of all phases gone through so far.

    Raises:
        ValueError: the teacher was not stopped at an edge where the student was.
    """
    lacking = sorted(student.keys() - teacher.keys())
    if lacking:
        raise ValueError(f"The teacher's trajectory has no state at the student's edges {lacking}, only at {sorted(teacher)}.")
    return {t: (x - teacher[t]).flatten(1).double().square().mean(1).sqrt() for t, x in student.items()}

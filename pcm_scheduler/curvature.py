"""Phase edges from the teacher's own curvature: phases that are short where its ODE bends.

In the coordinates (x / alpha, sigma / alpha) the probability-flow ODE is dx/dsigma = eps(x, sigma) (arXiv 2010.02502,
Eq. 14): its direction is eps, and it is straight where eps stays the same. One jump with a constant eps is then exact, for
the teacher as for a student; a phase is the harder to learn the more eps changes within it.

That measure is of directions, not of where they lead, and its edges lie low: for Gaussian data of spread 0.5 and Stable
Diffusion's schedule, half of the bend is below timestep 86 of 1000. The picture that a direction leads to is
x_0 = x / alpha - (sigma / alpha) eps. By the ODE its first term changes by eps d(sigma / alpha), which the second takes away
again, and what is left is

    d x_0 = -(sigma / alpha) d eps:

the same bend, weighed by how far it is from there to the end. This is the second measure; for the same Gaussian half of it is
below timestep 299.

    alphas, sigmas = alphas_and_sigmas(make_alphas_cumprod(make_betas(...)))
    curvature = measure_curvature(teacher, noise, PhaseGrid.even(1, 250), alphas, sigmas)
    grid = edges_by_curvature(curvature, num_phases=4, num_solver_steps=50)
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from .noise_schedule import widen
from .phases import PhaseGrid
from .sampling import Denoiser, jump

Measure = Literal["epsilon", "sample"]
"""Whose change is the curvature: the ODE's direction, or the x_0 that it leads to."""
MEASURES: tuple[Measure, ...] = get_args(Measure)


@torch.no_grad()
def measure_curvature(
    denoiser: Denoiser,
    sample: torch.Tensor,
    grid: PhaseGrid,
    alphas: torch.Tensor,
    sigmas: torch.Tensor,
    of: Measure = "epsilon",
) -> torch.Tensor:
    """How much the ODE's direction, or the picture it leads to, changes from each point of the grid to the point below it.

    Entry n - 1 is |eps(x_n, n) - eps(x_(n-1), n-1)|, or the same of x_0, as root mean square over a sample's coordinates,
    averaged over samples, along the trajectories of DDIM steps from one point to the next. It is the change itself, not the
    change per unit of time or of sigma: changes of consecutive points add up to how far eps has turned, which is the same
    however time is counted, and a rate would need its measure back before it could be summed. Being of eps, which has
    variance 1 in every coordinate, it compares between models and resolutions; x_0 has the data's variance. What bends
    between tau_0 and sigma = 0 is left out.

    A DDIM step leaves x_0 as it is, so that the change of x_0 is sigma / alpha at the lower point times that of eps, exactly.

    DDIM steps are first order, so a finer grid follows the ODE more closely; `edges_by_curvature` cuts a coarser one.

    Args:
        denoiser: (x_t, point n) -> x_0, after guidance, same shape; called at n = N..0, so N + 1 times.
        sample: x at the top point, shape (B, ...), usually standard normal noise.
        grid: for its points; its edges do not matter.
        alphas, sigmas: tables over all T timesteps, shape (T,), as `alphas_and_sigmas` gives them.
        of: whose change: `epsilon`, the direction, or `sample`, the predicted x_0.

    Returns:
        (N,) float64 on the CPU, entry n - 1 for point n = 1..N.

    Raises:
        ValueError: tables that are not (T,), a sigma of 0 at a point, where there is no eps, or another measure.
    """
    if of not in MEASURES:
        raise ValueError(f"Curvature is measured of {' or '.join(MEASURES)}; got {of!r}.")
    t = grid.num_train_timesteps
    if alphas.shape != (t,) or sigmas.shape != (t,):
        raise ValueError(f"alphas and sigmas must have shape ({t},); got {tuple(alphas.shape)} and {tuple(sigmas.shape)}.")
    levels = [(alphas[tau].item(), sigmas[tau].item()) for tau in grid.timesteps]
    for tau, (_, sigma) in zip(grid.timesteps, levels, strict=True):
        if sigma <= 0:
            raise ValueError(f"sigma must be positive at every point of the grid; at timestep {tau} it is {sigma}.")
    changes = torch.zeros(grid.num_solver_steps, dtype=torch.float64)
    last = None
    for n in range(grid.num_solver_steps, -1, -1):
        alpha, sigma = levels[n]
        x0 = denoiser(sample, n)
        current = x0 if of == "sample" else (sample - alpha * x0) / sigma
        if last is not None:
            changes[n] = widen(current - last).square().flatten(1).mean(1).sqrt().mean().item()
        last = current
        if n > 0:
            sample = jump(sample, x0, alpha, sigma, *levels[n - 1])
    return changes


def edges_by_curvature(
    curvature: torch.Tensor, num_phases: int, num_solver_steps: int, num_train_timesteps: int = 1000
) -> PhaseGrid:
    """Phases that bend equally: edge e_m is the last point up to which at most m/M of the whole curvature has been summed.

    Rounded down to a point, as even edges are: constant curvature gives exactly `PhaseGrid.even`, and a phase's share is
    off by less than one point's at either edge. Where more than 1/M is at one point, edges are as close to it as points
    allow, every phase keeping one at least. No curvature at all counts as constant.

    Args:
        curvature: as `measure_curvature` returns it, entry n - 1 between points n and n - 1: (N,), or (N',) measured
            on a finer grid whose N' points are a multiple of N.
        num_phases: M, in 1..N.
        num_solver_steps: N of the grid that is cut.
        num_train_timesteps: T.

    Returns:
        a grid of N points and M phases, edges strictly increasing from 0 to T - 1.

    Raises:
        ValueError: curvature of another shape, negative or not finite; M or N that `PhaseGrid.even` refuses.
    """
    even = PhaseGrid.even(num_phases, num_solver_steps, num_train_timesteps)
    if curvature.ndim != 1 or len(curvature) == 0 or len(curvature) % num_solver_steps:
        raise ValueError(
            f"curvature must have shape ({num_solver_steps},), or a multiple of that; got {tuple(curvature.shape)}."
        )
    if not (curvature.isfinite() & (curvature >= 0)).all():
        raise ValueError("curvature must be finite and not negative at every point.")
    summed = curvature.double().cpu().view(num_solver_steps, -1).sum(1).cumsum(0)  # up to points 1..N
    total = summed[-1].item()
    if total == 0:
        return even
    edges = [0]
    for m in range(1, num_phases):
        # Sums of equal numbers are not exact multiples of them: an edge may be past its share by rounding.
        below = int((summed / total <= m / num_phases + 1e-9).sum())
        edges.append(min(max(below, edges[-1] + 1), num_solver_steps - num_phases + m))
    return PhaseGrid(num_solver_steps, (*edges, num_solver_steps), num_train_timesteps)

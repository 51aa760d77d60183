"""What no adapter of an unguided teacher can do better: the model's own ODE, solved to the edge of the phase.

Guided sampling of it tells how much of a figure is the training's, and how much comes of guiding once a phase instead of
everywhere on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from pcm_scheduler.noise_schedule import Level, alphas_and_sigmas, make_output, predict_x0_and_epsilon
from pcm_scheduler.phases import PhaseGrid
from pcm_scheduler.sampling import jump
from pcm_scheduler.scheduling_pcm import PCMScheduler


def line_through(
    sample: torch.Tensor, alpha: Level, sigma: Level, other: torch.Tensor, other_alpha: Level, other_sigma: Level
) -> tuple[torch.Tensor, torch.Tensor]:
    """The (x_0, eps) of which both samples are made: x_t = alpha_t x_0 + sigma_t eps.

    Args:
        sample: x_t, shape (N, ...).
        alpha, sigma: the level of t.
        other: x_s, same shape.
        other_alpha, other_sigma: the level of s, of another ratio.
    """
    determinant = other_alpha * sigma - other_sigma * alpha
    x0 = (sigma * other - other_sigma * sample) / determinant
    return x0, (other_alpha * sample - alpha * other) / determinant


@contextmanager
def exact_jumps(unet: Any, scheduler: PCMScheduler) -> Iterator[None]:
    """While this lasts the network says what leads from x_t to where its ODE crosses the edge of t's phase.

    Every call follows the ODE by DDIM's steps through the points of the scheduler's grid, one run of the network each, with the
    text of that call: of both halves of a guided batch, each its own ODE. In the last phase it leads to the end, sigma 0.

    Args:
        unet: of diffusers; its `forward` is another until the block is left.
        scheduler: the grid, the schedule and the `prediction_type`.
    """
    grid, kind = scheduler.grid, scheduler.config.prediction_type
    alphas, sigmas = (levels[list(grid.timesteps)].tolist() for levels in alphas_and_sigmas(scheduler.alphas_cumprod))
    alphas[0], sigmas[0] = 1.0, 0.0  # where sampling ends
    run = unet.forward

    def forward(sample: torch.Tensor, timestep: Any, *args: Any, return_dict: bool = True, **told: Any) -> Any:
        point = _point(grid, timestep)
        edge, x = int(grid.target(torch.tensor(point))), sample.float()
        for n in range(point, edge, -1):
            at = torch.as_tensor(grid.timesteps[n], device=sample.device)
            output = run(x.to(sample.dtype), at, *args, return_dict=False, **told)[0]
            x0, _ = predict_x0_and_epsilon(output, x, alphas[n], sigmas[n], kind)
            x = jump(x, x0, alphas[n], sigmas[n], alphas[n - 1], sigmas[n - 1])
        ends = line_through(sample.float(), alphas[point], sigmas[point], x, alphas[edge], sigmas[edge])
        output = make_output(*ends, alphas[point], sigmas[point], kind).to(sample.dtype)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)

    before = vars(unet).get("forward")
    unet.forward = forward
    try:
        yield
    finally:
        if before is None:
            del unet.forward  # its class's again, which a copy of the network takes along
        else:
            unet.forward = before


def _point(grid: PhaseGrid, timestep: Any) -> int:
    """Of a timestep that all samples share, as pipelines give it."""
    shared = set(torch.as_tensor(timestep).flatten().tolist())
    if len(shared) > 1 or not shared <= set(grid.timesteps[1:]):
        raise ValueError(f"Exact jumps begin at one point of the grid, from {grid.timesteps[1]} up; got timesteps {shared}.")
    return grid.timesteps.index(shared.pop())

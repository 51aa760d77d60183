"""The frozen teacher: its guided prediction, and the solvers that take one step of its ODE down the solver's grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pcm_scheduler.noise_schedule import predict_x0_and_epsilon
from pcm_scheduler.phases import PhaseGrid
from pcm_scheduler.sampling import jump

from .backbones import Backbone, Conditioning
from .backbones.conditioning import joined
from .config import ObjectiveConfig
from .randomness import sent

_NO_SIGNAL = 1e-2
"""A level with less alpha is noise alone. Stable Diffusion's least is 0.068, on linear betas 0.040; a clipped 0 is 2^-12."""


@dataclass(frozen=True)
class Levels:
    """The schedule on the solver's grid tau_0..tau_N: timesteps, alphas and sigmas, (N + 1,) each, on one device.

    Samples have `dimensions`: 4 of pictures, 5 of clips.
    """

    timesteps: torch.Tensor
    alphas: torch.Tensor
    sigmas: torch.Tensor
    dimensions: int = 4

    def __call__(self, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and sigma at points n (B,), as (B, 1, ...)."""
        return self.per_sample(self.alphas[n]), self.per_sample(self.sigmas[n])

    def per_sample(self, values: torch.Tensor) -> torch.Tensor:
        """One value a sample, (B,), as (B, 1, ...), which broadcasts against samples."""
        return values.view(-1, *(1,) * (self.dimensions - 1))


def levels_of(backbone: Backbone, grid: PhaseGrid) -> Levels:
    """The model's schedule on the points of a grid, where the model is, in float32."""
    stops, device = torch.tensor(grid.timesteps), backbone.unet.device
    alphas, sigmas = backbone.alphas[stops].float(), backbone.sigmas[stops].float()
    return Levels(stops.to(device), alphas.to(device), sigmas.to(device), backbone.sample_dimensions)


def draw_guidance(config: ObjectiveConfig, batch: int, generator: torch.Generator) -> torch.Tensor:
    """g of every sample, (batch,), uniform in the configured range; on the CPU."""
    low, high = config.guidance_range
    return low + (high - low) * torch.rand(batch, generator=generator) if high > low else torch.full((batch,), low)


Prediction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""x_0, float32, in the shape of x_n, from (x_n, n)."""


def guided_prediction(
    backbone: Backbone,
    levels: Levels,
    conditioning: Conditioning,
    empty: Conditioning,
    guidance_scale: torch.Tensor,
) -> Prediction:
    """The teacher's x_0 with eps_u + g (eps_c - eps_u); both halves are one batch.

    Args:
        backbone: its adapter is switched off for the call.
        levels: of the solver's grid.
        conditioning: of the batch.
        empty: what the unguided half is told, (B, ...) each; what it does not say is taken from `conditioning`.
        guidance_scale: g, (B,), all of them 1 or none; 1 skips the unguided half.
    """
    unguided_only = bool((guidance_scale == 1).all())  # on the CPU: no synchronisation
    g = levels.per_sample(sent(guidance_scale, levels.alphas.device))
    told = conditioning if unguided_only else joined(empty, conditioning)

    @torch.no_grad()
    def predict(sample: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        timestep = levels.timesteps[n]
        with backbone.teacher():
            if unguided_only:
                output = backbone.predict(sample, timestep, told).float()
            else:
                both = backbone.predict(torch.cat([sample, sample]), timestep.repeat(2), told).float()
                unguided, guided = both.chunk(2)
                output = unguided + g * (guided - unguided)
        return predict_x0_and_epsilon(output, sample, *levels(n), backbone.prediction_type)[0]

    return predict


def ddim(predict: Prediction, levels: Levels, sample: torch.Tensor, n: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """x_m from x_n by one DDIM step (arXiv 2010.02502, Eq. 12), which is Euler's step in (x / alpha, sigma / alpha)."""
    return jump(sample, predict(sample, n), *levels(n), *levels(m))


def heun(predict: Prediction, levels: Levels, sample: torch.Tensor, n: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Heun's step in (x / alpha, sigma / alpha) (arXiv 2206.00364, Algorithm 1): the mean of eps at both ends.

    From points without signal (zero terminal SNR, also where it is clipped to a little) those coordinates are infinite, and
    the step is DDIM's.
    """
    (alpha, sigma), (next_alpha, next_sigma) = levels(n), levels(m)
    x0 = predict(sample, n)
    euler = jump(sample, x0, alpha, sigma, next_alpha, next_sigma)
    epsilon = (sample - alpha * x0) / sigma
    next_epsilon = (euler - next_alpha * predict(euler, m)) / next_sigma
    mean = (epsilon + next_epsilon) / 2
    corrected = next_alpha * (sample - sigma * mean) / alpha + next_sigma * mean
    return torch.where(alpha < _NO_SIGNAL, euler, corrected)


def dpmpp_2m(predict: Prediction, levels: Levels, sample: torch.Tensor, n: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """DPM-Solver++'s second-order multistep step (arXiv 2211.01095, Algorithm 2), the point before made by one step back.

    The solver remembers x_0 at the point above n. There is none behind a noised picture, so it is read at
    x_(n+1) = alpha x_0 + sigma eps, with the x_0 and eps that the teacher sees at n. At the top there is no such point and
    the step is DDIM's.
    """
    (alpha, sigma), (next_alpha, next_sigma) = levels(n), levels(m)
    above = (2 * n - m).clamp(max=len(levels.timesteps) - 1)
    above_alpha, above_sigma = levels(above)
    x0 = predict(sample, n)
    before = predict(jump(sample, x0, alpha, sigma, above_alpha, above_sigma), above)
    h = (next_alpha / next_sigma).log() - (alpha / sigma).log()
    h_before = (alpha / sigma).log() - (above_alpha / above_sigma).log()
    slope = torch.where(h_before > 0, h / (2 * h_before.clamp(min=1e-12)), torch.zeros_like(h))
    corrected = x0 + slope * (x0 - before)
    return next_sigma / sigma * sample - next_alpha * torch.expm1(-h) * corrected


Solver = Callable[[Prediction, Levels, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SOLVERS: dict[str, Solver] = {"ddim": ddim, "euler": ddim, "heun": heun, "dpmpp_2m": dpmpp_2m}


def followed(solver: Solver, predict: Prediction, levels: Levels, noise: torch.Tensor) -> list[torch.Tensor]:
    """The teacher's trajectory from pure noise, x_0 to x_N, one solver step between neighbours.

    Args:
        solver: of the ODE.
        predict: the teacher.
        levels: of the grid's N + 1 points.
        noise: x_N, (B, 4, h, w), float32, as samplers begin with it: no picture shows through, whatever alpha_N is.

    Returns:
        N + 1 samples, (B, 4, h, w) each, where the model is.
    """
    sample, points = noise, [noise]
    for n in range(len(levels.timesteps) - 1, 0, -1):
        at = torch.full((len(noise),), n, device=noise.device)
        sample = solver(predict, levels, sample, at, at - 1).float()
        points.append(sample)
    return points[::-1]

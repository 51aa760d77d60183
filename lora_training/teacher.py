"""The frozen teacher's ODE solver: one guided step down the solver's grid."""

from __future__ import annotations

import torch

from pcm_scheduler.noise_schedule import Level, predict_x0_and_epsilon
from pcm_scheduler.sampling import jump

from .backbones import StableDiffusion15


@torch.no_grad()
def ddim_step(
    backbone: StableDiffusion15,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    prompt_embeds: torch.Tensor,
    empty_embeds: torch.Tensor,
    guidance_scale: float,
    levels: tuple[Level, Level, Level, Level],
) -> torch.Tensor:
    """x_(n-1) from x_n by one DDIM step of the teacher (arXiv 2010.02502, Eq. 12).

    Args:
        backbone: its adapter is switched off for the call.
        sample: x_n, (B, 4, h, w) float32.
        timestep: tau_n, (B,).
        prompt_embeds, empty_embeds: conditions of the guided and the unguided half, (B, tokens, width) each.
        guidance_scale: g in eps_u + g (eps_c - eps_u); 1 skips the unguided half.
        levels: alpha_n, sigma_n, alpha_(n-1), sigma_(n-1), each (B, 1, 1, 1).

    Returns:
        x_(n-1), float32.
    """
    alpha, sigma, next_alpha, next_sigma = levels
    with backbone.teacher():
        if guidance_scale == 1:
            output = backbone.predict(sample, timestep, prompt_embeds).float()
        else:
            both = backbone.predict(sample.repeat(2, 1, 1, 1), timestep.repeat(2), torch.cat([empty_embeds, prompt_embeds]))
            unguided, guided = both.float().chunk(2)
            output = unguided + guidance_scale * (guided - unguided)
    x0, _ = predict_x0_and_epsilon(output, sample, alpha, sigma, backbone.prediction_type)
    return jump(sample, x0, alpha, sigma, next_alpha, next_sigma)

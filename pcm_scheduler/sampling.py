"""Multistep phased sampling over any denoiser, in any coordinates.

Variance-preserving hosts pass alpha = sqrt(alphas_cumprod), sigma = sqrt(1 - alphas_cumprod); variance-exploding ones
(k-diffusion, ComfyUI) pass alpha = 1 and sigma / alpha. The same picture comes out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from .noise_schedule import Level

Denoiser = Callable[[torch.Tensor, int], torch.Tensor]
"""(x_t, step number) -> x_0 as the network, after guidance, sees it; same shape."""

NoiseSampler = Callable[[float, float], torch.Tensor]
"""(sigma, next sigma) -> standard normal noise of the sample's shape; k-diffusion's signature."""

StepCallback = Callable[[int, torch.Tensor, torch.Tensor], None]
"""(step number, x_t, x_0), called after the network and before the jump."""


def check_eta(eta: float) -> None:
    """Raise ValueError unless eta is in [0, 1]."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1] (0 is deterministic, 1 draws all noise anew); got {eta}.")


def noise_fractions(eta: float) -> tuple[float, float]:
    """(kept, fresh) = (sqrt(r), sqrt(1 - r)) with sqrt(r) = 1 - eta: how much of eps stays and how much is drawn anew."""
    kept = 1 - eta
    return kept, math.sqrt(1 - kept * kept)


def jump(
    sample: torch.Tensor,
    x0: torch.Tensor,
    alpha: Level,
    sigma: Level,
    next_alpha: Level,
    next_sigma: Level,
    eta: float = 0.0,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """x_s = alpha_s x_0 + sigma_s (sqrt(r) eps + sqrt(1-r) z), with eps = (x_t - alpha_t x_0) / sigma_t.

    DDIM's step (arXiv 2010.02502, Eq. 12) for eta = 0; PCM (arXiv 2405.18407), Eq. 44 for eta > 0.

    Args:
        sample: x_t, shape (N, ...).
        x0: predicted x_0, same shape.
        alpha, sigma: the level of t; sigma > 0.
        next_alpha, next_sigma: the level of s; numbers, or tensors that broadcast.
        eta: in [0, 1].
        noise: z, same shape; needed when eta > 0, unless s is the end.

    Raises:
        ValueError: eta out of range, or above 0 without noise.
    """
    check_eta(eta)
    if eta > 0 and noise is None and torch.as_tensor(next_sigma).any():
        raise ValueError(f"eta is {eta:g}, so a part of the noise is drawn anew: pass it as noise.")
    kept, fresh = noise_fractions(eta)
    eps = (sample - alpha * x0) / sigma
    jumped = next_alpha * x0 + (next_sigma * kept) * eps
    return jumped if noise is None or eta == 0 else jumped + (next_sigma * fresh) * noise


def warn_if_not_finite(sample: torch.Tensor, steps: int, stacklevel: int = 3) -> None:
    """Say which samples have become NaN or infinite; hosts show those as black pictures, and say little or nothing.

    For the end of sampling, not for every step: a GPU's answer has to be waited for. While a CUDA graph is captured, where
    that is not allowed, nothing is said.

    Args:
        sample: (N, ...).
        steps: that led to it.
        stacklevel: of the warning.
    """
    if sample.is_meta or (sample.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if not sample.isfinite().all():
        bad = [i for i, one in enumerate(sample) if not one.isfinite().all()]
        warnings.warn(
            f"After {steps} step{'s' * (steps > 1)} {len(bad)} of {len(sample)} samples are not finite (in the batch: "
            f"{', '.join(map(str, bad))}): their pictures are black or mean nothing. If the network runs in float16, run it in "
            "bfloat16 or float32, or lower the guidance; else its weights or the adapter's are broken.",
            stacklevel=stacklevel,
        )


def sample_phased(
    denoiser: Denoiser,
    sample: torch.Tensor,
    alphas: Sequence[float],
    sigmas: Sequence[float],
    eta: float = 0.0,
    noise_sampler: NoiseSampler | None = None,
    callback: StepCallback | None = None,
) -> torch.Tensor:
    """K steps from the first level to the last.

    Args:
        denoiser: returns x_0 for (x_t, step number).
        sample: x at the first level, shape (N, ...).
        alphas, sigmas: K + 1 levels, sigma strictly decreasing; the last is where sampling ends, usually (1, 0).
            With `PhaseGrid.stops` they keep to the edges that the network was trained on.
        eta: in [0, 1]; 0 is deterministic, 1 re-noises x_0 as multistep consistency sampling does (arXiv 2303.01469, Alg. 1).
        noise_sampler: draws z; needed when eta > 0.
        callback: for previews and progress.

    Returns:
        x at the last level.

    Raises:
        ValueError: levels that do not match or do not decrease, eta out of range, eta > 0 without a noise_sampler.
    """
    check_eta(eta)
    if len(alphas) != len(sigmas) or len(sigmas) < 2:
        raise ValueError(f"alphas and sigmas must be equally many, at least two; got {len(alphas)} and {len(sigmas)}.")
    if any(b >= a for a, b in pairwise(sigmas)):
        raise ValueError(f"sigmas must decrease strictly; got {[round(float(s), 4) for s in sigmas]}.")
    if eta > 0 and noise_sampler is None:
        raise ValueError("eta > 0 draws fresh noise at every step: pass a noise_sampler.")
    for i in range(len(sigmas) - 1):
        x0 = denoiser(sample, i)
        if callback is not None:
            callback(i, sample, x0)
        noise = noise_sampler(sigmas[i], sigmas[i + 1]) if noise_sampler and eta > 0 and sigmas[i + 1] > 0 else None
        sample = jump(sample, x0, alphas[i], sigmas[i], alphas[i + 1], sigmas[i + 1], eta, noise)
    warn_if_not_finite(sample, len(sigmas) - 1)
    return sample

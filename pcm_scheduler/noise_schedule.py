"""Noise schedules, and the four ways a network can state its prediction.

Everywhere `x_t = alpha_t x_0 + sigma_t eps`. Variance-preserving: `alpha^2 + sigma^2 = 1`. Flow: `alpha + sigma = 1`.
Variance-exploding coordinates (k-diffusion, ComfyUI) are `x_t / alpha_t`, that is alpha = 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .checks import finite_number, shortened

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

_LARGEST_BETA = 1e30  # above 1 other schedulers let pass, and so do these, with a warning; float32 ends at 3e38

Level = float | torch.Tensor
"""An alpha or a sigma: a number, or a tensor that broadcasts against the samples."""


def make_betas(beta_schedule: str, beta_start: float, beta_end: float, num_train_timesteps: int) -> torch.Tensor:
    """The variances added at each training timestep.

    Args:
        beta_schedule: `linear`, `scaled_linear` (linear in sqrt(beta); Stable Diffusion) or `squaredcos_cap_v2`
            (Nichol and Dhariwal 2021, Eq. 17).
        beta_start, beta_end: first and last beta, from 0; unused by `squaredcos_cap_v2`.
        num_train_timesteps: T.

    Returns:
        betas of shape (T,), float32, computed as diffusers does so that the tables agree bit for bit.

    Raises:
        ValueError: unknown schedule, or a beta that is none.
    """
    check_beta_schedule(beta_schedule)
    beta_start = finite_number(beta_start, "beta_start", 0, _LARGEST_BETA)
    beta_end = finite_number(beta_end, "beta_end", 0, _LARGEST_BETA)
    if beta_schedule == "linear":
        return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float32)
    if beta_schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32) ** 2

    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    ratios = (alpha_bar((i + 1) / num_train_timesteps) / alpha_bar(i / num_train_timesteps) for i in range(num_train_timesteps))
    return torch.tensor([min(1 - ratio, 0.999) for ratio in ratios], dtype=torch.float32)


def check_beta_schedule(beta_schedule: str) -> None:
    """Raise ValueError unless the schedule is one of `BETA_SCHEDULES`."""
    if beta_schedule not in BETA_SCHEDULES:
        raise ValueError(f"Unknown beta_schedule {shortened(beta_schedule)}; choose one of {', '.join(BETA_SCHEDULES)}.")


def rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Shift and scale sqrt(alphas_cumprod) so that the last one is zero and the first is kept (arXiv 2305.08891, Alg. 1).

    Args:
        betas: shape (T,).

    Returns:
        betas of shape (T,); the last is 1.
    """
    roots = (1 - betas).cumprod(0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    alphas_cumprod = ((roots - last) * first / (first - last)) ** 2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas


def make_alphas_cumprod(betas: torch.Tensor | Sequence[float]) -> torch.Tensor:
    """`prod(1 - beta)` up to each timestep.

    Args:
        betas: T values in [0, 1]; larger ones warn, as other schedulers let them pass.

    Returns:
        shape (T,), float32.

    Raises:
        ValueError: they are no list of numbers, or one is negative or not finite.
    """
    try:
        betas = torch.as_tensor(betas, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"Betas must be a list of numbers; got {shortened(betas)}: {error}") from error
    if betas.ndim != 1 or not len(betas):
        raise ValueError(f"Betas must be a list of at least one number; got the shape {tuple(betas.shape)}.")
    bad = ~((betas >= 0) & betas.isfinite())  # also true for NaN
    outside = bad if bad.any() else betas > 1
    if outside.any():
        index = int(outside.nonzero()[0])
        message = f"Betas are variances in [0, 1]; number {index} of {len(betas)} is {betas[index].item()}."
        if bad.any():
            raise ValueError(message)
        warnings.warn(f"{message} Timesteps from there on have no noise level.", stacklevel=2)
    return (1 - betas).cumprod(0)


def alphas_and_sigmas(alphas_cumprod: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Variance-preserving alpha = sqrt(alphas_cumprod) and sigma = sqrt(1 - alphas_cumprod), shape (T,), float64."""
    table = alphas_cumprod.double()
    return table.sqrt(), (1 - table).sqrt()


class PredictionCoefficients(NamedTuple):
    """x_0 = `x0_from_sample` x_t + `x0_from_output` F,  eps = `eps_from_sample` x_t + `eps_from_output` F."""

    x0_from_sample: Level
    x0_from_output: Level
    eps_from_sample: Level
    eps_from_output: Level


def check_prediction_type(prediction_type: str) -> None:
    """Raise ValueError unless the type is one of `PREDICTION_TYPES`."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"Unknown prediction_type {shortened(prediction_type)}; choose one of {', '.join(PREDICTION_TYPES)}.")


def prediction_coefficients(prediction_type: str, alpha: Level, sigma: Level) -> PredictionCoefficients:
    """How x_0 and eps follow from the sample x_t and the network's output F. Both are linear in both.

    | type | F is |
    |---|---|
    | epsilon | eps |
    | sample | x_0 |
    | v_prediction | alpha eps - sigma x_0 (arXiv 2202.00512) |
    | flow | eps - x_0 |

    Args:
        prediction_type: one of `PREDICTION_TYPES`.
        alpha, sigma: any pair, not only variance-preserving ones. `epsilon` needs alpha > 0, `sample` needs sigma > 0.

    Raises:
        ValueError: unknown prediction type.
    """
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return PredictionCoefficients(1 / alpha, -sigma / alpha, 0.0, 1.0)
    if prediction_type == "sample":
        return PredictionCoefficients(0.0, 1.0, 1 / sigma, -alpha / sigma)
    if prediction_type == "v_prediction":
        norm = alpha * alpha + sigma * sigma
        return PredictionCoefficients(alpha / norm, -sigma / norm, sigma / norm, alpha / norm)
    norm = alpha + sigma
    return PredictionCoefficients(1 / norm, -sigma / norm, 1 / norm, alpha / norm)


def widen(x: torch.Tensor) -> torch.Tensor:
    """float32 for anything narrower; float32 and float64 as they are."""
    return x if x.dtype == torch.float64 else x.float()


def predict_x0_and_epsilon(
    output: torch.Tensor, sample: torch.Tensor, alpha: Level, sigma: Level, prediction_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read x_0 and eps out of a network's output; differentiable.

    Args:
        output: the network's F, shape (N, ...), any floating dtype.
        sample: x_t, same shape.
        alpha, sigma: the noise level; tensors must broadcast, e.g. (N, 1, 1, 1).
        prediction_type: one of `PREDICTION_TYPES`.

    Returns:
        (x_0, eps), computed and returned in float32, or float64 if that came in.
    """
    c = prediction_coefficients(prediction_type, alpha, sigma)
    output, sample = widen(output), widen(sample)
    return (
        c.x0_from_sample * sample + c.x0_from_output * output,
        c.eps_from_sample * sample + c.eps_from_output * output,
    )


def make_output(x0: torch.Tensor, eps: torch.Tensor, alpha: Level, sigma: Level, prediction_type: str) -> torch.Tensor:
    """The inverse of `predict_x0_and_epsilon`: what a network of this type would have said. Same shapes and dtypes.

    Raises:
        ValueError: unknown prediction type.
    """
    check_prediction_type(prediction_type)
    x0, eps = widen(x0), widen(eps)
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x0
    if prediction_type == "v_prediction":
        return alpha * eps - sigma * x0
    return eps - x0


def convert_output(
    output: torch.Tensor, sample: torch.Tensor, alpha: Level, sigma: Level, source: str, target: str
) -> torch.Tensor:
    """Restate a prediction of type `source` as one of type `target`; shapes and dtypes as in `predict_x0_and_epsilon`."""
    return make_output(*predict_x0_and_epsilon(output, sample, alpha, sigma, source), alpha, sigma, target)

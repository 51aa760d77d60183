"""Zero-shot editing: phased sampling with a projection in it, so that what was measured stays true of the result.

Consistency Models' Algorithm 4 (arXiv 2303.01469) generalised: any denoiser, any codec (a VAE, or none), any linear
measurement, any phase grid. The last operation is a projection of pixels, so the measurement holds in the output.

Where in sampling the measurement acts is a choice, for with M > 1 phases the x_0 of an early phase is not the ODE's end:

* `projected` steps decode x_0, move it to the measurement, encode it again, and jump from there;
* `Known` latents are put back between steps, at the level of the step, where the measurement is a region of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .operators import Operator
from .phases import PhaseGrid
from .sampling import Denoiser, NoiseSampler, check_eta, jump, warn_if_not_finite

StepEnd = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None]
"""(step number, the new sample, x_0), called after each step but the last; a sample that it returns replaces the new one."""


@dataclass(frozen=True)
class Codec:
    """Pictures (N, 3, H, W) in [-1, 1] to what the denoiser works on, and back.

    Attributes:
        encode: pictures to latents.
        decode: latents to pictures, which may leave [-1, 1] a little.
        scale: pixels behind a latent along each side, counted from the upper left corner.
    """

    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]
    scale: int


PIXELS = Codec(lambda picture: picture, lambda picture: picture, 1)
"""Of models that work on pixels."""


@dataclass(frozen=True)
class Known:
    """Latents that are known where the measurement keeps a region.

    Attributes:
        latents: of the given picture, (N, C, h, w).
        noise: that brings them to a level; the initial noise of the sample, for a path without fresh noise.
        mask: 1 where every pixel behind a latent is kept, (N, 1, h, w).
    """

    latents: torch.Tensor
    noise: torch.Tensor
    mask: torch.Tensor

    def put_back(self, sample: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        """The sample at this level with its known part replaced."""
        return torch.where(self.mask > 0, alpha * self.latents + sigma * self.noise, sample)


def latent_mask(kept: torch.Tensor, scale: int) -> torch.Tensor:
    """1 where every pixel behind a latent is kept.

    Args:
        kept: (N, 1, H, W), 1 for kept pixels.
        scale: of the codec; the last latents of a row or column may have fewer pixels behind them.

    Returns:
        (N, 1, h, w) float32.
    """
    return 1 - F.max_pool2d(1 - kept.float(), scale, ceil_mode=True)


def last_phase_steps(grid: PhaseGrid, stops: Sequence[int]) -> list[bool]:
    """Which steps start in the last phase, where x_0 is the ODE's end.

    Args:
        grid: that the adapter was trained on.
        stops: point numbers, one for each step.
    """
    return [stop <= grid.edge_indices[1] for stop in stops]


def measured(picture: torch.Tensor, operator: Operator, measurement: torch.Tensor, weight: float | None = None) -> torch.Tensor:
    """The picture with the measurement made true: without a seam first, then exactly.

    Args:
        picture: (N, 3, H, W).
        operator, measurement: what must hold.
        weight: how far a noisy measurement is trusted against the picture; None: it is exact.
    """
    if weight is not None:
        return operator.proximal(picture, measurement, weight)
    return operator.project(operator.approach(picture, measurement), measurement)


def sample_edit(
    denoiser: Denoiser,
    operator: Operator,
    measurement: torch.Tensor,
    sample: torch.Tensor,
    alphas: Sequence[float],
    sigmas: Sequence[float],
    codec: Codec = PIXELS,
    projected: Sequence[bool] | None = None,
    known: Known | None = None,
    eta: float = 0.0,
    noise_sampler: NoiseSampler | None = None,
    measurement_noise: float = 0.0,
    picture_spread: float = 0.3,
    callback: StepEnd | None = None,
) -> torch.Tensor:
    """K steps from the first level to a picture of which the measurement holds.

    Args:
        denoiser: returns x_0 for (x_t, step number).
        operator, measurement: what must hold of the picture.
        sample: x at the first level, (N, C, h, w).
        alphas, sigmas: K + 1 levels, as for `sample_phased`; the last is (1, 0).
        codec: between pictures and what the denoiser works on.
        projected: for each step, whether its x_0 goes through pixels and the projection; None: every step. The last one's
            always does, at the end.
        known: latents to put back between steps.
        eta: in [0, 1]; 1 draws all noise anew, as Algorithm 4 does.
        noise_sampler: draws z; needed when eta > 0.
        measurement_noise: standard deviation of the noise in the measurement, in units of [-1, 1]; 0: it is exact. Otherwise
            a step weighs picture against measurement by their variances.
        picture_spread: for that weighing: x_0 is uncertain by spread * sigma_t, in units of [-1, 1], where sigma_t is the
            variance-preserving one.
        callback: for previews and progress.

    Returns:
        pictures (N, 3, H, W) in [-1, 1].

    Raises:
        ValueError: eta out of range, eta > 0 without a noise_sampler.
    """
    check_eta(eta)
    if eta > 0 and noise_sampler is None:
        raise ValueError("eta > 0 draws fresh noise at every step: pass a noise_sampler.")
    steps = len(sigmas) - 1
    projected = [True] * steps if projected is None else projected
    if known is not None:
        sample = known.put_back(sample, alphas[0], sigmas[0])
    picture = sample
    for i in range(steps):
        x0 = denoiser(sample, i)
        share = sigmas[i] / math.hypot(alphas[i], sigmas[i])  # of noise in x_t, the same in every host's coordinates
        weight = (picture_spread * share / measurement_noise) ** 2 if measurement_noise else None
        last = i + 1 == steps
        if last or projected[i]:
            warn_if_not_finite(x0, i + 1)  # a projection may hide it: it makes numbers of NaN
            picture = measured(codec.decode(x0), operator, measurement, weight)
        if last:
            break
        if projected[i]:
            x0 = codec.encode(picture)
        noise = noise_sampler(sigmas[i], sigmas[i + 1]) if noise_sampler and eta > 0 else None
        sample = jump(sample, x0, alphas[i], sigmas[i], alphas[i + 1], sigmas[i + 1], eta, noise)
        if known is not None:
            sample = known.put_back(sample, alphas[i + 1], sigmas[i + 1])
        if callback is not None:
            replaced = callback(i, sample, x0)
            sample = sample if replaced is None else replaced
    return picture


def invert(denoiser: Denoiser, sample: torch.Tensor, alphas: Sequence[float], sigmas: Sequence[float]) -> torch.Tensor:
    """Up the teacher's ODE: from x near sigma 0 to the noise from which its solver comes back (arXiv 2105.05233, appendix F).

    A phase's jump is trained downwards only, and its upward step does not invert it: pass the unguided teacher and its
    fine grid.

    Args:
        denoiser: the teacher's x_0 for (x_t, number of the level).
        sample: x at the first level.
        alphas, sigmas: levels with sigma strictly increasing, all of them above 0.

    Returns:
        x at the last level.
    """
    for i in range(len(sigmas) - 1):
        sample = jump(sample, denoiser(sample, i), alphas[i], sigmas[i], alphas[i + 1], sigmas[i + 1])
    return sample


def slerp(first: torch.Tensor, second: torch.Tensor, share: float) -> torch.Tensor:
    """Between two noises along the sphere, sample by sample, so that the mixture has the length of noise.

    Args:
        first, second: (N, ...).
        share: 0 is the first, 1 the second.
    """
    a, b = first.flatten(1), second.flatten(1)
    cosine = F.cosine_similarity(a, b, dim=1).clamp(-1, 1)
    angle = torch.arccos(cosine).view(-1, *(1,) * (first.ndim - 1))
    across = torch.sin(angle)
    curved = (torch.sin((1 - share) * angle) * first + torch.sin(share * angle) * second) / across.clamp(min=1e-12)
    return torch.where(across < 1e-4, (1 - share) * first + share * second, curved)


def nearby_noise(noise: torch.Tensor, fresh: torch.Tensor, amount: float) -> torch.Tensor:
    """Noise at an angle of `amount` quarter turns: 0 is the same, 1 has nothing in common with it."""
    angle = amount * math.pi / 2
    return math.cos(angle) * noise + math.sin(angle) * fresh


def estimate_noise(picture: torch.Tensor) -> torch.Tensor:
    """Standard deviation of white noise in pictures (N, C, H, W), (N,), in their units.

    From the median of the finest diagonal Haar coefficients, which edges hardly reach (Donoho and Johnstone, 1994).

    Raises:
        ValueError: a picture too small to have such.
    """
    x = picture.float()
    height, width = x.shape[-2] // 2 * 2, x.shape[-1] // 2 * 2
    if not (height and width):
        raise ValueError(f"Noise is estimated from pictures of at least 2 x 2 pixels; got {x.shape[-2]} x {x.shape[-1]}.")
    x = x[..., :height, :width]
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    diagonal = ((a - b - c + d) / 2).flatten(1)
    return diagonal.abs().sort(dim=1).values[:, (diagonal.shape[1] - 1) // 2] / 0.6744897501960817

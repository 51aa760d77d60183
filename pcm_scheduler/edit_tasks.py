"""The editing tasks, the same in every host: what is measured, what sampling starts from, and where the measurement acts.

A host brings pictures, a denoiser and a codec; `draw` does the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from .editing import Codec, Known, StepEnd, estimate_noise, last_phase_steps, latent_mask, sample_edit
from .operators import BlockMean, Downsample, Everything, Free, KeepRegion, Luminance, Operator
from .phases import PhaseGrid
from .sampling import Denoiser, NoiseSampler

BLACK = 0.02  # of a mask: five grey levels, which JPEG makes of black
PROJECTED = ("all", "last phase", "end")
KERNELS = ("mean", "antialias")


@dataclass(frozen=True)
class Strategy:
    """Where in sampling a measurement acts.

    Attributes:
        projected: which steps send x_0 through pixels and the projection: `all`, those of the `last phase`, or only the
            `end`.
        known: put known latents back between steps, where the measurement keeps a region.
        strength: how far up the schedule sampling starts from the measured picture; 1 is pure noise.
        eta: how much of the noise is drawn anew between steps; None: as the adapter recommends.
    """

    projected: str = "all"
    known: bool = False
    strength: float = 1.0
    eta: float | None = None

    def __post_init__(self) -> None:
        if self.projected not in PROJECTED:
            raise ValueError(f"Strategy.projected is one of {', '.join(PROJECTED)}; got {self.projected!r}.")


EVERY_STEP = Strategy()  # from pure noise, for what is no named task

# Measured on the shapes model: docs/editing.md has the figures and `benchmarks/editing.py` writes them.
STRATEGIES = {
    "inpaint": Strategy("all", strength=0.8, eta=1.0),
    "colorize": Strategy("all", strength=0.6, eta=1.0),
    "super_resolve": Strategy("all", strength=0.6, eta=1.0),
    "stroke": Strategy("end", strength=0.6),
    "denoise": Strategy("end"),  # its strength is that of the noise
}


@dataclass(frozen=True)
class Edit:
    """One task on given pictures.

    Attributes:
        operator, measurement: what must hold of the result.
        size: (height, width) of the result.
        start: pictures (N, 3, H, W) in [-1, 1] to start from at `strategy.strength`, and whose kept latents are put back.
        strategy: where in sampling the measurement acts.
        measurement_noise: standard deviation of the noise in the measurement, in units of [-1, 1]; 0: it is exact.
    """

    operator: Operator
    measurement: Any
    size: tuple[int, int]
    start: torch.Tensor | None = None
    strategy: Strategy = EVERY_STEP
    measurement_noise: float = 0.0

    @property
    def strength(self) -> float:
        """Where sampling starts; without pictures to start from it is pure noise."""
        return self.strategy.strength if self.start is not None else 1.0


def draw(
    edit: Edit,
    denoiser: Denoiser,
    codec: Codec,
    grid: PhaseGrid,
    points: Sequence[int],
    alphas: Sequence[float],
    sigmas: Sequence[float],
    noise: torch.Tensor,
    eta: float = 0.0,
    noise_sampler: NoiseSampler | None = None,
    callback: StepEnd | None = None,
) -> torch.Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] of which the measurement holds.

    Args:
        edit: the task; its measurement is of N pictures.
        denoiser: returns x_0 for (x_t, step number).
        codec: between pictures and what the denoiser works on.
        grid: that the adapter was trained on.
        points: from which the K steps start: `grid.stops(K, edit.strength)`.
        alphas, sigmas: of the points, and (1, 0) after them.
        noise: of unit variance, (N, C, h, w).
        eta, noise_sampler, callback: of `sample_edit`.
    """
    strategy = edit.strategy
    # Pure noise has the variance alpha^2 + sigma^2 of any x_t, in every host's coordinates.
    sample, known = (alphas[0] ** 2 + sigmas[0] ** 2) ** 0.5 * noise, None
    if edit.start is not None and (edit.strength < 1 or strategy.known):
        first = codec.encode(edit.start).expand(len(noise), *noise.shape[1:])
        if edit.strength < 1:
            sample = alphas[0] * first + sigmas[0] * noise
        if strategy.known and isinstance(edit.operator, KeepRegion):
            known = Known(first, noise, latent_mask(edit.operator.mask.to(noise.device), codec.scale))
    projected = {
        "all": [True] * len(points),
        "last phase": last_phase_steps(grid, points),
        "end": [False] * len(points),
    }[strategy.projected]
    return sample_edit(
        denoiser, edit.operator, edit.measurement, sample, alphas, sigmas, codec, projected, known, eta, noise_sampler,
        edit.measurement_noise, callback=callback,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the tasks
# Pictures are (N, 3, H, W) in [-1, 1], masks (1|N, 1, H, W) in [0, 1], 1 where the picture is drawn anew.


def inpainting(pictures: torch.Tensor, mask: torch.Tensor) -> Edit:
    """Draw the white part of the mask anew; the black part is kept, pixel for pixel, and grey shows so much of the new.

    Of several pictures those whose mask is black come back as they were.

    Raises:
        ValueError: masks that leave nothing to draw in any picture, or one that leaves nothing to keep.
    """
    if mask.max() < BLACK:
        which = f"All {len(mask)} masks are" if len(mask) > 1 else "The mask is"
        raise ValueError(f"{which} black everywhere, so there is nothing to draw. White is drawn anew.")
    for i, one in enumerate(mask):
        if one.min() >= BLACK:
            which = f"Mask {i}" if len(mask) > 1 else "The mask"
            raise ValueError(f"{which} is black nowhere, so there is nothing to keep. Draw without a mask, or from strokes.")
    operator = KeepRegion(mask < BLACK, blend=mask)
    return Edit(operator, pictures, size_of(pictures), _filled(pictures, mask < 0.5), STRATEGIES["inpaint"])


def outpainting(pictures: torch.Tensor, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0) -> Edit:
    """Continue the picture past its edges, by so many pixels; the picture itself is kept, pixel for pixel.

    Raises:
        ValueError: margins below 0, or all of them 0.
    """
    margins = {"left": left, "top": top, "right": right, "bottom": bottom}
    if min(margins.values()) < 0 or not any(margins.values()):
        raise ValueError(f"Margins are 0 or more pixels, at least one of them more; got {margins}.")
    frame = (left, right, top, bottom)
    operator = KeepRegion(F.pad(torch.ones_like(pictures[:1, :1]), frame) > 0)
    wide = F.pad(pictures, frame)
    start = _filled(wide, operator.mask)
    return Edit(operator, operator.measure(wide), size_of(wide), start, STRATEGIES["inpaint"])


def colorization(pictures: torch.Tensor, mask: torch.Tensor | None = None) -> Edit:
    """Colour greyscale pictures, or the luminance (0.299 R + 0.587 G + 0.114 B) of coloured ones, which is kept.

    Where the mask is white, colour and luminance are drawn anew.

    Raises:
        ValueError: a mask that leaves nothing to keep.
    """
    if mask is not None and any(bool(one.min() >= 0.5) for one in mask):
        raise ValueError("The mask is white everywhere, so no luminance is kept. Draw without a mask, or from strokes.")
    operator = Luminance(None if mask is None else mask < 0.5)
    y = operator.measure(pictures)
    return Edit(operator, y, size_of(pictures), y.expand(-1, 3, -1, -1), STRATEGIES["colorize"])


def super_resolution(small: torch.Tensor, factor: int = 4, kernel: str = "mean") -> Edit:
    """Enlarge pictures; shrunk again, the result is the picture.

    Args:
        small: the pictures.
        factor: of enlargement along each side.
        kernel: how they were made small: `mean` of factor x factor pixels, or `antialias`, a wider kernel.

    Raises:
        ValueError: factor or kernel out of range.
    """
    if factor < 2 or int(factor) != factor:
        raise ValueError(f"factor is a whole number from 2; got {factor}.")
    factor = int(factor)
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {' or '.join(KERNELS)}; got {kernel!r}.")
    size = (small.shape[-2] * factor, small.shape[-1] * factor)
    operator = BlockMean(factor) if kernel == "mean" else Downsample(size, size_of(small))
    start = F.interpolate(small, size, mode="bicubic", antialias=False).clamp(-1, 1)
    return Edit(operator, small, size, operator.project(start, small), STRATEGIES["super_resolve"])


def stroke_guided(pictures: torch.Tensor) -> Edit:
    """From a sketch of coloured strokes, or a photograph, to a picture (SDEdit, arXiv 2108.01073)."""
    operator = Free()
    return Edit(operator, operator.measure(pictures), size_of(pictures), pictures, STRATEGIES["stroke"])


def denoising(pictures: torch.Tensor, noise_level: float | None, grid: PhaseGrid, ratios: Sequence[float]) -> Edit:
    """Take white noise out of pictures: sampling starts from them, at the noise's own level.

    Little noise leaves room for few steps: `grid.start_point(edit.strength)`.

    Args:
        pictures: the noisy ones.
        noise_level: standard deviation in grey levels of 0 to 255; None: estimated from the pictures.
        grid: that the adapter was trained on.
        ratios: sigma / alpha of the grid's points 1..N.

    Raises:
        ValueError: a level outside the schedule, or no noise found.
    """
    sigma = estimate_noise(pictures).mean().item() if noise_level is None else noise_level / 127.5
    if not 0 < sigma <= 2:
        raise ValueError(
            f"noise_level is above 0 and at most 255 grey levels; got {sigma * 127.5:g}"
            f"{' by estimation: there is no noise to take out' if noise_level is None else ''}."
        )
    point = 1 + sum(ratio < sigma for ratio in ratios)
    if point > grid.num_solver_steps:
        raise ValueError(f"A noise_level of {sigma * 127.5:g} grey levels is above the schedule's highest.")
    strategy = replace(STRATEGIES["denoise"], strength=point / grid.num_solver_steps)
    return Edit(Everything(), pictures, size_of(pictures), pictures, strategy, measurement_noise=sigma)


def free(count: int, size: tuple[int, int]) -> Edit:
    """Pictures of which nothing is known: plain sampling, in latents to its end."""
    return Edit(Free(), torch.zeros(count, 0), size, strategy=Strategy("end"))


def size_of(pictures: torch.Tensor) -> tuple[int, int]:
    """(height, width)."""
    return pictures.shape[-2], pictures.shape[-1]


def _filled(pictures: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The pictures with the mean of their kept pixels elsewhere: a start that leans to no side."""
    mean = (pictures * kept).sum(dim=(2, 3), keepdim=True) / kept.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    return torch.where(kept, pictures, mean)

"""What guidance and negative prompts do to the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from .alignment import Scorer


class Generate(Protocol):
    """The pictures of a method, or its clips, always from the same noise for the same prompts."""

    def __call__(self, prompts: Sequence[str], negative_prompts: Sequence[str], guidance_scale: float) -> torch.Tensor:
        """(N, 3, H, W), or (N, F, 3, H, W), in [-1, 1] of N prompts and N negative ones, empty for none; g is diffusers'."""


class GuidanceResponse(NamedTuple):
    """At one guidance scale: the mean score, and the mean saturation in 0..1."""

    guidance_scale: float
    alignment: float
    saturation: float


class NegativeResponse(NamedTuple):
    """The share of pictures, 0..1, in which the thing appears: with no negative prompt, and with one that names it."""

    without: float
    with_negative: float


def saturation(pictures: torch.Tensor) -> torch.Tensor:
    """Mean saturation of hue, saturation, value: (max - min) / max over the channels, 0 for black.

    What strong guidance raises (arXiv 2410.02416).

    Args:
        pictures: (N, 3, H, W), or clips (N, F, 3, H, W), in [-1, 1]; values outside are clamped.

    Returns:
        (N,), or of every frame (N, F), in 0..1; 0 for greys.
    """
    light = (pictures.float().clamp(-1, 1) + 1) / 2
    most, least = light.amax(-3), light.amin(-3)
    return ((most - least) / most.clamp(min=1e-6)).mean((-2, -1))


def guidance_response(
    generate: Generate, scorer: Scorer, batches: Sequence[Sequence[str]], guidance_scales: Sequence[float] = tuple(range(1, 11))
) -> list[GuidanceResponse]:
    """Alignment and saturation at each guidance scale.

    Args:
        generate: makes the pictures.
        scorer: of alignment.
        batches: prompts, as many at a time as fit.
        guidance_scales: g.
    """
    responses = []
    for guidance_scale in guidance_scales:
        scores, saturations = [], []
        for prompts in batches:
            pictures = generate(prompts, [""] * len(prompts), guidance_scale)
            scores.append(scorer(pictures, prompts).cpu())
            saturations.append(saturation(pictures).cpu())
        responses.append(GuidanceResponse(guidance_scale, _mean(scores), _mean(saturations)))
    return responses


def negative_prompt_response(
    generate: Generate,
    scorer: Scorer,
    batches: Sequence[Sequence[tuple[str, str]]],
    guidance_scale: float,
    threshold: float = 0.5,
) -> NegativeResponse:
    """How often a thing is in the picture without a negative prompt, and with one that names it, from the same noise.

    Args:
        generate: makes the pictures.
        scorer: of the thing's name; it appears where the score is above the threshold.
        batches: (prompt, name of the thing), as many at a time as fit.
        guidance_scale: g; above 1, where a negative prompt does something.
        threshold: of the scorer, which for a classifier that says 0 or 1 is 0.5.

    Raises:
        ValueError: g is not above 1.
    """
    if guidance_scale <= 1:
        raise ValueError(f"A negative prompt does nothing unless guidance_scale is above 1; got {guidance_scale}.")
    without: list[torch.Tensor] = []
    with_negative: list[torch.Tensor] = []
    for batch in batches:
        prompts, things = [prompt for prompt, _ in batch], [thing for _, thing in batch]
        for negative_prompts, found in (([""] * len(batch), without), (things, with_negative)):
            pictures = generate(prompts, negative_prompts, guidance_scale)
            found.append((scorer(pictures, things) > threshold).float().cpu())
    return NegativeResponse(_mean(without), _mean(with_negative))


def _mean(parts: list[torch.Tensor]) -> float:
    return torch.cat(parts).double().mean().item()

"""Clips (N, C, F, h, w) beside pictures (N, C, h, w): frames folded into the batch and back, noise for both, a few to show."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def frames_as_batch(x: torch.Tensor) -> torch.Tensor:
    """(N, C, F, h, w) as (N F, C, h, w), the frames of a clip one after the other; pictures as they are."""
    return x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x


def batch_as_frames(x: torch.Tensor, clips: int) -> torch.Tensor:
    """The reverse: (N F, C, h, w) as (N, C, F, h, w) for N clips."""
    return x.unflatten(0, (clips, -1)).transpose(1, 2)


def shown_frames(count: int, most: int = 4) -> list[int]:
    """The numbers of a few frames of a clip of `count`, evenly from its first to its last."""
    return torch.linspace(0, count - 1, min(most, count)).round().long().tolist()


def draw_noise(shape: Sequence[int], shared: float, generator: torch.Generator) -> torch.Tensor:
    """Standard normal noise; of clips, sqrt(s) common + sqrt(1 - s) own for every frame.

    Any two frames correlate by s, as in PYoCo's mixed noise model (arXiv 2305.10474), where s = a^2 / (1 + a^2).

    Args:
        shape: (N, C, h, w) or (N, C, F, h, w).
        shared: s, in [0, 1]; 0 for pictures.
        generator: on the CPU.
    """
    own = torch.randn(tuple(shape), generator=generator)
    if shared == 0:
        return own
    common = torch.randn((*shape[:2], 1, *shape[3:]), generator=generator)
    return shared**0.5 * common + (1 - shared) ** 0.5 * own

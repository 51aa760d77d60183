"""Judges of clips and of their frames whose answers are known: what evaluations of random networks name as factories."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def brightness() -> Callable[[torch.Tensor, Sequence[str]], torch.Tensor]:
    """A judge of pictures: how bright each is, in 0..1."""

    def score(pictures: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        assert pictures.ndim == 4
        return (pictures.mean((1, 2, 3)) + 1) / 2

    return score


def brightens() -> Callable[[torch.Tensor, Sequence[str]], torch.Tensor]:
    """A judge of clips: 1 where the last frame is brighter than the first, if the text says so, else 0."""

    def score(clips: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        assert clips.ndim == 5
        brighter = clips[:, -1].mean((1, 2, 3)) > clips[:, 0].mean((1, 2, 3))
        return torch.tensor([float(more.item() == ("darker" not in text)) for more, text in zip(brighter, texts, strict=True)])

    return score


def colours() -> Callable[[torch.Tensor], torch.Tensor]:
    """Features of pictures, (N, 3, H, W) -> (N, 12): the means of each quarter."""
    return lambda pictures: torch.nn.functional.adaptive_avg_pool2d(pictures, 2).flatten(1)


def changes() -> Callable[[torch.Tensor], torch.Tensor]:
    """Features of clips, (N, F, 3, H, W) -> (N, 6): their means, and how these change."""
    return lambda clips: torch.cat([clips.mean((1, 3, 4)), (clips[:, -1] - clips[:, 0]).mean((2, 3))], dim=1)

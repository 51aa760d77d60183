"""How alike pictures are: of the same prompt and noise at two numbers of steps, and of one prompt from several noises."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import functional as F

from .features import Features


def consistency(features: Features, few: Iterable[torch.Tensor], many: Iterable[torch.Tensor]) -> float:
    """Mean cosine between the features of pictures of the same prompts and noise at two numbers of steps.

    With CLIP's features at 1 and 16 steps it is the consistency of PCM's tables (arXiv 2405.18407). -1..1; 1 for equal
    pictures, and near it for blurs, so that it must be read beside a distance.

    Args:
        features: their space.
        few, many: batches of pictures (N, 3, H, W) in [-1, 1], in the same order.

    Raises:
        ValueError: not as many batches in both.
    """
    pairs = zip(few, many, strict=True)
    return torch.cat([F.cosine_similarity(features(a), features(b)).cpu() for a, b in pairs]).double().mean().item()


@torch.no_grad()
def perceptual_distance(network: torch.nn.Module, first: Iterable[torch.Tensor], second: Iterable[torch.Tensor]) -> float:
    """Mean LPIPS (arXiv 1801.03924, Eq. 1) of pairs of pictures; 0 for equal ones.

    Args:
        network: of `lora_training.distances.load_lpips`.
        first, second: batches of pictures (N, 3, H, W) in [-1, 1], in the same order.

    Raises:
        ValueError: not as many batches in both.
    """
    device = next(network.parameters()).device
    pairs = zip(first, second, strict=True)
    return torch.cat([network(a.to(device), b.to(device)).flatten().cpu() for a, b in pairs]).double().mean().item()


def diversity(features: Features, groups: Iterable[torch.Tensor]) -> float:
    """Mean of 1 - cosine over all pairs of a prompt's pictures, and over prompts; 0 if they are all alike, up to 2.

    Args:
        features: the space.
        groups: for every prompt its pictures (K, 3, H, W) in [-1, 1] from K noises.

    Raises:
        ValueError: a group of fewer than two pictures.
    """
    spreads = []
    for pictures in groups:
        if len(pictures) < 2:
            raise ValueError(f"Diversity needs at least 2 pictures of each prompt; got {len(pictures)}.")
        found = F.normalize(features(pictures).double().cpu(), dim=1)
        rows, columns = torch.triu_indices(len(found), len(found), offset=1)
        spreads.append((1 - (found @ found.T)[rows, columns]).mean())
    return torch.stack(spreads).mean().item()

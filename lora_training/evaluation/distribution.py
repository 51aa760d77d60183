"""How far one set of pictures is from another, in the features of both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..randomness import generator_of

_BLOCK = 1024  # rows of a table of distances that are held at once


@dataclass
class Moments:
    """Count, mean and scatter of features that come in batches, in float64 on the CPU.

    Batches are merged by Chan's formula, so that nothing is lost however far the mean is from zero.

    Attributes:
        count: N.
        mean: (D,).
        scatter: the sum of (x - mean)(x - mean)^T, (D, D).
    """

    count: int
    mean: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def of(cls, batches: Iterable[torch.Tensor]) -> Moments:
        """Of all batches (N, D) together.

        Raises:
            ValueError: there is none.
        """
        total: Moments | None = None
        for batch in batches:
            features = batch.detach().cpu().double()
            mean = features.mean(0)
            centred = features - mean
            part = cls(len(features), mean, centred.T @ centred)
            total = part if total is None else total.merged(part)
        if total is None:
            raise ValueError("Moments of no features: there was no batch.")
        return total

    def merged(self, other: Moments) -> Moments:
        """Of both sets together."""
        count = self.count + other.count
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        between = torch.outer(difference, difference) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> torch.Tensor:
        """(D, D), unbiased.

        Raises:
            ValueError: fewer than two features.
        """
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 pictures; got {self.count}.")
        return self.scatter / (self.count - 1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)): arXiv 1706.08500, Eq. 6; 0 or more, 0 for equal moments.

    It is biased: it grows as the pictures get fewer, so only figures of as many pictures are to be compared.

    Raises:
        ValueError: fewer than two pictures.
    """
    ours, theirs = first.covariance, second.covariance
    values, vectors = torch.linalg.eigh(ours)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # C_1 C_2 has the eigenvalues of this symmetric matrix, which are real and not negative
    product = torch.linalg.eigvalsh(root @ theirs @ root).clamp(min=0)
    distance = (first.mean - second.mean).square().sum() + ours.trace() + theirs.trace() - 2 * product.sqrt().sum()
    return max(distance.item(), 0.0)


class KernelDistance(NamedTuple):
    """The kernel distance, and how far it varies over the subsets."""

    mean: float
    deviation: float


def kernel_distance(
    first: torch.Tensor, second: torch.Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0, frames: int = 1
) -> KernelDistance:
    """The squared maximum mean discrepancy under the kernel (x y / D + 1)^3: arXiv 1801.01401, Section 4.

    Unbiased, so that it is about 0 for sets of one distribution, and may fall below.

    Args:
        first, second: features (N, D), (N', D).
        subsets: how many are drawn.
        subset_size: pictures in each, from either side without repetition.
        seed: of the draws.
        frames: F of clips, whose features follow each other in both sets; a subset has one frame at most of any clip, for
            frames of one clip are no independent draws, and with them it would not be unbiased.

    Raises:
        ValueError: subset_size is not in 2..min(N, N') / F.
    """
    fewest = min(len(first), len(second)) // frames
    if not 2 <= subset_size <= fewest:
        raise ValueError(f"subset_size must be between 2 and {fewest}, the pictures that there are; got {subset_size}.")
    generator = generator_of(seed)
    values = []
    for _ in range(subsets):
        x, y = (
            features[_drawn(len(features), frames, subset_size, generator).to(features.device)].cpu().double()
            for features in (first, second)
        )
        among = sum(_kernel(z, z).sum() - _kernel(z, z).diagonal().sum() for z in (x, y))
        values.append(among / (subset_size * (subset_size - 1)) - 2 * _kernel(x, y).mean())
    found = torch.stack(values)
    return KernelDistance(found.mean().item(), found.std(correction=0).item())


def _drawn(count: int, frames: int, subset_size: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers of pictures, or of a frame of each of as many clips."""
    clips = torch.randperm(count // frames, generator=generator)[:subset_size]
    return clips if frames == 1 else clips * frames + torch.randint(frames, (subset_size,), generator=generator)


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


class PrecisionRecall(NamedTuple):
    """Shares in 0..1: of generated pictures that look like real ones, and of real ones that the generator covers."""

    precision: float
    recall: float


def precision_recall(real: torch.Tensor, generated: torch.Tensor, neighbours: int = 3) -> PrecisionRecall:
    """arXiv 1904.06991, Eq. 1 and 2: a picture is within a set if it is no farther from one of its members than that
    member's k-th nearest neighbour is.

    Args:
        real, generated: features (N, D), (N', D); like numbers of both.
        neighbours: k.

    Raises:
        ValueError: k is not in 1..min(N, N') - 1.
    """
    fewest = min(len(real), len(generated))
    if not 1 <= neighbours < fewest:
        raise ValueError(f"neighbours must be between 1 and {fewest - 1}, one less than the pictures; got {neighbours}.")
    real, generated = real.double(), generated.double()
    return PrecisionRecall(_share_within(generated, real, neighbours), _share_within(real, generated, neighbours))


def _share_within(points: torch.Tensor, members: torch.Tensor, neighbours: int) -> float:
    # each member is its own nearest, at distance 0
    radii = torch.cat([torch.cdist(block, members).kthvalue(neighbours + 1).values for block in members.split(_BLOCK)])
    inside = [(torch.cdist(block, members) <= radii).any(1) for block in points.split(_BLOCK)]
    return torch.cat(inside).double().mean().item()

"""What is in a picture: `AttributeHeads` over a feature vector, the loss, and the classifier that judges pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, TEXTURES, Labels, Scene, labels

CLASSIFIER_FILE = Path(__file__).parent / "classifier.safetensors"
SLOT_WIDTHS = (1, len(SHAPES), len(COLOURS), len(SIZES))


@dataclass(frozen=True)
class Logits:
    """Scores of N pictures: per place whether an object is there and which, and the background."""

    presence: torch.Tensor  # (N, 9)
    shape: torch.Tensor  # (N, 9, 8)
    colour: torch.Tensor  # (N, 9, 8)
    size: torch.Tensor  # (N, 9, 3)
    background: torch.Tensor  # (N, 6)
    texture: torch.Tensor  # (N, 4)


class AttributeHeads(nn.Module):
    """One linear layer from features (N, width) to every attribute."""

    def __init__(self, width: int):
        super().__init__()
        self.slots = nn.Linear(width, len(PLACES) * sum(SLOT_WIDTHS))
        self.scene = nn.Linear(width, len(BACKGROUNDS) + len(TEXTURES))

    def forward(self, features: torch.Tensor) -> Logits:
        slots = self.slots(features).unflatten(-1, (len(PLACES), -1))
        presence, shape, colour, size = slots.split(SLOT_WIDTHS, dim=-1)
        background, texture = self.scene(features).split((len(BACKGROUNDS), len(TEXTURES)), dim=-1)
        return Logits(presence.squeeze(-1), shape, colour, size, background, texture)


def attribute_loss(logits: Logits, truth: Labels) -> torch.Tensor:
    """Sum of the cross entropies; an empty slot counts for its presence only."""
    present = truth.shape >= 0
    loss = len(PLACES) * F.binary_cross_entropy_with_logits(logits.presence, present.float())
    for name in ("shape", "colour", "size"):
        loss = loss + F.cross_entropy(getattr(logits, name)[present], getattr(truth, name)[present])
    for name in ("background", "texture"):
        loss = loss + F.cross_entropy(getattr(logits, name), getattr(truth, name))
    return loss


class AttributeClassifier(nn.Module):
    """A small convolutional network over pictures (N, 3, 128, 128) in [-1, 1]."""

    widths = (16, 32, 64, 96, 64)  # channels after each block of the trunk

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise((3, *self.widths[:-1])):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        before, after = self.widths[-2:]
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)  # (N, 64, 8, 8)
        self.where = nn.Sequential(nn.Conv2d(after, 64, 4, stride=2, padding=1), nn.SiLU(), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(1024, 256), nn.SiLU())
        self.heads = AttributeHeads(256)

    def features(self, images: torch.Tensor, blocks: int) -> torch.Tensor:
        """The channels after the first `blocks` blocks of the trunk, averaged over the picture, (N, widths[blocks - 1])."""
        return self.trunk[: 3 * blocks](images).mean(dim=(2, 3))

    def embedding(self, images: torch.Tensor) -> torch.Tensor:
        """The last layer before the answers, (N, 256): what and where; the space consistency is measured in."""
        return self.hidden(self.where(self.trunk(images)))

    def forward(self, images: torch.Tensor) -> Logits:
        return self.heads(self.embedding(images))


def load_classifier(path: Path = CLASSIFIER_FILE) -> AttributeClassifier:
    """The classifier that ships, in fp32."""
    classifier = AttributeClassifier()
    classifier.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return classifier.eval().requires_grad_(False)


@dataclass(frozen=True)
class Verdict:
    """How one picture agrees with the scene that was asked for."""

    count: bool
    shape_and_colour: bool  # of every object asked for
    size: bool
    place: bool
    background: bool
    texture: bool
    bound: bool | None  # two objects asked for: both have the right shape with the right colour; None for one


@torch.no_grad()
def judge(classifier: AttributeClassifier, images: torch.Tensor, scenes: Sequence[Scene]) -> list[Verdict]:
    """Compare pictures (N, 3, 128, 128) in [-1, 1] with the N scenes they were asked to show.

    Objects found are matched with the objects asked for so that as many shapes and colours as possible agree.
    """
    logits, truth = classifier(images.float()), labels(scenes)
    verdicts = []
    for i, scene in enumerate(scenes):
        wanted = [j for j in range(len(PLACES)) if truth.shape[i, j] >= 0]
        present = int((logits.presence[i] > 0).sum())
        # the likeliest places, as many as asked for: a missing object is a wrong count and judged at its best guess
        found = logits.presence[i].topk(max(len(wanted), 1)).indices.tolist()

        def agreement(order: Sequence[int], i: int = i, wanted: Sequence[int] = wanted) -> dict[str, list[bool]]:
            seen = {n: [int(getattr(logits, n)[i, j].argmax()) for j in order] for n in ("shape", "colour", "size")}
            same = {n: [v == int(getattr(truth, n)[i, w]) for v, w in zip(seen[n], wanted, strict=True)] for n in seen}
            return same | {"place": [j == w for j, w in zip(order, wanted, strict=True)]}

        def score(same: dict[str, list[bool]]) -> tuple[int, int]:
            return sum(same["shape"] + same["colour"]), sum(same["place"] + same["size"])

        best = max((agreement(order) for order in permutations(found)), key=score)
        exact = all(best["shape"]) and all(best["colour"]) and present >= len(wanted)
        verdicts.append(
            Verdict(
                count=present == len(wanted),
                shape_and_colour=exact,
                size=all(best["size"]),
                place=all(best["place"]),
                background=int(logits.background[i].argmax()) == int(truth.background[i]),
                texture=int(logits.texture[i].argmax()) == int(truth.texture[i]),
                bound=exact if len(scene.objects) == 2 else None,
            )
        )
    return verdicts


def rates(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The share of pictures that are right, per attribute; None (not asked) is left out."""
    table = {}
    for name in Verdict.__dataclass_fields__:
        values = [getattr(v, name) for v in verdicts if getattr(v, name) is not None]
        table[name] = sum(values) / len(values) if values else float("nan")
    return table

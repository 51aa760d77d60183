"""The adversarial consistency loss (arXiv 2405.18407, section 3.3): a critic tells where students land from where they should.

"Real" is the consistency target, not data. Heads judge both points by frozen features of them: `critic_features.py` says which.
Of clips some heads see frames one by one, and some all of them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from .backbones import Backbone, Conditioning
from .config import AdversarialConfig
from .critic_features import Features, PictureFeatures, TeacherFeatures
from .frames import frames_as_batch

if TYPE_CHECKING:
    from .objectives import ConsistencyObjective, Landing


ADVERSARIAL, CRITIC = "adversarial", "critic"  # of a loss's parts: the student's, weighted, and the critic's own
_LARGE = 1024  # so that a gradient in half precision does not vanish on its way; a power of 2, so that it changes no other


class Residual(nn.Module):
    """x + convolution, group norm and leaky ReLU of it."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.LeakyReLU(0.2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def head(channels: int, width: int, halvings: int = 0) -> nn.Sequential:
    """A judge of one map, (N, channels, h, w) -> logits, each of a place: (N, 1, h, w), both sides halved so many times.

    Args:
        channels: of the map.
        width: inside, a multiple of 8.
        halvings: strided convolutions to begin with, each wider than the one before: a patch critic (arXiv 1611.07004).
    """
    return nn.Sequential(*_beginning(channels, width, halvings), Residual(width), nn.Conv2d(width, 1, 1))


def temporal_head(channels: int, width: int, halvings: int = 0) -> nn.Sequential:
    """A judge of one map of clips that looks along frames: (N, channels, F, h, w) -> logits (N, 1, F, h, w); see `head`."""
    return nn.Sequential(
        *_beginning(channels, width, halvings, of_clips=True),
        nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0)), nn.GroupNorm(8, width), nn.LeakyReLU(0.2),
        nn.Conv3d(width, 1, 1),
    )  # fmt: skip


def _beginning(channels: int, width: int, halvings: int, of_clips: bool = False) -> list[nn.Module]:
    """What heads have in common: a map of `width` channels, of each frame by itself."""

    def convolution(before: int, after: int, side: int, stride: int = 1) -> nn.Module:
        pad = side // 2
        if of_clips:
            return nn.Conv3d(before, after, (1, side, side), stride=(1, stride, stride), padding=(0, pad, pad))
        return nn.Conv2d(before, after, side, stride=stride, padding=pad)

    if not halvings:
        return [convolution(channels, width, 1), nn.GroupNorm(8, width), nn.LeakyReLU(0.2)]
    # the first without a norm, which would take a picture's colour from it
    widths = [8 * max(1, width // 8 >> k) for k in reversed(range(halvings))]
    begin = [convolution(channels, widths[0], 3, stride=2), nn.LeakyReLU(0.2)]
    for before, after in pairwise(widths):
        begin += [convolution(before, after, 3, stride=2), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
    return begin


class Critic(nn.Module):
    """Heads, several for every map.

    Args:
        channels: of the maps.
        heads: for each map.
        width, halvings: of a head.
        temporal_heads: further ones for each map, of clips.
    """

    def __init__(self, channels: Sequence[int], heads: int, width: int, halvings: int = 0, temporal_heads: int = 0):
        super().__init__()
        self.heads_a_map, self.temporal_heads_a_map = heads, temporal_heads
        self.heads = nn.ModuleList(head(c, width, halvings) for c in channels for _ in range(heads))
        self.temporal_heads = nn.ModuleList(temporal_head(c, width, halvings) for c in channels for _ in range(temporal_heads))

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Logits (N, J), each a mean over places, and of clips over frames."""
        whole = [feature.float() for feature in features]
        frames = [frames_as_batch(x) for x in whole]
        logits = [judge(x) for judge, x in zip(self.heads, _each(frames, self.heads_a_map), strict=True)]
        along = _each(whole, self.temporal_heads_a_map)
        logits += [judge(x) for judge, x in zip(self.temporal_heads, along, strict=True)]
        return torch.stack([logit.reshape(len(whole[0]), -1).mean(dim=1) for logit in logits], dim=1)


def _each(values: Sequence[torch.Tensor], times: int) -> list[torch.Tensor]:
    return [value for value in values for _ in range(times)]


def hinge(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The critic's loss, mean of relu(1 - real) + relu(1 + fake); 2 where it knows nothing (arXiv 1705.02894)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


class AdversarialLoss:
    """Both sides of the game, in one pass of the frozen networks.

    The student's side comes as a term whose gradient at the landing is that of the critic's judgement: the pass is over, and
    the student's adapter switched on again, before anything flows back to the student.

    Args:
        backbone: gives the features.
        config: weight, space, heads, cadence.
        seed: of the heads' first weights.
        resolution: the side of training pictures, in pixels.

    Raises:
        FileNotFoundError, ValueError: as of `PictureFeatures`.
    """

    def __init__(self, backbone: Backbone, config: AdversarialConfig, seed: int, resolution: int):
        self.config = config
        in_pixels = config.space == "pixel"
        self.features: Features = PictureFeatures(backbone, config, resolution) if in_pixels else TeacherFeatures(backbone)
        self.temporal_heads = config.temporal_heads if backbone.sample_dimensions == 5 else 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.critic = Critic(
                self.features.channels, config.heads, config.width, self.features.halvings, self.temporal_heads
            ).to(backbone.unet.device)
        self.step = 0  # of the run; the loop sets it

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By names that no student has."""
        return {f"critic.{name}": p for name, p in self.critic.named_parameters()}

    def describe(self) -> str:
        """What it looks at and when it learns, in words."""
        config, maps = self.config, len(self.features.channels)
        part = f" of {config.crop} latents a side" if config.crop else ""
        where = f"pixels ({config.network}){part}" if config.space == "pixel" else "latents"
        often = "at every second step" if config.cadence == "alternate" else f"at one step of {config.critic_every}"
        along = f" and {self.temporal_heads} along frames" if self.temporal_heads else ""
        return f"in {where}: {config.heads} head(s){along} on each of {maps} map(s), learning {often}"

    @property
    def turns(self) -> tuple[bool, bool]:
        """Whether the student is told the critic's judgement at this step, and whether the critic learns."""
        if self.config.cadence == "alternate":
            return self.step % 2 == 1, self.step % 2 == 0
        return True, self.step % self.config.critic_every == 0

    def __call__(
        self, landing: Landing, objective: ConsistencyObjective, conditioning: Conditioning, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """weight * student's loss, and critic's loss, each at its turns: scalars to add.

        Args:
            landing: where the student and the target are.
            objective: whose grid and levels they are on.
            conditioning: of the batch.
            generator: on the CPU.
        """
        telling, learning = self.turns
        landed = landing.landed.detach().requires_grad_(telling)
        losses = {}
        with objective.backbone.teacher():  # for the gradient too: checkpointing runs the teacher again
            with torch.set_grad_enabled(telling):
                features = self.features(landed, landing, objective, conditioning, generator)
            if telling:
                for p in self.critic.parameters():
                    p.requires_grad_(False)
                wanted = -self.critic([feature[: len(landed)] for feature in features]).mean()
                (pull,) = torch.autograd.grad(_LARGE * wanted, landed)
                for p in self.critic.parameters():
                    p.requires_grad_(True)
                passed_on = ((landing.landed - landed.detach()) * pull).sum() / _LARGE
                losses[ADVERSARIAL] = self.config.weight * (wanted.detach() + passed_on)
        if learning:
            fake, real = self.critic([feature.detach() for feature in features]).chunk(2)
            losses[CRITIC] = hinge(real, fake)
        return losses

"""The adversarial consistency loss (arXiv 2405.18407, section 3.3): a critic tells where students land from where they should.

"Real" is the consistency target, not data. Both points, at the stop of the jump, are noised again to a random level of the
phase and shown to the frozen teacher; heads on its features judge them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from .backbones import Backbone, Conditioning
from .backbones.conditioning import joined
from .config import AdversarialConfig

if TYPE_CHECKING:
    from .objectives import ConsistencyObjective, Landing


_LARGE = 1024  # so that a gradient in half precision does not vanish on its way; a power of 2, so that it changes no other


class Residual(nn.Module):
    """x + convolution, group norm and leaky ReLU of it."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.LeakyReLU(0.2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def head(channels: int, width: int) -> nn.Sequential:
    """A judge of one block's features, (N, channels, h, w) -> logits (N, 1, h, w)."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 1), nn.GroupNorm(8, width), nn.LeakyReLU(0.2), Residual(width), nn.Conv2d(width, 1, 1)
    )  # fmt: skip


class TeacherFeatures:
    """What the teacher's down, mid and up blocks put out, read by hooks while it predicts.

    Args:
        backbone: its UNet, with the student stepped aside, is the teacher.
    """

    def __init__(self, backbone: Backbone):
        self.backbone = backbone

    def blocks(self) -> list[nn.Module]:
        """Of the network that is the teacher now."""
        unet: Any = self.backbone.unet
        return [*unet.down_blocks, unet.mid_block, *unet.up_blocks]

    @property
    def channels(self) -> list[int]:
        """Of each block's output."""
        widths = list(self.backbone.unet.config.block_out_channels)
        return [*widths, widths[-1], *reversed(widths)]

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> list[torch.Tensor]:
        """Features (N, C, h, w) of each block, with gradients to the sample; call it where the teacher is in place."""
        found: list[torch.Tensor] = []

        def keep(module: nn.Module, arguments: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        handles = [block.register_forward_hook(keep) for block in self.blocks()]
        try:
            self.backbone.predict(sample, timestep, conditioning)
        finally:
            for handle in handles:
                handle.remove()
        return found


class Critic(nn.Module):
    """Heads, several for every block, on the teacher's features.

    Args:
        channels: of the blocks' features.
        heads: for each block.
        width: of a head; a multiple of 8.
    """

    def __init__(self, channels: Sequence[int], heads: int, width: int):
        super().__init__()
        self.heads_a_block = heads
        self.heads = nn.ModuleList(head(c, width) for c in channels for _ in range(heads))

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Logits (N, J), each a mean over places."""
        shown = [feature.float() for feature in features for _ in range(self.heads_a_block)]
        return torch.stack([judge(x).mean(dim=(1, 2, 3)) for judge, x in zip(self.heads, shown, strict=True)], dim=1)


def hinge(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The critic's loss, mean of relu(1 - real) + relu(1 + fake); 2 where it knows nothing (arXiv 1705.02894)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


class AdversarialLoss:
    """Both sides of the game, in one pass of the teacher.

    The student's side comes as a term whose gradient at the landing is that of the critic's judgement: the pass of the teacher
    is over, and the student's adapter switched on again, before anything flows back to the student.

    Args:
        backbone: gives the features.
        config: weight, heads, cadence.
        seed: of the heads' first weights.
    """

    def __init__(self, backbone: Backbone, config: AdversarialConfig, seed: int):
        self.config = config
        self.features = TeacherFeatures(backbone)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.critic = Critic(self.features.channels, config.heads, config.width).to(backbone.unet.device)
        self.step = 0  # of the run; the loop sets it

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By names that no student has."""
        return {f"critic.{name}": p for name, p in self.critic.named_parameters()}

    def __call__(
        self, landing: Landing, objective: ConsistencyObjective, conditioning: Conditioning, generator: torch.Generator
    ) -> torch.Tensor:
        """weight * student's loss + critic's loss, a scalar to add.

        Args:
            landing: where the student and the target are.
            objective: whose grid and levels they are on.
            conditioning: of the batch; the critic is told the prompt too.
            generator: on the CPU.
        """
        batch, device = len(landing.stop), landing.landed.device
        level = self.draw_level(landing.stop, objective, generator)
        noise = torch.randn(landing.landed.shape, generator=generator).to(device)
        landed = landing.landed.detach().requires_grad_(True)
        both = torch.cat([landed, landing.target])
        shown = renoised(both, objective, landing.stop.repeat(2), level.repeat(2), noise.repeat(2, 1, 1, 1))
        timestep = objective.levels.timesteps[level].repeat(2)
        judging = self.step % self.config.critic_every == 0
        with objective.backbone.teacher():
            features = self.features(shown, timestep, joined(conditioning, conditioning))
            for p in self.critic.parameters():
                p.requires_grad_(False)
            wanted = -self.critic([feature[:batch] for feature in features]).mean()
            (pull,) = torch.autograd.grad(_LARGE * wanted, landed)
            for p in self.critic.parameters():
                p.requires_grad_(True)
        student = self.config.weight * (wanted.detach() + ((landing.landed - landed.detach()) * pull).sum() / _LARGE)
        if not judging:
            return student
        fake, real = self.critic([feature.detach() for feature in features]).chunk(2)
        return student + hinge(real, fake)

    @staticmethod
    def draw_level(stop: torch.Tensor, objective: ConsistencyObjective, generator: torch.Generator) -> torch.Tensor:
        """Points from the stop to the top of the phase above it, uniform, (B,)."""
        edges = torch.tensor(objective.grid.edge_indices, device=stop.device)
        top = edges[torch.searchsorted(edges, stop, right=True).clamp(max=len(edges) - 1)]
        share = torch.rand(len(stop), generator=generator).to(stop.device)
        return stop + (share * (top - stop + 1)).long()


def renoised(
    sample: torch.Tensor, objective: ConsistencyObjective, stop: torch.Tensor, level: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """x at `level` from x at `stop` by the forward process: c x + sqrt(sigma_r^2 - c^2 sigma_s^2) z, c = alpha_r / alpha_s."""
    (alpha, sigma), (next_alpha, next_sigma) = objective.levels(stop), objective.levels(level)
    scale = next_alpha / alpha
    spread = (next_sigma.square() - (scale * sigma).square()).clamp(min=0).sqrt()
    return scale * sample + spread * noise

"""What a critic's heads look at: frozen functions of the points where student and target landed.

`latent`: both points, noised again to a random level of the phase, through the frozen teacher (arXiv 2405.18407, section 3.3).

`pixel`: the pictures that both points imply, decoded, through a frozen network over pictures (as projected GANs have it, arXiv
2111.01007, and StyleGAN-T, arXiv 2301.09515), or as they are. A point before the last phase's end is noisy and decodes to
nothing; the picture shown for it is the x_0 that a prediction at x_n, where the student's jump begins, must name to land
there (`implied_x0`). Three things decide for it:

- Of the student's landing it is the student's own prediction, so every jump is judged, in every phase, at no cost.
- It is one map, from the same x_n, for student and target: pictures are alike exactly if landings are, and a student that
  meets its target cannot be told from it. The target's own prediction would not do: it begins at a point below, and names
  another x_0 for the same landing.
- With several phases it is not the ODE's end before the last one, but an extrapolation that is the blurrier the noisier the
  phase. A critic that takes photographs for "real" would find every student out by that. Here "real" is the target, which is
  blurred alike: the picture need not be a photograph, only say where the point is.

Only in the last phase (with one phase: always) it is the picture itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from .backbones import Backbone, Conditioning
from .backbones.conditioning import joined
from .config import AdversarialConfig
from .distances import load_lpips
from .frames import batch_as_frames, frames_as_batch
from .local_weights import call_factory
from .randomness import sent

if TYPE_CHECKING:
    from .objectives import ConsistencyObjective, Landing

Maps = list[torch.Tensor]
"""Feature maps, (N, C, h, w) each, of clips (N, C, F, h, w)."""


class Features(Protocol):
    """What both points are turned into.

    Attributes:
        channels: of every map.
        halvings: strided convolutions that a head begins with: none over features, some over pictures.
        frozen: networks that it holds beside the UNet.
    """

    @property
    def channels(self) -> Sequence[int]: ...

    @property
    def halvings(self) -> int: ...

    @property
    def frozen(self) -> Sequence[nn.Module]: ...

    def __call__(
        self,
        landed: torch.Tensor,
        landing: Landing,
        objective: ConsistencyObjective,
        conditioning: Conditioning,
        generator: torch.Generator,
    ) -> Maps:
        """Maps (2 B, ...), the student's half first, with gradients to `landed`; call it where the teacher is in place.

        Args:
            landed: `landing.landed`, cut off from the student.
            landing: where the student and the target are.
            objective: whose grid and levels they are on.
            conditioning: of the batch.
            generator: on the CPU. Both halves are shown by the same draws.
        """
        ...


class TeacherFeatures:
    """What the teacher's down, mid and up blocks put out, read by hooks while it predicts; it is told the prompt too.

    Args:
        backbone: its UNet, with the student stepped aside, is the teacher.
    """

    halvings = 0
    frozen: Sequence[nn.Module] = ()

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

    def __call__(
        self,
        landed: torch.Tensor,
        landing: Landing,
        objective: ConsistencyObjective,
        conditioning: Conditioning,
        generator: torch.Generator,
    ) -> Maps:
        level = draw_level(landing.stop, objective, generator)
        noise = sent(torch.randn(landed.shape, generator=generator), landed.device)
        both = torch.cat([landed, landing.target])
        shown = renoised(both, objective, landing.stop.repeat(2), level.repeat(2), torch.cat([noise, noise]))
        return self.read(shown, objective.levels.timesteps[level].repeat(2), joined(conditioning, conditioning))

    def read(self, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> Maps:
        """Features of each block, with gradients to the sample."""
        found: list[torch.Tensor] = []

        def keep(module: nn.Module, arguments: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        handles = [block.register_forward_hook(keep) for block in self.blocks()]
        try:
            self.backbone.predict(sample, timestep, conditioning)
        finally:
            for handle in handles:
                handle.remove()
        return [batch_as_frames(feature, len(sample)) for feature in found] if sample.ndim == 5 else found


def draw_level(stop: torch.Tensor, objective: ConsistencyObjective, generator: torch.Generator) -> torch.Tensor:
    """Points from the stop to the top of the phase above it, uniform, (B,)."""
    edges = objective.edges
    top = edges[torch.searchsorted(edges, stop, right=True).clamp(max=len(edges) - 1)]
    share = sent(torch.rand(len(stop), generator=generator), stop.device)
    return stop + (share * (top - stop + 1)).long()


def renoised(
    sample: torch.Tensor, objective: ConsistencyObjective, stop: torch.Tensor, level: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """x at `level` from x at `stop` by the forward process: c x + sqrt(sigma_r^2 - c^2 sigma_s^2) z, c = alpha_r / alpha_s."""
    (alpha, sigma), (next_alpha, next_sigma) = objective.levels(stop), objective.levels(level)
    scale = next_alpha / alpha
    spread = (next_sigma.square() - (scale * sigma).square()).clamp(min=0).sqrt()
    return scale * sample + spread * noise


class PictureFeatures:
    """Pictures that the points imply, decoded by the frozen VAE, in the maps of a network; it is not told the prompt.

    The network sees clips frame by frame.

    Args:
        backbone: its VAE decodes.
        config: the network, and the part of a picture that it sees.
        resolution: the side of training pictures, in pixels; the network is tried on one.

    Raises:
        FileNotFoundError, ValueError: as of `NETWORKS`; or the network does not give maps, or stops gradients.
    """

    def __init__(self, backbone: Backbone, config: AdversarialConfig, resolution: int):
        self.backbone, self.crop = backbone, config.crop
        self.network = NETWORKS[config.network](config, backbone.unet.device)
        self.halvings = 3 if config.network == "pyramid" else 0
        seen = min(resolution, config.crop * backbone.latent_scale or resolution)
        self.channels = probed(self.network, seen, backbone.unet.device)

    @property
    def frozen(self) -> Sequence[nn.Module]:
        return [self.backbone.vae, *([self.network] if isinstance(self.network, nn.Module) else [])]

    def __call__(
        self,
        landed: torch.Tensor,
        landing: Landing,
        objective: ConsistencyObjective,
        conditioning: Conditioning,
        generator: torch.Generator,
    ) -> Maps:
        corners = draw_corners(landed.shape, self.crop, generator)

        def maps(point: torch.Tensor) -> Maps:
            latents = cropped(implied_x0(point, landing, objective), self.crop, corners)
            found = as_maps(self.network(frames_as_batch(self.backbone.decode_latents(latents))))
            return [batch_as_frames(x, len(point)) for x in found] if point.ndim == 5 else found

        ours = maps(landed)
        with torch.no_grad():  # a decoder's activations are large, and only the student's are needed
            theirs = maps(landing.target)
        return [torch.cat(pair) for pair in zip(ours, theirs, strict=True)]


def implied_x0(point: torch.Tensor, landing: Landing, objective: ConsistencyObjective) -> torch.Tensor:
    """The x_0 that a prediction at x_n must name for its jump to land at x_s: the reverse of `pcm_scheduler.sampling.jump`.

    x_0 = (sigma_n x_s - sigma_s x_n) / (sigma_n alpha_s - sigma_s alpha_n); a jump goes down, so the denominator is above 0.

    Args:
        point: x_s, (B, 4, h, w), of clips (B, 4, F, h, w).
        landing: says n, x_n and s.
        objective: whose levels they are.
    """
    (alpha, sigma), (next_alpha, next_sigma) = objective.levels(landing.n), objective.levels(landing.stop)
    return (sigma * point - next_sigma * landing.sample) / (sigma * next_alpha - next_sigma * alpha)


def draw_corners(shape: Sequence[int], side: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """Top left corners of squares in latents (B, 4, h, w) or (B, 4, F, h, w), uniform; (0, 0) along sides seen whole."""
    most = [max(length - (side or length), 0) for length in shape[-2:]]
    drawn = [torch.randint(0, last + 1, shape[:1], generator=generator) for last in most]
    return [(int(top), int(left)) for top, left in zip(*drawn, strict=True)]


def cropped(latents: torch.Tensor, side: int, corners: Sequence[tuple[int, int]]) -> torch.Tensor:
    """A square of each, the same in all frames of a clip; shorter sides whole. The latents themselves if `side` is 0."""
    if not side:
        return latents
    return torch.stack([x[..., top : top + side, left : left + side] for x, (top, left) in zip(latents, corners, strict=True)])


Network = Callable[[torch.Tensor], Any]
"""Pictures (N, 3, H, W), float32, in about [-1, 1] -> a map (N, C, h, w) or several, with gradients to the pictures."""


def pyramid(pictures: torch.Tensor) -> Maps:
    """The pictures, at half and at a quarter of their size: for heads that learn to see by themselves (arXiv 1711.11585)."""
    return [pictures, *(F.avg_pool2d(pictures, scale, ceil_mode=True) for scale in (2, 4))]


class _Vgg(nn.Module):
    """The five maps of LPIPS's VGG."""

    def __init__(self, lpips: Any):
        super().__init__()
        self.scaling, self.trunk = lpips.scaling_layer, lpips.net

    def forward(self, pictures: torch.Tensor) -> Maps:
        return list(self.trunk(self.scaling(pictures)))


NETWORKS: dict[str, Callable[[AdversarialConfig, torch.device], Network]] = {
    "pyramid": lambda config, device: pyramid,
    "vgg": lambda config, device: _Vgg(load_lpips(config.path, "adversarial.path")).to(device),
    "factory": lambda config, device: call_factory(config.factory, config.path, device, "adversarial"),
}


def as_maps(found: Any) -> Maps:
    """One map or several, as a list."""
    return [found] if isinstance(found, torch.Tensor) else list(found)


def probed(network: Network, side: int, device: torch.device) -> list[int]:
    """The channels of a network's maps, read from those of a grey picture of this side, in pixels.

    Raises:
        ValueError: it fails, it gives something else than maps, or no gradient comes back through it.
    """
    picture = torch.zeros(1, 3, side, side, device=device, requires_grad=True)
    wanted = "adversarial.network must turn pictures (N, 3, H, W) into a map (N, C, h, w) or several, and let gradients through"
    try:
        maps = as_maps(network(picture))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{wanted}; on a picture of {side} x {side} pixels it fails: {error}") from error
    for found in maps:
        if not isinstance(found, torch.Tensor) or found.ndim != 4 or len(found) != 1:
            got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise ValueError(f"{wanted}; of one picture it gives {got}.")
        if not found.requires_grad:
            raise ValueError(f"{wanted}; it stops them: take torch.no_grad and torch.inference_mode out of it.")
    if not maps:
        raise ValueError(f"{wanted}; it gives none.")
    return [found.shape[1] for found in maps]

"""Zero-shot editing in ComfyUI's terms: IMAGE and MASK in, IMAGE out, over MODEL, VAE and CONDITIONING.

The loop of `pcm_scheduler.editing` goes through the VAE between steps. ComfyUI may take the UNet off the device to make room
for it, so the loop runs outside of sampling and asks for each x_0 by a sampling of its own, which loads what it needs.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import latent_preview
import torch
from torch.nn import functional as F

from ..pcm_scheduler.edit_tasks import Edit, draw, size_of
from ..pcm_scheduler.editing import Codec, invert
from ..pcm_scheduler.operators import KeepRegion
from ..pcm_scheduler.phases import PhaseGrid
from ..pcm_scheduler.sampling import Denoiser, NoiseSampler
from .sampling import points_of, sigmas_at


def at_home(tensor: torch.Tensor) -> torch.Tensor:
    """Where ComfyUI keeps what is between nodes: the CPU, unless it was started with --gpu-only."""
    return tensor.to(comfy.model_management.intermediate_device())


def to_rgb(image: torch.Tensor) -> torch.Tensor:
    """IMAGE (N, H, W, C) to (N, H, W, 3) in [0, 1]; grey is repeated, and an alpha channel left out."""
    colours = image.expand(*image.shape[:-1], 3) if image.shape[-1] == 1 else image[..., :3]
    return at_home(colours.float().clamp(0, 1))


def to_pictures(image: torch.Tensor) -> torch.Tensor:
    """IMAGE (N, H, W, C) to (N, 3, H, W) in [-1, 1], as by `to_rgb`."""
    return to_rgb(image).movedim(-1, 1) * 2 - 1


def to_image(pictures: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1] to IMAGE (N, H, W, 3) with the values of an 8-bit file.

    Saving cuts off what is behind the point instead of rounding it, which would change a kept pixel by a level.
    """
    return ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().div(255).movedim(1, -1)


def to_mask(mask: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """MASK (1|N, H, W), or as latents have it (1|N, 1, H, W), in [0, 1], 1 where drawn anew; any number for one picture.

    Returns:
        (1|N, 1, H, W).

    Raises:
        ValueError: not of the pictures' size, or not one for each.
    """
    mask = mask.float().clamp(0, 1)
    mask = mask.flatten(0, -3)[:, None] if mask.ndim > 2 else mask[None, None]
    if mask.shape[-2:] != pictures.shape[-2:]:
        sizes = [f"{x.shape[-1]} x {x.shape[-2]}" for x in (mask, pictures)]
        raise ValueError(
            f"The mask is {sizes[0]} and the image {sizes[1]}. Give both one size. Load Image gives an empty mask of 64 x 64 "
            "for an image in which nothing is masked: right-click it and open the mask editor."
        )
    if len(mask) not in (1, len(pictures)) and (len(pictures) > 1 or len(mask) == 0):
        images = f"{len(pictures)} image{'s' * (len(pictures) > 1)}"
        raise ValueError(f"There are {len(mask)} masks for {images}: give one, or one for each.")
    return at_home(mask)


def to_masked_pictures(image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """IMAGE and MASK as by `to_pictures` and `to_mask`; one picture is repeated for several masks.

    Raises:
        ValueError: as `to_mask`.
    """
    pictures = to_pictures(image)
    masks = to_mask(mask, pictures)
    return pictures.expand(max(len(pictures), len(masks)), -1, -1, -1), masks


class Host:
    """A model, its VAE and two prompts: what the loops of `pcm_scheduler.editing` need.

    Args:
        model, vae, positive, negative: MODEL, VAE and CONDITIONING.
        cfg: guidance.
        seed: of all noise.

    Raises:
        ValueError: a VAE that is not this model's.
    """

    def __init__(self, model: Any, vae: Any, positive: Any, negative: Any, cfg: float, seed: int):
        self.model, self.vae, self.cfg, self.seed = model, vae, cfg, seed
        self.prompts = (positive, negative)
        self.finite = True  # whether every x_0 was; an edit may end in a picture that does not show it
        channels = model.get_model_object("latent_format").latent_channels
        if vae.latent_channels != channels or vae.latent_dim != 2:
            raise ValueError(
                f"This VAE makes latents of {vae.latent_channels} channels, the model draws {channels}: not its VAE."
            )

    def noise(self, size: tuple[int, int], count: int, seed: int | None = None) -> torch.Tensor:
        """Unit noise for pictures of (height, width), as ComfyUI draws it for their latents."""
        scale = self.vae.spacial_compression_encode()
        blank = torch.zeros(count, self.vae.latent_channels, -(-size[0] // scale), -(-size[1] // scale))
        return at_home(comfy.sample.prepare_noise(blank, self.seed if seed is None else seed))

    def fresh_noise(self, noise: torch.Tensor) -> NoiseSampler:
        """Draws noise like the initial one, which is the seed's own: this is of another stream."""
        generator = torch.Generator().manual_seed(self.seed ^ 0x9E3779B9)
        return lambda sigma, next_sigma: at_home(torch.randn(noise.shape, generator=generator))

    def codec(self, size: tuple[int, int]) -> Codec:
        """Between pictures of (height, width), any size, and latents as sampling sees them."""
        scale = self.vae.spacial_compression_encode()
        right, below = -size[1] % scale, -size[0] % scale

        def encode(pictures: torch.Tensor) -> torch.Tensor:
            padded = F.pad(pictures, (0, right, 0, below), mode="replicate")
            return self.model.model.process_latent_in(self.vae.encode((padded / 2 + 0.5).movedim(1, -1)))

        def decode(latents: torch.Tensor) -> torch.Tensor:
            image = self.vae.decode(self.model.model.process_latent_out(latents))
            return image.movedim(-1, 1)[..., : size[0], : size[1]] * 2 - 1

        return Codec(encode, decode, scale)

    def denoiser(self, sigmas: torch.Tensor) -> Denoiser:
        """x_0 of (x, number of the sigma), with progress, previews and cancelling."""
        show = latent_preview.prepare_callback(self.model, len(sigmas))
        model = self.model.model

        def denoise(sample: torch.Tensor, i: int) -> torch.Tensor:
            level = torch.stack([sigmas[i], torch.zeros(())])
            latents = model.process_latent_out(sample)
            nothing = torch.zeros_like(latents)
            drawn = comfy.sample.sample_custom(
                self.model, nothing, self.cfg, _JUMP_TO_X0, level, *self.prompts, latents, disable_pbar=True, seed=self.seed
            )
            x0 = model.process_latent_in(drawn)
            self.finite &= bool(x0.isfinite().all())
            show(i, x0.to(self.model.load_device), sample, len(sigmas))  # where a preview's own network is
            return x0

        return denoise

    def draw(
        self,
        edit: Edit,
        grid: PhaseGrid,
        steps: int,
        eta: float,
        noise: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, float]:
        """IMAGE with the edit made, and how far it is from what was measured, in grey levels of its 8 bits.

        Args:
            edit: the task.
            grid: that the adapter was trained on.
            steps, eta: of sampling.
            noise: of unit variance, to start from instead of the seed's.
            kept: IMAGE of the result's size, whose own values come back where the edit keeps a region: those of 8 bits or not.

        Raises:
            ValueError: steps that do not fit, or a model that is not covered.
        """
        points = points_of(grid, steps, edit.strength, "strength")
        sigmas = sigmas_at(self.model, grid, [grid.timesteps[n] for n in points])
        noise = self.noise(edit.size, len(edit.measurement)) if noise is None else noise
        levels = [*sigmas.tolist(), 0.0]
        codec, denoiser = self.codec(edit.size), self.denoiser(sigmas)
        drawn = draw(edit, denoiser, codec, grid, points, [1.0] * len(levels), levels, noise, eta, self.fresh_noise(noise))
        image = to_image(drawn)
        if kept is not None and isinstance(edit.operator, KeepRegion):
            image = torch.where(edit.operator.mask.movedim(1, -1).to(image.device), kept, image)
        return image, edit.operator.residual(to_pictures(image), edit.measurement).max().item() * 127.5

    def invert(self, pictures: torch.Tensor, grid: PhaseGrid) -> torch.Tensor:
        """The unit noise from which this model, without an adapter, draws the pictures.

        `pcm_scheduler.editing.invert` over every point of the solver's grid.
        """
        sigmas = sigmas_at(self.model, grid, grid.timesteps)
        lengths = (1 + sigmas**2).sqrt()  # of x at each level, when latents and noise have unit variance
        sample = self.codec(size_of(pictures)).encode(pictures) * lengths[0]
        return invert(self.denoiser(sigmas), sample, [1.0] * len(sigmas), sigmas.tolist()) / lengths[-1]


@torch.no_grad()
def _x0(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any], **_: Any) -> torch.Tensor:
    return model(x, sigmas[0] * x.new_ones(len(x)), **extra_args)


_JUMP_TO_X0 = comfy.samplers.KSAMPLER(_x0)

"""What the two scripts that train a denoiser share: cached latents, captions in random wordings, noised latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import CLIPTokenizer

from lora_training.cpu import fast_autocast
from pcm_scheduler.lora_file import write_safetensors

from model import RUNS_DIR
from scenes import TRAIN_SEED, Scene, caption, render, sample_scene
from training import processes_here

OMIT = 0.12  # each of size, place, background is left unsaid this often
CAPTION_DROPOUT = 0.1  # for classifier-free guidance
LAYOUT_WEIGHT = 50.0  # the most that a timestep weighs where things are decided


def whole_scenes(indices: Sequence[int]) -> torch.Tensor:
    """The training scenes of these numbers, (N, 3, 128, 128)."""
    return render([sample_scene(TRAIN_SEED, i) for i in indices])


def cached_moments(
    vae: AutoencoderKL,
    count: int,
    pictures: Callable[[Sequence[int]], torch.Tensor] = whole_scenes,
    name: str = "moments",
) -> dict[str, torch.Tensor]:
    """Mean and standard deviation of the latents of pictures 0..count - 1, (count, 4, 16, 16) each, fp16; from disk if there.

    Args:
        vae: encodes; of several processes, the first one's.
        count: how many.
        pictures: draws the pictures of some numbers, (N, 3, 128, 128).
        name: of the file; what is drawn otherwise is called otherwise.
    """
    path = RUNS_DIR / f"{name}-{count}.safetensors"
    with processes_here().main_process_first():
        if not path.exists():
            write_safetensors(_moments(vae, count, pictures), path)
    return load_file(path)


@torch.no_grad()
def _moments(vae: AutoencoderKL, count: int, pictures: Callable[[Sequence[int]], torch.Tensor]) -> dict[str, torch.Tensor]:
    parts: dict[str, list[torch.Tensor]] = {"mean": [], "std": []}
    for j in tqdm(range(0, count, 64), desc="encode", mininterval=2.0):
        images = pictures(range(j, min(j + 64, count)))
        with fast_autocast(vae.device.type):
            posterior = vae.encode(images.to(vae.device)).latent_dist
        parts["mean"].append(posterior.mean.half().cpu())
        parts["std"].append(posterior.std.half().cpu())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def drawn_latents(
    moments: dict[str, torch.Tensor], which: torch.Tensor, vae: AutoencoderKL, generator: torch.Generator
) -> torch.Tensor:
    """Scaled latents (N, 4, 16, 16) of the pictures `which`, drawn from their posterior."""
    mean, std = moments["mean"][which].float(), moments["std"][which].float()
    return (mean + std * torch.randn(mean.shape, generator=generator)) * vae.config.scaling_factor


def random_of(generator: torch.Generator) -> np.random.Generator:
    """Numpy's random numbers, from torch's."""
    return np.random.default_rng(torch.randint(2**62, (), generator=generator).item())


def random_tokens(
    tokenizer: CLIPTokenizer, scenes: Sequence[Scene], generator: torch.Generator, dropout: float
) -> tuple[torch.Tensor, list[bool]]:
    """Captions in random wordings, (N, tokens), and which of them were dropped."""
    rng = random_of(generator)
    dropped = (rng.random(len(scenes)) < dropout).tolist()
    texts = ["" if drop else caption(scene, rng, OMIT) for scene, drop in zip(scenes, dropped, strict=True)]
    padded = tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
    return torch.tensor(padded.input_ids), dropped


@dataclass(frozen=True)
class Layout:
    """How much is shown of the noise levels that decide where things are.

    Attributes:
        nothing: share of what is shown that is pure noise, at the last timestep.
        noisy: share at timesteps from `least` on; the rest are at any.
        least: a timestep.
    """

    nothing: float = 0.3
    noisy: float = 0.3
    least: int = 600


class Noised(NamedTuple):
    """What the network is shown of N pictures or clips, and what it should say."""

    sample: torch.Tensor  # of the latents' shape
    timesteps: torch.Tensor  # (N,)
    noise: torch.Tensor  # of the latents' shape: what would lead from the sample back to them
    weight: torch.Tensor  # (N,)


def noised(latents: torch.Tensor, scheduler: DDIMScheduler, generator: torch.Generator, layout: Layout | None = None) -> Noised:
    """Noise latents to random timesteps.

    Args:
        latents: scaled, (N, 4, 16, 16) of pictures or (N, 4, F, 16, 16) of clips, whose frames have one timestep.
        scheduler: whose schedule.
        generator: of noise and timesteps.
        layout: look mostly at the noise levels that decide where things are; None looks at all alike.
    """
    count, last = len(latents), scheduler.config.num_train_timesteps - 1
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(last + 1, (count,), generator=generator)
    weight = torch.ones(count)
    each = (count, *(1,) * (latents.ndim - 1))
    seen = torch.ones(each)  # how much of the picture the network gets to see
    if layout is not None:
        draw = torch.rand(count, generator=generator)
        noisiest = torch.randint(layout.least, last + 1, (count,), generator=generator)
        timesteps = torch.where(draw < layout.nothing + layout.noisy, noisiest, timesteps)
        timesteps[draw < layout.nothing] = last
        seen[draw < layout.nothing] = 0.0
        weight = (1 / scheduler.alphas_cumprod[timesteps]).clamp(max=LAYOUT_WEIGHT)
    alpha = scheduler.alphas_cumprod[timesteps].sqrt().view(each)
    sigma = (1 - alpha**2).sqrt()
    sample = seen * alpha * latents + sigma * noise
    return Noised(sample, timesteps, (sample - alpha * latents) / sigma, weight)


def denoising_loss(predicted: torch.Tensor, given: Noised) -> torch.Tensor:
    """The weighted mean squared error of predicted noise, of the latents' shape."""
    return (given.weight * (predicted.float() - given.noise).square().flatten(1).mean(1)).mean()

"""Train the shapes autoencoder on crops of rendered scenes; about 35 minutes on two cores.

First on crops from anywhere, which teaches the textures; then on crops around the objects with the objects' pixels
weighted up, since they are a few percent of the picture and all of its meaning.

    python examples/shapes/train_autoencoder.py
"""

from __future__ import annotations

import argparse

import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from lora_training.cpu import fast_autocast, keep_freed_memory

from model import RUNS_DIR, build_autoencoder
from scenes import TRAIN_SEED, object_masks, render, sample_scene
from training import train

CROP = 64
KL_WEIGHT = 2e-4  # per latent element, against a mean absolute error per pixel
OBJECT_WEIGHT = 6.0


def rendered(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` training scenes and the masks of their objects, uint8 (N, 3, 128, 128) and (N, 1, 128, 128)."""
    images, masks = [], []
    for j in tqdm(range(0, count, 64), desc="render"):
        scenes = [sample_scene(TRAIN_SEED, i) for i in range(j, min(j + 64, count))]
        images.append(((render(scenes) + 1) * 127.5).round().byte())
        masks.append((object_masks(scenes) * 255).round().byte())
    return torch.cat(images), torch.cat(masks)


def object_centres(count: int) -> torch.Tensor:
    """The place of one object of each scene in pixels, (N, 2) as (y, x)."""
    boxes = object_masks([sample_scene(TRAIN_SEED, i) for i in range(count)], size=32)[:, 0]
    picks = [torch.multinomial(box.flatten(), 1, generator=torch.Generator().manual_seed(i)) for i, box in enumerate(boxes)]
    flat = torch.cat(picks)
    return torch.stack([flat // 32, flat % 32], dim=1) * 4 + 2


def crops(images: torch.Tensor, corners: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """CROP x CROP windows, scaled to [0, 1], (batch, C, CROP, CROP)."""
    windows = [images[i, :, y : y + CROP, x : x + CROP] for i, (y, x) in zip(which.tolist(), corners.tolist(), strict=True)]
    return torch.stack(windows).float() / 255


def reconstruction_loss(error: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Absolute error of pixels and of their differences, which keeps edges sharp, and a square for what is far off.

    Args:
        error: reconstruction minus picture, (N, 3, H, W).
        weight: (N, 1, H, W), 1 for the background.
    """
    pixels = (weight * (error.abs() + 3 * error.square())).mean()
    return pixels + (weight[..., 1:] * error.diff(dim=-1).abs()).mean() + (weight[..., 1:, :] * error.diff(dim=-2).abs()).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texture-steps", type=int, default=4000)
    parser.add_argument("--object-steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--images", type=int, default=8192)
    args = parser.parse_args()

    keep_freed_memory()
    torch.manual_seed(0)
    vae: AutoencoderKL = build_autoencoder()
    images, masks = rendered(args.images)
    centres = object_centres(args.images)

    def loss(x: torch.Tensor, loss_of_error, generator: torch.Generator) -> torch.Tensor:
        with fast_autocast():
            posterior = vae.encode(x).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            y = vae.decode(mean + std * torch.randn(mean.shape, generator=generator)).sample.float()
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        return loss_of_error(y - x) + KL_WEIGHT * kl

    def texture_loss(generator: torch.Generator) -> torch.Tensor:
        which = torch.randint(len(images), (args.batch,), generator=generator)
        corners = torch.randint(images.shape[-1] - CROP + 1, (args.batch, 2), generator=generator)
        x = crops(images, corners, which) * 2 - 1
        return loss(x, lambda e: e.abs().mean() + e.diff(dim=-1).abs().mean() + e.diff(dim=-2).abs().mean(), generator)

    def object_loss(generator: torch.Generator) -> torch.Tensor:
        which = torch.randint(len(images), (args.batch,), generator=generator)
        corners = centres[which] - torch.randint(CROP // 8, CROP - CROP // 8, (args.batch, 2), generator=generator)
        corners = corners.clamp(0, images.shape[-1] - CROP)
        weight = 1 + OBJECT_WEIGHT * crops(masks, corners, which)
        return loss(crops(images, corners, which) * 2 - 1, lambda e: reconstruction_loss(e, weight), generator)

    for name, steps, stage in (
        ("texture", args.texture_steps, texture_loss),
        ("object", args.object_steps, object_loss),
    ):
        checkpoint = RUNS_DIR / f"autoencoder-{name}.safetensors"
        train(vae, stage, steps=steps, peak_learning_rate=args.learning_rate, checkpoint=checkpoint)

    with torch.no_grad():
        latents = torch.cat([vae.encode(x.float() / 127.5 - 1).latent_dist.sample() for x in images[:1024].split(64)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    vae.save_pretrained(RUNS_DIR / "vae")
    print(f"scaling factor {vae.config.scaling_factor}, channel std {latents.std(dim=(0, 2, 3)).tolist()}")


if __name__ == "__main__":
    main()

"""Latents and text embeddings, computed once and kept on disk, so that training runs the UNet alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from pcm_scheduler.lora_file import write_safetensors

from ..backbones import StableDiffusion15
from ..config import DataConfig
from .captioned_images import CaptionedImage, find_images, load_image


@dataclass(frozen=True)
class TrainingData:
    """What a step draws from.

    Attributes:
        latent_means, latent_stds: (N, 4, h, w), scaled latents, fp16.
        prompt_embeds: (N, tokens, width), fp16.
        empty_embeds: (1, tokens, width), of the empty prompt, for guidance.
    """

    latent_means: torch.Tensor
    latent_stds: torch.Tensor
    prompt_embeds: torch.Tensor
    empty_embeds: torch.Tensor

    def __len__(self) -> int:
        return len(self.latent_means)


def _fingerprint(images: Sequence[CaptionedImage], config: DataConfig, model_path: str) -> str:
    """Changes when a picture, a caption, the resolution or the model does."""
    files = [(str(i.path), *_stamp(i.path), i.caption) for i in images]
    weights = [(str(path), *_stamp(path)) for path in sorted(Path(model_path).rglob("*.safetensors"))]  # none for a hub id
    return hashlib.sha256(json.dumps([files, config.resolution, model_path, weights]).encode()).hexdigest()[:16]


def _stamp(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


def load_training_data(config: DataConfig, backbone: StableDiffusion15, model_path: str, cache: Path) -> TrainingData:
    """Read the folder and encode it, or read what an earlier run encoded.

    Args:
        config: the folder and the resolution.
        backbone: encodes; on whatever device it is.
        model_path: part of the cache's name, so that models do not share latents.
        cache: the folder to keep it in.

    Raises:
        ValueError: unreadable pictures; all of them are named at once.
    """
    images = find_images(Path(config.folder))
    path = cache / f"{_fingerprint(images, config, model_path)}.safetensors"
    if not path.exists():
        _encode(images, config, backbone, path)
    return TrainingData(**load_file(path))


def _encode(images: Sequence[CaptionedImage], config: DataConfig, backbone: StableDiffusion15, path: Path) -> None:
    device = backbone.unet.device
    parts: dict[str, list[torch.Tensor]] = {"latent_means": [], "latent_stds": [], "prompt_embeds": []}
    broken: list[str] = []
    for start in tqdm(range(0, len(images), config.encode_batch_size), desc="encode"):
        pixels, captions = [], []
        for image in images[start : start + config.encode_batch_size]:
            try:
                pixels.append(load_image(image.path, config.resolution))
                captions.append(image.caption)
            except ValueError as error:
                broken.append(str(error))
        if broken or not pixels:
            continue  # go on reading, to name every broken file in one message
        mean, std = backbone.encode_images(torch.stack(pixels).to(device))
        parts["latent_means"].append(mean.half().cpu())
        parts["latent_stds"].append(std.half().cpu())
        parts["prompt_embeds"].append(backbone.encode_prompts(captions).half().cpu())
    if broken:
        raise ValueError(f"{len(broken)} of {len(images)} pictures cannot be used:\n" + "\n".join(broken[:20]))
    tensors = {name: torch.cat(part) for name, part in parts.items()}
    tensors["empty_embeds"] = backbone.encode_prompts([""]).half().cpu()
    write_safetensors(tensors, path)

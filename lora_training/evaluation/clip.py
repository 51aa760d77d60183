"""CLIP from a folder on disk, in open_clip's format or transformers'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from ..local_weights import library, local_folder

OPEN_CLIP_CONFIG = "open_clip_config.json"
_SOURCE = "Put a download of a CLIP repository there, such as laion/CLIP-ViT-B-32-laion2B-s34B-b79K."


def to_bytes(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures as they are saved: uint8 (N, 3, H, W) from (N, 3, H, W) in [-1, 1]; values outside are clamped.

    Raises:
        ValueError: another shape, or integers.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3 or not pictures.is_floating_point():
        raise ValueError(
            f"Pictures must be floating point (N, 3, H, W) in [-1, 1]; got {pictures.dtype} {tuple(pictures.shape)}."
        )
    return ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().byte()


@dataclass(frozen=True)
class Clip:
    """Two towers into one space (arXiv 2103.00020).

    Attributes:
        pictures: (N, 3, H, W) in [-1, 1] -> (N, D), not normalised.
        texts: N texts -> (N, D), not normalised.
        logit_scale: what the cosine is multiplied with before the softmax.
    """

    pictures: Callable[[torch.Tensor], torch.Tensor]
    texts: Callable[[Sequence[str]], torch.Tensor]
    logit_scale: float

    def cosine(self, pictures: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        """Of each picture with its own text, (N,) in [-1, 1]."""
        return F.cosine_similarity(self.pictures(pictures), self.texts(texts))


def load_clip(path: str, setting: str, device: torch.device | str = "cpu") -> Clip:
    """The CLIP of a folder: open_clip's if it has `open_clip_config.json`, else transformers'; in float32.

    Args:
        path: the folder.
        setting: that names it, for messages.
        device: where it runs.

    Raises:
        FileNotFoundError: the folder or a file in it is missing; which.
        ValueError: open_clip is needed and not installed.
    """
    if path and (Path(path) / OPEN_CLIP_CONFIG).is_file():
        open_clip = library("open_clip", setting, "open_clip_torch")
        folder = local_folder(path, setting, "a CLIP of open_clip", ("open_clip_*model.*",), _SOURCE)
        name = f"local-dir:{folder}"
        model, _, preprocess = open_clip.create_model_and_transforms(name)
        return of_open_clip(model, preprocess, open_clip.get_tokenizer(name), device)
    files = ("config.json", "*.safetensors", "preprocessor_config.json", "tokenizer*.json")
    return _of_transformers(local_folder(path, setting, "a CLIP of transformers or open_clip", files, _SOURCE), device)


def of_open_clip(
    model: Any,
    preprocess: Callable[..., torch.Tensor],
    tokenizer: Callable[[list[str]], torch.Tensor],
    device: torch.device | str,
) -> Clip:
    """open_clip's model behind its own preprocessing of PIL pictures."""
    model.to(device).eval().requires_grad_(False)

    def pictures(batch: torch.Tensor) -> torch.Tensor:
        prepared = torch.stack([preprocess(to_pil_image(picture)) for picture in to_bytes(batch).cpu()])
        return model.encode_image(prepared.to(device)).float()

    def texts(batch: Sequence[str]) -> torch.Tensor:
        return model.encode_text(tokenizer(list(batch)).to(device)).float()

    return Clip(pictures, texts, model.logit_scale.exp().item())


def _of_transformers(folder: Path, device: torch.device | str) -> Clip:
    model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model.to(device).eval().requires_grad_(False)

    def pictures(batch: torch.Tensor) -> torch.Tensor:
        prepared = processor(images=list(to_bytes(batch).cpu()), return_tensors="pt").to(device)
        return model.visual_projection(model.vision_model(**prepared).pooler_output)

    def texts(batch: Sequence[str]) -> torch.Tensor:
        longest = model.config.text_config.max_position_embeddings
        tokens = tokenizer(list(batch), padding=True, truncation=True, max_length=longest, return_tensors="pt").to(device)
        return model.text_projection(model.text_model(**tokens).pooler_output)

    return Clip(pictures, texts, model.logit_scale.exp().item())

"""What differs between models, one file each, behind the interface that `sd15.StableDiffusion15` shows."""

from __future__ import annotations

from ..config import ModelConfig
from .sd15 import StableDiffusion15

FAMILIES = {"sd15": StableDiffusion15}


def load_backbone(config: ModelConfig) -> StableDiffusion15:
    """The backbone of a model's family, frozen, in float32 on the CPU."""
    return FAMILIES[config.family].load(config.path)

"""What differs between models, one file each, behind the interface in `base.Backbone`."""

from __future__ import annotations

from ..config import ModelConfig
from .animatediff import AnimateDiff
from .base import Backbone
from .conditioning import Conditioning
from .sd15 import StableDiffusion15
from .sdxl import StableDiffusionXL

__all__ = ["FAMILIES", "Backbone", "Conditioning", "load_backbone"]

FAMILIES: dict[str, type[Backbone]] = {family.family: family for family in (StableDiffusion15, StableDiffusionXL, AnimateDiff)}


def load_backbone(config: ModelConfig) -> Backbone:
    """The backbone of a model's family, frozen, in float32 on the CPU."""
    return FAMILIES[config.family].load(config)

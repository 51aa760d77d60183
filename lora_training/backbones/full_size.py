"""The true shapes of the families' UNets, as diffusers' configurations: for tests and dry runs without anybody's weights."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models import UNetMotionModel

# What differs from the defaults of UNet2DConditionModel and UNetMotionModel, which are SD1.x's but for the width of the text.
UNET_CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768},
    "sdxl": {
        "sample_size": 128, "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "animatediff": {"sample_size": 64, "cross_attention_dim": 768, "use_motion_mid_block": False},  # motion modules v3
}  # fmt: skip
ADAPTED_MODULES = {"sd15": 278, "sdxl": 788, "animatediff": 478}  # by PCM's 14 kinds of target


def full_size_unet(family: str) -> UNet2DConditionModel | UNetMotionModel:
    """A family's UNet with random weights, or on the meta device with none."""
    return (UNetMotionModel if family == "animatediff" else UNet2DConditionModel)(**UNET_CONFIGS[family])

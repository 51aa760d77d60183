"""The true shapes of the families' UNets, as diffusers' configurations: for tests and dry runs without anybody's weights."""

from __future__ import annotations

from typing import Any

# What differs from UNet2DConditionModel's defaults, which are SD1.x's but for the width of the text.
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
}  # fmt: skip
ADAPTED_MODULES = {"sd15": 278, "sdxl": 788}  # by PCM's 14 kinds of target

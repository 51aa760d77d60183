"""Pipelines of the families with random weights: as large as people's, and narrow ones that a CPU trains."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models import UNetMotionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_training.backbones.full_size import UNET_CONFIGS

# Narrow networks are as deep as the true ones, a fifth as wide: as many operations, each of them small.
_WIDTHS = {"sd15": (64, 128, 256, 256), "sdxl": (64, 128, 256), "animatediff": (64, 128, 256, 256)}
_TEXT = {
    False: {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768},
    True: {"hidden_size": 160, "intermediate_size": 640, "num_attention_heads": 5, "projection_dim": 160},
}
_TEXT_2 = {
    False: {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "projection_dim": 1280},
    True: {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "projection_dim": 256},
}
_VAE_WIDTHS = {False: (128, 256, 512, 512), True: (32, 64, 128, 128)}
LATENTS = {"sd15": 64, "sdxl": 128, "animatediff": 64}  # a side, of full size; 512 and 1024 pixels
NARROW_LATENTS = 16


def latent_side(family: str, narrow: bool) -> int:
    """Of the pictures that benchmarks train on and draw."""
    return NARROW_LATENTS if narrow else LATENTS[family]


def build_unet(family: str, narrow: bool = False) -> UNet2DConditionModel | UNetMotionModel:
    """Float32, on torch's default device."""
    config: dict[str, Any] = dict(UNET_CONFIGS[family])
    if narrow:
        widths = _TEXT[True]["hidden_size"], _TEXT_2[True]["hidden_size"]
        config |= {"block_out_channels": _WIDTHS[family], "cross_attention_dim": widths[0], "sample_size": NARROW_LATENTS}
        if family == "sdxl":
            config |= {"attention_head_dim": (1, 2, 4), "cross_attention_dim": sum(widths)}
            config["projection_class_embeddings_input_dim"] = widths[1] + 6 * config["addition_time_embed_dim"]
    return (UNetMotionModel if family == "animatediff" else UNet2DConditionModel)(**config)


def build_pipeline(family: str, narrow: bool = False, device: str = "cpu") -> DiffusionPipeline:
    """All parts, float32, on the device, with the same random weights every time.

    Args:
        family: sd15, sdxl or animatediff.
        narrow: a fifth of the true widths.
        device: cpu or cuda.
    """
    torch.manual_seed(0)
    with torch.device(device):
        unet = build_unet(family, narrow).eval()
        vae = AutoencoderKL(
            block_out_channels=_VAE_WIDTHS[narrow], layers_per_block=2, latent_channels=4, norm_num_groups=32,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            sample_size=8 * latent_side(family, narrow), scaling_factor=0.13025 if family == "sdxl" else 0.18215,
        ).eval()  # fmt: skip
        text_encoder = CLIPTextModel(_text_config(12, _TEXT[narrow])).eval()
        second = CLIPTextModelWithProjection(_text_config(32, _TEXT_2[narrow])).eval() if family == "sdxl" else None
    scheduler = DDIMScheduler(
        beta_schedule="linear" if family == "animatediff" else "scaled_linear", beta_start=0.00085, beta_end=0.012,
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing",
    )  # fmt: skip
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": _tokenizer(), "unet": unet, "scheduler": scheduler}
    if family == "animatediff":
        pipe = AnimateDiffPipeline(**parts, motion_adapter=None)
    elif family == "sdxl":
        pipe = StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=_tokenizer(), add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _text_config(layers: int, widths: dict[str, int]) -> CLIPTextConfig:
    return CLIPTextConfig(num_hidden_layers=layers, bos_token_id=0, eos_token_id=1, pad_token_id=1, **widths)


def _tokenizer() -> CLIPTokenizer:
    """Of letters: how many tokens a text has does not matter, for all are padded to 77."""
    letters = [f"{c}{end}" for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocab = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)

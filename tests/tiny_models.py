"""Real diffusers classes at tiny sizes with random weights: what a pipeline does is the same at every size."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models import UNetMotionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pcm_scheduler.lora_file import adapter_tensors
from pcm_scheduler.lora_layouts import LoraTensors

BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def tokenizer() -> CLIPTokenizer:
    letters = [f"{c}{end}" for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocab = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=54, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1, projection_dim=32,
    )  # fmt: skip


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32), norm_num_groups=8, latent_channels=4, sample_size=32,
    ).eval()  # fmt: skip


def sdxl_pipeline() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        **{**BLOCKS, "cross_attention_dim": 64}, sample_size=16, attention_head_dim=(2, 4), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae(), unet=unet.eval(), scheduler=DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1),
        text_encoder=CLIPTextModel(text_config()).eval(), text_encoder_2=CLIPTextModelWithProjection(text_config()).eval(),
        tokenizer=tokenizer(), tokenizer_2=tokenizer(), add_watermarker=False,
    )  # fmt: skip


def image_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**BLOCKS, sample_size=8, attention_head_dim=2).eval()


def motion_adapter(**shape) -> MotionAdapter:
    torch.manual_seed(1)
    of_tiny = {"motion_layers_per_block": 1, "motion_norm_num_groups": 2, "motion_num_attention_heads": 4}
    return MotionAdapter(block_out_channels=(32, 64), **(of_tiny | shape)).eval()


def motion_parts(**shape) -> dict:
    unet, adapter = image_unet(), motion_adapter(**shape)
    return {
        "vae": vae(), "text_encoder": CLIPTextModel(text_config()).eval(), "tokenizer": tokenizer(),
        "unet": UNetMotionModel.from_unet2d(unet, adapter).eval(), "motion_adapter": adapter,
    }  # fmt: skip


def image_pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=vae(), text_encoder=CLIPTextModel(text_config()).eval(), tokenizer=tokenizer(), unet=image_unet(),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def random_lora(unet, rank=4, alpha=2.0) -> LoraTensors:
    """On every linear module of attentions and feed-forward layers, motion modules' too; numbers that fp16 holds exactly."""
    drawn, tensors = torch.Generator().manual_seed(2), {}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear) and ".transformer_blocks." in name:
            for key, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
                numbers = (torch.randn(shape, generator=drawn) * 100).round() / 1024
                tensors[f"{name}.lora_{key}.weight"] = numbers
    return adapter_tensors(tensors, {key.rpartition(".lora_")[0]: alpha for key in tensors})

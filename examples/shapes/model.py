"""The parts of the shapes models in diffusers' and transformers' own classes, and the folders they are saved in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    MotionAdapter,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

HERE = Path(__file__).parent
MODEL_DIR = HERE / "model"  # what ships
XL_MODEL_DIR = HERE / "model_xl"  # its sibling of SDXL's shape
MOTION_DIR = HERE / "motion_adapter"  # AnimateDiff's motion modules for it
RUNS_DIR = HERE / "runs"  # what training writes; not tracked
MAX_TOKENS = 40
TEXT_WIDTH = 160
_QUERY_GAIN = 2.0  # of motion modules: of 16 frames the own one then weighs a fifth to a third at the beginning
SIZE_WIDTH = 32  # of the embedding of each of the six numbers of SDXL's micro-conditioning


def build_autoencoder() -> AutoencoderKL:
    """8x downsampling to 4 latent channels, as in SD1.5, at a thirtieth of the size."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
    )


def build_tokenizer(phrases: list[str]) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer learned from the caption grammar: its words are one token, any other text still works."""
    empty = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    tokenizer = empty.train_new_from_iterator(phrases * 10, vocab_size=1000)
    tokenizer.model_max_length = MAX_TOKENS
    return tokenizer


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Of every text encoder here."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=3 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(text_config(tokenizer))


def build_xl_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """SDXL's two: the UNet reads the penultimate layers of both and the pooled, projected output of the second."""
    return CLIPTextModel(text_config(tokenizer)), CLIPTextModelWithProjection(text_config(tokenizer))


def build_unet(cross_attention_dim: int = TEXT_WIDTH, **config: Any) -> UNet2DConditionModel:
    """SD1.5's UNet in small: cross attention at half resolution (8 x 8) and in the middle."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 112, 112),
        layers_per_block=1,
        attention_head_dim=4,  # the number of heads, by diffusers' naming of old
        cross_attention_dim=cross_attention_dim,
        norm_num_groups=16,
        **config,
    )


def build_xl_unet() -> UNet2DConditionModel:
    """The same with what SDXL adds: text twice as wide, and an embedding of the pooled text and of the picture's frame."""
    return build_unet(
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_WIDTH,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * SIZE_WIDTH,
    )


def build_motion_adapter() -> MotionAdapter:
    """AnimateDiff's motion modules in its v2 layout, with one in the middle; as they begin, pictures are what they were.

    A frame's position is added to what attention sees and not to what passes by it, so attention spread evenly over frames, as
    it usually begins, tells none of them where it is. Here queries begin as keys, so that frames attend to themselves most.
    """
    adapter = MotionAdapter(
        block_out_channels=(64, 112, 112),
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=16,
    )
    for name, module in adapter.named_modules():
        if isinstance(module, Attention):
            nn.init.orthogonal_(module.to_q.weight, gain=_QUERY_GAIN)
            module.to_k.load_state_dict(module.to_q.state_dict())
        elif name.endswith(".proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return adapter


def build_scheduler() -> DDIMScheduler:
    """SD1.5's noise schedule, with DDIM set as a latent model needs it."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def assemble_pipeline(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The parts as one pipeline."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def assemble_xl_pipeline(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    text_encoder_2: CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
) -> StableDiffusionXLPipeline:
    """The parts as one pipeline; both text encoders read the same tokens."""
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        text_encoder_2=text_encoder_2.eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet.eval(),
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def load_pipeline(path: Path | str | None = None) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """A shapes pipeline, of either kind, from its folder (default: `MODEL_DIR`), in float32."""
    folder = path or MODEL_DIR
    if DiffusionPipeline.load_config(folder)["_class_name"] == StableDiffusionXLPipeline.__name__:
        return StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False).to(torch.float32)
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(torch.float32)


def fingerprint(weights: Iterable[Path]) -> str:
    """Of files: changes when the weights in them do."""
    digest = hashlib.sha256()
    for path in weights:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]

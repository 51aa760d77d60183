"""Stable Diffusion 1.x, and every model of its shape: one text encoder, no extra conditioning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline

from .base import Backbone
from .conditioning import Conditioning


class StableDiffusion15(Backbone):
    """Conditioning: `prompt_embeds` (N, tokens, width)."""

    family = "sd15"
    pipeline_class = StableDiffusionPipeline
    load_arguments = {"safety_checker": None}  # noqa: RUF012
    addition_embed_type = None

    @property
    def text_encoders(self) -> tuple[torch.nn.Module, ...]:
        return (self.pipe.text_encoder,)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        device = self.pipe.text_encoder.device
        embeds, _ = self.pipe.encode_prompt(list(prompts), device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds}

    def predict(self, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return self.unet(sample, timestep, encoder_hidden_states=conditioning["prompt_embeds"], return_dict=False)[0]

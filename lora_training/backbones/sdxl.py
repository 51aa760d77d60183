"""Stable Diffusion XL, and every model of its shape: two text encoders, a pooled embedding, and the picture's frame."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionXLPipeline

from .base import Backbone
from .conditioning import Conditioning


class StableDiffusionXL(Backbone):
    """Conditioning: `prompt_embeds` (N, tokens, width), `pooled_prompt_embeds` (N, width), `time_ids` (N, 6)."""

    family = "sdxl"
    pipeline_class = StableDiffusionXLPipeline
    load_arguments = {"add_watermarker": False}  # noqa: RUF012
    addition_embed_type = "text_time"

    @property
    def text_encoders(self) -> tuple[torch.nn.Module, ...]:
        return (self.pipe.text_encoder, self.pipe.text_encoder_2)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        device = self.pipe.text_encoder_2.device
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def empty_conditioning(self) -> Conditioning:
        """Zeros where the pipeline uses zeros for an empty prompt, as SDXL's own does."""
        encoded = self.encode_prompts([""])
        zeros = self.pipe.config.force_zeros_for_empty_prompt
        return {name: torch.zeros_like(tensor) for name, tensor in encoded.items()} if zeros else encoded

    def frame_conditioning(
        self, original_size: tuple[int, int], crop: tuple[int, int], target_size: tuple[int, int]
    ) -> Conditioning:
        """SDXL's micro-conditioning (arXiv 2307.01952, section 2.2)."""
        return {"time_ids": torch.tensor([[*original_size, *crop, *target_size]], dtype=torch.float32)}

    def predict(self, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        added = {"text_embeds": conditioning["pooled_prompt_embeds"], "time_ids": conditioning["time_ids"]}
        return self.unet(
            sample,
            timestep,
            encoder_hidden_states=conditioning["prompt_embeds"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

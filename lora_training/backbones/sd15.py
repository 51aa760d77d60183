"""Stable Diffusion 1.x, and every model of its shape: one text encoder, no extra conditioning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import CLIPTextModel, CLIPTokenizer

from pcm_scheduler.noise_schedule import alphas_and_sigmas, check_prediction_type

from ..config import LoraConfig

ADAPTER = "student"


class StableDiffusion15:
    """A frozen model with one trainable adapter. The teacher is the same UNet with the adapter switched off."""

    family = "sd15"

    def __init__(self, pipe: StableDiffusionPipeline):
        self.vae: AutoencoderKL = pipe.vae
        self.text_encoder: CLIPTextModel = pipe.text_encoder
        self.tokenizer: CLIPTokenizer = pipe.tokenizer
        self.unet: UNet2DConditionModel = pipe.unet
        for part in (self.vae, self.text_encoder, self.unet):
            part.eval().requires_grad_(False)
        self.adapted = False
        self.prediction_type: str = pipe.scheduler.config.prediction_type
        check_prediction_type(self.prediction_type)
        self.alphas, self.sigmas = alphas_and_sigmas(pipe.scheduler.alphas_cumprod)

    @classmethod
    def load(cls, path: str) -> StableDiffusion15:
        """From a diffusers folder, a hub id, or a single `.safetensors` checkpoint."""
        if path.endswith(".safetensors"):
            pipe = StableDiffusionPipeline.from_single_file(path)
        else:
            if Path(path).exists() and not (Path(path) / "model_index.json").is_file():
                raise ValueError(f"{path} is not a diffusers model folder: it has no model_index.json.")
            pipe = StableDiffusionPipeline.from_pretrained(path, safety_checker=None)
        return cls(pipe.to(torch.float32))

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return len(self.alphas)

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of scaled latents, (N, 4, H/8, W/8) each, for images (N, 3, H, W) in [-1, 1]."""
        posterior = self.vae.encode(images).latent_dist
        return posterior.mean * self.vae.config.scaling_factor, posterior.std * self.vae.config.scaling_factor

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Text embeddings (N, tokens, width)."""
        ids = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return self.text_encoder(ids.to(self.text_encoder.device)).last_hidden_state

    def predict(self, sample: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """The UNet's output for x_t (N, 4, h, w) at timesteps (N,)."""
        return self.unet(sample, timestep, encoder_hidden_states=prompt_embeds, return_dict=False)[0]

    def add_adapter(self, config: LoraConfig, seed: int) -> list[torch.nn.Parameter]:
        """Attach the student's LoRA; returns its parameters, the only trainable ones."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.unet.add_adapter(
                PeftLoraConfig(
                    r=config.rank,
                    lora_alpha=config.rank if config.alpha is None else config.alpha,
                    target_modules=list(config.target_modules),
                    init_lora_weights=True,
                ),
                adapter_name=ADAPTER,
            )
        self.adapted = True
        return [p for p in self.unet.parameters() if p.requires_grad]

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Within it the adapter, if there is one yet, is off and `predict` is the teacher, bit for bit."""
        if not self.adapted:
            yield
            return
        self.unet.disable_adapters()
        try:
            yield
        finally:
            self.unet.enable_adapters()

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors under PEFT's names."""
        return get_peft_model_state_dict(self.unet, adapter_name=ADAPTER)

    def load_adapter_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """The reverse of `adapter_state`."""
        set_peft_model_state_dict(self.unet, tensors, adapter_name=ADAPTER)

    def adapter_alphas(self) -> dict[str, float]:
        """lora_alpha of each adapted module path."""
        return {n: m.lora_alpha[ADAPTER] for n, m in self.unet.named_modules() if isinstance(m, LoraLayer)}

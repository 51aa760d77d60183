"""What every backbone shares: loading, encoding, and the roles its UNet plays in turn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import DiffusionPipeline

from pcm_scheduler.noise_schedule import alphas_and_sigmas, check_prediction_type

from ..config import ModelConfig
from .conditioning import Conditioning

if TYPE_CHECKING:
    from ..students import Student


class Backbone(ABC):
    """A frozen model, and what is trained on it once a `student` is there.

    A subclass says which pipeline it is the body of, how prompts become conditioning, and how the UNet takes it.
    """

    family: ClassVar[str]
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    load_arguments: ClassVar[dict[str, Any]] = {}
    addition_embed_type: ClassVar[str | None]  # of the UNet's configuration: what tells the families apart

    def __init__(self, pipe: Any, prediction_type: str | None = None):
        self.pipe = pipe
        self.vae, self.unet = pipe.vae, pipe.unet
        self._check_family()
        for part in (self.vae, self.unet, *self.text_encoders):
            part.eval().requires_grad_(False)
        self.student: Student | None = None  # set by a Student that is built on this
        self.prediction_type: str = prediction_type or pipe.scheduler.config.prediction_type
        check_prediction_type(self.prediction_type)
        self.alphas, self.sigmas = alphas_and_sigmas(pipe.scheduler.alphas_cumprod)
        if self.prediction_type == "epsilon" and self.alphas[-1] == 0:
            raise ValueError(
                "This model's schedule ends at zero signal (zero terminal SNR), where epsilon says nothing about the picture. "
                "Such models predict v: set model.prediction_type to v_prediction."
            )

    @classmethod
    def load(cls, config: ModelConfig) -> Backbone:
        """From a diffusers folder, a hub id, or a single `.safetensors` checkpoint; float32, on the CPU.

        Raises:
            ValueError: not a model, or one of another family.
        """
        path = config.path
        if path.endswith(".safetensors"):
            if not Path(path).is_file():
                raise ValueError(f"model.path {path} does not exist.")
            pipe = cls.pipeline_class.from_single_file(path, config=config.single_file_config or None, **cls.load_arguments)
        else:
            if Path(path).exists() and not (Path(path) / "model_index.json").is_file():
                raise ValueError(f"model.path {path} is not a diffusers model folder: it has no model_index.json.")
            pipe = cls.pipeline_class.from_pretrained(path, **cls.load_arguments)
        pipe.to(torch.float32)
        for lora in config.teacher_loras:
            if lora.endswith(".safetensors") and not Path(lora).is_file():
                raise ValueError(f"model.teacher_loras: {lora} does not exist.")
            pipe.load_lora_weights(lora)
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        return cls(pipe, config.prediction_type)

    def _check_family(self) -> None:
        found = self.unet.config.addition_embed_type
        if found != self.addition_embed_type:
            families = {sub.addition_embed_type: sub.family for sub in Backbone.__subclasses__()}
            raise ValueError(
                f"model.family is {self.family}, but this UNet is of {families.get(found, 'no family we train')} (its "
                f"addition_embed_type is {found})."
            )

    @property
    @abstractmethod
    def text_encoders(self) -> tuple[torch.nn.Module, ...]:
        """What `encode_prompts` runs."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """What the UNet is told of each prompt; every tensor (N, ...)."""

    def empty_conditioning(self) -> Conditioning:
        """What the unguided half is told; every tensor (1, ...)."""
        return self.encode_prompts([""])

    def frame_conditioning(
        self, original_size: tuple[int, int], crop: tuple[int, int], target_size: tuple[int, int]
    ) -> Conditioning:
        """What the UNet is told of a picture's frame, every tensor (1, ...); nothing unless the family has it.

        Args:
            original_size: (height, width) of the file.
            crop: (top, left) of what was kept, in pixels after scaling.
            target_size: (height, width) trained on.
        """
        return {}

    @abstractmethod
    def predict(self, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The UNet's output for x_t (N, 4, h, w) at timesteps (N,)."""

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return len(self.alphas)

    @property
    def latent_scale(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of scaled latents, (N, 4, H/8, W/8) each, for images (N, 3, H, W) in [-1, 1].

        In float32 whatever the run's precision: SDXL's own VAE overflows in fp16.
        """
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        return posterior.mean * self.vae.config.scaling_factor, posterior.std * self.vae.config.scaling_factor

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (N, 3, 8 h, 8 w), float32, of scaled latents (N, 4, h, w), with gradients to them.

        In float32, as `encode_images`. The VAE, left in main memory once pictures are encoded, comes to where the latents are.
        """
        self.vae.to(latents.device)
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Within it `predict` is the teacher, bit for bit; it always is while nothing is trained."""
        with self.student.teacher() if self.student else nullcontext():
            yield

    @contextmanager
    def target(self) -> Iterator[None]:
        """Within it `predict` is the student as the loss's target: its running average if it keeps one, else itself."""
        with self.student.target() if self.student else nullcontext():
            yield

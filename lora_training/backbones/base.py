"""What every backbone shares: loading, encoding, and the roles its UNet plays in turn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import SafetensorError

from pcm_scheduler.noise_schedule import alphas_and_sigmas, check_prediction_type

from ..config import ModelConfig
from ..frames import batch_as_frames, frames_as_batch
from .conditioning import Conditioning

if TYPE_CHECKING:
    from ..students import Student

DECODED_AT_ONCE = 16  # pictures, or frames of clips


def local_variant(folder: Path) -> str | None:
    """`fp16` for a local model of which only these files were downloaded; None for any other."""
    files = list((folder / "unet").glob("*.safetensors"))
    return "fp16" if files and all(".fp16" in file.name for file in files) else None


class Backbone(ABC):
    """A frozen model, and what is trained on it once a `student` is there.

    A subclass says which pipeline it is the body of, how prompts become conditioning, and how the UNet takes it.
    """

    family: ClassVar[str]
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    load_arguments: ClassVar[dict[str, Any]] = {}
    addition_embed_type: ClassVar[str | None]  # of the UNet's configuration: what tells the families apart
    sample_dimensions: ClassVar[int] = 4  # of x_t: (N, 4, h, w), or with frames (N, 4, F, h, w)

    def __init__(self, pipe: Any, prediction_type: str | None = None, beta_schedule: str | None = None):
        self.pipe = pipe
        self.vae, self.unet = pipe.vae, pipe.unet
        self.alone = Lock()  # a tokenizer may refuse to work in two threads, such as a stream's and validation's
        self._check_family(pipe.unet)
        if beta_schedule is not None:
            own = pipe.scheduler.config
            pipe.scheduler = pipe.scheduler.from_config(own, beta_schedule=beta_schedule, trained_betas=None)
        self._schedule_is_chosen = beta_schedule is not None
        for part in (self.vae, self.unet, *self.text_encoders):
            part.eval().requires_grad_(False)
        self.student: Student | None = None  # set by a Student that is built on this
        self.prediction_type: str = prediction_type or pipe.scheduler.config.prediction_type
        check_prediction_type(self.prediction_type)
        pipe.scheduler.register_to_config(prediction_type=self.prediction_type)  # for whoever samples with the pipeline
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
        return cls(cls._load_pipe(config), config.prediction_type, config.beta_schedule)

    @classmethod
    def _load_pipe(cls, config: ModelConfig) -> Any:
        path = config.path
        if path.endswith(".safetensors"):
            if not Path(path).is_file():
                raise ValueError(f"model.path {path} does not exist.")
            pipe = cls.pipeline_class.from_single_file(path, config=config.single_file_config or None, **cls.load_arguments)
        else:
            if Path(path).exists() and not (Path(path) / "model_index.json").is_file():
                raise ValueError(f"model.path {path} is not a diffusers model folder: it has no model_index.json.")
            variant = config.variant or local_variant(Path(path))
            pipe = cls.pipeline_class.from_pretrained(path, variant=variant, use_safetensors=True, **cls.load_arguments)
        pipe.to(torch.float32)
        for lora in config.teacher_loras:
            if lora.endswith(".safetensors") and not Path(lora).is_file():
                raise ValueError(f"model.teacher_loras: {lora} does not exist.")
            try:
                # by folder and name: offline, early versions of diffusers do not look into what they are given
                file = {"weight_name": Path(lora).name} if lora.endswith(".safetensors") else {}
                pipe.load_lora_weights(str(Path(lora).parent) if file else lora, use_safetensors=True, **file)
            except SafetensorError as error:
                raise ValueError(
                    f"model.teacher_loras: {lora} is not a safetensors file, or not a whole one: {error}"
                ) from error
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        return pipe

    @classmethod
    def _check_family(cls, unet: Any) -> None:
        found = unet.config.addition_embed_type
        if found != cls.addition_embed_type:
            families = {sub.addition_embed_type: sub.family for sub in Backbone.__subclasses__()}
            raise ValueError(
                f"model.family is {cls.family}, but this UNet is of {families.get(found, 'no family we train')} (its "
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
        """The UNet's output for x_t (N, 4, h, w) at timesteps (N,); with frames x_t is (N, 4, F, h, w)."""

    def check_sample(self, shape: Sequence[int]) -> None:
        """Refuse data that `predict` cannot take; `shape` is that of one sample's latents.

        Raises:
            ValueError: pictures where there must be clips, or the reverse, or too long a clip.
        """
        if len(shape) + 1 != self.sample_dimensions:
            wanted, found = ("clips", "pictures") if self.sample_dimensions == 5 else ("pictures", "clips")
            raise ValueError(f"model.family {self.family} is trained on {wanted}, and data.path holds {found}.")

    @property
    def betas(self) -> dict[str, Any]:
        """What the adapter's header says of the noise schedule; nothing where that is the model's own."""
        config = self.pipe.scheduler.config
        if not self._schedule_is_chosen or config.trained_betas is not None:
            return {}
        return {name: config[name] for name in ("beta_schedule", "beta_start", "beta_end")}

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations of the blocks of UNet and VAE again in the backward pass instead of keeping them."""
        self.vae.enable_gradient_checkpointing()
        self.unet.enable_gradient_checkpointing()
        self.unet.train()  # diffusers checkpoints in training mode only

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

    def decode_latents(self, latents: torch.Tensor, at_once: int = DECODED_AT_ONCE) -> torch.Tensor:
        """Pictures (N, 3, H, W), float32, of scaled latents (N, 4, h, w), with gradients to them; clips from clips.

        In float32, as `encode_images`. The VAE, left in main memory once pictures are encoded, comes to where the latents are.

        Args:
            latents: of pictures, or of clips, (N, 4, F, h, w), which come back as (N, 3, F, H, W).
            at_once: pictures or frames in a call of the VAE.
        """
        self.vae.to(latents.device)
        scaled = frames_as_batch(latents).to(self.vae.dtype) / self.vae.config.scaling_factor
        with torch.autocast(latents.device.type, enabled=False):
            decoded = torch.cat([self.vae.decode(part).sample for part in scaled.split(at_once)])
        return batch_as_frames(decoded, len(latents)) if latents.ndim == 5 else decoded

    def sample_latents(self, noise: torch.Tensor, **call: Any) -> torch.Tensor:
        """The pipeline's result for initial noise, still in latents; `call` is what the pipeline is called with."""
        return self.pipe(latents=noise, output_type="latent", **call).images

    @torch.no_grad()
    def pictures(self, latents: torch.Tensor) -> list[Image.Image]:
        """A picture to look at of each of the scaled latents (N, ...); decoded one at a time."""
        return self.pipe.image_processor.postprocess(self.decode_latents(latents, at_once=1).cpu())

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

"""What every backbone shares: a frozen model with one trainable adapter, teacher and student in one UNet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from pcm_scheduler.noise_schedule import alphas_and_sigmas, check_prediction_type

from ..config import LoraConfig, ModelConfig
from .conditioning import Conditioning

STUDENT, TARGET = "student", "target"


class Backbone(ABC):
    """A frozen model with one trainable adapter. The teacher is the same UNet with the adapter switched off.

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
        self.adapted = self.averaged_target = False
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

    def add_adapter(self, config: LoraConfig, seed: int, averaged_target: bool = False) -> dict[str, torch.nn.Parameter]:
        """Attach the student's LoRA; returns its parameters, the only trainable ones, by name.

        Args:
            config: rank, alpha, dropout, targets.
            seed: of the initial weights.
            averaged_target: keep a second adapter, a running average of the first, for `target`.
        """
        peft_config = PeftLoraConfig(
            r=config.rank,
            lora_alpha=config.rank if config.alpha is None else config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(config.target_names),
            use_dora=config.dora,
            init_lora_weights=True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.unet.add_adapter(peft_config, adapter_name=STUDENT)
            if averaged_target:
                self.unet.add_adapter(peft_config, adapter_name=TARGET)
        self.unet.set_adapter(STUDENT)
        for name, p in self.unet.named_parameters():
            if f".{STUDENT}." in name or f".{TARGET}." in name:
                p.data = p.data.float()  # whatever the frozen weights are: steps are too small for half precision
        self.adapted, self.averaged_target = True, averaged_target
        if averaged_target:
            self.update_target(decay=0.0)
        return self._parameters_of(STUDENT)

    def _parameters_of(self, adapter: str) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.unet.named_parameters() if f".{adapter}." in name}

    @property
    def target_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Of the running average, by name; none without one."""
        return self._parameters_of(TARGET) if self.averaged_target else {}

    @torch.no_grad()
    def update_target(self, decay: float) -> None:
        """target = decay * target + (1 - decay) * student, if there is one."""
        if not self.averaged_target:
            return
        student, target = self._parameters_of(STUDENT), self.target_parameters
        torch._foreach_lerp_(list(target.values()), [student[name.replace(TARGET, STUDENT)] for name in target], 1 - decay)

    @contextmanager
    def target(self) -> Iterator[None]:
        """Within it `predict` is the student as the loss's target: its running average if it keeps one, else itself."""
        if not self.averaged_target:
            yield
            return
        self.unet.set_adapter(TARGET)
        try:
            yield
        finally:
            self.unet.set_adapter(STUDENT)

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
        return get_peft_model_state_dict(self.unet, adapter_name=STUDENT)

    def load_adapter_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """The reverse of `adapter_state`.

        Raises:
            ValueError: tensors that the adapter has not, or has in another shape; which ones.
        """
        ours = {name: tensor.shape for name, tensor in self.adapter_state().items()}
        theirs = {name: tensor.shape for name, tensor in tensors.items()}
        different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if different:
            name = different[0]
            raise ValueError(
                f"{len(different)} of the adapter's {len(ours)} tensors do not fit, such as {name}: "
                f"the file has {theirs.get(name, 'none')}, this run {ours.get(name, 'none')}. "
                "Set lora.rank and lora.targets to the file's."
            )
        set_peft_model_state_dict(self.unet, tensors, adapter_name=STUDENT)

    def adapter_alphas(self) -> dict[str, float]:
        """lora_alpha of each adapted module path."""
        return {n: m.lora_alpha[STUDENT] for n, m in self.unet.named_modules() if isinstance(m, LoraLayer)}

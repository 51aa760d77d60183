"""AnimateDiff (arXiv 2307.04725): Stable Diffusion 1.x with motion modules between its layers, trained on clips.

Samples are (N, 4, F, h, w). The teacher is the image model with its motion modules, and nothing of an image adapter.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AnimateDiffPipeline, MotionAdapter, UNet2DConditionModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch.utils.checkpoint import checkpoint

from ..config import ModelConfig
from ..frames import batch_as_frames, frames_as_batch, shown_frames
from .base import Backbone
from .conditioning import Conditioning
from .sd15 import StableDiffusion15

ENCODED_AT_ONCE = 16  # frames
_MODULE = re.compile(
    r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?motion_modules\.(\d+)\.temporal_transformer\.norm\.weight"
)


def motion_config(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The diffusers configuration of motion modules in AnimateDiff's own layout: v1, v2 (with a middle block) or v3.

    Args:
        shapes: of the file's tensors, by name.

    Raises:
        ValueError: another layout, or motion modules without positions, which diffusers' have always; what to do.
    """
    modules = [(match, shapes[name]) for name in shapes if (match := _MODULE.fullmatch(name))]
    if not modules:
        raise ValueError(
            "is not in AnimateDiff's own layout: it has no motion_modules with a temporal_transformer. For a diffusers "
            "MotionAdapter, name its folder."
        )
    widths = {int(match[2]): shape[0] for match, shape in modules if match[1] == "down_blocks"}
    layers = [1 + max(int(match[3]) for match, _ in modules if match.group(1, 2) == ("down_blocks", str(i))) for i in widths]
    positions = {shapes[name][1] for name in shapes if name.endswith("pos_encoder.pe")}
    if len(positions) != 1:
        raise ValueError("has no positions, or several kinds of them: diffusers' motion modules have one.")
    return {
        "block_out_channels": [widths[i] for i in sorted(widths)],
        "motion_layers_per_block": layers,
        "motion_max_seq_length": positions.pop(),
        "use_motion_mid_block": any(match[1] == "mid_block" for match, _ in modules),
    }


def load_motion_adapter(path: str) -> MotionAdapter:
    """From a diffusers folder, a hub id, or a `.safetensors` file in AnimateDiff's own layout.

    Raises:
        ValueError: it is not there, or is no motion adapter; what is wrong.
    """
    if not path.endswith(".safetensors"):
        if Path(path).exists() and not (Path(path) / "config.json").is_file():
            raise ValueError(f"model.motion_adapter {path} is not a diffusers MotionAdapter folder: it has no config.json.")
        return MotionAdapter.from_pretrained(path, use_safetensors=True)
    if not Path(path).is_file():
        raise ValueError(f"model.motion_adapter {path} does not exist.")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        config = motion_config(shapes)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"model.motion_adapter {path} {error}") from error
    with tempfile.TemporaryDirectory() as folder:  # diffusers wants the configuration as a folder, and guesses from the hub
        MotionAdapter(**config).save_config(folder)
        return MotionAdapter.from_single_file(path, config=folder, local_files_only=True)


class AnimateDiff(StableDiffusion15):
    """Conditioning: `prompt_embeds` (N, tokens, width), the same for every frame of a clip."""

    family = "animatediff"
    sample_dimensions = 5

    @classmethod
    def load(cls, config: ModelConfig) -> Backbone:
        """The image model as SD1.5's family loads it, with `motion_adapter` in it.

        Raises:
            ValueError: not a model of SD1.5's shape, no motion adapter, or one that does not fit.
        """
        image = cls._load_pipe(config)
        if not isinstance(image.unet, UNet2DConditionModel):
            raise ValueError(f"model.path {config.path} must be the image model; its UNet is a {type(image.unet).__name__}.")
        cls._check_family(image.unet)
        adapter = load_motion_adapter(config.motion_adapter)
        parts = {name: getattr(image, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
        try:
            pipe = AnimateDiffPipeline(**parts, motion_adapter=adapter)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"model.motion_adapter {config.motion_adapter} does not fit {config.path}: {error}") from error
        pipe.register_modules(motion_adapter=None)  # its weights were copied into the UNet
        return cls(pipe, config.prediction_type, config.beta_schedule)

    def __init__(self, pipe: Any, prediction_type: str | None = None, beta_schedule: str | None = None):
        super().__init__(pipe, prediction_type, beta_schedule)
        self._schedule_is_chosen = True  # image model and motion modules often differ: the header says which was trained on

    def predict(self, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        embeds = conditioning["prompt_embeds"].repeat_interleave(sample.shape[2], dim=0)
        return self.unet(sample, timestep, encoder_hidden_states=embeds, return_dict=False)[0]

    def check_sample(self, shape: Sequence[int]) -> None:
        super().check_sample(shape)
        longest = self.unet.config.motion_max_seq_length
        if shape[1] > longest:
            raise ValueError(
                f"Clips of {shape[1]} frames are too long for model.motion_adapter, which knows {longest} positions."
            )

    def enable_gradient_checkpointing(self) -> None:
        """Motion modules too, which diffusers (0.42) leaves out."""
        super().enable_gradient_checkpointing()
        for module in self.unet.modules():
            if isinstance(module, AnimateDiffTransformer3D):
                module.forward = _checkpointed(module.forward)

    @torch.no_grad()
    def encode_clips(self, clips: torch.Tensor, frames_at_once: int = ENCODED_AT_ONCE) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of scaled latents, (N, 4, F, h, w) each, for clips (N, 3, F, H, W) in [-1, 1]."""
        parts = [self.encode_images(frames) for frames in frames_as_batch(clips).split(frames_at_once)]
        mean, std = (torch.cat(values) for values in zip(*parts, strict=True))
        return batch_as_frames(mean, len(clips)), batch_as_frames(std, len(clips))

    def sample_latents(self, noise: torch.Tensor, **call: Any) -> torch.Tensor:
        return self.pipe(latents=noise, num_frames=noise.shape[2], output_type="latent", **call).frames

    @torch.no_grad()
    def pictures(self, latents: torch.Tensor) -> list[Image.Image]:
        """Of each clip a strip of frames, from its first to its last."""
        strips = self.decode_latents(latents[:, :, shown_frames(latents.shape[2])]).permute(0, 1, 3, 2, 4).flatten(3)
        return self.pipe.video_processor.postprocess(strips.cpu())


def _checkpointed(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def again(*arguments: Any, **named: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, use_reentrant=False, **named)

    return again

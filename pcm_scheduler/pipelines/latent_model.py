"""A loaded SD1.5 or SDXL pipeline as a denoiser and a codec: what the torch-only loops of this package take."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import functional as F

from ..editing import Codec
from ..noise_schedule import alphas_and_sigmas, predict_x0_and_epsilon
from ..phases import PhaseGrid
from ..scheduling_pcm import PCMScheduler


@dataclass(frozen=True)
class Levels:
    """Stops of one sampling: K timesteps, and K + 1 alphas and sigmas, the last (1, 0)."""

    timesteps: tuple[int, ...]
    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]


@dataclass(frozen=True)
class Prompts:
    """What the UNet is told: N rows, or with guidance 2 N, the unguided first."""

    embeds: torch.Tensor
    added: dict[str, torch.Tensor] | None
    guidance_scale: float


class LatentModel:
    """The networks of a pipeline; nothing is copied.

    Args:
        pipe: a diffusers pipeline of SD1.5's or SDXL's kind, with a `PCMScheduler`.

    Raises:
        ValueError: another kind of pipeline or scheduler; what to do.
    """

    def __init__(self, pipe: Any):
        missing = [name for name in ("unet", "vae", "text_encoder", "scheduler", "encode_prompt") if not hasattr(pipe, name)]
        if missing:
            raise ValueError(f"{type(pipe).__name__} is no pipeline of SD1.5's or SDXL's kind: it has no {', '.join(missing)}.")
        if not isinstance(pipe.scheduler, PCMScheduler):
            raise ValueError(
                f"The pipeline's scheduler is {type(pipe.scheduler).__name__}. Load a PCM adapter with "
                "load_pcm_lora(pipe, file), or set one: PCMScheduler.from_config(pipe.scheduler.config, num_phases=...)."
            )
        channels = pipe.unet.config.in_channels
        if channels != pipe.vae.config.latent_channels:
            raise ValueError(
                f"The UNet takes {channels} channels, latents have {pipe.vae.config.latent_channels}: it is an inpainting "
                "model. Use its own pipeline, or a model that draws from text alone."
            )
        self.pipe = pipe
        self.unet, self.vae = pipe.unet, pipe.vae
        self.scale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        self.is_xl = pipe.unet.config.addition_embed_type == "text_time"

    @property
    def device(self) -> torch.device:
        """Where the UNet runs, offloading hooks included."""
        return self.pipe._execution_device

    @property
    def grid(self) -> PhaseGrid:
        """That the adapter was trained on."""
        return self.pipe.scheduler.grid

    def noise_ratios(self) -> list[float]:
        """sigma / alpha of the points 1..N of the grid; infinite where nothing of the picture is left (zero terminal SNR)."""
        alphas, sigmas = alphas_and_sigmas(self.pipe.scheduler.alphas_cumprod)
        timesteps = list(self.grid.timesteps[1:])
        return (sigmas[timesteps] / alphas[timesteps]).tolist()

    def levels(self, points: Sequence[int], ends_at_zero: bool = True) -> Levels:
        """The levels of points of the grid, in their order, and (1, 0) after them.

        Raises:
            ValueError: one of them has zero signal, where an epsilon prediction says nothing of x_0.
        """
        alphas, sigmas = alphas_and_sigmas(self.pipe.scheduler.alphas_cumprod)
        timesteps = tuple(self.grid.timesteps[n] for n in points)
        if self.pipe.scheduler.config.prediction_type == "epsilon" and alphas[list(timesteps)].min() == 0:
            raise ValueError(
                "This schedule ends at zero signal (zero terminal SNR), where an epsilon prediction says nothing about x_0: "
                "start below it (strength < 1), use a v_prediction model, or set rescale_betas_zero_snr=False."
            )
        end = ((1.0,), (0.0,)) if ends_at_zero else ((), ())
        return Levels(
            timesteps,
            tuple(alphas[t].item() for t in timesteps) + end[0],
            tuple(sigmas[t].item() for t in timesteps) + end[1],
        )

    def latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of latents for pictures of (height, width), rounded up."""
        return -(-size[0] // self.scale), -(-size[1] // self.scale)

    def prompts(
        self,
        prompt: Sequence[str],
        negative_prompt: Sequence[str],
        guidance_scale: float,
        size: tuple[int, int],
    ) -> Prompts:
        """Encode N prompts.

        Args:
            prompt, negative_prompt: N texts each; the negative ones are read with guidance only, and empty ones are zeros where
                the pipeline's own are (`force_zeros_for_empty_prompt`, SDXL).
            guidance_scale: g; 1 leaves the unguided half out.
            size: (height, width) of the pictures, which SDXL is told.
        """
        guided = guidance_scale > 1
        arguments = {
            "prompt": list(prompt), "device": self.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": guided,
            "negative_prompt": list(negative_prompt) if guided else None,
        }  # fmt: skip
        with torch.no_grad():
            encoded = self.pipe.encode_prompt(**arguments)
        added = None
        if self.is_xl:
            embeds, negative, pooled, negative_pooled = encoded
            if guided and self.pipe.config.get("force_zeros_for_empty_prompt"):
                said = torch.tensor([bool(text) for text in negative_prompt], device=negative.device)
                negative, negative_pooled = negative * said[:, None, None], negative_pooled * said[:, None]
            rows = len(pooled) * (1 + guided)
            height, width = self.latent_size(size)
            frame = (height * self.scale, width * self.scale)
            added = {
                "text_embeds": torch.cat([negative_pooled, pooled]) if guided else pooled,
                "time_ids": torch.tensor([[*frame, 0, 0, *frame]], dtype=embeds.dtype, device=self.device).repeat(rows, 1),
            }
        else:
            embeds, negative = encoded
        return Prompts(torch.cat([negative, embeds]) if guided else embeds, added, guidance_scale)

    def denoiser(self, levels: Levels, prompts: Prompts) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """x_0 (N, 4, h, w) float32 from (x_t, step number), after guidance."""
        prediction_type = self.pipe.scheduler.config.prediction_type
        timesteps = torch.tensor(levels.timesteps, device=self.device)  # each call would wait for a number's copy

        @torch.no_grad()
        def denoise(sample: torch.Tensor, i: int) -> torch.Tensor:
            guided = prompts.guidance_scale > 1
            inputs = torch.cat([sample, sample]) if guided else sample
            output = self.unet(
                inputs.to(self.unet.dtype),
                timesteps[i],
                encoder_hidden_states=prompts.embeds.to(self.unet.dtype),
                added_cond_kwargs=prompts.added,
                return_dict=False,
            )[0].float()
            if guided:
                without, with_prompt = output.chunk(2)
                output = without + prompts.guidance_scale * (with_prompt - without)
            return predict_x0_and_epsilon(output, sample, levels.alphas[i], levels.sigmas[i], prediction_type)[0]

        return denoise

    @contextmanager
    def _vae(self) -> Iterator[torch.dtype]:
        """The VAE in a precision that it survives: SDXL's own overflows in fp16."""
        before = self.vae.dtype
        # Stable Diffusion 1.x's does not, and says nothing; casting would undo what group offloading keeps
        upcast = before == torch.float16 and self.vae.config.force_upcast and self.is_xl
        if upcast:
            self.vae.to(torch.float32)
        try:
            yield self.vae.dtype
        finally:
            if upcast:
                self.vae.to(before)

    def codec(self, size: tuple[int, int]) -> Codec:
        """Between pictures of (height, width), any size, and scaled latents, float32 both.

        Pictures are continued past their right and lower edge to whole latents; what is decoded there is cut off.
        """
        height, width = self.latent_size(size)
        right, below = width * self.scale - size[1], height * self.scale - size[0]
        factor = self.vae.config.scaling_factor

        @torch.no_grad()
        def encode(picture: torch.Tensor) -> torch.Tensor:
            padded = F.pad(picture, (0, right, 0, below), mode="replicate")
            with self._vae() as dtype:
                encoded = self.vae.encode(padded.to(dtype))
            # a tiny autoencoder has no distribution
            latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
            return latents.float() * factor

        @torch.no_grad()
        def decode(latents: torch.Tensor) -> torch.Tensor:
            with self._vae() as dtype:
                picture = self.vae.decode((latents / factor).to(dtype), return_dict=False)[0].float()
            return picture[..., : size[0], : size[1]]

        return Codec(encode, decode, self.scale)

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Within it the adapters are off and the UNet is the model's own; afterwards they are as they were.

        Warns where there is no adapter to switch off: a UNet that was trained whole, or has an adapter merged into its weights,
        jumps from phase to phase, and those jumps cannot be run backwards.
        """
        layers = [module for module in self.unet.modules() if isinstance(module, BaseTunerLayer)]
        if not layers:
            warnings.warn(
                "The UNet has no adapter to switch off, so it is itself taken for the teacher that is run backwards. If it was "
                "trained whole (load_pcm_unet) or an adapter is fused into it, pictures come back changed: load the adapter by "
                "load_pcm_lora, and do not fuse it.",
                stacklevel=2,
            )
        on = any(not layer.disable_adapters for layer in layers)
        merged = [(layer, list(layer.merged_adapters)) for layer in layers if layer.merged]
        if any(layer.get_base_layer().weight.is_meta for layer, _ in merged):  # from which nothing can be taken
            raise ValueError(
                "An adapter is fused into weights that are offloaded, so the teacher cannot be had: fuse no adapter, or use "
                "enable_model_cpu_offload instead of enable_sequential_cpu_offload."
            )
        if on:
            self.unet.disable_adapters()  # which takes merged ones out of the weights
        try:
            yield
        finally:
            if on:
                self.unet.enable_adapters()
            for layer, names in merged:
                if not layer.merged:
                    layer.merge(adapter_names=names)

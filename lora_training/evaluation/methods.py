"""What is compared: an adapter or none, a scheduler, numbers of steps, guidance."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from pcm_scheduler import load_pcm_lora
from pcm_scheduler.lora_file import AdapterSettings, read_settings
from pcm_scheduler.phases import PhaseGrid
from pcm_scheduler.scheduling_pcm import PCMScheduler

from ..randomness import generator_of
from .exact import exact_jumps


@dataclass(frozen=True)
class Rival:
    """A scheduler of diffusers' as people set it up.

    Attributes:
        scheduler: its class.
        options: beside the model's own schedule.
        eta: that pipelines pass to it; None: it has none.
    """

    scheduler: Any
    options: dict[str, Any]
    eta: float | None = None


_BETAS = ("beta_schedule", "beta_start", "beta_end", "trained_betas")
# Of a model's own scheduler what says which noise it was trained on; the rest, such as Karras's sigmas, is how one samples.
_MODEL = (*_BETAS, "num_train_timesteps", "prediction_type", "rescale_betas_zero_snr", "set_alpha_to_one", "steps_offset")
_TRAILING = {"timestep_spacing": "trailing"}  # from the top of the schedule: with few steps the others never see pure noise
RIVALS = {
    "ddim": Rival(DDIMScheduler, _TRAILING | {"clip_sample": False, "set_alpha_to_one": False}, eta=0.0),
    "dpmpp": Rival(DPMSolverMultistepScheduler, _TRAILING),
    "unipc": Rival(UniPCMultistepScheduler, _TRAILING),
    "euler": Rival(EulerDiscreteScheduler, _TRAILING),
    "lcm": Rival(LCMScheduler, {}),
    "tcd": Rival(TCDScheduler, {}, eta=0.3),  # its authors' gamma
}


@dataclass
class MethodConfig:
    """A row of a table.

    Attributes:
        name: in tables, and of its folder of pictures.
        adapter: a LoRA file; empty: the model itself.
        scheduler: `pcm` keeps to the edges that the adapter states; `exact`, without an adapter, is the model's own ODE solved
            to those of `num_phases`, the most that an adapter of an unguided teacher can do; the others are diffusers' own.
        steps: numbers of sampling steps.
        guidance_scale: g; None: what the adapter recommends, 1 without one.
        eta: of the scheduler; None: what the adapter recommends with `pcm`, and otherwise what the scheduler is known for.
        num_phases, num_solver_steps: of an adapter whose file does not say, 0: it does; or of `exact`, where 0 solver steps are
            the scheduler's 50. With other schedulers, which know no phases, neither is needed.
        timesteps: where `pcm` stops instead of at the grid's own, such as `python -m lora_training.evaluation.search` finds;
            `steps` is their number. Where other numbers of steps are measured, such as for guidance, those keep the grid's own.
    """

    name: str
    adapter: str = ""
    scheduler: Literal["pcm", "exact", "ddim", "dpmpp", "unipc", "euler", "lcm", "tcd"] = "pcm"
    steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    guidance_scale: float | None = None
    eta: float | None = None
    num_phases: int = 0
    num_solver_steps: int = 0
    timesteps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w .,+-]*", self.name):
            raise ValueError(
                "A method's name is also that of a folder: a letter or digit, then letters, digits, spaces and .,+-_; got "
                f"{self.name!r}."
            )
        if self.adapter and not Path(self.adapter).is_file():
            raise ValueError(f"Method {self.name}: there is no file {self.adapter}.")
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"Method {self.name}: steps are whole numbers from 1; got {self.steps}.")
        noisy = ["pcm", *(name for name, rival in RIVALS.items() if rival.eta is not None)]
        if self.eta and self.scheduler not in noisy:
            raise ValueError(
                f"Method {self.name}: the scheduler {self.scheduler} has no eta; {', '.join(noisy)} have. Leave it out."
            )
        if self.scheduler == "exact" and (self.adapter or not self.num_phases):
            raise ValueError(f"Method {self.name}: the scheduler exact has num_phases, from 1 on, and no adapter.")
        for given in ("num_phases", "num_solver_steps"):
            if getattr(self, given) < 0 or (getattr(self, given) and not self.adapter and self.scheduler != "exact"):
                raise ValueError(f"Method {self.name}: {given} is of an adapter, from 1 on; got {getattr(self, given)}.")
        if self.timesteps and self.scheduler != "pcm":
            raise ValueError(f"Method {self.name}: timesteps are for the scheduler pcm, and this one has {self.scheduler}.")
        if self.timesteps and self.steps != (len(self.timesteps),):
            raise ValueError(
                f"Method {self.name}: {len(self.timesteps)} timesteps are as many steps, and no other number; write "
                f"steps: [{len(self.timesteps)}] instead of {list(self.steps)}."
            )


class Gallery:
    """A pipeline that draws by any of several methods.

    An adapter is drawn with on the betas that its file states, whichever the scheduler, and else on the pipeline's own.

    Args:
        pipe: of SD1.5's or SDXL's kind, or AnimateDiff's, on its device.
        methods: their adapters are loaded; names must differ.
        frames: of the clips that it draws, F; 0: it draws pictures.

    Raises:
        ValueError: two methods of one name, an adapter that does not fit, or timesteps that are not its grid's.
    """

    def __init__(self, pipe: Any, methods: Sequence[MethodConfig], frames: int = 0):
        names = [method.name for method in methods]
        if len(set(names)) < len(names):
            raise ValueError(f"Methods need names of their own; got {names}.")
        self.pipe, self.frames = pipe, frames
        self.methods = {method.name: method for method in methods}
        own = pipe.scheduler
        self.settings: dict[str, AdapterSettings] = {}  # of those methods that have an adapter
        # what their files say of themselves, each read once, for one without a header is hashed whole
        self.stated = {method.name: read_settings(method.adapter) for method in methods if method.adapter}
        self._adapters: dict[str, str] = {}
        self._schedulers: dict[str, Any] = {}
        self._guidance: dict[str, float] = {}
        self._eta: dict[str, float] = {}
        # by file and what is said of it, for two methods may say different phases
        loaded: dict[tuple[str, int, int], tuple[str, AdapterSettings, PCMScheduler]] = {}
        for number, method in enumerate(methods):
            settings = None
            config = {key: own.config[key] for key in _MODEL if key in own.config}
            if method.adapter:
                told = (method.adapter, method.num_phases, method.num_solver_steps)
                if told not in loaded:
                    name = f"adapter{number}"
                    pipe.scheduler = own  # not on the betas of the adapter before
                    loaded[told] = (name, self._load(method, name), pipe.scheduler)
                self._adapters[method.name], settings, on_phases = loaded[told]
                if method.scheduler == "pcm" or not self._is_silent(method):
                    self.settings[method.name] = settings
                else:
                    settings = None
                config |= {name: on_phases.config[name] for name in _BETAS}
            if method.scheduler == "pcm":
                self._schedulers[method.name] = on_phases if method.adapter else PCMScheduler.from_config(config, num_phases=1)
                if method.timesteps:
                    self.use_timesteps(method.name, method.timesteps)
                eta = settings.eta if settings else 0.0
            elif method.scheduler == "exact":
                self._schedulers[method.name], eta = self._exact(method, config), 0.0
            else:
                rival = RIVALS[method.scheduler]
                self._schedulers[method.name] = rival.scheduler.from_config(config, **rival.options)
                eta = rival.eta or 0.0
            self._guidance[method.name] = _first(method.guidance_scale, settings.guidance_scale if settings else 1.0)
            self._eta[method.name] = _first(method.eta, eta)

    def _load(self, method: MethodConfig, name: str) -> AdapterSettings:
        """Put a method's adapter into the pipeline, and the scheduler of its phases.

        Raises:
            ValueError: it does not fit, or its phases are said nowhere.
        """
        num_phases, num_solver_steps = method.num_phases or None, method.num_solver_steps or None
        if method.scheduler != "pcm" and self._is_silent(method):
            num_phases, num_solver_steps = 1, None  # which nothing is drawn with
        try:
            return load_pcm_lora(
                self.pipe, method.adapter, adapter_name=name, num_phases=num_phases, num_solver_steps=num_solver_steps
            )
        except ValueError as error:
            raise ValueError(f"Method {method.name}: {error}") from error

    def _exact(self, method: MethodConfig, config: dict[str, Any]) -> PCMScheduler:
        """The phases of a method without an adapter, on a model's own schedule.

        Raises:
            ValueError: the grid has no such phases.
        """
        phases = {"num_phases": method.num_phases}
        if method.num_solver_steps:  # else as many as the scheduler has by default
            phases["num_solver_steps"] = method.num_solver_steps
        try:
            return PCMScheduler.from_config(config, **phases)
        except ValueError as error:
            raise ValueError(f"Method {method.name}: {error}") from error

    def _is_silent(self, method: MethodConfig) -> bool:
        """Whether nobody says which phases its adapter was trained for."""
        return not method.num_phases and self.stated[method.name] is None

    def noise(self, indices: Sequence[int], size: tuple[int, int], seed: int) -> torch.Tensor:
        """Initial latents of pictures by their number, the same for every method, batch and process.

        (N, 4, h, w), or of clips (N, 4, F, h, w), whose frames have noise of their own.
        """
        scale, time = self.pipe.vae_scale_factor, (self.frames,) if self.frames else ()
        shape = (self.pipe.unet.config.in_channels, *time, size[0] // scale, size[1] // scale)
        return torch.stack([torch.randn(shape, generator=generator_of(seed, i)) for i in indices])

    def put_in_place(self, name: str | None) -> None:
        """The adapter and the scheduler of a method; None: the model alone."""
        if name is not None:
            self.pipe.scheduler = self._schedulers[name]
        if name in self._adapters:
            self.pipe.enable_lora()
            self.pipe.set_adapters(self._adapters[name])
        elif self._adapters:
            self.pipe.disable_lora()

    def grid(self, name: str) -> PhaseGrid:
        """Of a method whose scheduler is `pcm`."""
        return self._schedulers[name].grid

    def use_timesteps(self, name: str, timesteps: Sequence[int]) -> None:
        """Where a method whose scheduler is `pcm` stops from now on, in as many steps.

        Raises:
            ValueError: they are not points of its grid, strictly decreasing.
        """
        try:
            self._schedulers[name] = PCMScheduler.from_config(self._schedulers[name].config, timesteps=list(timesteps))
        except ValueError as error:
            raise ValueError(f"Method {name}: {error}") from error

    def guidance_scale(self, name: str) -> float:
        """Of a method."""
        return self._guidance[name]

    def eta(self, name: str) -> float:
        """Of a method."""
        return self._eta[name]

    def check_steps(self, name: str, steps: Sequence[int]) -> None:
        """Refuse numbers of steps that a method's scheduler does not have.

        Raises:
            ValueError: the method, the number, and what its scheduler says.
        """
        for k in steps:
            try:
                copy.deepcopy(self._schedulers[name]).set_timesteps(k)
            except ValueError as error:
                raise ValueError(f"Method {name} cannot be sampled in {k} steps: {error}") from error

    @torch.no_grad()
    def draw(
        self,
        name: str,
        steps: int,
        prompts: Sequence[str],
        indices: Sequence[int],
        size: tuple[int, int],
        seed: int = 0,
        negative_prompts: Sequence[str] | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pt",
    ) -> torch.Tensor:
        """Pictures of prompts, or clips.

        Args:
            name: of the method.
            steps: of sampling.
            prompts: N texts.
            indices: N numbers, which with the seed name the noise: the initial one and what is drawn on the way.
            size: (height, width).
            seed: of all noise.
            negative_prompts: N texts, empty for none. If all are, the unguided half is told what the pipeline tells it without
                any, which for SDXL are zeros, as in training, and not the embedding of an empty text.
            guidance_scale: instead of the method's.
            output_type: `pt`: pictures (N, 3, H, W), or clips (N, F, 3, H, W), in [0, 1]; `latent`: as `noise`.

        Raises:
            ValueError: some came out as NaN or infinite, which would be kept and measured as black; which.
        """
        self.put_in_place(name)
        exact = self.methods[name].scheduler == "exact"
        latents = self.noise(indices, size, seed).to(self.pipe.unet.device, self.pipe.unet.dtype)
        with exact_jumps(self.pipe.unet, self.pipe.scheduler) if exact else nullcontext():
            drawn = self.pipe(
                prompt=list(prompts),
                negative_prompt=list(negative_prompts) if negative_prompts and any(negative_prompts) else None,
                latents=latents,
                num_inference_steps=steps,
                guidance_scale=self._guidance[name] if guidance_scale is None else guidance_scale,
                eta=self._eta[name],
                generator=[generator_of(seed, i, 1) for i in indices],
                height=size[0],
                width=size[1],
                output_type=output_type,
                **({"num_frames": self.frames} if self.frames else {}),
            )
        found = drawn.frames if self.frames else drawn.images
        bad = [n for n, one in zip(indices, found, strict=True) if not one.isfinite().all()]
        if bad:
            raise ValueError(
                f"Method {name} in {steps} steps drew {len(bad)} of {len(prompts)} with numbers that are not finite, from seed "
                f"{seed} such as number {bad[0]}, {prompts[list(indices).index(bad[0])]!r}. With precision fp16 try bf16 or "
                f"fp32 (the UNet is {self.pipe.unet.dtype} now); else the adapter or the model is broken."
            )
        return found


def _first(chosen: float | None, otherwise: float) -> float:
    return otherwise if chosen is None else chosen

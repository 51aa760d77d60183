"""Phased sampling in ComfyUI's terms: sigmas of the model's own table, and a sampler function.

ComfyUI works with x / alpha, so every level here has alpha 1 and the sigma of its table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.supported_models
import comfy.utils
import latent_preview
import torch
from comfy.k_diffusion import sampling as k_diffusion

from ..pcm_scheduler.phases import PhaseGrid
from ..pcm_scheduler.sampling import NoiseSampler, sample_phased


def table_of(model_sampling: Any) -> torch.Tensor:
    """sigma / alpha at every training timestep, (T,), of the object that a model keeps its schedule in.

    Raises:
        ValueError: a model that phased consistency does not cover; which.
    """
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        raise ValueError("This is a flow-matching model. PCM adapters are for SD1.5, SDXL and AnimateDiff.")
    edm = isinstance(model_sampling, comfy.model_sampling.ModelSamplingDiscreteEDM)
    if edm or not hasattr(model_sampling, "num_timesteps"):
        raise ValueError(
            "This model samples on another schedule, such as EDM's. PCM adapters are for SD1.5, SDXL and AnimateDiff."
        )
    if len(model_sampling.sigmas) != model_sampling.num_timesteps:
        raise ValueError(
            f"This model's schedule was cut to {len(model_sampling.sigmas)} of {model_sampling.num_timesteps} timesteps, as "
            "ModelSamplingDiscrete does when set to lcm, and AnimateDiff-Evolved's beta_schedule when set to lcm, or to "
            "autoselect with AnimateLCM. Choose another there: PCM stops lie elsewhere."
        )
    return model_sampling.sigmas


def sigmas_of(table: torch.Tensor, grid: PhaseGrid, timesteps: Sequence[int]) -> torch.Tensor:
    """The sigmas of a table at timesteps of the grid, (len(timesteps),) float32.

    Raises:
        ValueError: a table of another number of timesteps.
    """
    if len(table) != grid.num_train_timesteps:
        raise ValueError(f"The adapter was trained on {grid.num_train_timesteps} timesteps, this model has {len(table)}.")
    return table[list(timesteps)].float().cpu()


def sigmas_at(model: Any, grid: PhaseGrid, timesteps: Sequence[int]) -> torch.Tensor:
    """The same of a MODEL, as patches of it have left its table."""
    return sigmas_of(table_of(model.get_model_object("model_sampling")), grid, timesteps)


def is_sdxl(model: Any) -> bool:
    """Whether a MODEL is SDXL, or one of those that were made smaller from it."""
    return isinstance(model.model.model_config, comfy.supported_models.SDXL)


def prediction_type_of(model: Any) -> str | None:
    """What a MODEL predicts as it is patched, in diffusers' words; None for what PCM adapters are not trained on."""
    model_sampling = model.get_model_object("model_sampling")
    if isinstance(model_sampling, comfy.model_sampling.V_PREDICTION):  # a kind of EPS in ComfyUI
        return "v_prediction"
    if isinstance(model_sampling, comfy.model_sampling.X0):
        return "sample"
    return "epsilon" if isinstance(model_sampling, comfy.model_sampling.EPS) else None


def points_of(grid: PhaseGrid, steps: int, strength: float, name: str) -> tuple[int, ...]:
    """`grid.stops`, with a sentence in a node's own words for steps that do not fit.

    Args:
        grid: that the adapter was trained on.
        steps: of the node.
        strength: how far up the schedule they start.
        name: of the input that says so.
    """
    room = grid.start_point(strength)
    if steps > room:
        below = f", {room} of them below {name} {strength:g}" if room < grid.num_solver_steps else ""
        raise ValueError(f"steps is {steps}, and the adapter's grid has {grid.num_solver_steps} points{below}: at most {room}.")
    return grid.stops(steps, strength)


def stops_in_words(grid: PhaseGrid, steps: int, strength: float) -> str:
    """Where the steps start, for a node's face."""
    stops = grid.sampling_timesteps(steps, strength) if strength > 0 else ()
    return f"timesteps {', '.join(map(str, stops))}" if stops else "nothing to do"


def phased_sigmas(model: Any, grid: PhaseGrid, steps: int, denoise: float = 1.0) -> torch.Tensor:
    """The sigmas of `grid.stops`, (steps + 1,), the last 0; none for a denoise of 0.

    Args:
        model: a MODEL, whose own table they are taken from.
        grid: that the adapter was trained on.
        steps: all of them lie below the part of the schedule that denoise says.
        denoise: in [0, 1].

    Raises:
        ValueError: steps or denoise out of range, or a model that is not covered.
    """
    stops = [grid.timesteps[n] for n in points_of(grid, steps, denoise, "denoise")] if denoise > 0 else []
    sigmas = sigmas_at(model, grid, stops)
    return torch.cat([sigmas, torch.zeros(1)]) if stops else sigmas


@torch.no_grad()
def sample_pcm(
    model: Any,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = None,
    eta: float = 0.0,
) -> torch.Tensor:
    """k-diffusion's signature over `sample_phased`: any sigmas, those of a split schedule too.

    Args:
        model: x_0, after guidance, of (x, sigma).
        x: (N, C, ...).
        sigmas: descending.
        extra_args: for the model; its seed draws the noise.
        callback: for previews.
        disable: of a progress bar; ComfyUI has its own.
        eta: in [0, 1].
    """
    if len(sigmas) < 2:
        return x
    extra_args = extra_args or {}
    levels = sigmas.tolist()
    ones = x.new_ones(len(x))

    def denoise(sample: torch.Tensor, i: int) -> torch.Tensor:
        return model(sample, sigmas[i] * ones, **extra_args)

    def show(i: int, sample: torch.Tensor, x0: torch.Tensor) -> None:
        if callback is not None:
            callback({"x": sample, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": x0})

    noise_sampler = fresh_noise(x, extra_args.get("seed")) if eta > 0 else None
    return sample_phased(denoise, x, [1.0] * len(levels), levels, eta, noise_sampler, show)


def fresh_noise(x: torch.Tensor, seed: int | None) -> NoiseSampler:
    """Draws noise like x by ComfyUI's own sampler of noise, looked up at call time: AnimateDiff-Evolved puts another there.

    On a CPU ComfyUI 0.3.64 begins it with the seed's first numbers, which are the initial noise; later ones begin elsewhere.
    """
    if x.device.type == "cpu" and seed is not None:
        initial = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
        if torch.equal(k_diffusion.default_noise_sampler(x, seed=seed)(1.0, 0.0), initial):
            seed = (seed + 1) % 2**64  # as later versions do
    drawn: NoiseSampler = k_diffusion.default_noise_sampler(x, seed=seed)
    return drawn


def pcm_sampler(eta: float) -> comfy.samplers.KSAMPLER:
    """A SAMPLER."""
    return comfy.samplers.KSAMPLER(sample_pcm, {"eta": eta})


def sample_latent(
    model: Any,
    seed: int,
    cfg: float,
    sampler: comfy.samplers.Sampler,
    sigmas: torch.Tensor,
    positive: Any,
    negative: Any,
    latent: dict[str, Any],
    callback: Any = None,
) -> dict[str, Any]:
    """A LATENT sampled as ComfyUI's own samplers do it, with its mask; what else it holds stays.

    Args:
        model, seed, cfg, sampler, sigmas, positive, negative, latent: of the nodes.
        callback: at each step, in ComfyUI's signature; None: progress and previews.
    """
    # newer than ComfyUI 0.8: how much smaller than a picture an empty latent was made
    latent = dict(latent)
    ratio = latent.pop("downscale_ratio_spacial", None)
    told = () if ratio is None else (ratio,)
    samples: torch.Tensor = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *told)
    if len(sigmas) == 0:
        return latent | {"samples": samples}
    drawn = comfy.sample.sample_custom(
        model,
        comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")),
        cfg,
        sampler,
        sigmas,
        positive,
        negative,
        samples,
        noise_mask=latent.get("noise_mask"),
        callback=callback or latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return latent | {"samples": drawn}

"""The nodes most people need: load an adapter, and sample along the phases it was trained for."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.sd
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy_api.latest import io, ui

from ..pcm_scheduler.lora_file import AdapterSettings, read_settings, read_tensors, with_overrides
from ..pcm_scheduler.phases import PhaseGrid
from .sampling import pcm_sampler, phased_sigmas

CATEGORY = "phased consistency"
Settings = io.Custom("PCM_SETTINGS")

# Inputs that several nodes share.
_MODEL = "The model with the adapter in it. Its own table of sigmas is used, AnimateDiff's and zero-SNR ones too."
_SETTINGS = "How the adapter was trained, from PCM LoRA Loader. Without it, num_phases and num_solver_steps count."
_PHASES = "How many phases the adapter was trained with; published '4step' files have 4. Settings, if connected, count instead."
_SOLVER = "Points of the solver's grid in training: 50 for SD1.5, 40 for SDXL. Settings, if connected, count instead."
_STEPS = "Sampling steps, independent of the phases. With as many as phases, every step ends where training did."
_DENOISE = (
    "1 starts from noise. Less keeps more of the latent: all steps then lie below that part of the schedule, on its edges."
)
_ETA = "0 is deterministic, what PCM adapters are trained for. 1 draws all noise anew at every step, what LCM adapters want."


def phase_inputs() -> list[Any]:
    """Where the phases are: settings, or two numbers."""
    return [
        Settings.Input("settings", optional=True, tooltip=_SETTINGS),
        io.Int.Input("num_phases", default=4, min=1, max=100, optional=True, tooltip=_PHASES),
        io.Int.Input("num_solver_steps", default=50, min=1, max=500, optional=True, tooltip=_SOLVER),
    ]


def chosen_grid(settings: AdapterSettings | None, num_phases: int, num_solver_steps: int) -> PhaseGrid:
    """The settings' grid, or an even one."""
    return settings.grid if settings is not None else PhaseGrid.even(num_phases, num_solver_steps)


def in_words(settings: AdapterSettings) -> str:
    """For the node's face."""
    grid = settings.grid
    source = "inferred from the file's name or hash" if settings.inferred else "stated in the file"
    return (
        f"{settings.base_model}, predicts {settings.prediction_type} ({source})\n"
        f"{grid.num_phases} phases: {', '.join(map(str, grid.edges))}; {grid.num_solver_steps} solver steps\n"
        f"recommended: {settings.num_inference_steps} steps, cfg {settings.guidance_scale:g}, eta {settings.eta:g}"
    )


class PCMLoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCMLoraLoader",
            display_name="PCM LoRA Loader",
            category=CATEGORY,
            description="Load a phased consistency LoRA and read from it how it wants to be sampled.",
            inputs=[
                io.Model.Input("model", tooltip="What the adapter is put into. Other LoRAs may come before or after."),
                io.Combo.Input(
                    "lora_name",
                    options=[name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors")],
                    tooltip="A .safetensors file in models/loras.",
                ),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="1 is what the adapter was trained at.",
                ),
                io.Int.Input(
                    "num_phases",
                    default=0,
                    min=0,
                    max=100,
                    optional=True,
                    tooltip="0: as the file says. Anything else overrides it; needed for files that say nothing.",
                ),
            ],
            outputs=[
                io.Model.Output("adapted", display_name="model", tooltip="The model with the adapter."),
                Settings.Output("settings", display_name="settings", tooltip="For PCM Scheduler and PCM KSampler."),
                io.Int.Output("steps", display_name="steps", tooltip="Recommended number of steps."),
                io.Float.Output(
                    "cfg", display_name="cfg", tooltip="Recommended guidance. At 1 a negative prompt has no effect."
                ),
                io.Float.Output("eta", display_name="eta", tooltip="Recommended eta."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, lora_name: str, strength_model: float, num_phases: int = 0) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        settings = with_overrides(read_settings(path), num_phases=num_phases or None)
        if strength_model:
            model, _ = comfy.sd.load_lora_for_models(model, None, read_tensors(path)[0], strength_model, 0)
        recommended = (settings.num_inference_steps, settings.guidance_scale, settings.eta)
        return io.NodeOutput(model, settings, *recommended, ui=ui.PreviewText(in_words(settings)))


class PCMScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCMScheduler",
            display_name="PCM Scheduler",
            category=CATEGORY,
            description="Sigmas on the edges of the phases, for SamplerCustom and its relatives.",
            inputs=[
                io.Model.Input("model", tooltip=_MODEL),
                io.Int.Input("steps", default=4, min=1, max=500, tooltip=_STEPS),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=_DENOISE),
                *phase_inputs(),
            ],
            outputs=[io.Sigmas.Output("sigmas", display_name="sigmas", tooltip="Descending, the last 0.")],
        )

    @classmethod
    def execute(
        cls, model: Any, steps: int, denoise: float, settings: Any = None, num_phases: int = 4, num_solver_steps: int = 50
    ) -> io.NodeOutput:
        grid = chosen_grid(settings, num_phases, num_solver_steps)
        return io.NodeOutput(phased_sigmas(model, grid, steps, denoise))


class PCMSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCMSampler",
            display_name="PCM Sampler",
            category=CATEGORY,
            description="The jump from edge to edge, for SamplerCustom and its relatives.",
            inputs=[io.Float.Input("eta", default=0.0, min=0.0, max=1.0, step=0.01, tooltip=_ETA)],
            outputs=[io.Sampler.Output("sampler", display_name="sampler", tooltip="Goes with the sigmas of PCM Scheduler.")],
        )

    @classmethod
    def execute(cls, eta: float) -> io.NodeOutput:
        return io.NodeOutput(pcm_sampler(eta))


class PCMKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCMKSampler",
            display_name="PCM KSampler",
            category=CATEGORY,
            description="Sample with a phased consistency adapter: PCM Scheduler, PCM Sampler and SamplerCustom in one.",
            inputs=[
                io.Model.Input("model", tooltip=_MODEL),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the initial noise.",
                ),
                io.Int.Input("steps", default=4, min=1, max=500, tooltip=_STEPS),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance. At 1 a negative prompt has no effect and a step costs half.",
                ),
                io.Float.Input("eta", default=0.0, min=0.0, max=1.0, step=0.01, tooltip=_ETA),
                io.Conditioning.Input("positive", tooltip="What should be in the picture."),
                io.Conditioning.Input("negative", tooltip="What should not. Without effect at cfg 1."),
                io.Latent.Input("latent_image", tooltip="An empty latent, or a picture's, with a mask if you like."),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=_DENOISE),
                *phase_inputs(),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent", tooltip="The result, for VAE Decode.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        seed: int,
        steps: int,
        cfg: float,
        eta: float,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        denoise: float,
        settings: Any = None,
        num_phases: int = 4,
        num_solver_steps: int = 50,
    ) -> io.NodeOutput:
        sigmas = phased_sigmas(model, chosen_grid(settings, num_phases, num_solver_steps), steps, denoise)
        samples: torch.Tensor = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        if len(sigmas) == 0:
            return io.NodeOutput(latent_image | {"samples": samples})
        noise = comfy.sample.prepare_noise(samples, seed, latent_image.get("batch_index"))
        drawn = comfy.sample.sample_custom(
            model,
            noise,
            cfg,
            pcm_sampler(eta),
            sigmas,
            positive,
            negative,
            samples,
            noise_mask=latent_image.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        return io.NodeOutput(latent_image | {"samples": drawn})

"""The nodes most people need: sample along the phases that an adapter was trained for."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .face import HIDDEN, finite_advice, model_advice, sampling_advice, say
from .inputs import (
    CATEGORY,
    PhaseNode,
    cfg_input,
    chosen_grid,
    eta_input,
    model_input,
    phase_inputs,
    prompt_inputs,
    seed_input,
    steps_input,
)
from .sampling import pcm_sampler, phased_sigmas, sample_latent, stops_in_words

_DENOISE = (
    "1 starts from noise. Less keeps more of the latent: all steps then lie below that part of the schedule, on its edges."
)


def denoise_input() -> Any:
    return io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=_DENOISE)


class PCMScheduler(PhaseNode, io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCMScheduler",
            display_name="PCM Scheduler",
            category=CATEGORY,
            description="Sigmas on the edges of the phases, for SamplerCustom and its relatives.",
            inputs=[model_input(), steps_input(), denoise_input(), *phase_inputs()],
            outputs=[io.Sigmas.Output("sigmas", display_name="sigmas", tooltip="Descending, the last 0.")],
            hidden=HIDDEN,
        )

    @classmethod
    def execute(
        cls, model: Any, steps: int, denoise: float, settings: Any = None, num_phases: int = 4, num_solver_steps: int = 50
    ) -> io.NodeOutput:
        grid = chosen_grid(settings, num_phases, num_solver_steps)
        sigmas = phased_sigmas(model, grid, steps, denoise)
        return io.NodeOutput(sigmas, ui=say(cls, stops_in_words(grid, steps, denoise), *model_advice(model, grid, settings)))


class PCMSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCMSampler",
            display_name="PCM Sampler",
            category=CATEGORY,
            description="The jump from edge to edge, for SamplerCustom and its relatives.",
            inputs=[eta_input()],
            outputs=[io.Sampler.Output("sampler", display_name="sampler", tooltip="Goes with the sigmas of PCM Scheduler.")],
        )

    @classmethod
    def execute(cls, eta: float) -> io.NodeOutput:
        return io.NodeOutput(pcm_sampler(eta))


class PCMKSampler(PhaseNode, io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCMKSampler",
            display_name="PCM KSampler",
            category=CATEGORY,
            description="Sample with a phased consistency adapter: PCM Scheduler, PCM Sampler and SamplerCustom in one.",
            inputs=[
                model_input(),
                seed_input("Of the initial noise."),
                steps_input(),
                cfg_input(),
                eta_input(),
                *prompt_inputs(),
                io.Latent.Input("latent_image", tooltip="An empty latent, or a picture's, with a mask if you like."),
                denoise_input(),
                *phase_inputs(),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent", tooltip="The result, for VAE Decode.")],
            hidden=HIDDEN,
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
        grid = chosen_grid(settings, num_phases, num_solver_steps)
        sigmas = phased_sigmas(model, grid, steps, denoise)
        drawn = sample_latent(model, seed, cfg, pcm_sampler(eta), sigmas, positive, negative, latent_image)
        said = finite_advice(bool(drawn["samples"].isfinite().all())) + sampling_advice(cls, model, grid, cfg, eta, settings)
        return io.NodeOutput(drawn, ui=say(cls, stops_in_words(grid, steps, denoise), *said))

"""Inputs that several nodes share, and what is made of them."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..pcm_scheduler.lora_file import AdapterSettings
from ..pcm_scheduler.phases import PhaseGrid

CATEGORY = "phased consistency"
Settings = io.Custom("PCM_SETTINGS")

MODEL = "The model with the adapter in it. Its own table of sigmas is used, AnimateDiff's and zero-SNR ones too."
POSITIVE = "What should be in the picture."
NEGATIVE = "What should not. Without effect at cfg 1."
_SETTINGS = (
    "How the adapter was trained, from PCM LoRA Loader or PCM LoRA Settings. Without it, num_phases and num_solver_steps count."
)
_PHASES = "How many phases the adapter was trained with; published '4step' files have 4. Settings, if connected, count instead."
_SOLVER = "Points of the solver's grid in training: 50 for SD1.5, 40 for SDXL. Settings, if connected, count instead."
_STEPS = "Sampling steps, independent of the phases. With as many as phases, every step ends where training did."
_CFG = "Guidance. At 1 a negative prompt has no effect and a step costs half; below 1 it is drawn into the picture."
_ETA = "0 is deterministic, what PCM adapters are trained for. 1 draws all noise anew at every step, what LCM adapters want."


def model_input() -> Any:
    return io.Model.Input("model", tooltip=MODEL)


def prompt_inputs() -> list[Any]:
    return [io.Conditioning.Input("positive", tooltip=POSITIVE), io.Conditioning.Input("negative", tooltip=NEGATIVE)]


def seed_input(tooltip: str) -> Any:
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=tooltip)


def steps_input() -> Any:
    return io.Int.Input("steps", default=4, min=1, max=500, tooltip=_STEPS)


def cfg_input() -> Any:
    return io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip=_CFG)


def eta_input(default: float = 0.0, tooltip: str = _ETA) -> Any:
    return io.Float.Input("eta", default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def phase_inputs() -> list[Any]:
    """Where the phases are: settings, or two numbers."""
    return [
        Settings.Input("settings", optional=True, tooltip=_SETTINGS),
        io.Int.Input("num_phases", default=4, min=1, max=500, optional=True, tooltip=_PHASES),
        io.Int.Input("num_solver_steps", default=50, min=1, max=500, optional=True, tooltip=_SOLVER),
    ]


def chosen_grid(settings: AdapterSettings | None, num_phases: int, num_solver_steps: int) -> PhaseGrid:
    """The settings' grid, or an even one."""
    return settings.grid if settings is not None else PhaseGrid.even(num_phases, num_solver_steps)


class PhaseNode:
    """Of a node with `phase_inputs`: phases that a grid cannot have are refused when the graph is queued.

    No `io.ComfyNode` itself, as no class that nodes share: ComfyUI-Manager looks for that name among a class's own bases, and
    would list this one for a node.
    """

    @classmethod
    def validate_inputs(
        cls, settings: Any = "none", num_phases: int | None = 4, num_solver_steps: int | None = 50
    ) -> bool | str:
        """ComfyUI passes None for what another node will give; settings, once connected, count instead of the numbers."""
        if settings == "none" and num_phases is not None and num_solver_steps is not None:
            try:
                PhaseGrid.even(num_phases, num_solver_steps)
            except ValueError as error:
                return str(error)
        return True

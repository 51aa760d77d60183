"""Opt-in: phased schedules in ComfyUI's own scheduler drop-downs, for detailers and upscalers that take nothing but names.

With the sampler `euler` they are PCM KSampler at eta 0. A drop-down has no options, so each name says family and phases.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import comfy.samplers
import torch

from ..pcm_scheduler.lora_file import SOLVER_STEPS
from ..pcm_scheduler.phases import PhaseGrid
from .sampling import sigmas_of, table_of

VARIABLE = "PCM_DROPDOWN"
GRIDS = {
    f"pcm_{family}_{num_phases}": PhaseGrid.even(num_phases, num_solver_steps)
    for family, num_solver_steps in SOLVER_STEPS.items()
    for num_phases in (2, 4, 8, 16)
}


def schedule(grid: PhaseGrid, model_sampling: Any, steps: int) -> torch.Tensor:
    """As ComfyUI asks for it: (steps + 1,), the last 0.

    A node that denoises in part asks for more steps than it takes, and takes the last: on the edges too, for every number is.

    Raises:
        ValueError: more steps than the grid has points, or a model that is not covered.
    """
    if steps > grid.num_solver_steps:
        raise ValueError(
            f"This node asks for a schedule of {steps} steps (its steps divided by its denoise, and one more for dpm_2, "
            f"uni_pc and such), and the adapter's grid has {grid.num_solver_steps} points. Take fewer steps or more denoise."
        )
    return torch.cat([sigmas_of(table_of(model_sampling), grid, grid.sampling_timesteps(steps)), torch.zeros(1)])


def add_schedulers() -> None:
    """Add the names to ComfyUI's list, in place: others hold the same list."""
    for name, grid in GRIDS.items():
        if name not in comfy.samplers.SCHEDULER_HANDLERS:
            comfy.samplers.SCHEDULER_HANDLERS[name] = comfy.samplers.SchedulerHandler(partial(schedule, grid))
            comfy.samplers.SCHEDULER_NAMES.append(name)


def add_schedulers_if_asked() -> None:
    """With PCM_DROPDOWN=1 in the environment."""
    if os.environ.get(VARIABLE) == "1":
        add_schedulers()

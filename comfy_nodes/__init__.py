"""Phased consistency in ComfyUI's node graphs. Nothing to install beside ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .dropdown import add_schedulers_if_asked
from .nodes_adapter import PCMLoraLoader, PCMLoraSettings
from .nodes_editing import PCMColorize, PCMDenoise, PCMInpaint, PCMInterpolate, PCMOutpaint, PCMStroke, PCMSuperResolve
from .nodes_sampling import PCMKSampler, PCMSampler, PCMScheduler
from .nodes_step_sheet import PCMStepSheet

NODES: list[type[io.ComfyNode]] = [
    PCMLoraLoader,
    PCMLoraSettings,
    PCMScheduler,
    PCMSampler,
    PCMKSampler,
    PCMStepSheet,
    PCMInpaint,
    PCMOutpaint,
    PCMColorize,
    PCMSuperResolve,
    PCMStroke,
    PCMDenoise,
    PCMInterpolate,
]


add_schedulers_if_asked()


class PhasedConsistency(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> PhasedConsistency:
    return PhasedConsistency()

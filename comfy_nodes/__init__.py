"""Phased consistency in ComfyUI's node graphs. Nothing to install beside ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .nodes_sampling import PCMKSampler, PCMLoraLoader, PCMSampler, PCMScheduler


class PhasedConsistency(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [PCMLoraLoader, PCMScheduler, PCMSampler, PCMKSampler]


async def comfy_entrypoint() -> PhasedConsistency:
    return PhasedConsistency()

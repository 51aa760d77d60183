"""Phased consistency sampling: few-step diffusion along the edges an adapter was trained on.

`from pcm_scheduler import PCMScheduler` needs diffusers; the mathematics (`PhaseGrid`, `sample_phased`) needs torch only.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lora_file import AdapterSettings, read_settings
    from .phases import PhaseGrid
    from .pipelines import PCMEditPipeline, export_clip, load_pcm_lora, load_pcm_unet
    from .sampling import jump, sample_phased
    from .scheduling_pcm import PCMScheduler, PCMSchedulerOutput

__version__ = "0.1.0"

_HOMES = {
    "AdapterSettings": "lora_file",
    "read_settings": "lora_file",
    "export_clip": "pipelines",
    "load_pcm_lora": "pipelines",
    "load_pcm_unet": "pipelines",
    "PCMEditPipeline": "pipelines",
    "PCMScheduler": "scheduling_pcm",
    "PCMSchedulerOutput": "scheduling_pcm",
    "PhaseGrid": "phases",
    "jump": "sampling",
    "sample_phased": "sampling",
}

__all__ = [
    "AdapterSettings",
    "PCMEditPipeline",
    "PCMScheduler",
    "PCMSchedulerOutput",
    "PhaseGrid",
    "__version__",
    "export_clip",
    "jump",
    "load_pcm_lora",
    "load_pcm_unet",
    "read_settings",
    "sample_phased",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

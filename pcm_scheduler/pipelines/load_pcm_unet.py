"""Put a UNet that was trained whole, and the scheduler it was trained for, into a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..lora_file import AdapterSettings, differing_shapes, read_settings, read_tensors
from .fitting import fitting_scheduler, local_file, uncompiled


def load_pcm_unet(pipe: Any, unet: str | Path, weight_name: str | None = None) -> AdapterSettings:
    """Replace the weights of `pipe.unet`, in the precision it has, and set `pipe.scheduler` to the `PCMScheduler` they need.

    Args:
        pipe: any diffusers pipeline with a UNet of the trained one's shape, and no adapter loaded.
        unet: a `.safetensors` file, a folder, or a hub id.
        weight_name: the file in a folder or hub repository.

    Returns:
        the settings in force, with the recommended `num_inference_steps`, `guidance_scale` and `eta` to call the pipeline with.

    Raises:
        ValueError: the file is not safetensors, does not say how it was trained, is not of this UNet, or was trained for
            another prediction type or number of timesteps than the pipeline's.
    """
    path = local_file(str(unet), weight_name)
    settings = read_settings(path)
    if settings is None:
        raise ValueError(f"{path} does not say how it was trained (no pcm.* header): it is no UNet that this project wrote.")
    scheduler = fitting_scheduler(pipe, settings, path.name)
    tensors, _ = read_tensors(path)
    network = uncompiled(pipe.unet)
    if any(parameter.is_meta for parameter in network.parameters()):  # into which nothing can be copied
        raise ValueError("The pipeline's weights are offloaded: call load_pcm_unet before enable_sequential_cpu_offload.")
    different = differing_shapes(network.state_dict(), tensors)
    if different:
        name, (ours, theirs) = next(iter(different.items()))
        raise ValueError(
            f"{path} is not of this pipeline's UNet: {len(different)} tensors differ, such as {name}: the file has "
            f"{tuple(theirs or ()) or 'none'}, the pipeline {tuple(ours or ()) or 'none'}. "
            "A file of an adapter is for load_pcm_lora; adapters that are loaded must be unloaded first."
        )
    network.load_state_dict(tensors)
    pipe.scheduler = scheduler
    return settings

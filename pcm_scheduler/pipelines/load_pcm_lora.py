"""Put a PCM adapter and the scheduler it was trained for into a pipeline, in one call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from ..lora_file import AdapterSettings, companion, read_lora, read_settings, read_tensors, with_overrides
from ..lora_layouts import LoraTensors, is_motion, is_of_original, to_diffusers
from .fitting import fitting_scheduler, local_file

logger = logging.get_logger(__name__)


def load_pcm_lora(
    pipe: Any,
    adapter: str | Path,
    weight_name: str | None = None,
    adapter_name: str = "pcm",
    num_phases: int | None = None,
    phase_edges: tuple[int, ...] | None = None,
    num_solver_steps: int | None = None,
) -> AdapterSettings:
    """Load an adapter's weights and set `pipe.scheduler` to the `PCMScheduler` it was trained for.

    The noise schedule stays the pipeline's, unless the file states the betas that it was trained on. Of a video adapter's three
    files the whole one is enough; its `_motion` and `_spatial` parts load too, each under an adapter_name of its own.

    Args:
        pipe: any diffusers pipeline with `load_lora_weights` and a scheduler.
        adapter: a `.safetensors` file, a folder, or a hub id.
        weight_name: the file in a folder or hub repository.
        adapter_name: the name under which PEFT keeps it; an adapter of that name is replaced.
        num_phases, phase_edges, num_solver_steps: override what the file says; needed when it says nothing.

    Returns:
        the settings in force, with the recommended `num_inference_steps`, `guidance_scale` and `eta` to call the pipeline with.

    Raises:
        ValueError: the file is not safetensors, neither it nor the caller says the phases, it was trained for another
            prediction type or number of timesteps than the pipeline's or for another UNet, or it adapts motion modules that
            the pipeline has not. The pipeline is then as it was.
    """
    if not hasattr(pipe, "unet"):
        raise ValueError(f"{type(pipe).__name__} has no UNet. PCM adapters here are for SD1.5, SDXL and AnimateDiff.")
    path = local_file(str(adapter), weight_name)
    stated = read_settings(path)
    settings = with_overrides(stated, num_phases=num_phases, phase_edges=phase_edges, num_solver_steps=num_solver_steps)
    if settings.inferred:
        logger.warning(f"{path.name} does not state its settings; inferred from what was published: {settings}")
    own = stated is not None and not stated.inferred
    scheduler = fitting_scheduler(pipe, settings, path.name, stated=own)  # refuses before weights are touched
    lora = read_lora(path)
    _check_motion(pipe, lora, path)
    _check_fit(pipe, lora, path)
    if adapter_name in {name for names in pipe.get_list_adapters().values() for name in names}:
        pipe.delete_adapters(adapter_name)
    _load_weights(pipe, lora, path, adapter_name)
    pipe.scheduler = scheduler
    return settings


def _check_motion(pipe: Any, lora: LoraTensors, path: Path) -> None:
    """Refuse motion modules that the pipeline has not: PEFT (0.21) would leave them out, or speak of target modules."""
    motion = [name for name in lora.modules if is_motion(name)]
    if not motion:
        return
    present = _modules(pipe)
    missing = [name for name in motion if name not in present]
    if not missing:
        return
    if not any(map(is_motion, present)):
        spatial = companion(path, "spatial")
        elsewhere = f"; its part for pictures is {spatial.name}" if spatial.is_file() else ""
        raise ValueError(
            f"{path.name} is a video adapter: {len(motion)} of its {len(lora.modules)} modules adapt AnimateDiff's motion "
            f"modules, and {type(pipe).__name__} has none. Load it into an AnimateDiffPipeline{elsewhere}."
        )
    if any(name.endswith("_transformer_blocks_0_module") for name in present):
        raise ValueError(f"Load {path.name} before enable_free_noise_split_inference, which renames motion modules.")
    raise ValueError(
        f"{path.name} adapts {len(missing)} motion modules that this pipeline has not, such as {lora.path(missing[0])}: it was "
        "trained with another motion adapter (AnimateDiff's v2 has one in the middle block, v1 and v3 have not)."
    )


def _check_fit(pipe: Any, lora: LoraTensors, path: Path) -> None:
    """Refuse matrices that lack their match, and those of another model, before anything in the pipeline changes."""
    for misfit in lora.misfits():
        raise ValueError(f"{path.name}: {misfit}")
    present = _modules(pipe)
    found = [name for name in lora.modules if name in present]
    for name in found:
        weight = getattr(getattr(present[name], "base_layer", present[name]), "weight", None)
        down, up = lora.modules[name]["down"], lora.modules[name]["up"]
        if weight is None or not weight.is_floating_point():  # as quantised weights are, in shapes of their own
            continue
        of_model, of_file = tuple(weight.shape), (up.shape[0], *down.shape[1:])
        if of_model != of_file:
            raise ValueError(
                f"{path.name} was trained for another model: its matrices for {name} make a weight of {of_file}, and in this "
                f"{type(pipe.unet).__name__} it is {of_model}."
            )
    if not found and not any(map(is_of_original, lora.modules)):
        name = min(lora.modules)
        raise ValueError(f"{path.name} adapts nothing that this {type(pipe.unet).__name__} has: {name} is not in it.")


def _modules(pipe: Any) -> dict[str, torch.nn.Module]:
    """The UNet's, by their paths with underscores."""
    return {name.replace(".", "_"): module for name, module in pipe.unet.named_modules()}


def _load_weights(pipe: Any, lora: LoraTensors, path: Path, adapter_name: str) -> None:
    """Put a LoRA into the UNet, and what the file has for text encoders into those.

    Not by `load_lora_weights` and the file's name: diffusers (0.42) takes keys without `unet.` for no LoRA at all, drops of
    kohya's layout DoRA magnitudes, motion modules, and the alphas of attention modules where alphas differ, and hands what
    the header says to PEFT, which runs its `rank_pattern` and `target_modules` as regular expressions. One may take years.
    """
    if any(map(is_of_original, lora.modules)):  # of which diffusers has the table
        if lora.has_magnitudes or len({lora.alpha(name) for name in lora.modules}) > 1:
            raise ValueError(f"{path.name} has DoRA magnitudes or several alphas under the original UNet's names: convert it.")
        pipe.load_lora_weights(read_tensors(path)[0], adapter_name=adapter_name)
        return
    whole, metadata = to_diffusers(lora)
    pipe.load_lora_into_unet(
        whole,
        network_alphas=None,
        unet=pipe.unet,
        adapter_name=adapter_name,
        metadata=json.loads(metadata),
        _pipeline=pipe,
    )
    of_text = [key for key in lora.strangers if key.startswith("text_encoder")]
    if of_text:  # which adapters of this project have not: the file is read once more
        tensors = read_tensors(path)[0]
        pipe.load_lora_weights({key: tensors[key] for key in of_text}, adapter_name=adapter_name)
    if left_out := [key for key in lora.strangers if key not in of_text]:
        logger.warning(f"{len(left_out)} tensors of {path.name} are of no LoRA of a UNet and left out, such as {left_out[0]}.")

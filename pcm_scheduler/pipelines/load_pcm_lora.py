"""Put a PCM adapter and the scheduler it was trained for into a pipeline, in one call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from peft.tuners.tuners_utils import BaseTunerLayer

from ..lora_file import AdapterSettings, companion, read_lora, read_settings, read_tensors, with_overrides
from ..lora_layouts import (
    TEXT_ENCODERS,
    LoraTensors,
    is_motion,
    is_of_original,
    sort_tensors,
    sort_text_tensors,
    to_diffusers,
    to_kohya,
)
from .fitting import fitting_scheduler, local_file, without_compiler

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

    The noise schedule stays the pipeline's, unless the file states the betas that it was trained on. Other adapters that act go
    on acting, at their weights, but for those that this function loaded: of them the newest acts alone. Of a video adapter's
    three files the whole one is enough; its `_motion` and `_spatial` parts load too, each under an adapter_name of its own, and
    `pipe.set_adapters` with both names makes both act.

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
            prediction type or number of timesteps than the pipeline's or for another UNet, it adapts motion modules that
            the pipeline has not, or an adapter is fused into the weights. The pipeline is then as it was.
        RuntimeError: diffusers or PEFT could not load what was expected to fit; what was loaded of it is taken out again.
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
    lora = _in_diffusers_names(pipe, read_lora(path), path)
    with without_compiler(pipe):
        _check_motion(pipe, lora, path)
        _check_fit(pipe, pipe.unet, lora, path)
        _check_fused(pipe)
        weights = _weights(pipe, lora, path)  # the last that may refuse
        active = _active(pipe)
        replaced = _delete(pipe, adapter_name)
        try:
            weights.load(pipe, adapter_name)
        except Exception as error:
            _delete(pipe, adapter_name)
            _activate(pipe, active)
            gone = f", and the adapter {adapter_name!r} that was there is gone" if replaced else ""
            raise RuntimeError(f"{path.name} could not be loaded{gone}: {error}") from error
        _activate(pipe, _beside(pipe, active, adapter_name))
    if lora.without_alpha:
        logger.warning(
            f"{path.name} says no alpha of {len(lora.without_alpha)} modules, so that they act with alpha = rank: too strong "
            "if the adapter was trained with less."
        )
    pipe.scheduler = scheduler
    return settings


def _in_diffusers_names(pipe: Any, lora: LoraTensors, path: Path) -> LoraTensors:
    """Modules that are called as in the original UNet under their names in diffusers', which has the table.

    Raises:
        ValueError: matrices without their match, names that the table has not, or DoRA magnitudes, which it loses.
    """
    original = lora.only(is_of_original)
    if not original.modules:
        return lora
    for misfit in original.misfits():
        raise ValueError(f"{path.name}: {misfit}")
    if original.has_magnitudes:
        raise ValueError(
            f"{path.name} has DoRA magnitudes under the original UNet's names, which diffusers' table of names loses."
        )
    # diffusers (0.42) mixes up alphas where they differ: it is given none, and scales are in the matrices
    tensors = {key: tensor for key, tensor in to_kohya(original.folded()).items() if not key.endswith(".alpha")}
    try:
        renamed, _ = pipe.lora_state_dict(tensors, unet_config=pipe.unet.config)
        found = sort_tensors(renamed)
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(
            f"{path.name} has modules under the original UNet's names that diffusers does not know: {error}"
        ) from error
    stated = found if original.without_alpha else found.stating()
    rest = lora.only(lambda name: not is_of_original(name))
    return replace(rest, modules=rest.modules | stated.modules, paths=rest.paths | stated.paths)


_LOADED = "loaded_by_load_pcm_lora"  # set on the PEFT configurations of PCM adapters, with which it goes


def _adapter_layers(pipe: Any) -> dict[str, list[BaseTunerLayer]]:
    """PEFT's layers in each network that LoRAs are for, by the network's name."""
    names = ("unet", *(prefix.rstrip(".") for prefix in TEXT_ENCODERS))
    networks = {name: getattr(pipe, name, None) for name in names}
    return {
        name: [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
        for name, network in networks.items()
        if network is not None
    }


def _check_fused(pipe: Any) -> None:
    """Refuse while anything is merged into the weights: PEFT (0.21) takes it out when another adapter is added."""
    for network, layers in _adapter_layers(pipe).items():
        merged = sorted({name for layer in layers for name in layer.merged_adapters})
        if merged:
            raise ValueError(
                f"Adapters are fused into the weights of {network}, which loading another would undo: {', '.join(merged)}. "
                "Call pipe.unfuse_lora() first, and pipe.fuse_lora() afterwards to fuse all that act; or call "
                "pipe.unload_lora_weights() to leave them in the weights for good."
            )


def _delete(pipe: Any, adapter_name: str) -> bool:
    """Take an adapter out of every network, and say whether it was in one."""
    present = any(adapter_name in names for names in pipe.get_list_adapters().values())
    if present:
        pipe.delete_adapters(adapter_name)
    return present


def _active(pipe: Any) -> dict[str, list[str]]:
    """The adapters that act, by network: none where they are switched off."""
    return {
        network: list(dict.fromkeys(name for layer in layers if not layer.disable_adapters for name in layer.active_adapters))
        for network, layers in _adapter_layers(pipe).items()
    }


def _beside(pipe: Any, active: Mapping[str, list[str]], adapter_name: str) -> dict[str, list[str]]:
    """What is to act once a PCM adapter is loaded: it, and what acted before but other PCM adapters."""
    configs = pipe.unet.peft_config
    setattr(configs[adapter_name], _LOADED, True)
    kept = {network: [name for name in names if not hasattr(configs.get(name), _LOADED)] for network, names in active.items()}
    return {
        network: [*names, *([adapter_name] if adapter_name in getattr(getattr(pipe, network), "peft_config", {}) else [])]
        for network, names in kept.items()
    }


def _activate(pipe: Any, active: Mapping[str, list[str]]) -> None:
    """Let these adapters act: diffusers (0.42) lets the one that was loaded last act alone.

    Not by `pipe.set_adapters`, which sets all weights anew, nor `pipe.enable_lora`, which lets act what was switched off.
    """
    for network, layers in _adapter_layers(pipe).items():
        present = [name for name in active[network] if name in getattr(getattr(pipe, network), "peft_config", {})]
        for layer in layers:
            layer.set_adapter(present)
            if present:
                layer.enable_adapters(enabled=True)


def _check_motion(pipe: Any, lora: LoraTensors, path: Path) -> None:
    """Refuse motion modules that the pipeline has not: PEFT (0.21) would leave them out, or speak of target modules."""
    motion = [name for name in lora.modules if is_motion(name)]
    if not motion:
        return
    present = _modules(pipe.unet)
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


def _check_fit(pipe: Any, network: torch.nn.Module, lora: LoraTensors, path: Path) -> None:
    """Refuse matrices that lack their match, those of another model and NaN, before anything in the pipeline changes."""
    for misfit in lora.misfits():
        raise ValueError(f"{path.name}: {misfit}")
    for name in lora.not_finite():
        raise ValueError(f"{path.name}: {name} holds numbers that are not finite, from which every picture would be black.")
    present = _modules(network)
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
                f"{type(network).__name__} it is {of_model}."
            )
    if not found:
        name = min(lora.modules)
        raise ValueError(f"{path.name} adapts nothing that this {type(network).__name__} has: {name} is not in it.")


def _modules(network: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """By their paths with underscores; a text encoder's also as transformers called them before its fifth version."""
    found = {name.replace(".", "_"): module for name, module in network.named_modules()}
    return found | ({} if hasattr(network, "up_blocks") else {f"text_model_{name}": module for name, module in found.items()})


@dataclass(frozen=True)
class _Weights:
    """What goes into a pipeline, once nothing can be refused any more.

    Attributes:
        unet: tensors in diffusers' layout.
        metadata: of them, as diffusers has it in headers.
        text: tensors of text encoders in diffusers' layout, alpha = rank.
    """

    unet: dict[str, torch.Tensor]
    metadata: dict[str, Any]
    text: dict[str, torch.Tensor]

    def load(self, pipe: Any, adapter_name: str) -> None:
        """Put them in, under a name that is free.

        Not by `load_lora_weights` and the file's name: diffusers (0.42) takes keys without `unet.` for no LoRA at all, drops of
        kohya's layout DoRA magnitudes, motion modules, and the alphas of attention modules where alphas differ, and hands what
        the header says to PEFT, which runs its `rank_pattern` and `target_modules` as regular expressions. One may take years.
        """
        pipe.load_lora_into_unet(
            self.unet,
            network_alphas=None,
            unet=pipe.unet,
            adapter_name=adapter_name,
            metadata=self.metadata,
            _pipeline=pipe,
        )
        if self.text:
            pipe.load_lora_weights(self.text, adapter_name=adapter_name)


def _weights(pipe: Any, lora: LoraTensors, path: Path) -> _Weights:
    """A LoRA, and what its file has for text encoders; what cannot be read as either is named in a warning.

    Raises:
        ValueError: a name that says no module, or matrices that do not fit a text encoder.
    """
    text: dict[str, torch.Tensor] = {}
    left_out = [key for key in lora.strangers if not key.startswith(TEXT_ENCODERS)]
    if any(key.startswith(TEXT_ENCODERS) for key in lora.strangers):  # which adapters of this project have not: read once more
        text, unread = _text_tensors(pipe, *read_tensors(path), path)
        left_out += unread
    if left_out:
        logger.warning(
            f"{len(left_out)} tensors of {path.name} are left out, such as {left_out[0]}: they are named neither as in a LoRA "
            "of a UNet nor as in diffusers' files for text encoders."
        )
    try:
        tensors, metadata = to_diffusers(lora)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    return _Weights(tensors, json.loads(metadata), text)


def _text_tensors(
    pipe: Any, tensors: Mapping[str, torch.Tensor], header: Mapping[str, str], path: Path
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Those of text encoders, with their scales in the matrices: diffusers is not given the header, in which alphas are.

    And the names of those of no known layout.
    """
    found: dict[str, torch.Tensor] = {}
    unread: list[str] = []
    for prefix in TEXT_ENCODERS:
        own = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        encoder = getattr(pipe, prefix.rstrip("."), None)
        if not own or encoder is None:
            continue
        try:
            lora = sort_text_tensors(own, header, prefix)
        except ValueError as error:
            raise ValueError(f"{path.name} {error}") from error
        if lora is None:
            unread += own
            continue
        unread += [prefix + key for key in lora.strangers]
        _check_fit(pipe, encoder, lora, path)
        written, _ = to_diffusers(lora.folded())
        found |= {prefix + key.removeprefix("unet."): tensor for key, tensor in written.items()}
    return found, unread

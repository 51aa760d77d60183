"""A LoRA file in ComfyUI's terms: tensors under the names that it maps, put into a MODEL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.sd
import comfy.supported_models
import torch
from comfy.weight_adapter import LoRAAdapter

from ..pcm_scheduler.lora_file import HEADER_PREFIX
from ..pcm_scheduler.lora_layouts import METADATA_KEY, PEFT_CONFIG, LoraTensors, sort_tensors, to_kohya

FAMILIES = {
    "sd15": comfy.supported_models.SD15,
    "sdxl": comfy.supported_models.SDXL,
    "animatediff": comfy.supported_models.SD15,  # spatial layers; motion modules are in a file of their own
}

_MAGNITUDE = ".dora_scale"  # ends the name, in kohya's layout
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # whose numbers are the weights, with no scale to them


def with_lora(
    model: Any, tensors: Mapping[str, torch.Tensor], header: Mapping[str, str], strength: float, family: str | None
) -> tuple[Any, list[str]]:
    """The model with a LoRA in it, and what is to be said of it.

    Args:
        model: a MODEL.
        tensors, header: of the file.
        strength: 1 is what it was trained at.
        family: for which the file says it is, of `FAMILIES`; None if it does not say.

    Raises:
        ValueError: a file for another kind of model, or one that is not whole. Many of the modules' names are the same, and
            ComfyUI would only log those that do not fit.
    """
    config = model.model.model_config
    if family in FAMILIES and not isinstance(config, FAMILIES[family]):
        raise ValueError(f"This adapter is for {family}, and the model is {type(config).__name__}: load the other file.")
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    named, modules, silent = in_kohyas_names(tensors, header, names)
    weights, left = unpatched_weights(model), 0
    if any(key.startswith(HEADER_PREFIX) for key in header) or not any(key.endswith(_MAGNITUDE) for key in tensors):
        named, left = with_pefts_norm(named, names, weights)  # others, who write kohya's names, may divide as ComfyUI does
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(named)), names, log_missing=False)
    fitting = [patch for key, patch in patches.items() if fits(key, patch, weights)]
    if not fitting:
        raise ValueError(
            f"Nothing in this file fits the model, which is {type(config).__name__}: it is for another kind of model, or no "
            "LoRA of a UNet. Choose another file."
        )
    adapted = comfy.sd.load_lora_for_models(model, None, named, strength, 0)[0]
    fitted = sum(isinstance(patch, LoRAAdapter) for patch in fitting)
    said = [f"{fitted} of {modules} modules fit this model; the others have no effect"] if fitted < modules else []
    if silent:
        said.append(
            f"The file says no alpha of {silent} modules, so that they act with alpha = rank: too strong if the adapter was "
            "trained with less. If pictures are burnt or black, lower strength_model; alpha 8 of rank 64 is strength 0.125."
        )
    if left:
        said.append(
            f"The DoRA magnitudes of {left} modules act otherwise than in training, because the model's weights there are "
            "quantized: results will differ. Load the model in fp16, bf16 or fp32."
        )
    return adapted, said


def unpatched_weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights of a MODEL by name, as its checkpoint has them: ComfyUI leaves LoRAs in the network after a run."""
    kept = {key: backup.weight for key, backup in model.backup.items()}
    return model.model.state_dict() | kept | {key: backup[0] for key, backup in model.hook_backup.items()}


def with_pefts_norm(
    named: Mapping[str, torch.Tensor], names: Mapping[str, Any], weights: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], int]:
    """A DoRA with magnitudes from which ComfyUI's formula makes PEFT's weight, m (W + delta) / |W + delta|.

    ComfyUI (0.3.64 and 0.8.0) divides by |W|, so m is multiplied by |W| / |W + delta|, a number for each output channel.
    That is exact at strength 1 with no other LoRA before. At another strength ComfyUI goes so far of the way from W to that
    weight; after other LoRAs its W has them in it, and lengths are off by as much as they change those of W.

    Args:
        named: tensors under kohya's names.
        names: of the model's weights, by modules.
        weights: of the model, without patches.

    Returns:
        the tensors, and of how many modules the magnitudes were left as they are, because the weight is quantized.
    """
    scaled, left = dict(named), 0
    for key in named:
        module = key.removesuffix(_MAGNITUDE)
        weight = weights.get(names.get(module, ""))
        down, up, middle = (named.get(f"{module}.lora_{part}.weight") for part in ("down", "up", "mid"))
        if module == key or weight is None or down is None or up is None or middle is not None:
            continue
        if weight.dtype not in _PLAIN:
            left += 1
            continue
        magnitude = named[key].to(weight.device, torch.float32)
        if not of_shape(up, down, weight) or magnitude.shape[:1] != weight.shape[:1] or magnitude.numel() != len(weight):
            continue
        up, down = (part.to(weight.device, torch.float32).flatten(1) for part in (up, down))
        alpha = named[f"{module}.alpha"].item() if f"{module}.alpha" in named else len(down)
        base = weight.float().flatten(1)
        merged = base + up @ down * (alpha / len(down))
        lengths = [rows.norm(dim=1) + torch.finfo(torch.float32).eps for rows in (base, merged)]  # as ComfyUI adds it
        scaled[key] = magnitude * (lengths[0] / lengths[1]).reshape(magnitude.shape)
    return scaled, left


def in_kohyas_names(
    tensors: Mapping[str, torch.Tensor], header: Mapping[str, str], names: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], int, int]:
    """A file's tensors as ComfyUI maps all of them, how many modules have LoRA matrices, and of how many nobody says alpha.

    Of diffusers' layout ComfyUI maps no attention module but `to_out`, and it does not look for alpha in the header. Of a pair
    of kohya's matrices that lacks one it passes over what is left, or stops at the missing name.

    Args:
        tensors, header: of the file.
        names: that ComfyUI knows modules of the model by.

    Raises:
        ValueError: matrices or metadata that cannot be used; what is wrong.
    """
    try:
        lora = sort_tensors(tensors, header)
    except ValueError as error:
        if {METADATA_KEY, PEFT_CONFIG} & header.keys():
            raise ValueError(f"This file {error}") from error
        return dict(tensors), 0, 0  # LoHa and others, which ComfyUI may know
    for name in lora.not_finite():
        raise ValueError(
            f"This file holds numbers that are not finite, in {name}: every picture would be black. Train it again."
        )
    modules = sum({"down", "up"} <= parts.keys() for parts in lora.modules.values())
    known = lora.only(lambda name: f"lora_unet_{name}" in names)
    silent = len(lora.without_alpha)
    if lora.layouts == ("kohya",):
        _refuse_misfits(known.only(lambda name: len({"down", "up"} & known.modules[name].keys()) == 1))  # the rest may be LoHa
        return dict(tensors), modules, silent
    if not known.modules:
        return dict(tensors), modules, silent
    _refuse_misfits(lora)
    return {key: tensors[key] for key in lora.strangers if key in tensors} | to_kohya(lora), modules, silent


def _refuse_misfits(lora: LoraTensors) -> None:
    for misfit in lora.misfits():
        raise ValueError(f"This file is not whole: {misfit} Download or convert it again.")


def fits(key: Any, patch: Any, weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether a patch of ComfyUI's has a weight to act on, and LoRA matrices its shape.

    Args:
        key: name of a weight, or a tuple of it and a part of it.
        patch: for it. What is not a plain LoRA passes, and so does what is for a quantized weight, whose shape is another.
        weights: of the model.
    """
    weight = weights.get(key if isinstance(key, str) else key[0])
    if weight is None:
        return False
    if not isinstance(key, str) or not isinstance(patch, LoRAAdapter) or not weight.is_floating_point():
        return True
    up, down, middle, reshape = (patch.weights[i] for i in (0, 1, 3, 5))
    if middle is not None or reshape is not None:
        return True
    return of_shape(up, down, weight)


def of_shape(up: torch.Tensor, down: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the product of LoRA matrices has a weight's shape."""
    if min(up.ndim, down.ndim) < 2 or up.shape[1] != down.shape[0] or up.shape[0] != weight.shape[0]:
        return False
    return up.shape[0] * down.shape[1:].numel() == weight.numel()

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

from ..pcm_scheduler.lora_layouts import METADATA_KEY, LoraTensors, sort_tensors, to_kohya

FAMILIES = {
    "sd15": comfy.supported_models.SD15,
    "sdxl": comfy.supported_models.SDXL,
    "animatediff": comfy.supported_models.SD15,  # spatial layers; motion modules are in a file of their own
}


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
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(named)), names, log_missing=False)
    weights = model.model.state_dict()
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
    return adapted, said


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
        if METADATA_KEY in header:
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
    if min(up.ndim, down.ndim) < 2 or up.shape[1] != down.shape[0] or up.shape[0] != weight.shape[0]:
        return False
    return up.shape[0] * down.shape[1:].numel() == weight.numel()

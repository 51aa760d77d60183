"""What a node says of a combination that works but will disappoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from ..pcm_scheduler.lora_file import SOLVER_STEPS, AdapterSettings
from ..pcm_scheduler.noise_schedule import make_alphas_cumprod, make_betas

EVOLVED_SCHEDULES = {
    "linear": "sqrt_linear (AnimateDiff)",
    "scaled_linear": "linear (HotshotXL/default)",
    "squaredcos_cap_v2": "squaredcos_cap_v2",
}
"""What AnimateDiff-Evolved calls diffusers' beta schedules."""

_BETA_RANGE = (0.00085, 0.012)  # Stable Diffusion's, which ComfyUI and AnimateDiff-Evolved have too
_TEXTS = ("text", "text_g", "text_l", "prompt", "string", "value")


def _texts(prompt: dict[str, Any], link: Any, seen: set[str]) -> Iterator[str]:
    """Texts that a graph's conditioning is made of, followed back from a link [node id, output]."""
    node_id, output = str(link[0]), link[1]
    if node_id in seen or node_id not in prompt:
        return
    seen.add(node_id)
    if prompt[node_id].get("class_type") == "ConditioningZeroOut":  # which leaves nothing of its text
        return
    inputs = prompt[node_id]["inputs"]
    if {"positive", "negative"} <= inputs.keys():  # such as ControlNet's, which pass both on in this order
        inputs = {"conditioning": inputs["negative" if output == 1 else "positive"]}
    for name, value in inputs.items():
        if isinstance(value, str) and name in _TEXTS:
            yield value
        elif isinstance(value, list) and (name in _TEXTS or name.startswith("conditioning")):
            yield from _texts(prompt, value, seen)


def negative_prompt(prompt: dict[str, Any] | None, node_id: str | None) -> str:
    """The text behind the `negative` input of a node; empty if there is none, it is the positive one's too, or it cannot be
    followed.

    Args:
        prompt: the graph as the server has it.
        node_id: of the node.
    """
    inputs = (prompt or {}).get(str(node_id), {}).get("inputs", {})
    link = inputs.get("negative")
    if not prompt or not isinstance(link, list) or link == inputs.get("positive"):
        return ""
    return " ".join(_texts(prompt, link, set())).strip()


def advice(
    cfg: float, eta: float, settings: AdapterSettings | None, num_phases: int, negative: str, editing: bool = False
) -> list[str]:
    """Sentences, each on one combination.

    Args:
        cfg, eta: of the node.
        settings: of the adapter, if it is known.
        num_phases: of the grid.
        negative: text of the negative prompt.
        editing: new noise is then wanted, whatever the adapter.
    """
    said = []
    if math.isclose(cfg, 1):  # as ComfyUI compares it before it leaves the negative prompt out
        if negative:
            said.append(f"cfg is {cfg:g}, so the negative prompt has no effect: {negative[:60]!r}. Above 1 it has.")
    elif cfg < 1:
        said.append(
            f"cfg is {cfg:g}: below 1 ComfyUI mixes in what the negative prompt says, and at 0 it draws nothing else. "
            "Set it to 1 or more; what diffusers calls guidance 0 is cfg 1 here."
        )
    if settings is not None and settings.guidance_scale <= 1 and cfg > 2.5:
        said.append(f"cfg is {cfg:g}. This adapter has guidance in it and recommends 1; try 1 to 2.")
    if not editing and settings is not None and settings.eta == 1 and eta == 0:
        said.append("This adapter is in LCM's style and recommends eta 1; eta is 0, so results will be soft.")
    if not editing and eta > 0 and num_phases > 1 and (settings is None or settings.eta == 0):
        said.append(f"eta is {eta:g}: new noise needs x0 from across phases, for which {num_phases} phases were not trained.")
    return said


def fit_advice(sdxl: bool, prediction_type: str | None, settings: AdapterSettings | None) -> list[str]:
    """Sentences on an adapter of another kind of model.

    Args:
        sdxl: whether the model is of that family.
        prediction_type: of the model as it is patched; None: none of those that adapters state.
        settings: of the adapter, if it is known; those of a file that says nothing name neither.
    """
    said: list[str] = []
    if settings is None or settings.assumed:
        return said
    if sdxl != (settings.base_model == "sdxl"):
        said.append(f"The settings are of an adapter for {settings.base_model}, and the model is {'' if sdxl else 'not '}SDXL.")
    if prediction_type is not None and prediction_type != settings.prediction_type:
        said.append(
            f"The adapter was trained on a model that predicts {settings.prediction_type}, and this one predicts "
            f"{prediction_type}: pictures will be wrong. Take the model that it was trained on."
        )
    return said


def grid_advice(sdxl: bool, settings: AdapterSettings | None, num_solver_steps: int) -> list[str]:
    """Sentences on where the steps stop.

    Args:
        sdxl: whether the model is of that family.
        settings: of the adapter, if it is known; those of a file that says nothing hold what their node was told.
        num_solver_steps: of the grid.
    """
    told = settings is None or settings.assumed
    if not sdxl or not told or num_solver_steps != SOLVER_STEPS["sd15"]:
        return []
    way_out = "Connect settings, or set it to" if settings is None else "On the node that gives the settings, set it to"
    return [
        f"The model is SDXL and num_solver_steps is {num_solver_steps}, which is for SD1.5. {way_out} "
        f"{SOLVER_STEPS['sdxl']}, unless the adapter was trained on {num_solver_steps}."
    ]


def betas_advice(sigmas: torch.Tensor, settings: AdapterSettings | None) -> list[str]:
    """Sentences on noise levels that the adapter was not trained on.

    Args:
        sigmas: sigma / alpha at every training timestep of the model as it is patched, (T,).
        settings: of the adapter, if it is known; those that state no betas fit any.
    """
    zero_snr = sigmas[-1] > 1000  # which moves the whole table: other numbers then are no other schedule
    if settings is None or settings.beta_schedule is None or zero_snr:
        return []
    stated = (settings.beta_start, settings.beta_end)
    first, last = (default if value is None else value for value, default in zip(stated, _BETA_RANGE, strict=True))
    alphas_cumprod = make_alphas_cumprod(make_betas(settings.beta_schedule, first, last, len(sigmas)))
    middle = len(sigmas) // 2
    trained, here = (1 / alphas_cumprod - 1)[middle].sqrt().item(), sigmas[middle].item()
    if math.isclose(here, trained, rel_tol=0.03):  # schedules differ by a tenth and more there
        return []
    said = (
        f"The adapter was trained on {settings.beta_schedule} betas from {first:g} to {last:g}, and the model has others: at "
        f"timestep {middle} its sigma is {here:.2f} instead of {trained:.2f}, so pictures suffer."
    )
    if (first, last) == _BETA_RANGE:
        said += f" In AnimateDiff-Evolved, set beta_schedule to {EVOLVED_SCHEDULES[settings.beta_schedule]}."
    return [said]

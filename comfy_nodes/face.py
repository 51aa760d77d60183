"""Words on a node's face."""

from __future__ import annotations

import logging
import sys
from typing import Any

from comfy_api.latest import io, ui

from ..pcm_scheduler.lora_file import AdapterSettings
from ..pcm_scheduler.phases import PhaseGrid
from .advice import advice, betas_advice, fit_advice, grid_advice, negative_prompt
from .sampling import is_sdxl, prediction_type_of, table_of

HIDDEN = [io.Hidden.prompt, io.Hidden.unique_id]
"""What a node's schema asks for, for the functions here."""


def say(node: type[io.ComfyNode], *lines: str) -> Any:
    """Show lines on the running node, and return them for its output, where programs read them.

    ComfyUI's front-end shows a node's text only when the server sends it as progress.
    """
    text = "\n".join(lines)
    running = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if running is not None and node.hidden:
        running.send_progress_text(text, node.hidden.unique_id, sid=running.client_id)
    return ui.PreviewText(text)


def finite_advice(finite: bool) -> list[str]:
    """What is to be said of a run in which a number was NaN or infinite; in ComfyUI's log too, at every such run."""
    if finite:
        return []
    said = (
        "The model gave numbers that are not finite, so pictures are black or mean nothing. If it runs in fp16, start ComfyUI "
        "with --bf16-unet or --force-fp32, or lower cfg; else the model or the adapter is broken."
    )
    logging.warning(said)
    return [said]


def model_advice(model: Any, grid: PhaseGrid, settings: AdapterSettings | None) -> list[str]:
    """What does not go together of a model and the adapter whose settings these are, in sentences."""
    sdxl = is_sdxl(model)
    said = fit_advice(sdxl, prediction_type_of(model), settings) + grid_advice(sdxl, settings, grid.num_solver_steps)
    return said + betas_advice(table_of(model.get_model_object("model_sampling")), settings)


def sampling_advice(
    node: type[io.ComfyNode],
    model: Any,
    grid: PhaseGrid,
    cfg: float,
    eta: float,
    settings: AdapterSettings | None,
    editing: bool = False,
) -> list[str]:
    """What disappoints of the running node's inputs, in sentences.

    Args:
        node: has a `negative`, whose text is found as far as the graph shows it.
        model: of ComfyUI.
        grid: which `settings` decide if there are any.
        cfg, eta: of the node.
        settings: of the adapter, if it is known.
        editing: new noise is then wanted, whatever the adapter.
    """
    # some patches, such as SelfAttentionGuidance, have the negative prompt used at cfg 1 too
    unused = node.hidden and not model.model_options.get("disable_cfg1_optimization")
    negative = negative_prompt(node.hidden.prompt, node.hidden.unique_id) if unused else ""
    return advice(cfg, eta, settings, grid.num_phases, negative, editing) + model_advice(model, grid, settings)

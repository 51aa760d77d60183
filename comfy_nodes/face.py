"""Words on a node's face."""

from __future__ import annotations

import sys
from typing import Any

from comfy_api.latest import io, ui

from ..pcm_scheduler.lora_file import AdapterSettings
from ..pcm_scheduler.phases import PhaseGrid
from .advice import advice, grid_advice, negative_prompt
from .sampling import is_sdxl

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
    negative = negative_prompt(node.hidden.prompt, node.hidden.unique_id) if node.hidden else ""
    said = advice(cfg, eta, settings, grid.num_phases, negative, editing)
    return said + grid_advice(is_sdxl(model), settings, grid.num_solver_steps)

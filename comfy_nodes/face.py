"""Words on a node's face."""

from __future__ import annotations

import sys
from typing import Any

from comfy_api.latest import io, ui

from .advice import negative_prompt

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


def told_negative(node: type[io.ComfyNode]) -> str:
    """The text behind the running node's `negative`, as far as the graph shows it."""
    return negative_prompt(node.hidden.prompt, node.hidden.unique_id) if node.hidden else ""

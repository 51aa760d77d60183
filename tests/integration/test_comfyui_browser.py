"""Every example workflow in ComfyUI's own front-end: it opens whole, would post what is documented, its queue button works.

Set COMFYUI_PATH and COMFYUI_PYTHON as for `test_comfyui.py`, and COMFYUI_ANIMATEDIFF_PATH for AnimateDiff-Evolved's workflow.
Needs Chromium on the machine and `pip install playwright`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from comfyui_browser import CHROMIUM, front_end
from comfyui_server import serve
from comfyui_workflows import MOTION_LORA, WORKFLOWS, build

pytest.importorskip("playwright", reason="pip install playwright")

ROOT = Path(__file__).parents[2]
EVOLVED = os.environ.get("COMFYUI_ANIMATEDIFF_PATH")

pytestmark = [
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a ComfyUI checkout"),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    packs = {"ComfyUI-AnimateDiff-Evolved": Path(EVOLVED)} if EVOLVED else {}
    with serve(tmp_path_factory.mktemp("comfyui") / "base", "a pack", packs=packs) as server:
        (server.base / "models" / "animatediff_models" / "mm_sd_v15_v2.ckpt").touch()
        (server.base / "models" / "animatediff_motion_lora" / MOTION_LORA).touch()
        with front_end(server) as opened:
            yield opened


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_opens_whole_and_runs(page, name):
    if name == "animatediff" and not EVOLVED:
        pytest.skip("set COMFYUI_ANIMATEDIFF_PATH to a checkout of AnimateDiff-Evolved")
    page.reload()
    page.open_workflow(json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8")))
    assert page.unknown_nodes() == []
    assert page.api_form() == build(name)
    if name != "animatediff":  # there is no motion module of that size here
        page.queue()

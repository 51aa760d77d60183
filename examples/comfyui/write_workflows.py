"""Write example_workflows/: each graph in API form, as ComfyUI's front-end saves it, and a picture of it after a run.

    COMFYUI_PATH=... COMFYUI_PYTHON=... python examples/comfyui/write_workflows.py

Needs a ComfyUI checkout, Chromium and Playwright. The pictures are of the shapes models; so are those of the help pages.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from comfyui_browser import FrontEnd, front_end
from comfyui_server import ROOT, serve
from comfyui_workflows import WORKFLOWS, build, for_shapes, note

sys.path.append(str(ROOT / "examples" / "shapes"))
from scenes import TRAIN_SEED, caption, render, sample_scene

FOLDER = ROOT / "example_workflows"
HELP = ROOT / "comfy_nodes" / "web" / "docs" / "images"
# Which of the pictures a workflow loads; all others take the first.
PICTURES = {"super_resolve": "small.png", "denoise": "noisy.png", "colorize": "grey.png", "stroke": "sketch.png"}
NEEDS = {"animatediff": "AnimateDiff-Evolved"}
# A node's picture is taken from the first workflow that has it.
SCENE = 11


def write_scenes(folder: Path) -> str:
    """Pictures of one scene for the workflows to load, one of them with a part masked; its caption."""
    scene = sample_scene(TRAIN_SEED, SCENE)
    pixels = ((render([scene])[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    alpha = Image.new("L", picture.size, 255)
    alpha.paste(0, (70, 40, 120, 90))
    masked = picture.copy()
    masked.putalpha(alpha)
    masked.save(folder / "scene.png")
    picture.convert("L").save(folder / "grey.png")
    picture.resize((32, 32), Image.Resampling.BOX).save(folder / "small.png")
    picture.resize((16, 16), Image.Resampling.BOX).resize((128, 128), Image.Resampling.BILINEAR).save(folder / "sketch.png")
    noisy = pixels + np.random.default_rng(0).normal(0, 20, pixels.shape)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / "noisy.png")
    return caption(scene)


def write_json(path: Path, content: Any) -> None:
    """As text that changes little from one writing to the next."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def lasting(workflow: dict[str, Any]) -> dict[str, Any]:
    """A workflow without what the front-end makes up anew: ids of the run and of the graph."""
    return {key: value for key, value in workflow.items() if key not in ("id", "revision")}


def write(page: FrontEnd, prompt: str) -> None:
    pictured: set[str] = set()
    for name in WORKFLOWS:
        graph = build(name)
        write_json(FOLDER / "api" / f"{name}.json", graph)
        page.reload()
        page.open_api_form(graph, name, note(name))
        unknown = page.unknown_nodes()
        if unknown:
            print(f"{name}: not written, there is no {', '.join(unknown)}")
            continue
        write_json(FOLDER / f"{name}.json", lasting(page.workflow()))
        if name in NEEDS:
            page.picture(str(FOLDER / f"{name}.jpg"), quality=80)
            continue
        page.reload()
        page.open_api_form(for_shapes(graph, prompt, PICTURES.get(name, "scene.png")), name, note(name))
        page.queue()
        page.picture(str(FOLDER / f"{name}.jpg"), quality=80)
        for node_type in sorted({node["class_type"] for node in graph.values()} - pictured):
            if node_type.startswith("PCM"):
                page.picture(str(HELP / f"{node_type}.png"), node_type)
                pictured.add(node_type)
        print(name)


def main() -> None:
    if "COMFYUI_PATH" not in os.environ:
        raise SystemExit("Set COMFYUI_PATH to a ComfyUI checkout, and COMFYUI_PYTHON to a Python with its requirements.")
    (FOLDER / "api").mkdir(parents=True, exist_ok=True)
    HELP.mkdir(parents=True, exist_ok=True)
    evolved = os.environ.get("COMFYUI_ANIMATEDIFF_PATH")
    packs = {"ComfyUI-AnimateDiff-Evolved": Path(evolved)} if evolved else {}
    with tempfile.TemporaryDirectory() as base, serve(Path(base), "phased-consistency", packs=packs) as server:
        prompt = write_scenes(server.base / "input")
        with front_end(server) as page:
            write(page, prompt)


if __name__ == "__main__":
    main()

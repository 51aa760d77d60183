"""A real ComfyUI server, headless, with this pack in its custom_nodes and the shapes models behind the usual file names."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
ADAPTERS = ROOT / "examples" / "shapes" / "adapters"
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
# What people have in their folders, and what stands for it here.
CHECKPOINTS = {"v1-5-pruned-emaonly-fp16.safetensors": "model", "sd_xl_base_1.0.safetensors": "model_xl"}
LORAS = {
    "pcm_sd15_smallcfg_4step_converted.safetensors": "pcm_4phase.safetensors",
    "pcm_sdxl_smallcfg_4step_converted.safetensors": "xl_pcm_4phase.safetensors",
    "AnimateLCM_sd15_t2v_lora.safetensors": "lcm.safetensors",
}
TEXT = 3  # of the kinds of binary messages that ComfyUI sends
# No welcome in the way, and text on nodes however small.
FRONT_END_SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0.1,
}


def copy_pack(folder: Path) -> Path:
    """What people clone into custom_nodes, in a folder of a name of their own."""
    folder.mkdir(parents=True)
    for part in ("__init__.py", "comfy_nodes", "pcm_scheduler", "pyproject.toml", "locales", "example_workflows"):
        if (ROOT / part).exists():
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, folder / part)
    return folder


@dataclass
class Run:
    """What a posted graph did.

    Attributes:
        status: `success`, `error` or `interrupted`.
        outputs: what its output nodes showed, by node id.
        messages: everything that came over the websocket, in order.
        previews: how many pictures came over it.
        words: what the nodes showed on their faces.
    """

    status: str = ""
    outputs: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)
    previews: int = 0
    words: list[str] = field(default_factory=list)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The data of messages of a kind."""
        return [message["data"] for message in self.messages if message["type"] == kind]

    @property
    def error(self) -> str:
        """What the failing node said."""
        return "\n".join(data["exception_message"] for data in self.of("execution_error"))


class RefusedError(Exception):
    """A graph that the server did not take: its answer of status 400."""

    def __init__(self, answer: dict[str, Any]):
        super().__init__(json.dumps(answer))
        self.answer = answer


class Server:
    """A running ComfyUI.

    Args:
        url: without a slash at the end.
        base: its base directory.
    """

    def __init__(self, url: str, base: Path):
        self.url, self.base = url, base

    def get(self, path: str) -> Any:
        """JSON."""
        with urllib.request.urlopen(self.url + path) as answer:
            return json.load(answer)

    def text(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path) as answer:
            return answer.read().decode()

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            raise RefusedError(json.loads(error.read())) from error
        return json.loads(content) if content else None

    def run(self, graph: dict[str, Any], cancel_after: int | None = None) -> Run:
        """Post a graph in its API form and watch it to its end.

        Args:
            graph: the nodes by id.
            cancel_after: cancel once that many steps have been reported.

        Raises:
            RefusedError: the server finds it wrong.
        """
        from websocket import create_connection

        client, run = uuid.uuid4().hex, Run()
        socket_url = self.url.replace("http", "ws") + f"/ws?clientId={client}"
        connection = create_connection(socket_url, timeout=300)
        try:
            prompt_id = self.post("/prompt", {"prompt": graph, "client_id": client})["prompt_id"]
            steps = 0
            while not run.status:
                received = connection.recv()
                if isinstance(received, bytes):
                    if int.from_bytes(received[:4], "big") == TEXT:
                        node_id_length = int.from_bytes(received[4:8], "big")
                        run.words.append(received[8 + node_id_length :].decode())
                    else:
                        run.previews += 1
                    continue
                message = json.loads(received)
                if message["data"].get("prompt_id", prompt_id) != prompt_id:
                    continue
                run.messages.append(message)
                kind = message["type"]
                if kind == "progress":
                    steps += 1
                    if steps == cancel_after:
                        self.post("/interrupt", {})
                elif kind == "executed":
                    run.outputs[message["data"]["node"]] = message["data"]["output"]
                elif kind.startswith("execution_") and kind.removeprefix("execution_") in ("success", "error", "interrupted"):
                    run.status = kind.removeprefix("execution_")
        finally:
            connection.close()
        return run

    def picture(self, shown: dict[str, Any]) -> Image.Image:
        """A picture that an output node lists."""
        folder = self.base / shown["type"] / shown.get("subfolder", "")
        return Image.open(folder / shown["filename"])


def write_input(folder: Path) -> None:
    """A picture of the name and the size of the one that ComfyUI brings along."""
    y, x = np.mgrid[:768, :768]
    picture = np.stack([120 + 60 * np.sin(x / 120), 130 + 50 * np.cos(y / 150), 140 + 0 * x], -1)
    picture += np.random.default_rng(0).normal(0, 10, picture.shape)
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / "example.png")


@contextmanager
def serve(
    base: Path, pack_name: str, environment: dict[str, str] | None = None, packs: dict[str, Path] | None = None
) -> Iterator[Server]:
    """ComfyUI from COMFYUI_PATH, until the end of the block.

    Args:
        base: an empty folder.
        pack_name: of this pack's folder.
        environment: variables to add to its own.
        packs: further packs by name.
    """
    folders = (
        "custom_nodes",
        "models/checkpoints",
        "models/loras",
        "models/animatediff_models",
        "models/animatediff_motion_lora",
        "input",
        "output",
        "temp",
        "user",
    )
    for folder in folders:
        (base / folder).mkdir(parents=True)
    copy_pack(base / "custom_nodes" / pack_name)
    (base / "custom_nodes" / "shapes_pack").symlink_to(Path(__file__).parent / "shapes_pack")
    for name, pack in (packs or {}).items():
        (base / "custom_nodes" / name).symlink_to(pack)
    for name, model in CHECKPOINTS.items():
        save_file({"nothing": torch.zeros(1)}, base / "models" / "checkpoints" / name, {"shapes": model})
    for name, adapter in LORAS.items():
        shutil.copy(ADAPTERS / adapter, base / "models" / "loras" / name)
    write_input(base / "input")
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir()
    settings.write_text(json.dumps(FRONT_END_SETTINGS))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base), "--disable-api-nodes"]
    flags += ["--database-url", "sqlite:///:memory:", "--disable-auto-launch", "--preview-method", "latent2rgb"]
    server = Server(f"http://127.0.0.1:{port}", base)
    with (base / "log").open("w") as log:
        process = subprocess.Popen(
            [PYTHON, "main.py", *flags],
            cwd=os.environ["COMFYUI_PATH"],
            stdout=log,
            stderr=log,
            env=os.environ | (environment or {}),
        )
        try:
            for _ in range(180):
                assert process.poll() is None, (base / "log").read_text()[-3000:]
                try:
                    server.get("/system_stats")
                    break
                except OSError:
                    time.sleep(1)
            else:
                raise AssertionError((base / "log").read_text()[-3000:])
            yield server
        finally:
            process.terminate()
            process.wait(timeout=30)

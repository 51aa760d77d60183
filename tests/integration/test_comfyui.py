"""The nodes in real ComfyUI: its server lists them, and they draw what its own samplers draw on the same sigmas.

Set COMFYUI_PATH to a checkout, and COMFYUI_PYTHON to a Python with its requirements (default: the one that runs the tests).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from pcm_scheduler.phases import PhaseGrid

ROOT = Path(__file__).parents[2]
ADAPTER = ROOT / "examples" / "shapes" / "adapters" / "pcm_4phase.safetensors"
SNAPSHOT = Path(__file__).parent / "comfyui_nodes.json"

pytestmark = pytest.mark.skipif(
    "COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a ComfyUI checkout, COMFYUI_PYTHON to its Python"
)


@pytest.fixture(scope="module")
def found(run_host, tmp_path_factory):
    """What `comfyui_host.py` saw."""
    loras = tmp_path_factory.mktemp("loras")
    shutil.copy(ADAPTER, loras)
    return run_host("comfyui_host.py", loras)


def test_the_all_in_one_node_is_the_three_wired_by_hand(found):
    assert max(found["by_hand"]) == 0


def test_the_deterministic_jump_is_eulers_step(found):
    """Relative to the largest latent; float32 rounding over 16 steps. Any sampler agrees on a network that answers nothing."""
    assert max(found["euler"]) < 1e-5
    assert found["guidance_matters"] > 0.1


def test_the_network_is_asked_at_the_schedulers_own_timesteps(found):
    grid = PhaseGrid.even(4)
    assert found["timesteps"] == {str(k): list(grid.sampling_timesteps(k)) for k in (1, 2, 3, 4, 8)}
    assert found["half"] == list(grid.sampling_timesteps(4, 0.5))


def test_masks_splits_and_no_denoising(found):
    kept, drawn = found["masked"]
    assert kept < 1e-5
    assert drawn > 0.01
    assert found["split"] < 1e-4
    assert found["nothing_to_do"]


def test_the_loader_reads_the_header(found):
    assert found["settings"] == [50, [0, 239, 499, 739, 999], 4, 1.0, 0.0]
    assert found["from_settings"]
    assert "4 phases" in found["text"]


def test_other_models_are_refused_and_patched_schedules_are_used(found):
    assert "lcm" in found["refused"]["lcm"]
    assert "flow" in found["refused"]["flow"]
    assert found["zero_snr_top"] > 100  # of the unpatched table: 14.6


@pytest.fixture(scope="module")
def object_info(comfyui_python, pack, tmp_path_factory):
    """GET /object_info of a headless server with the pack in its custom_nodes."""
    base = tmp_path_factory.mktemp("base")
    for folder in ("custom_nodes", "models/loras", "input", "output", "temp", "user"):
        (base / folder).mkdir(parents=True)
    shutil.copy(ADAPTER, base / "models" / "loras")
    shutil.copytree(pack, base / "custom_nodes" / pack.name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base), "--disable-api-nodes"]
    flags += ["--database-url", "sqlite:///:memory:", "--disable-auto-launch"]
    log = (base / "log").open("w")
    server = subprocess.Popen([comfyui_python, "main.py", *flags], cwd=os.environ["COMFYUI_PATH"], stdout=log, stderr=log)
    try:
        for _ in range(120):
            assert server.poll() is None, (base / "log").read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/object_info") as answer:
                    return json.load(answer)
            except OSError:
                time.sleep(1)
        raise AssertionError((base / "log").read_text()[-3000:])
    finally:
        server.terminate()
        server.wait(timeout=30)


def released(object_info):
    """What saved workflows depend on: ids, inputs with type and default, outputs."""
    seen = {}
    for name, info in object_info.items():
        if name.startswith("PCM"):
            inputs = {}
            for kind in ("required", "optional"):
                for key, (of_type, *options) in info["input"].get(kind, {}).items():
                    default = options[0].get("default") if options else None
                    inputs[key] = [kind, of_type if isinstance(of_type, str) else "COMBO", default]
            seen[name] = {"inputs": inputs, "outputs": list(zip(info["output"], info["output_name"], strict=True))}
    return json.loads(json.dumps(seen))


def test_every_id_input_output_and_default_is_as_released(object_info):
    """Renaming any of them breaks the workflows people have saved: a new node is added to the file, nothing in it changes."""
    assert released(object_info) == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_everything_has_a_tooltip(object_info):
    for name, info in object_info.items():
        if name.startswith("PCM"):
            assert info["description"], name
            assert all(info["output_tooltips"]), name
            for kind in ("required", "optional"):
                for key, (_, *options) in info["input"].get(kind, {}).items():
                    assert options, f"{name}.{key}"
                    assert options[0]["tooltip"], f"{name}.{key}"

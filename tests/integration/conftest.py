"""For the tests in real ComfyUI."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def comfyui_python():
    """Of COMFYUI_PYTHON, or the one that runs the tests."""
    return os.environ.get("COMFYUI_PYTHON", sys.executable)


@pytest.fixture(scope="session")
def pack(tmp_path_factory):
    """What people clone into custom_nodes, in a folder of another name."""
    folder = tmp_path_factory.mktemp("custom_nodes") / "some pack.name"
    folder.mkdir()
    for part in ("__init__.py", "comfy_nodes", "pcm_scheduler", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / part)
    return folder


@pytest.fixture(scope="session")
def run_host(comfyui_python, pack):
    """What a script beside this file saw, run with ComfyUI's Python."""

    def run(script, *arguments):
        command = [comfyui_python, str(Path(__file__).parent / script), str(pack), os.environ["COMFYUI_PATH"]]
        command += [str(argument) for argument in arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=arguments[-1])
        said = done.stderr.split("Exception ignored in")[0]  # what follows are ComfyUI's own complaints at the end
        assert "FOUND " in done.stdout, said[-3000:]
        return json.loads(done.stdout.split("FOUND ")[1])

    return run

"""The loop that trains the shapes models, shared by several processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from model import HERE

ROOT = HERE.parents[1]
TWO_PROCESSES = str(ROOT / "examples" / "accelerate" / "two_processes_cpu.yaml")
SCRIPT = """
from pathlib import Path
import sys
import torch
from training import processes_here, train

aim = float(processes_here().process_index)
weight = torch.nn.Linear(1, 1, bias=False)
weight.load_state_dict({"weight": torch.full((1, 1), 3.0)})
checkpoint = Path(sys.argv[1])
train(
    weight, lambda generator: (weight.weight - aim).square().sum(), steps=200, peak_learning_rate=0.1, checkpoint=checkpoint,
    warmup=1, average_decay=0.5,
)
print(f"{weight.weight.item():.3f}")
"""


def test_processes_follow_the_mean_of_their_gradients(tmp_path):
    """One is told 0 and the other 1; both end half-way, and one of them writes the checkpoint."""
    script, checkpoint = tmp_path / "script.py", tmp_path / "state.safetensors"
    script.write_text(SCRIPT)
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", TWO_PROCESSES]
    path = os.pathsep.join([str(ROOT), str(HERE)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path}
    command = [sys.executable, *launch, str(script), str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    written = load_file(checkpoint)["weight/weight"].item()
    assert [*map(float, done.stdout.split()), written] == pytest.approx([0.5] * 3, abs=0.01)  # weights decay a little

"""The loop that trains the shapes models, shared by several processes."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file
from training_runs import ROOT, launch

from model import HERE
from training import train

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
    path = os.pathsep.join([str(ROOT), str(HERE)])
    two_processes = "examples/accelerate/two_processes_cpu.yaml"
    done = launch(script, str(checkpoint), config_file=two_processes, num_processes=2, PYTHONPATH=path)
    written = load_file(checkpoint)["weight/weight"].item()
    assert [*map(float, done.stdout.split()), written] == pytest.approx([0.5] * 3, abs=0.01)  # weights decay a little


def test_a_checkpoint_of_other_settings_is_refused_and_of_the_same_continued(tmp_path):
    """A script that was changed does not go on from what it wrote before, unnoticed."""
    checkpoint, calls = tmp_path / "state.safetensors", []

    def run(steps: int, batch: int) -> None:
        weight = torch.nn.Linear(1, 1, bias=False)

        def loss(generator: torch.Generator) -> torch.Tensor:
            calls.append(steps)
            return weight.weight.square().sum()

        train(weight, loss, steps=steps, peak_learning_rate=0.1, checkpoint=checkpoint, settings={"batch": batch})

    run(3, 16)
    run(3, 16)
    assert calls == [3] * 3  # the second had nothing left to do
    for steps, batch, said in ((3, 32, "batch: 16 in the checkpoint, 32 now"), (4, 16, "steps: 3 in the checkpoint, 4 now")):
        with pytest.raises(ValueError, match=f"{said}(.|\n)*begin anew, without that file"):
            run(steps, batch)
    assert len(calls) == 3

"""Of two processes one is killed: the other says so and ends, and nothing is lost that was on disk."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from training_runs import tiny_arguments, tiny_folder

pytestmark = pytest.mark.hard
ROOT = Path(__file__).parent.parent.parent


def processes_of_ranks(launcher: int) -> dict[str, psutil.Process]:
    """The processes of a run by their rank; those that a launcher starts for a moment are none, and may be gone by now."""
    ranks = {}
    for process in psutil.Process(launcher).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            environment = process.environ()
            if "RANK" in environment:
                ranks[environment["RANK"]] = process
    return ranks


@pytest.mark.parametrize("killed", ["0", "1"])
def test_when_one_of_two_processes_is_killed_the_other_ends_and_says_where_the_run_goes_on(tmp_path, killed):
    settings = {"optimizer.steps": 100000, "checkpoint_every": 2}
    arguments = tiny_arguments(tiny_folder(tmp_path), tmp_path / "output.safetensors", **settings)
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch"]
    how = ["--config_file", "examples/accelerate/two_processes_cpu.yaml", "lora_training/train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            [sys.executable, *launch, *how, *arguments], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
        checkpoints, ranks = tmp_path / "output.run" / "checkpoints", {}
        try:
            while not list(checkpoints.glob("step-*.safetensors")):
                assert launcher.poll() is None, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.05)
            ranks = processes_of_ranks(launcher.pid)
            ranks[killed].kill()
            begun = time.monotonic()
            launcher.wait(timeout=300)  # seconds; a few on a machine that is not busy
            seconds = time.monotonic() - begun
        finally:
            for process in (launcher, *ranks.values()):
                with suppress(psutil.NoSuchProcess):  # it has ended, as it should
                    process.kill()
    said = (tmp_path / "log").read_text()
    assert launcher.returncode != 0
    assert "Another process of this run has ended" in said, said[-3000:]
    assert "The same command goes on from" in said
    latest = sorted(checkpoints.glob("step-*.safetensors"))[-1].name
    assert latest in said
    assert not list(checkpoints.glob("*.tmp")) or killed == "0", "the process that writes was not killed"
    print(f"the other process ended after {seconds:.1f} s")

"""Runs that are killed again and again, at random moments and in the middle of every kind of file, end as if nothing had been.

Libraries take longer to import than a run on a tiny model takes, so the runs are forks of one process that has imported them.
"""

from __future__ import annotations

import multiprocessing
import random
import re
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_runs import Death, tiny_arguments, tiny_folder, train_in_this_process

pytestmark = pytest.mark.hard

EVERY, STEPS, RANDOM_KILLS = 4, 30, 16
DEATHS = [
    *[Death("shard-", at) for at in ("half", "whole")],
    Death("config.yaml", "whole"),
    *[Death("step-", at) for at in ("half", "whole")] * 2,
    *[Death("output", at) for at in ("half", "whole")],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


class Lives:
    """A run and its continuations, each in a process of its own."""

    def __init__(self, folder: Path, output: Path):
        self.output, self.journal = output, output.with_suffix(".log")
        self.arguments = tiny_arguments(folder, output, **{"optimizer.steps": STEPS, "checkpoint_every": EVERY})
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["lora_training.train", "lora_training.data.stream"])

    def start(self, death: Death | None = None):
        process = self.context.Process(target=train_in_this_process, args=(self.arguments, str(self.journal), death))
        process.start()
        return process

    def steps(self) -> list[int]:
        """Every step that was begun, in all lives so far."""
        text = self.journal.read_text(encoding="utf-8") if self.journal.exists() else ""
        return [int(found) for found in re.findall(r"^step (\d+)$", text, re.MULTILINE)]

    def kept(self) -> int:
        """Steps that are done in the newest checkpoint."""
        found = self.output.with_suffix(".run").glob("checkpoints/step-*.safetensors")
        return max((int(path.stem.removeprefix("step-")) for path in found), default=0)

    def said(self) -> str:
        return self.journal.read_text(encoding="utf-8")[-3000:]


@pytest.fixture
def environment(monkeypatch):
    """What the processes that are forked inherit; the process that they are forked from is started by the first of them."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def test_a_run_that_is_killed_25_times_ends_with_the_weights_of_an_unbroken_one(folder, tmp_path, environment):
    unbroken = Lives(folder, tmp_path / "unbroken.safetensors")
    process = unbroken.start()
    process.join()
    assert process.exitcode == 0, unbroken.said()
    expected = load_file(unbroken.output)
    begun = time.monotonic()  # once more, for its time with everything imported and the pictures encoded
    again = Lives(folder, tmp_path / "again.safetensors")
    process = again.start()
    process.join()
    duration = time.monotonic() - begun
    assert unbroken.steps() == again.steps() == list(range(STEPS))

    for path in (folder / "cache").rglob("*.*"):
        path.unlink()
    draw = random.Random(0)
    later: list[Death | None] = [*DEATHS[2:], *[None] * RANDOM_KILLS]
    draw.shuffle(later)
    deaths = [*DEATHS[:2], *later]  # pictures are encoded once
    assert len(deaths) == 25
    lives, finished, lost = Lives(folder, tmp_path / "output-0.safetensors"), [], []
    while deaths:
        death, before, kept = deaths[0], len(lives.steps()), lives.kept()
        encoded = {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*.safetensors")}
        process = lives.start(death)
        process.join(None if death else draw.uniform(0.2, 1) * duration)
        process.kill()
        process.join()
        now = lives.steps()[before:]
        assert now[:1] in ([], [kept]), f"went on at step {now[0]} with a checkpoint of {kept}"
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in encoded.items()), "pictures were encoded twice"
        ended = lives.output.exists() and not lives.kept()  # checkpoints go last: a kill may come too late to matter
        if process.exitcode == -signal.SIGKILL:
            deaths.pop(0)
            # the last step that was begun may be done, and its checkpoint not written
            lost.append(now[-1] + 1 - lives.kept() if now and not ended else 0)
            assert lost[-1] <= EVERY, lives.said()
        else:
            assert process.exitcode == 0, lives.said()
            assert ended
        if ended:
            finished.append(lives)
            lives = Lives(folder, tmp_path / f"output-{len(finished)}.safetensors")
    process = lives.start()
    process.join()
    assert process.exitcode == 0, lives.said()
    finished.append(lives)
    for lives in finished:
        found = load_file(lives.output)
        assert found.keys() == expected.keys()
        assert all(found[key].numpy().tobytes() == tensor.numpy().tobytes() for key, tensor in expected.items())
    assert not list(tmp_path.rglob("checkpoints")), "checkpoints of a finished run, or what their writing left"
    assert not list(tmp_path.rglob("*tmp*")), "what the writing of a killed run left"
    assert max(lost) > 0, "no kill hit a step"
    print(f"{len(lost)} kills over {len(finished)} runs; steps lost: {lost}; an unbroken run takes {duration:.1f} s")


def test_a_cache_that_is_killed_while_it_is_written_goes_on_with_the_next_shard(tmp_path, environment):
    folder = tiny_folder(tmp_path)
    lives = Lives(folder, tmp_path / "output.safetensors")
    for there, death in enumerate((Death("shard-000000", "half"), Death("shard-000001", "half"), Death("index.json", "whole"))):
        process = lives.start(death)
        process.join()
        assert process.exitcode == -signal.SIGKILL, lives.said()
        shards = sorted((folder / "cache").rglob("shard-*.safetensors"))
        assert len(shards) == there
        assert all(load_file(path) for path in shards)
    assert lives.steps() == []
    process = lives.start()
    process.join()
    assert process.exitcode == 0, lives.said()
    assert lives.steps() == list(range(STEPS))

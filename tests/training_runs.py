"""Short runs of the trainer, on the shipped model and on a tiny one, and ways into them and out of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import tiny_models
import torch
from PIL import Image

import pcm_scheduler.lora_file
from lora_training.config import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
    ValidationConfig,
)
from lora_training.loop import Run
from lora_training.objectives import ConsistencyObjective
from lora_training.train import main, parse

from model import MODEL_DIR

ROOT = Path(__file__).parent.parent
TINY = {
    "data.resolution": 16, "data.shard_size": 4, "lora.rank": 2, "lora.dropout": 0.1, "objective.guidance_scale": 3.0,
    "optimizer.learning_rate": 1e-3, "optimizer.batch_size": 2, "optimizer.steps": 6, "optimizer.schedule": "cosine",
    "checkpoint_every": 2, "validation.steps": "[1]", "validation.guidance_scales": "[1.0]", "validation.prompts": "[a cat]",
}  # fmt: skip
"""A run of a second or two on `tiny_folder`."""


def launch(
    script: str | Path, *arguments: str, config_file: str = "", num_processes: int = 1, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` of a script, on the CPU, in processes of its own that must end well."""
    how = ["--config_file", config_file] if config_file else ["--cpu", "--num_machines", "1"]
    how += ["--num_processes", str(num_processes)]
    how += [] if config_file else ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *how, str(script), *arguments]
    own = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | environment
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=own)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def tiny_folder(folder: Path) -> Path:
    """A model with random weights and eight captioned pictures of 16 x 16 for it, in two shards of a cache."""
    tiny_models.image_pipeline().save_pretrained(folder / "model")
    (folder / "pictures").mkdir()
    drawn = np.random.default_rng(0)
    for i, animal in enumerate(("cat", "dog", "fox", "owl", "bee", "ant", "hen", "cow")):
        Image.fromarray(drawn.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(folder / "pictures" / f"{i}.png")
        (folder / "pictures" / f"{i}.txt").write_text(f"a {animal}", encoding="utf-8")
    return folder


def tiny_arguments(folder: Path, output: Path, **settings) -> list[str]:
    """What `lora_training/train.py` is told; `settings` by their full names."""
    own = {"model.path": folder / "model", "data.path": folder / "pictures", "data.cache": folder / "cache", "output": output}
    return [part for name, value in (TINY | own | settings).items() for part in (f"--{name}", str(value))]


def tiny_config(folder: Path, output: Path, **settings) -> TrainConfig:
    return parse(tiny_arguments(folder, output, **settings))


@dataclass(frozen=True)
class Death:
    """SIGKILL at a moment that no clock hits for certain.

    Args:
        file: part of the name of the file that is being written then.
        at: `half` of it is in temporary files, safetensors' own among them, or it is `whole` there and not renamed yet.
    """

    file: str
    at: str

    def arrange(self) -> None:
        """In the process that is to die."""
        save, replace = safetensors.torch.save_file, os.replace

        def half_saved(tensors, path, metadata=None):
            if self.at != "half" or self.file not in Path(path).name:
                return save(tensors, path, metadata)
            whole = safetensors.torch.save(tensors, metadata)
            for name in (Path(path).name, ".tmpP9dIkN"):  # what safetensors writes first, under a name that it draws
                Path(path).with_name(name).write_bytes(whole[: len(whole) // 2])
            return os.kill(os.getpid(), signal.SIGKILL)

        def not_replaced(source, target):
            if self.at == "whole" and self.file in Path(target).name:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        pcm_scheduler.lora_file.save_file = half_saved
        os.replace = not_replaced


def train_in_this_process(arguments: list[str], journal: str, death: Death | None = None) -> None:
    """`lora_training/train.py` with these arguments; for a process of its own.

    Args:
        arguments: of the command line.
        journal: file that a line is added to for every step that is begun, with its number, and whatever is printed.
        death: if it is to die in the writing of a file.
    """
    torch.set_num_threads(1)
    log = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    step = Run.step

    def noted(self, number):
        os.write(log, f"\nstep {number}\n".encode())
        return step(self, number)

    Run.step = noted
    if death:
        death.arrange()
    sys.argv = ["train.py", *arguments]
    main()


def config_for(pictures, output, steps=4, **kwargs):
    return TrainConfig(
        model=ModelConfig(path=str(MODEL_DIR)),
        data=DataConfig(path=str(pictures), resolution=128, cache=str(pictures / "cache")),
        lora=LoraConfig(rank=4, alpha=2.0),
        objective=ObjectiveConfig(guidance_scale=3.0),
        optimizer=OptimizerConfig(learning_rate=1e-3, batch_size=2, steps=steps, schedule="cosine"),
        sampling=SamplingConfig(guidance_scale=1.5),
        validation=ValidationConfig(steps=(1, 2), guidance_scales=(1.0,)),
        output=str(output),
        **kwargs,
    )


def losses_of(monkeypatch):
    """Every loss that a run computes, in order."""
    seen = []
    original = Run.step
    monkeypatch.setattr(Run, "step", lambda self, step: seen.append(original(self, step)) or seen[-1])
    return seen


def stop_at(monkeypatch, step):
    """SIGTERM in the middle of step `step`."""
    original = ConsistencyObjective.losses
    calls = iter(range(10**6))

    def interrupted(self, *args):
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(ConsistencyObjective, "losses", interrupted)


def batch_for(backbone, count=3):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, 4, 16, 16, generator=generator)
    return latents, backbone.encode_prompts(["a red star"] * count), backbone.encode_prompts([""])

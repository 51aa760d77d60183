"""Short runs of the trainer on the shipped model, and ways into them."""

from __future__ import annotations

import os
import signal

import torch

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

from model import MODEL_DIR


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
    original = ConsistencyObjective.__call__
    calls = iter(range(10**6))

    def interrupted(self, *args):
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(ConsistencyObjective, "__call__", interrupted)


def batch_for(backbone, count=3):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, 4, 16, 16, generator=generator)
    return latents, backbone.encode_prompts(["a red star"] * count), backbone.encode_prompts([""])

"""The optimiser, the learning rate of a step, and gradients that several processes share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec

import torch
from accelerate import PartialState
from accelerate.utils import reduce

from .config import OptimizerConfig

# name -> library, class
_CLASSES = {
    "adamw": ("torch.optim", "AdamW"),
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "prodigy": ("prodigyopt", "Prodigy"),
}


def check_installed(config: OptimizerConfig) -> None:
    """Refuse an optimiser whose library is not here.

    Raises:
        ValueError: which, and how to install it.
    """
    package = _CLASSES[config.name][0].split(".")[0]
    if find_spec(package) is None:
        raise ValueError(f"optimizer.name is {config.name}, which needs {package}: pip install {package}")


def build_optimizer(config: OptimizerConfig, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that `optimizer.name` names.

    Raises:
        ValueError: its library is not installed.
    """
    library, name = _CLASSES[config.name]
    check_installed(config)
    options: dict[str, object] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.name == "prodigy":  # its authors' advice for diffusion models with a warm-up
        options |= {"use_bias_correction": True, "safeguard_warmup": True}
    return getattr(import_module(library), name)(parameters, **options)


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Linear warm-up, then constant or a cosine to zero; a function of the step, so that resuming needs no state."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Over processes, as one flat tensor; nothing to do in one process."""
    if PartialState().num_processes == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
    parts = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

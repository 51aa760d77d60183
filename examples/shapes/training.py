"""What the shapes training scripts share: a seeded, resumable loop with an average of the weights.

Everything that a step needs is a function of (seed, step), so a run that is stopped and started again ends
with the same weights as one that never stopped. Processes that `accelerate launch` started share a step: each has numbers of
its own, and all have the mean of their gradients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from accelerate import PartialState
from torch import nn
from tqdm import tqdm

from lora_training.checkpoint import Told, load_checkpoint, save_checkpoint
from lora_training.cpu import coming_device
from lora_training.optimizers import average_gradients
from lora_training.randomness import generator_of, seed_of

LossFunction = Callable[[torch.Generator], torch.Tensor]
ADAMW = partial(torch.optim.AdamW, lr=0.0, betas=(0.9, 0.99), weight_decay=1e-2)


def processes_here() -> PartialState:
    """This process among those that `accelerate launch` started, with a GPU each or none at all; alone without it."""
    return PartialState(cpu=coming_device().type == "cpu")


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine down to 2% of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    module: nn.Module,
    loss_function: LossFunction,
    *,
    steps: int,
    peak_learning_rate: float,
    checkpoint: Path,
    seed: int = 0,
    warmup: int = 100,
    average_decay: float = 0.999,
    optimizer_of: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = ADAMW,
    checkpoint_seconds: float = 120.0,
    settings: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Minimise `loss_function`; at the end `module` holds the averaged weights.

    Args:
        module: everything that is trained.
        loss_function: takes a CPU generator seeded for this step and process, returns a scalar.
        steps: optimisation steps in all; a checkpoint of an earlier run is continued.
        peak_learning_rate: after warm-up.
        warmup: steps until then.
        optimizer_of: makes one of parameters; the learning rate of all its groups is set at every step.
        checkpoint: safetensors file of weights, average and optimiser state, rewritten every `checkpoint_seconds`.
        settings: what else the weights depend on, kept in the checkpoint: JSON.

    Raises:
        ValueError: the checkpoint is of a run with other settings or other parameters; which.
    """
    processes = processes_here()
    own = (processes.process_index,) if processes.num_processes > 1 else ()
    parameters = dict(module.named_parameters())
    average = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = optimizer_of(module.parameters())
    told = {"steps": steps, "peak_learning_rate": peak_learning_rate, "warmup": warmup, "average_decay": average_decay}
    told |= {"seed": seed, "processes": processes.num_processes, **settings}
    first = 0
    if checkpoint.exists():
        first = load_checkpoint(checkpoint, parameters, optimizer, average, told=Told(told, anew="without that file"))
    bar = tqdm(
        range(first, steps), initial=first, total=steps, desc=checkpoint.stem, mininterval=2.0,
        disable=not processes.is_main_process,
    )  # fmt: skip
    smoothed, last_save = None, time.monotonic()
    module.train()
    for step in bar:
        generator = generator_of(seed, step, *own)
        torch.manual_seed(seed_of(seed, step, *own))  # dropout
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_learning_rate, warmup)
        loss = loss_function(generator)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters.values())
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        decay = min(average_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - decay)
        value = loss.item()
        if not math.isfinite(value):
            raise RuntimeError(f"The loss is {value} at step {step}; the last good state is {checkpoint}.")
        smoothed = value if smoothed is None else 0.98 * smoothed + 0.02 * value
        bar.set_postfix(loss=f"{smoothed:.4f}", lr=f"{optimizer.param_groups[0]['lr']:.1e}", refresh=False)
        if time.monotonic() - last_save > checkpoint_seconds or step == steps - 1:
            save_checkpoint(
                checkpoint, parameters, optimizer, step + 1, average, settings=told, write=processes.is_main_process
            )
            last_save = time.monotonic()
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(average[name])
    module.eval()

"""The state of an interrupted run as one safetensors file: no pickle, never half written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from pcm_scheduler.lora_file import write_safetensors


def save_checkpoint(
    path: Path,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
    average: Mapping[str, torch.Tensor] | None = None,
    run: str = "",
) -> None:
    """Write parameters, what the optimiser remembers of each, and optionally their running average.

    Args:
        path: rewritten in one move.
        parameters: by name.
        optimizer: with tensors in its per-parameter state (AdamW and its kin).
        step: how many steps are done.
        average: by the same names.
        run: what the run was told; `load_checkpoint` refuses another.
    """
    tensors = {f"weight/{name}": p for name, p in parameters.items()}
    tensors |= {f"average/{name}": p for name, p in (average or {}).items()}
    for name, p in parameters.items():
        tensors |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state[p].items()}
    write_safetensors(tensors, path, {"step": str(step), "run": run})


def load_checkpoint(
    path: Path,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    average: Mapping[str, torch.Tensor] | None = None,
    run: str = "",
) -> int:
    """The reverse of `save_checkpoint`, in place; returns how many steps are done.

    Raises:
        ValueError: the checkpoint is of other parameters than these, or of a run that was told something else.
    """
    with safe_open(path, framework="pt") as file, torch.no_grad():
        keys = set(file.keys())
        if file.metadata().get("run", "") != run:
            raise ValueError(
                f"{path} is of a run with other settings:\n{file.metadata()['run']}\nRestore them, or move it away."
            )
        found = {k.removeprefix("weight/"): file.get_slice(k).get_shape() for k in keys if k.startswith("weight/")}
        if found != {name: list(p.shape) for name, p in parameters.items()}:
            raise ValueError(f"{path} is of a run with other parameters. Restore the settings, or move it away.")
        for name, p in parameters.items():
            p.copy_(file.get_tensor(f"weight/{name}"))
            prefix = f"optimizer/{name}/"
            remembered = {k.removeprefix(prefix): file.get_tensor(k) for k in keys if k.startswith(prefix)}
            # AdamW keeps its step count on the CPU, everything else beside the parameter
            optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in remembered.items()}
        for name, p in (average or {}).items():
            p.copy_(file.get_tensor(f"average/{name}"))
        return int(file.metadata()["step"])

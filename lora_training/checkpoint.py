"""The state of an interrupted run as one safetensors file: no pickle, never half written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pcm_scheduler.lora_file import write_safetensors

from .sharding import split_like, whole


def save_checkpoint(
    path: Path,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
    average: Mapping[str, torch.Tensor] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    run: str = "",
    write: bool = True,
) -> None:
    """Write parameters, what the optimiser remembers of each, and optionally their running average.

    Of sharded parameters the file holds the whole, so every process must call this, and one of them write.

    Args:
        path: rewritten in one move.
        parameters: by name.
        optimizer: with tensors and numbers in its state.
        step: how many steps are done.
        average: by the same names.
        scaler: of fp16 losses.
        run: what the run was told; `load_checkpoint` refuses another.
        write: this process writes the file.
    """
    parts = {f"weight/{name}": p for name, p in parameters.items()}
    parts |= {f"average/{name}": p for name, p in (average or {}).items()}
    numbers: dict[str, dict[str, object]] = {}
    for name, p in parameters.items():
        remembered = optimizer.state[p].items()
        parts |= {f"optimizer/{name}/{key}": value for key, value in remembered if isinstance(value, torch.Tensor)}
        numbers[name] = {key: value for key, value in remembered if not isinstance(value, torch.Tensor)}
    tensors = {}
    for name, part in parts.items():
        tensor = whole(part.detach())
        if write:
            tensors[name] = tensor.cpu()
    if not write:
        return
    scalars = {"state": numbers, "groups": [_plain(group) for group in optimizer.param_groups]}
    scalars |= {"scaler": scaler.state_dict()} if scaler else {}
    write_safetensors(tensors, path, {"step": str(step), "run": run, "optimizer": json.dumps(scalars)})


def _plain(group: Mapping[str, object]) -> dict[str, object]:
    """What an optimiser keeps of a whole group, such as Prodigy's step size."""
    return {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in group.items() if k != "params"}


def load_checkpoint(
    path: Path,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    average: Mapping[str, torch.Tensor] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    run: str = "",
) -> int:
    """The reverse of `save_checkpoint`, in place; returns how many steps are done.

    Raises:
        ValueError: the checkpoint is of other parameters than these, or of a run that was told something else.
    """
    with safe_open(path, framework="pt") as file, torch.no_grad():
        keys = sorted(file.keys())  # the same order in every process: parts are handed out together
        if file.metadata().get("run", "") != run:
            raise ValueError(
                f"{path} is of a run with other settings:\n{file.metadata()['run']}\nRestore them, or move it away."
            )
        found = {k.removeprefix("weight/"): file.get_slice(k).get_shape() for k in keys if k.startswith("weight/")}
        if found != {name: list(p.shape) for name, p in parameters.items()}:
            raise ValueError(f"{path} is of a run with other parameters. Restore the settings, or move it away.")
        scalars = json.loads(file.metadata()["optimizer"])
        for name, p in parameters.items():
            p.copy_(split_like(file.get_tensor(f"weight/{name}"), p))
            prefix = f"optimizer/{name}/"
            remembered = {k.removeprefix(prefix): file.get_tensor(k) for k in keys if k.startswith(prefix)}
            # AdamW keeps its step count on the CPU, everything else beside the parameter and split as it is
            beside = {
                k: v if k == "step" else split_like(v, p) if v.shape == p.shape else v.to(p.device)
                for k, v in remembered.items()
            }
            optimizer.state[p] = beside | scalars["state"][name]
        for group, kept in zip(optimizer.param_groups, scalars["groups"], strict=True):
            group |= kept
        if scaler and "scaler" in scalars:
            scaler.load_state_dict(scalars["scaler"])
        for name, p in (average or {}).items():
            p.copy_(split_like(file.get_tensor(f"average/{name}"), p))
        return int(file.metadata()["step"])


@dataclass(frozen=True)
class Checkpoints:
    """The newest checkpoints of one run, `step-<number>.safetensors` in a folder.

    Args:
        folder: made when the first is saved.
        kept: how many; 0 keeps all.
        run: what the run was told.
    """

    folder: Path
    kept: int
    run: str

    def all(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("step-*.safetensors"))

    def latest(self) -> Path | None:
        """The newest, if there is one."""
        return self.all()[-1] if self.all() else None

    def save(
        self,
        parameters: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer,
        step: int,
        average: Mapping[str, torch.Tensor] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        write: bool = True,
    ) -> None:
        """Write one, then remove those beyond `kept`; as `save_checkpoint`, every process calls it."""
        path = self.folder / f"step-{step:08d}.safetensors"
        save_checkpoint(path, parameters, optimizer, step, average, scaler, self.run, write)
        if not write:
            return
        for path in self.all()[: -self.kept] if self.kept else []:
            path.unlink()

    def load_latest(
        self,
        parameters: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer,
        average: Mapping[str, torch.Tensor] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> int:
        """Read the newest, in place; returns how many steps are done, 0 without one.

        Raises:
            ValueError: as `load_checkpoint`, or a file that cannot be read.
        """
        path = self.latest()
        if path is None:
            return 0
        try:
            return load_checkpoint(path, parameters, optimizer, average, scaler, self.run)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}). Remove it to go on from the one before.") from error

    def remove(self) -> None:
        """All of them: the run is done."""
        for path in self.all():
            path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

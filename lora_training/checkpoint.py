"""The state of an interrupted run as one safetensors file: no pickle, never half written."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pcm_scheduler.lora_file import write_safetensors

from .files import remove_temporary, writing
from .sharding import split_like, whole

_STATED = {"step", "optimizer"}  # in the header of every checkpoint

Settings = Mapping[str, object]
"""JSON, with groups in it."""

Header = Mapping[str, str]
"""Of a checkpoint."""


@dataclass(frozen=True)
class Told:
    """What a run was told, and how a checkpoint that it goes on from may differ.

    Attributes:
        settings: all of it.
        may_change: settings, or groups of them, that may be others than the checkpoint's.
        defaults: what settings say that the checkpoint's run, of an earlier release, did not know of yet.
        anew: how people begin without the checkpoint, for the message that refuses it.
    """

    settings: Settings = field(default_factory=dict)
    may_change: tuple[str, ...] = ()
    defaults: Settings = field(default_factory=dict)
    anew: str = "with another output, or with `resume: no`, which keeps the old checkpoints aside"

    def changed(self, header: Header) -> dict[str, tuple[str, str]]:
        """What a checkpoint's run was told differently; as `differences`."""
        return differences(json.loads(header.get("run") or "{}"), self.settings, self.defaults)

    def check(self, path: Path, header: Header) -> None:
        """Refuse the checkpoint of a run that was told something else than may change.

        Raises:
            ValueError: what, then and now.
        """
        refused = {name: values for name, values in self.changed(header).items() if not _is_among(name, self.may_change)}
        if refused:
            raise ValueError(
                f"{path} is of a run with other settings:\n{listed(refused)}\nRestore them to go on from it; or begin anew, "
                f"{self.anew}."
            )


class NotFinite(RuntimeError):  # noqa: N818  (it reads as a sentence)
    """What would be written holds NaN or infinity; where."""


def check_finite(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Refuse to write what nobody can use.

    Raises:
        NotFinite: a number is not finite; which tensors. `what` the file would be is for the message.
    """
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        raise NotFinite(f"{what} is not written: {len(bad)} of its {len(tensors)} tensors are not finite, such as {bad[0]}.")


def save_checkpoint(
    path: Path,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
    average: Mapping[str, torch.Tensor] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    settings: Settings | None = None,
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
        settings: what the run was told.
        write: this process writes the file.

    Raises:
        CannotWrite: the disk is full, or the like; no part of the file is left.
        NotFinite: the state is of no use; which tensors.
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
    check_finite(tensors, f"The state after step {step}")
    scalars = {"state": numbers, "groups": [_plain(group) for group in optimizer.param_groups]}
    scalars |= {"scaler": scaler.state_dict()} if scaler else {}
    header = {"step": str(step), "run": json.dumps(settings or {}), "optimizer": json.dumps(scalars)}
    with writing(path):
        write_safetensors(tensors, path, header)


def _plain(group: Mapping[str, object]) -> dict[str, object]:
    """What an optimiser keeps of a whole group, such as Prodigy's step size."""
    return {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in group.items() if k != "params"}


def flat(settings: Settings, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every setting by its full name, such as `lora.rank`."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def differences(then: Settings, now: Settings, defaults: Settings | None = None) -> dict[str, tuple[str, str]]:
    """Settings that two runs were told differently: full name -> (then, now), as JSON; `not set` where one has no such.

    Args:
        then, now: what they were told.
        defaults: what settings say that are newer than the first run, which then were as good as told that.
    """
    before, after, usual = (dict(flat(json.loads(json.dumps(settings)))) for settings in (then, now, defaults or {}))
    before = {name: usual[name] for name in after if name in usual} | before
    said = {
        name: tuple(json.dumps(known[name]) if name in known else "not set" for known in (before, after))
        for name in before | after
    }
    return {name: (old, new) for name, (old, new) in said.items() if old != new}


def listed(different: Mapping[str, tuple[str, str]]) -> str:
    """A line for each, for people."""
    return "\n".join(f"  {name}: {old} in the checkpoint, {new} now" for name, (old, new) in different.items())


def load_checkpoint(
    path: Path,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    average: Mapping[str, torch.Tensor] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    told: Told | None = None,
) -> int:
    """The reverse of `save_checkpoint`, in place; returns how many steps are done.

    Args:
        path, parameters, optimizer, average, scaler: as there.
        told: what this run was told.

    Raises:
        ValueError: the checkpoint is of other parameters than these, or of a run that was told something else; what.
    """
    with safe_open(path, framework="pt") as file, torch.no_grad():
        keys = sorted(file.keys())  # the same order in every process: parts are handed out together
        header = file.metadata() or {}
        if not header.keys() >= _STATED:
            raise ValueError(f"{path} is not a checkpoint of this trainer. Move it away.")
        (told or Told()).check(path, header)
        found = {k.removeprefix("weight/"): file.get_slice(k).get_shape() for k in keys if k.startswith("weight/")}
        if found != {name: list(p.shape) for name, p in parameters.items()}:
            raise ValueError(f"{path} is of a run with other parameters. Restore the settings, or move it away.")
        scalars = json.loads(header["optimizer"])
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
        return int(header["step"])


def _is_among(name: str, settings: Collection[str]) -> bool:
    """Whether a full name is one of these, or in a group that is."""
    return any(f"{name}.".startswith(f"{other}.") for other in settings)


@dataclass(frozen=True)
class Checkpoints:
    """The newest checkpoints of one run, `step-<number>.safetensors` in a folder.

    Args:
        folder: made when the first is saved.
        kept: how many; 0 keeps all.
        told: what the run was told.
    """

    folder: Path
    kept: int
    told: Told

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
        save_checkpoint(path, parameters, optimizer, step, average, scaler, self.told.settings, write)
        if not write:
            return
        self._remove_leftovers()
        for path in self.all()[: -self.kept] if self.kept else []:
            path.unlink()

    def _remove_leftovers(self) -> None:
        """Of writes that were killed."""
        remove_temporary(self.folder, "step-*.safetensors.*.tmp")

    def set_aside(self) -> Path | None:
        """Rename the folder, for a run that begins anew and must not be mistaken for this one; returns its new name."""
        if not self.all():
            return None
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}-before-{number}")).exists():
            number += 1
        os.rename(self.folder, aside)
        return aside

    def changed(self) -> dict[str, tuple[str, str]]:
        """What the newest was told differently; as `differences`."""
        path = self.latest()
        if path is None:
            return {}
        with safe_open(path, framework="pt") as file:
            return self.told.changed(file.metadata() or {})

    def check(self) -> None:
        """Whether a run could go on from the newest, by its header alone.

        Raises:
            ValueError: it is of a run that was told something else; what.
        """
        path = self.latest()
        if path is not None:
            try:
                with safe_open(path, framework="pt") as file:
                    header = file.metadata() or {}
            except (SafetensorError, OSError):
                return  # `load_latest` says so
            if header.keys() >= _STATED:
                self.told.check(path, header)

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
            return load_checkpoint(path, parameters, optimizer, average, scaler, self.told)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}). Remove it to go on from the one before.") from error

    def remove(self) -> None:
        """All of them: the run is done."""
        self._remove_leftovers()
        for path in self.all():
            path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

"""What is trained on a backbone: an adapter on its UNet, or the whole UNet; student, target and teacher take turns."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch.distributed.device_mesh import DeviceMesh

from pcm_scheduler.lora_file import AdapterSettings, differing_shapes, read_adapter, write_adapter
from pcm_scheduler.unet_file import write_unet

from .backbones import Backbone
from .config import LoraConfig, TrainConfig
from .sharding import shard, whole

STUDENT, TARGET = "student", "target"  # PEFT's names of the adapter and of its running average


def build_student(backbone: Backbone, config: TrainConfig, mesh: DeviceMesh | None = None) -> Student:
    """What `trainable` names, on a backbone whose weights are where and in what precision they will stay.

    Args:
        backbone: gets the student.
        config: of the run.
        mesh: processes to split the weights between.

    Raises:
        ValueError: `lora.init_adapter` does not fit.
    """
    averaged = config.objective.target_ema > 0
    student: Student
    if config.trainable == "unet":
        student = WholeUNet(backbone, averaged)
    else:
        student = adapter = Adapter(backbone, config.lora, config.seed, averaged)
        if config.lora.init_adapter:
            adapter.load(read_adapter(config.lora.init_adapter, adapter.alphas()))
            adapter.update_target(decay=0.0)
    if mesh is not None:
        student.shard(mesh)
    return student


class Student(ABC):
    """The trainable part of a backbone; `backbone.teacher()` and `backbone.target()` ask it to step aside.

    Attributes:
        parameters: all that is trained, by name, in float32.
        target_parameters: their running average, in the same order; none without one.
    """

    parameters: dict[str, torch.nn.Parameter]
    target_parameters: dict[str, torch.nn.Parameter]

    @abstractmethod
    def _collect_parameters(self) -> None:
        """Set `parameters` and `target_parameters`."""

    def shard(self, mesh: DeviceMesh) -> None:
        """Split every network between the processes of the mesh."""
        for unet in self.unets:
            shard(unet, mesh)
        self._collect_parameters()

    @torch.no_grad()
    def update_target(self, decay: float) -> None:
        """target = decay * target + (1 - decay) * student, if there is a running average."""
        if self.target_parameters:
            torch._foreach_lerp_(list(self.target_parameters.values()), list(self.parameters.values()), 1 - decay)

    @property
    @abstractmethod
    def unets(self) -> tuple[UNet2DConditionModel, ...]:
        """Every network that a step runs, the student's own first."""

    @abstractmethod
    def teacher(self) -> AbstractContextManager[None]:
        """Within it `backbone.predict` is the teacher, bit for bit."""

    @abstractmethod
    def target(self) -> AbstractContextManager[None]:
        """Within it `backbone.predict` is the running average if there is one, else the student."""

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """What is written, in whole tensors; of a sharded student every process must ask."""

    @abstractmethod
    def write(
        self, path: Path, state: Mapping[str, torch.Tensor], settings: AdapterSettings, title: str, extra: Mapping[str, str]
    ) -> None:
        """The file that people load, of a `state`; to a temporary name first."""

    @abstractmethod
    def describe(self) -> str:
        """What is trained, in words."""


class Adapter(Student):
    """A LoRA on the backbone's UNet. The teacher is the same UNet with it switched off: no second copy.

    Args:
        backbone: its UNet gets the adapter, and keeps its own weights frozen.
        config: rank, alpha, dropout, targets.
        seed: of the initial weights.
        averaged: keep a second adapter, a running average of the first, for `target`.
    """

    def __init__(self, backbone: Backbone, config: LoraConfig, seed: int, averaged: bool = False):
        self.unet = backbone.unet
        peft_config = PeftLoraConfig(
            r=config.rank,
            lora_alpha=config.rank if config.alpha is None else config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(config.target_names),
            use_dora=config.dora,
            init_lora_weights=True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in (STUDENT, TARGET) if averaged else (STUDENT,):
                self.unet.add_adapter(peft_config, adapter_name=name)
        self.unet.set_adapter(STUDENT)
        self._collect_parameters()
        for p in (*self.parameters.values(), *self.target_parameters.values()):
            p.data = p.data.float()  # whatever the frozen weights are: steps are too small for half precision
        self.update_target(decay=0.0)
        backbone.student = self

    def _collect_parameters(self) -> None:
        every = dict(self.unet.named_parameters())
        self.parameters = {name: p for name, p in every.items() if f".{STUDENT}." in name}
        self.target_parameters = {name.replace(TARGET, STUDENT): p for name, p in every.items() if f".{TARGET}." in name}

    @property
    def unets(self) -> tuple[UNet2DConditionModel, ...]:
        return (self.unet,)

    @contextmanager
    def teacher(self) -> Iterator[None]:
        self.unet.disable_adapters()
        try:
            yield
        finally:
            self.unet.enable_adapters()

    @contextmanager
    def target(self) -> Iterator[None]:
        if not self.target_parameters:
            yield
            return
        self.unet.set_adapter(TARGET)
        try:
            yield
        finally:
            self.unet.set_adapter(STUDENT)

    def state(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors under PEFT's names."""
        return {name: whole(p) for name, p in get_peft_model_state_dict(self.unet, adapter_name=STUDENT).items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """The reverse of `state`.

        Raises:
            ValueError: tensors that the adapter has not, or has in another shape; which ones.
        """
        state = self.state()
        different = differing_shapes(state, tensors)
        if different:
            name, (ours, theirs) = next(iter(different.items()))
            raise ValueError(
                f"{len(different)} of the adapter's {len(state)} tensors do not fit, such as {name}: "
                f"the file has {theirs or 'none'}, this run {ours or 'none'}. "
                "Set lora.rank and lora.targets to the file's."
            )
        set_peft_model_state_dict(self.unet, tensors, adapter_name=STUDENT)

    def alphas(self) -> dict[str, float]:
        """lora_alpha of each adapted module path."""
        return {n: m.lora_alpha[STUDENT] for n, m in self.unet.named_modules() if isinstance(m, LoraLayer)}

    def write(
        self, path: Path, state: Mapping[str, torch.Tensor], settings: AdapterSettings, title: str, extra: Mapping[str, str]
    ) -> None:
        write_adapter(path, state, self.alphas(), settings, title, extra)

    def describe(self) -> str:
        return f"an adapter on {len(self.alphas())} modules"


class WholeUNet(Student):
    """Every weight of the UNet. The teacher is what the UNet was, kept frozen beside it, as is a running average.

    Args:
        backbone: its UNet becomes the teacher, in the precision it has, and a float32 copy the student.
        averaged: keep a third copy, a running average of the student, for `target`.
    """

    def __init__(self, backbone: Backbone, averaged: bool = False):
        self.backbone, self._teacher = backbone, backbone.unet
        student = copy.deepcopy(self._teacher).float().requires_grad_(True)
        self._target = copy.deepcopy(student).requires_grad_(False) if averaged else student
        backbone.unet = backbone.pipe.unet = student
        backbone.student = self
        self._collect_parameters()

    def _collect_parameters(self) -> None:
        student = self.backbone.unet
        self.parameters = dict(student.named_parameters())
        self.target_parameters = {} if self._target is student else dict(self._target.named_parameters())

    @property
    def unets(self) -> tuple[UNet2DConditionModel, ...]:
        return tuple({id(unet): unet for unet in (self.backbone.unet, self._target, self._teacher)}.values())

    @contextmanager
    def _instead(self, unet: UNet2DConditionModel) -> Iterator[None]:
        student, self.backbone.unet = self.backbone.unet, unet
        try:
            yield
        finally:
            self.backbone.unet = student

    def teacher(self) -> AbstractContextManager[None]:
        return self._instead(self._teacher)

    def target(self) -> AbstractContextManager[None]:
        return self._instead(self._target)

    def state(self) -> dict[str, torch.Tensor]:
        """The UNet's tensors under diffusers' names."""
        return {name: whole(p) for name, p in self.parameters.items()}

    def write(
        self, path: Path, state: Mapping[str, torch.Tensor], settings: AdapterSettings, title: str, extra: Mapping[str, str]
    ) -> None:
        write_unet(path, state, settings, title, extra)

    def describe(self) -> str:
        return "the whole UNet"

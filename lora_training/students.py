"""What is trained on a backbone: an adapter on its UNet, or the whole UNet; student, target and teacher take turns."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeAlias

import torch
from diffusers import UNet2DConditionModel
from diffusers.models import UNetMotionModel
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch.distributed.device_mesh import DeviceMesh

from pcm_scheduler.lora_file import (
    AdapterSettings,
    adapter_tensors,
    differing_shapes,
    read_adapter,
    read_lora,
    read_whole_lora,
    write_video_adapter,
)
from pcm_scheduler.lora_layouts import LoraTensors, dotted_name, is_motion, stacked, to_diffusers
from pcm_scheduler.unet_file import write_unet

from .backbones import Backbone
from .config import LoraConfig, TrainConfig
from .sharding import shard, whole

STUDENT, TARGET = "student", "target"  # PEFT's names of the adapter and of its running average
IMAGE = "image"  # and of the frozen one of the image model beneath them

UNet: TypeAlias = UNet2DConditionModel | UNetMotionModel
PARTS: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "spatial": lambda name: not is_motion(name),
    "motion": is_motion,
}
"""`lora.parts`, and which of a UNet's modules they are."""

_MOTION_PROJECTIONS = ("proj_in", "proj_out")  # diffusers (0.42) calls them with `input=`, which PEFT's layers do not take


def build_student(
    backbone: Backbone, config: TrainConfig, mesh: DeviceMesh | None = None, teacher_dtype: torch.dtype = torch.float32
) -> Student:
    """What `trainable` names, on a backbone whose weights are where they will stay.

    Args:
        backbone: gets the student.
        config: of the run.
        mesh: processes to split the weights between.
        teacher_dtype: of the teacher of a whole UNet; beneath an adapter the teacher stays as the backbone has it.

    Raises:
        ValueError: `lora.init_adapter` does not fit.
    """
    averaged = config.objective.target_ema > 0
    student: Student
    if config.trainable == "unet":
        student = WholeUNet(backbone, averaged, teacher_dtype)
    else:
        student = adapter = Adapter(backbone, config.lora, config.seed, averaged, config.model.image_adapter)
        if config.lora.init_adapter:
            adapter.load(config.lora.init_adapter)
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
    def unets(self) -> tuple[UNet, ...]:
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
    ) -> Sequence[Path]:
        """The files that people load, of a `state`, each to a temporary name first; returns them."""

    @abstractmethod
    def describe(self) -> str:
        """What is trained, in words."""


def compile_blocks(unets: Sequence[UNet], several_shapes: bool) -> None:
    """Compile what repeats in the UNets, once for all of its kind (`torch.compile`).

    Args:
        unets: of `Student.unets`.
        several_shapes: pictures differ in shape; compile for all shapes at once.
    """
    import torch._dynamo  # takes a second

    # Torch counts what it compiled over all blocks together: one variant for each width of the network, with and without the
    # adapter, with and without gradients. SD1.5 has nine already, and from the ninth on its own limit leaves blocks uncompiled.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    for unet in unets:
        unet.compile_repeated_blocks(dynamic=several_shapes or None)


class Adapter(Student):
    """A LoRA on the backbone's UNet. The teacher is the same UNet with it switched off: no second copy.

    Args:
        backbone: its UNet gets the adapter, and keeps its own weights frozen.
        config: rank, alpha, dropout, targets.
        seed: of the initial weights.
        averaged: keep a second adapter, a running average of the first, for `target`.
        image_adapter: a LoRA file that student and target have beneath what is trained, frozen; the teacher has it not.

    Raises:
        ValueError: no module is adapted, or an image adapter that does not fit.
    """

    def __init__(
        self, backbone: Backbone, config: LoraConfig, seed: int, averaged: bool = False, image_adapter: str | Path = ""
    ):
        self.unet = backbone.unet
        modules = adapted_modules(self.unet, config)
        self.image = load_image_adapter(self.unet, image_adapter) if image_adapter else None
        peft_config = PeftLoraConfig(
            r=config.rank,
            lora_alpha=config.rank if config.alpha is None else config.alpha,
            lora_dropout=config.dropout,
            target_modules=modules,
            use_dora=config.dora,
            init_lora_weights=True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in (STUDENT, TARGET) if averaged else (STUDENT,):
                self.unet.add_adapter(peft_config, adapter_name=name)
        self._layers = [module for module in self.unet.modules() if isinstance(module, LoraLayer)]
        self.unet.set_adapter(self._names(STUDENT))
        self._freeze_image()
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
    def unets(self) -> tuple[UNet, ...]:
        return (self.unet,)

    @contextmanager
    def teacher(self) -> Iterator[None]:
        self._switch("_disable_adapters", True)
        try:
            yield
        finally:
            self._switch("_disable_adapters", False)

    @contextmanager
    def target(self) -> Iterator[None]:
        if not self.target_parameters:
            yield
            return
        self._switch("_active_adapter", self._names(TARGET))
        try:
            yield
        finally:
            self._switch("_active_adapter", self._names(STUDENT))

    def _names(self, name: str) -> list[str]:
        return [IMAGE, name] if self.image else [name]

    def _switch(self, attribute: str, value: object) -> None:
        """What PEFT's own switches do to a layer's forward; those search the UNet and flip requires_grad of every tensor too,
        which takes tens of milliseconds, several times a step."""
        for layer in self._layers:
            setattr(layer, attribute, value)

    def _freeze_image(self) -> None:
        """PEFT makes every adapter that is switched on trainable."""
        if self.image:
            for name, p in self.unet.named_parameters():
                if f".{IMAGE}." in name:
                    p.requires_grad_(False)

    def state(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors under PEFT's names."""
        return {name: whole(p) for name, p in get_peft_model_state_dict(self.unet, adapter_name=STUDENT).items()}

    def load(self, path: str) -> None:
        """Go on from an adapter file. One of the image model alone leaves motion modules as they are.

        Raises:
            ValueError: tensors that the adapter has not, or has in another shape; which ones.
        """
        parts = set(map(is_motion, read_lora(path).modules))
        state = self.state()
        alphas = {module: alpha for module, alpha in self.alphas().items() if is_motion(module) in parts}
        tensors = state | read_adapter(path, alphas)
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
        layers = ((name, m) for name, m in self.unet.named_modules() if isinstance(m, LoraLayer))
        return {name: layer.lora_alpha[STUDENT] for name, layer in layers if STUDENT in layer.lora_alpha}

    def write(
        self, path: Path, state: Mapping[str, torch.Tensor], settings: AdapterSettings, title: str, extra: Mapping[str, str]
    ) -> Sequence[Path]:
        state = {name: tensor.cpu() for name, tensor in state.items()}  # where those of the frozen one are
        lora = adapter_tensors(state, self.alphas())
        return write_video_adapter(path, stacked(self.image, lora) if self.image else lora, settings, title, extra)

    def describe(self) -> str:
        beneath = f" over a frozen one on {len(self.image.modules)}" if self.image else ""
        return f"an adapter on {len(self.alphas())} modules{beneath}"


def adapted_modules(unet: UNet, config: LoraConfig) -> list[str]:
    """The modules of `lora.parts` whose names end as `lora.targets` says.

    Raises:
        ValueError: there are none.
    """
    found = [
        name
        for name, _ in unet.named_modules()
        if PARTS[config.parts](name)
        and any(f".{name}".endswith(f".{ending}") for ending in config.target_names)
        and not (is_motion(name) and name.endswith(_MOTION_PROJECTIONS))
    ]
    if not found:
        raise ValueError(f"lora.parts {config.parts} has no module that is named as lora.targets says: {config.target_names}.")
    return found


def load_image_adapter(unet: UNet, path: str | Path) -> LoraTensors:
    """Put a LoRA file into the UNet as PEFT's adapter `IMAGE`; returns what it holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no LoRA of this UNet's, or one with DoRA magnitudes, which no file of a video adapter holds.
    """
    lora = read_whole_lora(path)
    if lora.has_magnitudes:
        raise ValueError(f"model.image_adapter {path} is a DoRA, to which no further adapter adds. Train it without lora.dora.")
    known = {name for name, _ in unet.named_modules()}
    strange = sorted(name for name in lora.modules if dotted_name(name) not in known)
    if strange:
        raise ValueError(
            f"model.image_adapter {path} has {len(strange)} modules that this model has not, such as {strange[0]}."
        )
    tensors, metadata = to_diffusers(lora)
    unet.load_lora_adapter(tensors, prefix="unet", adapter_name=IMAGE, metadata=json.loads(metadata))
    return lora


class WholeUNet(Student):
    """Every weight of the UNet. The teacher is what the UNet was, kept frozen beside it, as is a running average.

    Args:
        backbone: its UNet becomes the teacher, and a float32 copy of what it was before that the student.
        averaged: keep a third copy, a running average of the student, for `target`.
        teacher_dtype: of the teacher's weights.
    """

    def __init__(self, backbone: Backbone, averaged: bool = False, teacher_dtype: torch.dtype = torch.float32):
        self.backbone, self._teacher = backbone, backbone.unet
        student = copy.deepcopy(self._teacher).float().requires_grad_(True)
        self._teacher.to(teacher_dtype)
        self._target = copy.deepcopy(student).requires_grad_(False) if averaged else student
        backbone.unet = backbone.pipe.unet = student
        backbone.student = self
        self._collect_parameters()

    def _collect_parameters(self) -> None:
        student = self.backbone.unet
        self.parameters = dict(student.named_parameters())
        self.target_parameters = {} if self._target is student else dict(self._target.named_parameters())

    @property
    def unets(self) -> tuple[UNet, ...]:
        return tuple({id(unet): unet for unet in (self.backbone.unet, self._target, self._teacher)}.values())

    @contextmanager
    def _instead(self, unet: UNet) -> Iterator[None]:
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
        buffers = dict(self.backbone.unet.named_buffers())  # such as the positions of motion modules
        return {name: whole(tensor) for name, tensor in (self.parameters | buffers).items()}

    def write(
        self, path: Path, state: Mapping[str, torch.Tensor], settings: AdapterSettings, title: str, extra: Mapping[str, str]
    ) -> Sequence[Path]:
        write_unet(path, state, settings, title, extra)
        return (path,)

    def describe(self) -> str:
        return "the whole UNet"

"""Everything a run can be told, typed: a YAML file, with command-line overrides (`--lora.rank 16`).

Guidance is diffusers' everywhere: g in eps_u + g (eps_c - eps_u). The papers' w is g - 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pcm_scheduler.phases import PhaseGrid

# PCM's own list: attention, feed-forward, projections, resnet convolutions, samplers, time embeddings.
PCM_TARGET_MODULES = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


@dataclass
class ModelConfig:
    """The teacher, which is also the student's body.

    Attributes:
        path: a diffusers folder, a hub id, or a single `.safetensors` checkpoint.
        family: which backbone reads it.
    """

    path: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    family: Literal["sd15"] = "sd15"


@dataclass
class DataConfig:
    """A folder of pictures, each with a caption in a `.txt` file of the same name.

    Attributes:
        folder: searched with its subfolders.
        resolution: pictures are scaled to it on their short side and cropped to a square in the middle.
        cache: a folder for latents and text embeddings; empty: beside the output.
        encode_batch_size: pictures per call of the VAE.
    """

    folder: str = "data"
    resolution: int = 512
    cache: str = ""
    encode_batch_size: int = 16


@dataclass
class LoraConfig:
    """The adapter.

    Attributes:
        rank: of every module.
        alpha: the scale is alpha / rank; None means alpha = rank.
        target_modules: name endings of the modules that are adapted.
    """

    rank: int = 64
    alpha: float | None = None
    target_modules: tuple[str, ...] = PCM_TARGET_MODULES


@dataclass
class ObjectiveConfig:
    """What is learned.

    Attributes:
        name: `pcm` jumps to the edge of the point's phase, `lcm` to the end of the ODE.
        num_phases: M; `lcm` has one.
        num_solver_steps: N, the points of the teacher's grid.
        guidance_scale: g of the teacher's solver; 1 leaves the teacher unguided.
        huber_c: the constant of the pseudo-Huber distance sqrt(d^2 + c^2) - c.
    """

    name: Literal["pcm", "lcm"] = "pcm"
    num_phases: int = 4
    num_solver_steps: int = 50
    guidance_scale: float = 5.5
    huber_c: float = 0.001


@dataclass
class OptimizerConfig:
    """AdamW with a linear warm-up, then constant or a cosine to zero."""

    learning_rate: float = 5e-6
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 1e-3
    max_grad_norm: float = 1.0
    batch_size: int = 16  # per process
    steps: int = 5000


@dataclass
class SamplingConfig:
    """How the finished adapter wants to be sampled; written into its header.

    Attributes:
        num_inference_steps: recommended steps.
        guidance_scale: recommended g.
    """

    num_inference_steps: int = 4
    guidance_scale: float = 1.0


@dataclass
class TrainConfig:
    """One run.

    Attributes:
        output: the adapter file that is written, `.safetensors`.
        title: its human name.
        seed: of everything random; 0 or more.
        mixed_precision: of the networks; the adapter itself stays in float32.
        checkpoint_every: steps between checkpoints, from which an interrupted run goes on.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    output: str = "outputs/pcm_lora.safetensors"
    title: str = "PCM adapter"
    seed: int = 0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        if not self.output.endswith(".safetensors"):
            raise ValueError(f"output must end in .safetensors; got {self.output!r}.")
        if self.objective.name == "lcm" and self.objective.num_phases != 1:
            raise ValueError(f"objective lcm has one phase; got num_phases={self.objective.num_phases}.")
        if self.objective.guidance_scale < 1:
            raise ValueError(f"objective.guidance_scale is at least 1 (unguided); got {self.objective.guidance_scale}.")
        positive = {
            "lora.rank": self.lora.rank,
            "optimizer.steps": self.optimizer.steps,
            "optimizer.batch_size": self.optimizer.batch_size,
            "optimizer.learning_rate": self.optimizer.learning_rate,
            "checkpoint_every": self.checkpoint_every,
        }
        for name, value in positive.items():
            if value <= 0:
                raise ValueError(f"{name} must be positive; got {value}.")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more; got {self.seed}.")
        _ = self.grid(1000)

    def grid(self, num_train_timesteps: int) -> PhaseGrid:
        """The phase grid on a model's T; refuses impossible ones."""
        return PhaseGrid.even(self.objective.num_phases, self.objective.num_solver_steps, num_train_timesteps)

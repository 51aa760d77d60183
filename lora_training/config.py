"""Everything a run can be told, typed: a YAML file, with command-line overrides (`--lora.rank 16`).

Guidance is diffusers' everywhere: g in eps_u + g (eps_c - eps_u). The papers' w is g - 1.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from pcm_scheduler.checks import shortened
from pcm_scheduler.phases import PhaseGrid

_MOST_GUIDANCE = 1e6  # that the header of an adapter may state, which is written when all is trained
Precision = Literal["no", "fp16", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of the networks

# `all` is PCM's own list: attention, feed-forward, projections, resnet convolutions, samplers, time embeddings.
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
TARGET_SETS = {
    "attention": _ATTENTION,
    "attention+ff": (*_ATTENTION, *_FEED_FORWARD),
    "all": (
        *_ATTENTION, "proj_in", "proj_out", *_FEED_FORWARD,
        "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
    ),
}  # fmt: skip


def check_finite_settings(config: Any, prefix: str = "") -> None:
    """Refuse numbers that nothing can be computed with, group by group: NaN, which passes most comparisons, and huge ones.

    Args:
        config: a dataclass.
        prefix: of its settings' names, for messages.

    Raises:
        ValueError: which setting, and what it is.
    """
    for item in fields(config):
        name, value = f"{prefix}{item.name}", getattr(config, item.name)
        for part in value if isinstance(value, tuple) else (value,):
            if is_dataclass(part) and not isinstance(part, type):
                check_finite_settings(part, f"{name}.")
            elif isinstance(part, float) and not math.isfinite(part):
                raise ValueError(f"{name} must be a finite number; got {part}.")
            elif isinstance(part, int) and abs(part) >= 2**63:
                raise ValueError(f"{name} must be less than 2^63; got {shortened(part, 40)}.")


def chosen(config: Any) -> dict[str, Any]:
    """What a configuration says beside its defaults, group by group, so that a setting that is new changes nothing until used.

    Args:
        config: a dataclass; groups are its fields that are dataclasses by default.
    """
    told = {}
    for item in fields(config):
        value = getattr(config, item.name)
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if value != default:
            if is_dataclass(value) and not isinstance(value, type):
                value = chosen(value) if type(value) is type(default) else asdict(value)
            told[item.name] = value
    return told


@dataclass
class ModelConfig:
    """The teacher, which is also the student's body.

    Attributes:
        path: a diffusers folder, a hub id, or a single `.safetensors` checkpoint.
        family: which backbone reads it.
        prediction_type: overrides the model's own, for single files that do not say `v_prediction`; None: as the model says.
        variant: of a diffusers folder's files, such as `fp16`; empty: the plain ones, or those of fp16 where a local folder has
            no others.
        single_file_config: the diffusers folder or hub id whose configuration a single file has; empty: diffusers guesses.
        teacher_loras: LoRA files merged into the teacher, and so into the student's body, such as a style; at scale 1.
        beta_schedule: of the noise, for teacher, student and whoever samples the adapter, whose header states it; None: as the
            model says. AnimateDiff's motion modules v1 to v3 were trained on `linear`, Stable Diffusion on `scaled_linear`.
        motion_adapter: of `animatediff`: a diffusers MotionAdapter folder, a hub id, or a `.safetensors` file in AnimateDiff's
            own layout.
        image_adapter: of `animatediff`: a PCM LoRA of the image model that the student has beneath what is trained, frozen; the
            teacher has it not. It is in the files that are written.
    """

    path: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    family: Literal["sd15", "sdxl", "animatediff"] = "sd15"
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    variant: str = ""
    single_file_config: str = ""
    teacher_loras: tuple[str, ...] = ()
    beta_schedule: Literal["linear", "scaled_linear"] | None = None
    motion_adapter: str = ""
    image_adapter: str = ""

    def check(self) -> None:
        """Refuse what only a video model has with another family, and a video model without motion modules."""
        if self.family != "animatediff":
            for name in ("motion_adapter", "image_adapter"):
                if getattr(self, name):
                    raise ValueError(
                        f"model.{name} is for model.family animatediff; got {getattr(self, name)!r} with {self.family}."
                    )
        elif not self.motion_adapter:
            raise ValueError(
                "model.family animatediff needs model.motion_adapter: a diffusers MotionAdapter folder or hub id, such as "
                "guoyww/animatediff-motion-adapter-v1-5-3, or a .safetensors file in AnimateDiff's own layout."
            )


@dataclass
class ClipConfig:
    """Which frames of a file make its clip. Every file is one clip; the folders' layout is in `lora_training/data/clips.py`.

    Attributes:
        frames: of a clip, and so of every sample.
        stride: every n-th frame is taken, however long each is shown.
        fps: instead, the frames shown at these many instants a second, whatever the file's own rate and however uneven; a file
            of a lower rate gives frames twice. 0: by `stride`.
        start: where in the file the frames are taken: at its beginning, in its middle, or at a place drawn once for each file.
        skip_seconds: of every file, at both ends, that are not used, such as titles.
    """

    frames: int = 16
    stride: int = 1
    fps: float = 0.0
    start: Literal["first", "middle", "random"] = "middle"
    skip_seconds: float = 0.0

    def check(self, setting: str) -> None:
        """Refuse values that mean nothing; `setting` is the name of the configuration's part, for messages."""
        for name, least in (("frames", 1), ("stride", 1), ("fps", 0), ("skip_seconds", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{setting}.{name} must be {least} or more; got {getattr(self, name)}.")
        if self.fps and self.stride != 1:
            raise ValueError(
                f"{setting}.fps={self.fps:g} and {setting}.stride={self.stride} do not go together: leave one out."
            )


@dataclass
class DataConfig:
    """Captioned pictures or clips: where they are, how they are framed, and whether they are encoded once or as they are read.

    Attributes:
        path: a folder (captions in a `.txt` beside each picture, or in `metadata.jsonl`), parquet files (`data/*.parquet`),
            webdataset tar shards (`shards/{000..099}.tar`, a glob, or addresses), or a dataset id of the Hugging Face hub.
        clips: which frames are taken, if the data are clips (`data.clips: {}` for the usual); none: they are pictures. What is
            said of a picture below holds for a clip, whose frames are all scaled, cropped and mirrored alike.
        format: which of these it is; `auto` looks at the path.
        subset: of a hub dataset, its configuration's name.
        split: of a hub dataset.
        image_column: of a table; empty: the first that holds pictures, or videos if the data are clips.
        caption_column: of a table; empty: `text`, `caption` or `prompt`.
        resolution: the side of the square trained on; with buckets, its area is that of every picture.
        aspect_buckets: keep wide and tall pictures so, in batches of one size; otherwise all are squares.
        bucket_step: sides of buckets are its multiples; `resolution` is one.
        max_aspect: long side by short side of the longest bucket.
        crop: what is kept of a picture once it covers its size: the middle, or a part drawn once for each picture.
        flip: half of the samples are mirrored. Not for captions that say left and right.
        cache: a folder for latents and text embeddings; empty: beside the output.
        shard_size: pictures, or frames of clips, in a file of the cache.
        streaming: encode while training and keep nothing, for data too large to keep; slower steps.
        shuffle_buffer: pictures or clips that a streamed sample is drawn from; those out of tar shards wait in memory.
        encode_batch_size: pictures, or frames of clips, per call of the VAE.
        caption_dropout: share of the samples whose caption is replaced by the empty one, drawn anew at every step.
        max_bad_share: of pictures that cannot be read or have no caption; they are named and left out, more stop the run.
    """

    path: str = "data"
    clips: ClipConfig | None = None
    format: Literal["auto", "folder", "parquet", "webdataset", "hub"] = "auto"
    subset: str = ""
    split: str = "train"
    image_column: str = ""
    caption_column: str = ""
    resolution: int = 512
    aspect_buckets: bool = False
    bucket_step: int = 64
    max_aspect: float = 2.0
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    cache: str = ""
    shard_size: int = 1024
    streaming: bool = False
    shuffle_buffer: int = 1000
    encode_batch_size: int = 16
    caption_dropout: float = 0.0
    max_bad_share: float = 0.01

    @property
    def noun(self) -> str:
        """What a sample is, for messages."""
        return "clip" if self.clips else "picture"


@dataclass
class LoraConfig:
    """The adapter.

    Attributes:
        rank: of every module.
        alpha: the scale is alpha / rank; None means alpha = rank.
        dropout: of the adapter's input in training.
        targets: which kinds of module are adapted: a set by name, or name endings of your own. Of motion modules, never
            `proj_in` and `proj_out`: diffusers calls them in a way that PEFT's layers do not take.
        parts: which of a video model's layers: those of the image model (`spatial`), the motion modules, or all.
        dora: learn the length of every output's weights beside their direction (arXiv 2402.09353).
        init_adapter: go on from this adapter file (written by this trainer, or a published PCM LoRA) instead of from nothing.
    """

    rank: int = 64
    alpha: float | None = None
    dropout: float = 0.0
    targets: Literal["attention", "attention+ff", "all"] | tuple[str, ...] = "all"
    parts: Literal["all", "spatial", "motion"] = "all"
    dora: bool = False
    init_adapter: str = ""

    @property
    def target_names(self) -> tuple[str, ...]:
        """Name endings of the adapted modules."""
        return TARGET_SETS[self.targets] if isinstance(self.targets, str) else self.targets


@dataclass
class ObjectiveConfig:
    """What is learned.

    Attributes:
        name: `pcm` jumps to the edge of the point's phase, `lcm` is the same with one phase, sampled with new noise; `ctm` to
            any point on the way there (with one phase: CTM and TCD); `direct` to the edge, where the teacher's ODE, solved
            all the way, ends; `ct` to the edge, from pictures alone, with no teacher.
        starts: where the jumps begin: at noised pictures (`data`), or at points of the teacher's own trajectories from pure
            noise, which is where samplers are (`teacher`). Of the data those need captions and sizes alone. The teacher is run
            for a batch of trajectories now and then instead of at every step, and `direct` has nothing else to solve.
        trajectories_kept: of `starts: teacher`, how many batches of trajectories the starts are drawn from; they are in the
            computer's memory, each N + 1 times as large as a batch of latents.
        trajectory_every: batches of jumps from one new batch of trajectories, N guided steps of the teacher, to the next.
        trajectory_cache: a folder where the trajectories are kept on disk, for runs with the same teacher, captions, seed and
            batch, such as a search of learning rates, and for a run that goes on; empty: they are followed anew.
        num_phases: M; `lcm` has one.
        phase_edges: the M edges as timesteps, in any order, such as 999, 739, 499, 239; none: even ones. `python -m
            lora_training.phase_edges` proposes some.
        progressive_phases: train on these numbers of phases one after the other, in equal parts of the run, such as 8, 4, 2;
            the last must be `num_phases`, which is what the file states. None of them: `num_phases` throughout.
        num_solver_steps: N, the points of the teacher's grid.
        solver: of the teacher. `euler` is `ddim` under its other name; `heun` and `dpmpp_2m` run the teacher twice.
        solver_skip: grid points that a solver step goes down, at most to the edge; of `starts: teacher`, how far below x_n the
            point on its trajectory is.
        guidance_scale: g of the teacher's solver: one number, or two to draw from between for every sample. 1 leaves the
            teacher unguided: with `data.caption_dropout`, adapters that take large guidance and negative prompts when sampled.
        distance: of student and target, in latents, or `lpips` of the decoded pictures (for one phase, or late ones).
        lpips_weights: a `.safetensors` file with the state of `lpips.LPIPS(net="vgg")`.
        huber_c: the constant of the pseudo-Huber distance sqrt(d^2 + c^2) - c.
        target_ema: decay of the running average of the adapter that makes the target; 0: the adapter itself. With `ct` it is
            mu_0, and grows towards 1 with the number of intervals.
        shared_noise: of clips, the share s of the noise's variance that all frames have in common: sqrt(s) common + sqrt(1 - s)
            own, as PYoCo's mixed noise model (arXiv 2305.10474). Sampling draws its own noise, usually with s = 0.
        ct_start: with `ct`, the intervals that the schedule is cut into at first; they grow to `num_solver_steps`.
    """

    name: Literal["pcm", "lcm", "ctm", "direct", "ct"] = "pcm"
    starts: Literal["data", "teacher"] = "data"
    trajectories_kept: int = 16
    trajectory_every: int = 16
    trajectory_cache: str = ""
    num_phases: int = 4
    phase_edges: tuple[int, ...] = ()
    progressive_phases: tuple[int, ...] = ()
    num_solver_steps: int = 50
    solver: Literal["ddim", "euler", "heun", "dpmpp_2m"] = "ddim"
    solver_skip: int = 1
    guidance_scale: float | tuple[float, float] = 5.5
    distance: Literal["pseudo_huber", "l2", "l1", "lpips"] = "pseudo_huber"
    lpips_weights: str = ""
    huber_c: float = 0.001
    target_ema: float = 0.0
    shared_noise: float = 0.0
    ct_start: int = 2

    @property
    def guidance_range(self) -> tuple[float, float]:
        """The least and the largest g."""
        return self.guidance_scale if isinstance(self.guidance_scale, tuple) else (self.guidance_scale, self.guidance_scale)

    @property
    def phases_by_stage(self) -> tuple[int, ...]:
        """The numbers of phases trained on, in order."""
        return self.progressive_phases or (self.num_phases,)

    def check_starts(self) -> None:
        """Refuse what does not go with where the jumps begin.

        Raises:
            ValueError: which setting, what it is, what it may be.
        """
        if self.starts == "data":
            default = ObjectiveConfig()
            for name in ("trajectories_kept", "trajectory_every", "trajectory_cache"):
                if getattr(self, name) != getattr(default, name):
                    raise ValueError(
                        f"objective.{name} is of the teacher's trajectories: set objective.starts to teacher, or leave it out; "
                        f"got {getattr(self, name)!r}."
                    )
        elif self.name == "ct":
            raise ValueError("objective ct has no teacher whose trajectories it could begin on: set objective.starts to data.")
        elif self.name == "direct" and self.solver_skip != 1:
            raise ValueError(
                "objective direct from starts: teacher goes to a point of the trajectory, which is solved in steps of one grid "
                f"point: leave objective.solver_skip at 1; got {self.solver_skip}."
            )


@dataclass
class AdversarialConfig:
    """A critic beside the objective: heads on frozen features tell the student's landings from their targets.

    Attributes:
        weight: of its judgement in the student's loss; 0: there is no critic.
        space: what is looked at: `latent`, the points themselves, noised again, by the teacher's blocks; `pixel`, the pictures
            that they imply, decoded with gradients, which takes a lot of memory: see `crop` and `gradient_checkpointing`.
        network: whose features of pictures the heads judge: `pyramid`, none, but patch critics at three sizes, learned from
            nothing; `vgg`, five maps of LPIPS's; `factory`, a module of your own. Not one that the result is measured by.
        path: for `vgg` a `.safetensors` file with the state of `lpips.LPIPS(net="vgg")`; optional for `factory`, which is
            called with it.
        factory: `package.module:name` or `folder/file.py:name` of a function that returns a module which turns pictures
            (N, 3, H, W) in [-1, 1] into a map (N, C, h, w) or several, with gradients.
        crop: side of a square, in latents, drawn anew for every sample and the same in all frames of a clip, that
            is decoded instead of the whole; 0: the whole.
        learning_rate: of the critic, constant.
        cadence: `together`: the student is told the judgement at every step; `alternate`: at odd steps, and the critic learns
            at even ones. The objective's own loss is there at all of them.
        critic_every: `together`, steps from one update of the critic to the next.
        heads: for each map; of clips they see frame by frame.
        temporal_heads: further ones for each map that see the frames of a clip together; pictures have none.
        width: of a head, a multiple of 8.
    """

    weight: float = 0.0
    space: Literal["latent", "pixel"] = "latent"
    network: Literal["pyramid", "vgg", "factory"] = "pyramid"
    path: str = ""
    factory: str = ""
    crop: int = 0
    learning_rate: float = 1e-5
    cadence: Literal["together", "alternate"] = "together"
    critic_every: int = 1
    heads: int = 4
    temporal_heads: int = 2
    width: int = 64

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: which setting, what it is, what it may be.
        """
        if self.weight < 0:
            raise ValueError(f"adversarial.weight must be 0 (no critic) or more; got {self.weight}.")
        if self.width <= 0 or self.width % 8:
            raise ValueError(f"adversarial.width must be a positive multiple of 8; got {self.width}.")
        if self.temporal_heads < 0:
            raise ValueError(f"adversarial.temporal_heads must be 0 (none) or more; got {self.temporal_heads}.")
        if self.crop < 0:
            raise ValueError(f"adversarial.crop must be 0 (whole pictures) or a number of latents; got {self.crop}.")
        if self.cadence == "alternate" and self.critic_every != 1:
            raise ValueError(
                "adversarial.cadence alternate already says when the critic learns: leave adversarial.critic_every at 1; got "
                f"{self.critic_every}."
            )
        default = AdversarialConfig()
        for name in ("network", "path", "factory", "crop"):
            if self.space == "latent" and getattr(self, name) != getattr(default, name):
                raise ValueError(
                    f"adversarial.{name} is of a critic that sees pictures, and adversarial.space is latent, where the teacher "
                    f"looks: set adversarial.space to pixel, or leave it out; got {getattr(self, name)!r}."
                )
        if (self.network == "factory") != bool(self.factory):
            raise ValueError(
                "adversarial.network factory and adversarial.factory, the function that returns the network, go together; got "
                f"network={self.network} and factory={self.factory!r}."
            )
        if self.network == "pyramid" and self.path:
            raise ValueError(
                "adversarial.network pyramid has no weights to read: set it to vgg or factory, or leave adversarial.path out; "
                f"got {self.path!r}."
            )


@dataclass
class OptimizerConfig:
    """A linear warm-up, then constant or a cosine to zero.

    Attributes:
        name: `adamw`; `adamw8bit` (bitsandbytes, CUDA) keeps its moments in 8 bits; `prodigy` (prodigyopt) finds the step
            size itself, at learning_rate 1.
        learning_rate: after the warm-up.
        schedule: `cosine` ends at zero.
        warmup_steps: from zero.
        weight_decay: decoupled, as AdamW's.
        max_grad_norm: longer gradients are shortened to it.
        batch_size: samples per process and forward pass.
        gradient_accumulation: batches per optimisation step.
        steps: optimisation steps in all.
    """

    name: Literal["adamw", "adamw8bit", "prodigy"] = "adamw"
    learning_rate: float = 5e-6
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 1e-3
    max_grad_norm: float = 1.0
    batch_size: int = 16
    gradient_accumulation: int = 1
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
class ValidationConfig:
    """Pictures and figures while the run goes on, in its `.run` folder.

    Attributes:
        every: steps between validations; 0: only when the run is done.
        prompts: what is drawn; none: the first four captions of the data.
        steps: numbers of sampling steps, one or more.
        guidance_scales: one or more, such as low and high.
        seed: of the initial noise; 0 or more.
    """

    every: int = 0
    prompts: tuple[str, ...] = ()
    steps: tuple[int, ...] = (1, 4, 16)
    guidance_scales: tuple[float, ...] = (1.0, 5.0)
    seed: int = 0


@dataclass
class TrainConfig:
    """One run.

    Attributes:
        output: the file that is written, `.safetensors`: an adapter, or with `trainable: unet` a UNet.
        title: its human name.
        trainable: `lora` trains an adapter; `unet` every weight of the UNet (full fine-tuning; what `lora` says is not used),
            which holds teacher and student side by side and takes 16 bytes for each weight trained.
        seed: of everything random, from 0 to 2^32 - 1.
        mixed_precision: of the networks; the adapter itself stays in float32. `auto`: as `accelerate launch` was told, in its
            configuration or by `--mixed_precision`. A processor without bfloat16 computes in float32 when asked for `bf16`.
        checkpoint_every: steps between checkpoints, from which an interrupted run goes on.
        checkpoints_kept: of the latest; 0 keeps all.
        resume: `latest` goes on from the newest checkpoint of this output, if there is one; `no` starts anew.
        max_bad_steps: steps in a row whose loss is not a number (they are skipped and counted) before the run stops.
        compile: compile the UNet's repeated blocks with `torch.compile`; the first steps are slow.
        gradient_checkpointing: less memory for a fifth more time.
        log_with: a tracker for loss, learning rate and validation, in the `.run` folder; it must be installed.
        push_to_hub: upload the finished adapter, its card and its samples to this repository (`owner/name`); empty: nowhere.
        dry_run: print what would happen, take one real step, and write nothing but the cache of latents.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    output: str = "outputs/pcm_lora.safetensors"
    title: str = "PCM adapter"
    trainable: Literal["lora", "unet"] = "lora"
    seed: int = 0
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    checkpoint_every: int = 500
    checkpoints_kept: int = 2
    resume: Literal["latest", "no"] = "latest"
    max_bad_steps: int = 10
    gradient_checkpointing: bool = False
    compile: bool = False
    log_with: Literal["none", "tensorboard", "wandb"] = "none"
    push_to_hub: str = ""
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        check_finite_settings(self)
        if not self.output.endswith(".safetensors"):
            raise ValueError(f"output must end in .safetensors; got {self.output!r}.")
        data = Path(self.data.path)
        if data.is_dir() and Path(self.output).resolve().is_relative_to(data.resolve()):
            raise ValueError(
                f"output {self.output} lies within data.path {self.data.path}, where the run's own samples would be taken for "
                "training pictures. Write it beside that folder."
            )
        if self.trainable == "unet" and self.lora.init_adapter:
            raise ValueError("lora.init_adapter goes on from an adapter, and trainable: unet has none. Set trainable: lora.")
        self._check_video()
        if self.objective.name == "lcm" and self.objective.num_phases != 1:
            raise ValueError(f"objective lcm has one phase; got num_phases={self.objective.num_phases}.")
        if self.objective.name == "ct" and self.objective.guidance_scale != 1:
            raise ValueError(
                "objective ct has no teacher to guide: set objective.guidance_scale to 1, and data.caption_dropout above 0 for "
                f"an adapter that is guided when sampled; got {self.objective.guidance_scale}."
            )
        if not 1 <= self.objective.ct_start <= self.objective.num_solver_steps:
            raise ValueError(
                f"objective.ct_start must be between 1 and objective.num_solver_steps={self.objective.num_solver_steps}; got "
                f"{self.objective.ct_start}."
            )
        self.adversarial.check()
        self.objective.check_starts()
        low, high = self.objective.guidance_range
        if not 1 <= low <= high <= _MOST_GUIDANCE:
            raise ValueError(
                f"objective.guidance_scale is at least 1 (unguided) and at most {_MOST_GUIDANCE:g}, or a range low..high; got "
                f"{self.objective.guidance_scale}."
            )
        if self.objective.phases_by_stage[-1] != self.objective.num_phases:
            raise ValueError(
                f"objective.progressive_phases {self.objective.progressive_phases} must end at "
                f"objective.num_phases={self.objective.num_phases}."
            )
        if self.objective.trajectory_cache and self.data.streaming:
            raise ValueError(
                "objective.trajectory_cache is for captions that are encoded once, and a stream has others every time: set "
                "data.streaming to no, or leave the cache out."
            )
        if self.objective.phase_edges and self.objective.progressive_phases:
            raise ValueError("objective.phase_edges and objective.progressive_phases do not go together: leave one out.")
        for name, value in (("lora.alpha", self.lora.alpha), ("optimizer.max_grad_norm", self.optimizer.max_grad_norm)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive; got {value}.")
        shares = {
            "lora.dropout": self.lora.dropout,
            "data.caption_dropout": self.data.caption_dropout,
            "data.max_bad_share": self.data.max_bad_share,
            "objective.target_ema": self.objective.target_ema,
            "objective.shared_noise": self.objective.shared_noise,
        }
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1; got {value}.")
        for name in ("lora.dropout", "objective.target_ema"):
            if shares[name] == 1:
                raise ValueError(f"{name} must be less than 1, with which nothing is learned.")
        positive = {
            "objective.solver_skip": self.objective.solver_skip,
            "objective.trajectories_kept": self.objective.trajectories_kept,
            "objective.trajectory_every": self.objective.trajectory_every,
            "objective.huber_c": self.objective.huber_c,
            "adversarial.learning_rate": self.adversarial.learning_rate,
            "adversarial.critic_every": self.adversarial.critic_every,
            "adversarial.heads": self.adversarial.heads,
            "optimizer.gradient_accumulation": self.optimizer.gradient_accumulation,
            "data.resolution": self.data.resolution,
            "data.bucket_step": self.data.bucket_step,
            "data.shard_size": self.data.shard_size,
            "data.shuffle_buffer": self.data.shuffle_buffer,
            "data.encode_batch_size": self.data.encode_batch_size,
            "max_bad_steps": self.max_bad_steps,
            "lora.rank": self.lora.rank,
            "optimizer.steps": self.optimizer.steps,
            "optimizer.batch_size": self.optimizer.batch_size,
            "optimizer.learning_rate": self.optimizer.learning_rate,
            "checkpoint_every": self.checkpoint_every,
        }
        for name, value in positive.items():
            if value <= 0:
                raise ValueError(f"{name} must be positive; got {value}.")
        if self.optimizer.name == "prodigy" and self.optimizer.learning_rate < 0.1:
            raise ValueError(
                "optimizer.name prodigy finds the step size itself and multiplies it by optimizer.learning_rate: set "
                f"that to 1; got {self.optimizer.learning_rate:g}, with which nothing is learned."
            )
        if self.data.aspect_buckets and self.data.resolution % self.data.bucket_step:
            raise ValueError(
                f"data.resolution={self.data.resolution} must be a multiple of data.bucket_step={self.data.bucket_step}."
            )
        if self.data.clips:
            self.data.clips.check("data.clips")
        if self.data.max_aspect < 1:
            raise ValueError(f"data.max_aspect must be at least 1; got {self.data.max_aspect}.")
        if not 1 <= self.sampling.num_inference_steps <= self.objective.num_solver_steps:
            raise ValueError(
                "sampling.num_inference_steps must be between 1 and objective.num_solver_steps="
                f"{self.objective.num_solver_steps}; got {self.sampling.num_inference_steps}."
            )
        if not 0 <= self.sampling.guidance_scale <= _MOST_GUIDANCE:
            raise ValueError(
                f"sampling.guidance_scale must be between 0 and {_MOST_GUIDANCE:g}; got {self.sampling.guidance_scale}. "
                "1 is without guidance."
            )
        not_negative = {
            "checkpoints_kept": self.checkpoints_kept,
            "optimizer.warmup_steps": self.optimizer.warmup_steps,
            "optimizer.weight_decay": self.optimizer.weight_decay,
            "validation.seed": self.validation.seed,
        }
        for name, value in not_negative.items():
            if value < 0:
                raise ValueError(f"{name} must be 0 or more; got {value}.")
        if not self.validation.steps or not self.validation.guidance_scales:
            raise ValueError("validation.steps and validation.guidance_scales: name at least one of each.")
        if self.validation.every < 0:
            raise ValueError(f"validation.every must be 0 (at the end only) or more; got {self.validation.every}.")
        for steps in self.validation.steps:
            if not 1 <= steps <= self.objective.num_solver_steps:
                raise ValueError(
                    f"validation.steps must be between 1 and objective.num_solver_steps={self.objective.num_solver_steps}; "
                    f"got {steps}."
                )
        if self.log_with != "none" and find_spec(self.log_with) is None:
            raise ValueError(f"log_with is {self.log_with}, which is not installed: pip install {self.log_with}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}; got {self.seed}.")
        if self.grids(1000)[-1].num_phases != self.objective.num_phases:
            raise ValueError(
                f"objective.phase_edges {self.objective.phase_edges} are of {self.grids(1000)[-1].num_phases} phases, and "
                f"objective.num_phases is {self.objective.num_phases}."
            )

    def _check_video(self) -> None:
        """What only a video model has, and what one has not."""
        video_only = {
            "objective.shared_noise": self.objective.shared_noise,
            "lora.parts": "" if self.lora.parts == "all" else self.lora.parts,
        }
        if self.model.family != "animatediff":
            self.model.check()
            for name, value in video_only.items():
                if value:
                    raise ValueError(f"{name} is for model.family animatediff; got {value!r} with {self.model.family}.")
            if self.data.clips is not None:
                raise ValueError(f"data.clips is for model.family animatediff; {self.model.family} learns from pictures.")
            return
        if self.data.clips is None:
            raise ValueError("model.family animatediff learns from clips: set data.clips, `data.clips: {}` for the usual.")
        self.model.check()
        if self.lora.dora:
            raise ValueError(
                "lora.dora: AnimateDiff's layout of motion LoRAs has no place for DoRA's magnitudes. Set it to false."
            )
        if self.compile:
            raise ValueError("compile: diffusers (0.42) names no blocks to compile in a video UNet. Set it to false.")
        if self.trainable == "unet" and self.model.image_adapter:
            raise ValueError(
                "model.image_adapter lies beneath an adapter, and trainable: unet has none. Set trainable: lora, or merge it "
                "into teacher and student with model.teacher_loras."
            )

    def grids(self, num_train_timesteps: int) -> list[PhaseGrid]:
        """The phase grids trained on, in order, on a model's T; the last is the adapter's. Refuses impossible ones."""
        steps = self.objective.num_solver_steps
        if self.objective.phase_edges:
            return [PhaseGrid.from_timesteps(self.objective.phase_edges, steps, num_train_timesteps)]
        return [PhaseGrid.even(phases, steps, num_train_timesteps) for phases in self.objective.phases_by_stage]

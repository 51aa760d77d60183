"""The run: one training step after another, a progress bar, checkpoints in and out, and the adapter file at the end."""

from __future__ import annotations

import glob
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, set_seed
from huggingface_hub.errors import HfHubHTTPError
from tqdm import tqdm

from pcm_scheduler import __version__
from pcm_scheduler.lora_file import AdapterSettings
from pcm_scheduler.phases import PhaseGrid

from .backbones import Conditioning, load_backbone
from .checkpoint import Checkpoints, NotFinite, Told, check_finite, flat, listed
from .config import DTYPES, Precision, TrainConfig
from .cpu import coming_device, keep_freed_memory, precision_here, use_plain_attention
from .data.latent_cache import LatentCache, TrainingData
from .data.sources import open_source
from .data.stream import StreamingData
from .discriminator import CRITIC, AdversarialLoss
from .distances import load_lpips
from .files import CannotWrite, check_writable, claimed, remove_temporary, write_text, writing
from .hub import check_repository, push
from .model_card import model_card
from .objectives import CONSISTENCY, ConsistencyObjective, sampling_eta, target_decay, total
from .optimizers import average_gradients, build_optimizer, check_installed, learning_rate
from .randomness import generator_of, seed_of
from .sharding import shard_mesh, whole
from .students import adapted_modules, build_student, compile_blocks
from .trajectories import Trajectories, TrajectoryCache, TrajectoryPool
from .validation import draw_sheet, fixed_loss, latent_shape

# What may change between a run and its continuation.
_MAY_CHANGE = (
    "output", "title", "checkpoint_every", "checkpoints_kept", "resume", "max_bad_steps", "gradient_checkpointing", "compile",
    "log_with", "sampling", "validation", "push_to_hub", "dry_run", "data.cache", "data.encode_batch_size",
    "objective.trajectory_cache",
    # what a run that has stopped says may be changed; with the same ones it ends with the same weights
    "data.max_bad_share", "mixed_precision", "optimizer.learning_rate", "optimizer.max_grad_norm",
    "num_processes",  # of the launch: the batch is another one then, and what each process draws
)  # fmt: skip

_ONE_PRECISION = "uniform original parameter dtype"  # in what FSDP says (torch 2.6 and 2.7) of weights in several
# In the messages of torch.distributed's backends when a connection to another process breaks or nothing comes from it.
_LOST = re.compile(r"gloo|nccl|closed by peer|connection reset|timed out", re.IGNORECASE)


class _Asked(Exception):  # noqa: N818  (not an error)
    """To stop, before a step was done."""


class Interrupted(Exception):  # noqa: N818  (not an error)
    """The run was asked to stop; its state is saved."""


class Run:
    """Everything that a run holds, from a checked configuration to the adapter file.

    Args:
        config: what to do.

    Raises:
        ValueError: a model, data or adapter that does not fit the configuration.
        CannotWrite: a RuntimeError; the output, or the run's folder beside it, could not be written.
    """

    def __init__(self, config: TrainConfig):
        precision = _precision_told(config)
        coming = coming_device()
        self.precision = precision_here(precision, coming)
        self.config = config = replace(config, mixed_precision=self.precision)
        self.output = Path(config.output)
        self.folder = self.output.with_suffix(".run")
        shared = config.objective.trajectory_cache
        for file in (self.output, self.folder / "config.yaml", *([Path(shared) / "trajectories"] if shared else [])):
            check_writable(file)
        self.accelerator = Accelerator(
            mixed_precision=self.precision,
            cpu=coming.type == "cpu",  # without that, processes that find no GPU do not find each other either
            log_with=None if config.log_with == "none" else config.log_with,
            project_dir=self.folder,
            # one process may encode, validate or write while the others wait, for longer than NCCL's own ten minutes
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
        )
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "DeepSpeed keeps its own optimiser and writes its own pickled checkpoints, and this trainer has neither. "
                "To split the weights between processes, launch with examples/accelerate/fsdp.yaml."
            )
        if self.accelerator.is_main_process and _launched_precision() not in ("no", precision):
            print(
                f"mixed_precision is {precision}, as configured, and not accelerate's {_launched_precision()}", file=sys.stderr
            )
        self.mesh = shard_mesh(self.accelerator)
        settings = asdict(config) | {"num_processes": self.accelerator.num_processes}
        told = Told(settings, _MAY_CHANGE, defaults=asdict(TrainConfig()))
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.checkpoints_kept, told)
        self._asked: list[int] = []  # signals to stop
        self.figures: dict[str, float] = {}  # of the last step: the parts of its loss, and the length of its gradient
        set_seed(config.seed)
        on_cpu = self.accelerator.device.type == "cpu"
        if on_cpu:
            keep_freed_memory()
        self.backbone = load_backbone(config.model)
        if on_cpu:
            use_plain_attention(self.backbone.unet)
        elif config.trainable == "lora":  # where memory is short, and every operation takes half precision
            self.backbone.unet.to(DTYPES[self.precision])
        for part in (self.backbone.vae, *self.backbone.text_encoders, self.backbone.unet):
            part.to(self.accelerator.device)
        self.critic = self._build_critic()  # before pictures are encoded: it may lack weights
        self._check_before_encoding()
        with self._in_words(self._smaller_encoding):
            self.data = self._load_data()
        self.empty = {name: tensor.to(self.accelerator.device, torch.float32) for name, tensor in self.data.empty.items()}
        self.latent_shape = latent_shape(self.data.fixed)
        self.backbone.check_sample(self.latent_shape)
        self.grids = config.grids(self.backbone.num_train_timesteps)
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # what is shown is of training, not of encoding
        teacher_dtype = torch.float32 if on_cpu else DTYPES[self.precision]
        self.student = build_student(self.backbone, config, self.mesh, teacher_dtype)
        if config.gradient_checkpointing:
            self.backbone.enable_gradient_checkpointing()
        if config.compile:
            compile_blocks(self.student.unets, config.data.aspect_buckets)
        optimizer = build_optimizer(config.optimizer, self.student.parameters.values())
        if self.critic:
            optimizer.add_param_group({"params": list(self.critic.parameters.values()), "lr": config.adversarial.learning_rate})
        # the UNet stays bare: only gradients of what is trained travel between processes, in average_gradients or by FSDP
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.objectives = [ConsistencyObjective(self.backbone, grid, config.objective) for grid in self.grids]
        self.trajectories = self._build_trajectories() if config.objective.starts == "teacher" else None

    def _check_before_encoding(self) -> None:
        """Refuse what would be refused after it, which may take hours.

        Raises:
            ValueError: which setting, and what is wrong with it.
            CannotWrite: another run writes to the same folder.
        """
        config = self.config
        if self.folder.is_dir() and not config.dry_run:
            with self._alone():  # and again when training begins
                pass
        if config.push_to_hub:
            check_repository(config.push_to_hub)
        if config.compile and self.mesh is not None:
            raise ValueError(
                "compile: diffusers does not find the blocks of a UNet that FSDP split. Turn it off, or launch without FSDP."
            )
        if config.resume == "latest":
            self.checkpoints.check()
        check_installed(config.optimizer)
        if config.objective.distance == "lpips":
            load_lpips(config.objective.lpips_weights, "objective.lpips_weights")
        for setting, file in (
            ("lora.init_adapter", config.lora.init_adapter),
            ("model.image_adapter", config.model.image_adapter),
        ):
            if file and not Path(file).is_file():
                raise ValueError(f"{setting}: there is no file {file}.")
        if config.trainable == "lora":
            adapted_modules(self.backbone.unet, config.lora)
        if config.data.clips:
            side = config.data.resolution // self.backbone.latent_scale
            self.backbone.check_sample((4, config.data.clips.frames, side, side))

    def _build_critic(self) -> AdversarialLoss | None:
        config = self.config.adversarial
        if config.weight == 0:
            return None
        if self.mesh is not None:
            raise ValueError("adversarial.weight needs whole weights in every process: launch without FSDP, or set it to 0.")
        if self.config.optimizer.name == "prodigy":
            raise ValueError("prodigy has one step size for all, and the critic wants its own: set optimizer.name to adamw.")
        return AdversarialLoss(self.backbone, config, self.config.seed, self.config.data.resolution)

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """All that is trained, the critic's too."""
        return self.student.parameters | (self.critic.parameters if self.critic else {})

    def _load_data(self) -> TrainingData | StreamingData:
        """Encode where the model is, then leave that place to the UNet; a stream goes on encoding there."""
        config, accelerator = self.config, self.accelerator
        process = (accelerator.process_index, accelerator.num_processes)
        source = open_source(config.data)
        if config.data.streaming:
            return StreamingData(source, config.data, self.backbone, config.seed, *process)
        root = Path(config.data.cache) if config.data.cache else self.output.parent / "cache"
        cache = LatentCache(source, config.data, self.backbone, config.model, root)
        cache.encode(*process)
        self._encoded = cache.folder.name
        accelerator.wait_for_everyone()
        data = cache.open()
        for part in (self.backbone.vae, *self.backbone.text_encoders):
            part.to("cpu")
        return data

    def _build_trajectories(self) -> TrajectoryPool:
        """All stages' grids have the same points, and differ in their edges alone."""
        config, levels, empty = self.config, self.objectives[-1].levels, self.empty
        process, autocast = self.accelerator.process_index, self.accelerator.autocast
        cache = TrajectoryCache.of(config, self.precision, self._encoded) if config.objective.trajectory_cache else None
        return TrajectoryPool(
            self.backbone, levels, config.objective, self._draw_data, empty, autocast, config.seed, process, cache
        )

    def _draw_data(self, generator: torch.Generator) -> tuple[torch.Tensor, Conditioning]:
        config = self.config
        return self.data.draw(config.optimizer.batch_size, generator, self.accelerator.device, config.data.caption_dropout)

    @property
    def grid(self) -> PhaseGrid:
        """The finished adapter's."""
        return self.grids[-1]

    def step(self, step: int) -> float:
        """Optimisation step number `step`; returns the loss; NaN or infinite if it, or a gradient, was, and nothing changed.

        Raises:
            _Asked: to stop, before it was done; nothing changed.
        """
        config = self.config
        names = (config.seed, self.accelerator.process_index, step)
        torch.manual_seed(seed_of(*names))  # dropout
        objective = self.objectives[step * len(self.objectives) // config.optimizer.steps]
        progress = step / config.optimizer.steps
        if self.critic:
            self.critic.step = step
        losses = []
        self.optimizer.zero_grad()
        for micro in range(config.optimizer.gradient_accumulation):
            if self._stopping():
                raise _Asked
            generator = generator_of(*names, micro)
            begun, conditioning = self._draw(step * config.optimizer.gradient_accumulation + micro, generator)
            with self.accelerator.autocast():
                parts = objective.losses(begun, conditioning, self.empty, generator, progress, self.critic)
                loss = total(parts) / config.optimizer.gradient_accumulation
            self.accelerator.backward(loss)
            losses.append(torch.stack([part.detach().float() for part in parts.values()]))
        means = self._agreed(torch.stack(losses).mean(0))  # waits for a GPU, and so does the norm below
        self.figures = dict(zip(parts, means, strict=True))
        value = sum(means)
        if not math.isfinite(value):
            return value
        parameters = list(self.parameters.values())
        if self.mesh is None:
            average_gradients(parameters)
        self.optimizer.param_groups[0]["lr"] = learning_rate(config.optimizer, step)  # the critic's own is constant
        self.accelerator.unscale_gradients()  # once: accelerate's own clipping does it again under FSDP, which torch refuses
        clipped = torch.nn.utils.clip_grad_norm_(self.student.parameters.values(), config.optimizer.max_grad_norm)
        norm = whole(clipped).item()
        if self.accelerator.scaler is None and not self._finite(norm):
            return math.nan
        self.optimizer.step()
        if self.optimizer.step_was_skipped:  # by the scaler of fp16 losses, which takes a smaller scale from now on
            return math.nan
        self.figures["grad_norm"] = norm
        self.student.update_target(target_decay(config.objective, progress))
        return value

    def _draw(self, batch: int, generator: torch.Generator) -> tuple[torch.Tensor | Trajectories, Conditioning]:
        """What batch number `batch` of the run begins on."""
        if self.trajectories is None:
            return self._draw_data(generator)
        self.follow_teacher(batch)
        return self.trajectories.draw(self.config.optimizer.batch_size, generator, self.accelerator.device)

    def follow_teacher(self, batch: int) -> None:
        """Along the trajectories that batch number `batch` begins on, if it begins on such, and they are not there yet.

        Raises:
            _Asked: to stop, meanwhile.
        """
        if self.trajectories is None:
            return
        for _ in self.trajectories.refill(batch, show=self.accelerator.is_main_process):
            if self._stopping():
                raise _Asked

    def _finite(self, norm: float) -> bool:
        """Whether every gradient is, from the norm of the student's; the same in all processes, for gradients are."""
        judged = [p.grad.norm() for p in self.critic.parameters.values() if p.grad is not None] if self.critic else []
        return math.isfinite(norm) and (not judged or math.isfinite(torch.stack(judged).sum().item()))

    def _agreed(self, values: torch.Tensor) -> list[float]:
        """The means over processes, so that all of them skip a bad step or none does; (N,)."""
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values.to(self.accelerator.device), reduction="mean")
        return values.tolist()

    def _stopping(self) -> bool:
        """Whether the run was asked to stop, in all processes or in none: a launcher kills what has not stopped in time."""
        if self.accelerator.num_processes == 1:
            return bool(self._asked)
        return self._agreed(torch.tensor([float(len(self._asked))]))[0] > 0

    def train(self) -> Path:
        """All steps, from the newest checkpoint if there is one; returns the adapter file.

        Raises:
            Interrupted: SIGTERM or Ctrl-C; the state is saved.
            ValueError: the newest checkpoint is of a run that was told something else, or cannot be read.
            RuntimeError: too many bad steps in a row, out of memory, a disk that is full, another process that has ended, or
                another run that writes to the same folder; what to do, and where the run goes on.
        """
        with self._alone(), self._in_words(self._smaller):
            return self._train()

    def _alone(self) -> AbstractContextManager[None]:
        """Two runs of one output would mix their checkpoints, and the later one's adapter would replace the other's."""
        return claimed(self.folder) if self.accelerator.is_main_process else nullcontext()

    def _begin(self) -> int:
        """Restore the newest checkpoint, or set those of an earlier run aside; returns how many steps are done."""
        config, main = self.config, self.accelerator.is_main_process
        if config.resume == "no":
            aside = self.checkpoints.set_aside() if main else None
            if aside:
                print(f"the checkpoints of an earlier run are now in {aside}")
                if self._table.exists():  # its rows are of that run
                    self._table.rename(aside / self._table.name)
            self.accelerator.wait_for_everyone()
            return 0
        scaler, average = self.accelerator.scaler, self.student.target_parameters
        first = self.checkpoints.load_latest(self.parameters, self.optimizer.optimizer, average, scaler)
        changed = self.checkpoints.changed() if first else {}
        if main and changed:
            print(f"going on after step {first} with other settings:\n{listed(changed)}", file=sys.stderr)
        return first

    def _train(self) -> Path:
        config, main = self.config, self.accelerator.is_main_process
        state = (self.parameters, self.optimizer.optimizer)
        average, scaler = self.student.target_parameters, self.accelerator.scaler
        first = self._begin()
        batches = first * config.optimizer.gradient_accumulation
        drawn = self.trajectories.oldest(batches) if self.trajectories else batches
        self.data.skip(drawn, config.optimizer.batch_size)
        if main:
            if self.mesh:
                print(f"weights are split between {self.mesh.size()} processes")
            write_text(self.folder / "config.yaml", yaml.safe_dump(_plain(asdict(config)), sort_keys=False))
        if config.log_with != "none":
            told = {name: v if isinstance(v, (int, float, str)) else json.dumps(v) for name, v in flat(asdict(config))}
            self.accelerator.init_trackers(self.output.stem, told, init_kwargs={"wandb": {"dir": str(self.folder)}})
        bar = tqdm(
            range(first, config.optimizer.steps), initial=first, total=config.optimizer.steps,
            desc=self.output.stem, disable=not main, mininterval=1.0,
        )  # fmt: skip
        smoothed: dict[str, float] = {}
        bad, bad_in_a_row, saved = 0, 0, first
        with _stop_requests(self._asked):
            for step in bar:
                try:
                    value = self.step(step)
                except _Asked:
                    if saved != step:
                        self.checkpoints.save(*state, step, average, scaler, write=main)
                    raise Interrupted(f"Stopped after step {step}; run the same command to go on.") from None
                if not math.isfinite(value):
                    bad, bad_in_a_row = bad + 1, bad_in_a_row + 1
                    if bad_in_a_row >= config.max_bad_steps:
                        raise RuntimeError(
                            f"The loss or its gradient was not finite for {bad_in_a_row} steps in a row, up to step {step}. "
                            f"Lower optimizer.learning_rate (now {config.optimizer.learning_rate:g}), or set mixed_precision "
                            f"to bf16 or no (now {self.precision}). The last good state is "
                            f"{self.checkpoints.latest() or 'the beginning: there is no checkpoint yet'}."
                        )
                    if main and bad_in_a_row == 1:
                        bar.write(f"step {step}: the loss or its gradient is not finite; skipped", file=sys.stderr)
                else:
                    bad_in_a_row = 0
                    smoothed |= {name: 0.98 * smoothed.get(name, now) + 0.02 * now for name, now in self.figures.items()}
                bar.set_postfix(self._shown(smoothed, step, bad, bar.format_dict["rate"]), refresh=False)
                self.accelerator.log(self._logged(value, step, bad), step)
                if step + 1 == config.optimizer.steps:
                    break
                if (step + 1) % config.checkpoint_every == 0 and not bad_in_a_row:
                    self.checkpoints.save(*state, step + 1, average, scaler, write=main)
                    saved = step + 1
                if config.validation.every and (step + 1) % config.validation.every == 0:
                    self.validate(step + 1)
        self._asked.clear()  # too late to stop: all steps are done, and the card shows the last sheet
        self.write()
        self.validate(config.optimizer.steps)
        if main:
            self.checkpoints.remove()
            if config.push_to_hub:
                self._push()
        self.accelerator.end_training()
        return self.output

    def _push(self) -> None:
        """To the hub, when all is written.

        Raises:
            RuntimeError: it failed; that the adapter is here, and how to upload it.
        """
        repository = self.config.push_to_hub
        try:
            print(f"pushed to {push(repository, self.output, self.folder)}")
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise RuntimeError(
                f"{self.output} is finished, and only its upload failed: {error}\n"
                f"Upload it without training again: hf upload {repository} {self.output}"
            ) from error

    def _logged(self, loss: float, step: int, bad: int) -> dict[str, float]:
        """For the tracker."""
        parts = {name if name == "grad_norm" else f"loss/{name}": value for name, value in self.figures.items()}
        return {"loss": loss, "lr": learning_rate(self.config.optimizer, step), "skipped": bad} | parts

    def _shown(self, smoothed: Mapping[str, float], step: int, bad: int, rate: float | None) -> dict[str, str]:
        """For the progress bar: the objective's own loss, and what the critic's says beside it; `rate` in steps a second."""
        config = self.config.optimizer
        shown = {"loss": f"{smoothed.get(CONSISTENCY, math.nan):.4f}"}
        if CRITIC in smoothed:
            shown["critic"] = f"{smoothed[CRITIC]:.3f}"
        shown["lr"] = f"{learning_rate(config, step):.1e}"
        if bad:
            shown["skipped"] = str(bad)
        if rate:
            shown["clips/s" if len(self.latent_shape) == 4 else "images/s"] = f"{rate * self.samples:.1f}"
        return shown | {"memory": f"{self.memory / 2**30:.1f}GiB"}

    @property
    def memory(self) -> int:
        """Bytes: on a GPU the most that was allocated since training began, elsewhere what this process holds now."""
        on_gpu = self.accelerator.device.type == "cuda"
        return torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss

    @contextmanager
    def _in_words(self, smaller: Callable[[], str]) -> Iterator[None]:
        """What goes wrong outside the run itself, with what to do about it, as RuntimeErrors; `smaller`: for want of memory."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise RuntimeError(f"Out of memory. Next to try: {smaller()}. ({str(error).splitlines()[0]})") from error
        except AssertionError as error:
            if _ONE_PRECISION not in str(error):
                raise
            raise RuntimeError(
                f"FSDP of torch {torch.__version__} takes weights of one precision, and an adapter is in float32 over networks "
                f"in {self.precision}. Take a newer torch, set mixed_precision to no, or launch without FSDP. {self._goes_on}"
            ) from error
        except (CannotWrite, NotFinite) as error:
            raise RuntimeError(f"{error} {self._goes_on}") from error
        except OSError as error:
            if error.errno is None:  # in our own words already
                raise
            raise RuntimeError(f"A file or a connection failed: {error}. {self._goes_on}") from error
        except RuntimeError as error:
            if self.accelerator.num_processes == 1 or not _LOST.search(str(error)):
                raise
            raise RuntimeError(
                "Another process of this run has ended or does not answer, and this one cannot go on alone. Why is in its own "
                f"message; if there is none, the system may have killed it for its memory. {self._goes_on} "
                f"({str(error).splitlines()[0]})"
            ) from error

    @property
    def _goes_on(self) -> str:
        """Where the run does, for messages."""
        latest, begin = self.checkpoints.latest(), "The same command" if self.config.resume == "latest" else "`resume: latest`"
        if latest is None:
            return f"{begin} begins again: there is no checkpoint yet, and checkpoint_every is {self.config.checkpoint_every}."
        return f"{begin} goes on from {latest}."

    def _smaller(self) -> str:
        """What to change next when memory is short."""
        config = self.config
        advice = [
            ("mixed_precision: bf16", self.precision == "no"),
            ("gradient_checkpointing: true", not config.gradient_checkpointing),
            (self._smaller_encoding(), config.data.streaming and config.data.encode_batch_size > 1),
            (
                f"optimizer.batch_size: {config.optimizer.batch_size // 2} with "
                f"optimizer.gradient_accumulation: {config.optimizer.gradient_accumulation * 2}",
                config.optimizer.batch_size > 1,
            ),
            ("trainable: lora", config.trainable != "lora"),
            ("adversarial.crop: 16", config.adversarial.space == "pixel" and not 0 < config.adversarial.crop <= 16),
            (f"lora.rank: {config.lora.rank // 2}", config.lora.rank > 1),
        ]
        return next((text for text, open_ in advice if open_), "a smaller data.resolution")

    def _smaller_encoding(self) -> str:
        """What to change next when memory is short while pictures are encoded."""
        size = self.config.data.encode_batch_size
        return f"data.encode_batch_size: {size // 2}" if size > 1 else "a smaller data.resolution"

    def validate(self, step: int) -> None:
        """Pictures, the loss of fixed samples and the consistency of few and many steps, into the run's folder."""
        config, main = self.config, self.accelerator.is_main_process
        if not main and self.mesh is None:  # sharded, every process runs every network
            return
        prompts = config.validation.prompts or self.data.captions[:4]
        autocast = self.accelerator.autocast
        stopping = self._stopping if self.mesh else lambda: bool(self._asked)  # the others are at the next step already
        loss = fixed_loss(self.objectives[-1], self.data.fixed, config.optimizer.batch_size, config.validation.seed, autocast)
        with autocast():
            at_once = config.optimizer.batch_size  # which training has room for
            sheet = draw_sheet(
                self.backbone, self.grid, config.validation, prompts, self.latent_shape, self.eta, at_once, stopping
            )
        if not main or sheet is None:
            return
        sheet.save(self.folder / "samples" / f"step-{step:08d}.png")
        figures = {"validation_loss": loss, "consistency": sheet.consistency()}
        self.accelerator.log(figures, step)
        for name, value in figures.items():
            if not math.isfinite(value):
                print(f"after step {step}: {name} is {value}, so the pictures are of no use either", file=sys.stderr)
        table = self._table
        rows = table.read_text(encoding="utf-8").splitlines()[1:] if table.exists() else []
        rows = [row for row in rows if _step_of(row) < step]  # what is drawn again after an interruption has one row
        rows.append(",".join([str(step), *(f"{value:.6g}" for value in figures.values())]))
        write_text(table, "\n".join([",".join(["step", *figures]), *rows]) + "\n")

    @property
    def samples(self) -> int:
        """Of an optimisation step, in all processes."""
        config = self.config.optimizer
        return config.batch_size * config.gradient_accumulation * self.accelerator.num_processes

    @property
    def _table(self) -> Path:
        """Figures of validations."""
        return self.folder / "validation.csv"

    @property
    def eta(self) -> float:
        """How the adapter is sampled."""
        return sampling_eta(self.config.objective)

    def write(self) -> None:
        """The file that people load, and its card in the run's folder."""
        config, backbone, grid = self.config, self.backbone, self.grid
        state = self.student.state()
        if not self.accelerator.is_main_process:
            return
        check_finite({name: tensor.half() for name, tensor in state.items()}, f"{self.output}, in fp16,")
        low, high = config.objective.guidance_range
        settings = AdapterSettings(
            base_model=backbone.family,
            phase_edges=grid.edges,
            num_solver_steps=grid.num_solver_steps,
            num_train_timesteps=grid.num_train_timesteps,
            prediction_type=backbone.prediction_type,
            training_guidance_scale=(low + high) / 2,
            guidance_scale=config.sampling.guidance_scale,
            num_inference_steps=config.sampling.num_inference_steps,
            eta=self.eta,
            **backbone.betas,
        )
        extra = {"pcm_trainer.version": __version__, "pcm_trainer.config": json.dumps(_without_folders(asdict(config)))}
        with writing(self.output):
            written = self.student.write(self.output, state, settings, config.title, extra)
        for path in written:  # of a life of this run that was killed then
            remove_temporary(path.parent, f"{glob.escape(path.name)}.*.tmp")
        sample = f"samples/step-{config.optimizer.steps:08d}.png"
        write_text(self.folder / "README.md", model_card(config, settings, self.data.describe(), self.samples, sample))


def run(config: TrainConfig) -> Path:
    """Train one adapter; returns the file it was written to.

    A run that was interrupted goes on from its last checkpoint and ends with the same weights: the batch and the noise of
    a step are functions of the seed and the step's number.

    Raises:
        Interrupted: the run was asked to stop, and its state is saved.
        RuntimeError: it cannot go on; what to change. The checkpoints are kept.
    """
    return Run(config).train()


@contextmanager
def _stop_requests(asked: list[int]) -> Iterator[None]:
    """Put SIGTERM and the first Ctrl-C into a list; a second Ctrl-C stops at once."""

    def note(number: int, frame: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nstopping when this batch is done ...", file=sys.stderr)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: its owner handles signals
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _launched_precision() -> str:
    """What `accelerate launch` tells every process through its environment."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def _precision_told(config: TrainConfig) -> Precision:
    """By the configuration, else by the launcher.

    Raises:
        ValueError: the launcher's is none that the trainer has, such as fp8.
    """
    told = _launched_precision() if config.mixed_precision == "auto" else config.mixed_precision
    found = next((precision for precision in DTYPES if precision == told), None)
    if found is None:
        raise ValueError(f"accelerate's mixed_precision is {told}; the trainer has {', '.join(DTYPES)}.")
    return found


def _step_of(row: str) -> int:
    """The step of a line of validation.csv; of one that is none, later than all."""
    first = row.split(",")[0]
    return int(first) if first.isdigit() else sys.maxsize


def _without_folders(value: object) -> object:
    """Absolute paths as their last part: a file that is shared says nothing of the machine it was made on."""
    if isinstance(value, dict):
        return {k: _without_folders(v) for k, v in value.items()} | (
            {"output": Path(value["output"]).name} if "output" in value else {}
        )
    if isinstance(value, (list, tuple)):
        return [_without_folders(v) for v in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _plain(value: object) -> object:
    """Tuples as lists: YAML has no other."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value

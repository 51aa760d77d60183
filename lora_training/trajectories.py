"""The teacher's own trajectories from noise to a picture, for jumps that begin where samplers are.

Noised pictures have the right distribution only if the teacher has learned that of the data, and is not guided. A sampler
starts from noise alone and follows the guided model, so what it meets at timestep tau_n is the teacher's x_n, not a picture
with noise. Here the teacher is followed from noise through all points of the solver's grid, for a batch of captions at a
time, and the jumps of many batches begin at points of what is kept of these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from pcm_scheduler.lora_file import write_safetensors

from .backbones import Backbone, Conditioning
from .backbones.conditioning import expanded
from .config import ObjectiveConfig, TrainConfig
from .data.latent_cache import weights_seen
from .files import writing
from .frames import draw_noise
from .randomness import generator_of, sent
from .teacher import SOLVERS, Levels, draw_guidance, followed, guided_prediction

_STREAM = 1  # of random numbers, beside those of training's batches


@dataclass(frozen=True)
class Trajectories:
    """Of a batch, on the CPU, where there is room for them.

    Attributes:
        points: for every sample x_0 to x_N, (N + 1, 4, h, w) float32; of clips (N + 1, 4, F, h, w).
    """

    points: tuple[torch.Tensor, ...]

    def __len__(self) -> int:
        return len(self.points)

    def at(self, n: torch.Tensor) -> torch.Tensor:
        """The points n, (B,), of them: x_n, (B, 4, h, w); on the CPU."""
        return torch.stack([points[k] for points, k in zip(self.points, n.tolist(), strict=True)])


Batch = tuple[torch.Tensor, Conditioning]
"""Trajectories of a batch, (B, N + 1, 4, h, w), and what they were told; on the CPU."""


@dataclass(frozen=True)
class TrajectoryCache:
    """Files of trajectories, for runs of the same teacher: whichever comes first follows it, and the others read.

    Args:
        folder: named after everything that they depend on.
    """

    folder: Path

    @classmethod
    def of(cls, config: TrainConfig, precision: str, data: str) -> TrajectoryCache:
        """Those of a run.

        Args:
            config: of the run, whose `objective.trajectory_cache` is the folder of all of them.
            precision: that the teacher runs in.
            data: the name of its encoded captions and sizes, and so of the model that encoded them.
        """
        objective, model = config.objective, asdict(config.model)
        del model["image_adapter"]  # which the teacher has not
        solved = [objective.solver, objective.num_solver_steps, objective.guidance_range, objective.shared_noise]
        drawn = [config.seed, config.optimizer.batch_size, config.data.caption_dropout]
        parts = ["1", data, model, weights_seen(config.model.motion_adapter), solved, drawn, precision]
        return cls(Path(objective.trajectory_cache) / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16])

    def _path(self, process: int, number: int) -> Path:
        return self.folder / f"trajectories-{process:03d}-{number:06d}.safetensors"

    def read(self, process: int, number: int) -> Batch | None:
        """None if they are not there, or not whole."""
        try:
            tensors = load_file(self._path(process, number))
            return tensors.pop("points"), tensors
        except (OSError, SafetensorError, KeyError):
            return None

    def write(self, process: int, number: int, batch: Batch) -> None:
        """In one move.

        Raises:
            CannotWrite: the disk is full, or the like; no part of the file is left.
        """
        path = self._path(process, number)
        with writing(path):
            write_safetensors({"points": batch[0]} | batch[1], path)


Draw = Callable[[torch.Generator], tuple[torch.Tensor, Conditioning]]
"""A batch of the data, latents (B, 4, h, w) and conditioning, from a generator of the CPU; all on one device."""


class TrajectoryPool:
    """The trajectories that a run's batches begin on: a window that moves along the numbered batches of them.

    Batch number b of jumps begins on trajectories number b // every to b // every + kept - 1. Each is a function of the seed,
    the process and its number, so that a run that goes on has the same ones.

    Args:
        backbone: whose teacher is followed.
        levels: of the solver's grid.
        config: solver, guidance, and how many are kept for how long.
        draw: captions, and the size of their pictures; called once for every number, in order.
        empty: of the unguided half, (1, ...) each.
        autocast: the precision that the teacher is run in.
        seed, process: name the random numbers.
        cache: where trajectories are kept for other runs; None: nowhere, and then nothing is read either.
    """

    def __init__(
        self,
        backbone: Backbone,
        levels: Levels,
        config: ObjectiveConfig,
        draw: Draw,
        empty: Conditioning,
        autocast: Callable[[], AbstractContextManager],
        seed: int,
        process: int = 0,
        cache: TrajectoryCache | None = None,
    ):
        self._backbone, self._levels, self._config, self._draw = backbone, levels, config, draw
        self._empty, self._autocast, self._names, self._cache = empty, autocast, (seed, process), cache
        self._kept: dict[int, Batch] = {}  # by number

    def oldest(self, batch: int) -> int:
        """The lowest number of those that a batch begins on: how many came before it."""
        return batch // self._config.trajectory_every

    @property
    def size(self) -> int:
        """Bytes of the points that are kept."""
        return sum(points.numel() * points.element_size() for points, _ in self._kept.values())

    def refill(self, batch: int, show: bool = False) -> Iterator[None]:
        """Follow the teacher until all are there that a batch begins on; a chance to stop after each.

        Args:
            batch: the number of the batch of jumps, counted from the beginning of the run.
            show: a progress bar, if there are several to be followed.
        """
        first = self.oldest(batch)
        wanted = range(first, first + self._config.trajectories_kept)
        self._kept = {number: kept for number, kept in self._kept.items() if number in wanted}
        missing = [number for number in wanted if number not in self._kept]
        for number in tqdm(missing, "teacher's trajectories", leave=False, disable=not show or len(missing) < 2):
            self._kept[number] = self._numbered(number)
            yield

    def _numbered(self, number: int) -> Batch:
        """From the cache, if there is one; what that lacks is followed and written to it."""
        if self._cache is None:
            return self._follow(number)
        process = self._names[1]
        batch = self._cache.read(process, number)
        if batch is None:
            batch = self._follow(number)
            self._cache.write(process, number, batch)
        return batch

    @torch.no_grad()
    def _follow(self, number: int) -> Batch:
        generator = generator_of(*self._names, number, 0, _STREAM)
        latents, conditioning = self._draw(generator)
        config, count = self._config, len(latents)
        guidance = draw_guidance(config, count, generator)
        noise = sent(draw_noise(latents.shape, config.shared_noise, generator), latents.device)
        teacher = guided_prediction(self._backbone, self._levels, conditioning, expanded(self._empty, count), guidance)
        with self._autocast():
            points = followed(SOLVERS[config.solver], teacher, self._levels, noise)
        told = {name: tensor.cpu() for name, tensor in conditioning.items()}
        return torch.stack([point.cpu() for point in points], 1), told

    def draw(self, count: int, generator: torch.Generator, device: torch.device) -> tuple[Trajectories, Conditioning]:
        """A batch of one size from what is kept, each sample with its own conditioning, (count, ...), on the device.

        Args:
            count: B.
            generator: on the CPU.
            device: where the model is.
        """
        kept = list(self._kept.values())
        shape = kept[int(torch.randint(len(kept), (), generator=generator))][0].shape
        kept = [pair for pair in kept if pair[0].shape == shape]
        which = torch.randint(len(kept), (count,), generator=generator).tolist()
        rows = torch.randint(shape[0], (count,), generator=generator).tolist()
        places = list(zip(which, rows, strict=True))
        points = tuple(kept[batch][0][row] for batch, row in places)
        told = {name: torch.stack([kept[batch][1][name][row] for batch, row in places]) for name in kept[0][1]}
        return Trajectories(points), {name: sent(tensor, device) for name, tensor in told.items()}

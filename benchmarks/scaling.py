"""What a run and a picture cost as phases, steps, resolution, frames, records and processes grow: no more than their work does.

    python benchmarks/scaling.py                                    (measures everything and prints; an hour)
    python benchmarks/scaling.py --write                            (also rewrites the tables in benchmarks/README.md)
    python benchmarks/scaling.py --axis phases --axis steps         (some of them)
    python benchmarks/scaling.py --axis build --records 10000       (fewer records than a million)

Every axis has a table: the size, its seconds, and the cost of a unit of its work, which should not rise; with it the exponent p
of seconds = c work^p, fitted on logarithms: 1 grows as its work does, 0 does not grow, more than 1 outgrows it (said from 1.1
on, above what repetitions differ by). Work is counted, not guessed: the operations of a training step (torch's FLOP counter,
which sees that attention grows faster than the picture), UNet passes of a sampling, records, samples drawn.

Networks are small, so that what is ours is a large part of the time. Records are pictures of 8 x 8 pixels in memory, and their
encoder averages pixels: what is timed is reading, decoding, sharding, opening, drawing and shuffling. Two processes run on two
cores with one thread each, and each has its own batch: the table tells samples a second.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import psutil
import torch
from diffusers import DiffusionPipeline
from measuring import UNMEASURED, Book, Figures, conditions, exponent, in_turns, seconds, table, write_section
from networks import build_pipeline
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from training_step import write_pictures

from lora_training.backbones import FAMILIES, Backbone
from lora_training.config import DataConfig, LoraConfig, ModelConfig, ObjectiveConfig
from lora_training.cpu import keep_freed_memory, use_plain_attention
from lora_training.data.latent_cache import LatentCache, TrainingData
from lora_training.data.sources import Record
from lora_training.data.stream import StreamingData
from lora_training.objectives import ConsistencyObjective, total
from lora_training.students import Adapter
from pcm_scheduler import PCMScheduler
from pcm_scheduler.phases import PhaseGrid

ROOT = Path(__file__).parent.parent
SHAPES = ROOT / "examples" / "shapes" / "model"
OUTGROWS = 1.1
CPU = torch.device("cpu")
BATCH = 16


@dataclass(frozen=True)
class Point:
    """One size of an axis: seconds for so much work."""

    size: int
    seconds: float
    work: float


@dataclass(frozen=True)
class Axis:
    """What grows.

    Attributes:
        size: its name.
        work: what is counted, and the unit that its cost is told in.
        unit: how much work that is.
        measure: from the options, the points.
    """

    size: str
    work: str
    unit: float
    measure: Callable[[argparse.Namespace], list[Point]]


# training


class Training:
    """Steps of the trainer's objective, gradients and optimiser on a small model, without its data.

    Args:
        backbone: gets an adapter.
        phases: M.
    """

    def __init__(self, backbone: Backbone, phases: int = 4):
        self.backbone = backbone
        if backbone.student is None:
            backbone.student = Adapter(backbone, LoraConfig(rank=8), seed=0)
        self.parameters = list(backbone.student.parameters.values())
        self.optimizer = torch.optim.AdamW(self.parameters)
        self.objective = ConsistencyObjective(backbone, PhaseGrid.even(phases), ObjectiveConfig(num_phases=phases))

    def step(self, shape: Sequence[int]) -> None:
        """One, on samples (B, 4, ...)."""
        generator = torch.Generator().manual_seed(0)
        told = {"prompt_embeds": torch.randn(shape[0], 77, self.backbone.unet.config.cross_attention_dim, generator=generator)}
        empty = {name: tensor[:1] for name, tensor in told.items()}
        total(self.objective.losses(torch.randn(*shape, generator=generator), told, empty, generator)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def shapes_backbone() -> Backbone:
    """The shapes model, as a run on a CPU has it."""
    pipe = DiffusionPipeline.from_pretrained(SHAPES, safety_checker=None).to(torch.float32)
    use_plain_attention(pipe.unet)
    return FAMILIES["sd15"](pipe)


def operations(function: Callable[[], object]) -> float:
    """FLOPs."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def of_training(shapes: dict[int, tuple[int, ...]], training: Training, rounds: int) -> list[Point]:
    """A point for every shape of samples."""
    calls = {str(size): lambda shape=shape: training.step(shape) for size, shape in shapes.items()}
    times = in_turns(calls, rounds)
    return [Point(size, times[str(size)], operations(calls[str(size)])) for size in shapes]


def phases(options: argparse.Namespace) -> list[Point]:
    """A training step with ever more phases is the same work."""
    backbone = shapes_backbone()
    runs = {m: Training(backbone, m) for m in (1, 2, 5, 10, 25, 50)}
    times = in_turns({str(m): lambda run=run: run.step((4, 4, 16, 16)) for m, run in runs.items()}, options.rounds)
    work = operations(lambda: runs[1].step((4, 4, 16, 16)))
    return [Point(m, times[str(m)], work) for m in runs]


def resolution(options: argparse.Namespace) -> list[Point]:
    """Sides of pictures, in latents."""
    return of_training({side: (2, 4, side, side) for side in (8, 16, 24, 32, 48)}, Training(shapes_backbone()), options.rounds)


def batch(options: argparse.Namespace) -> list[Point]:
    """Pictures a step."""
    return of_training({b: (b, 4, 16, 16) for b in (1, 2, 4, 8, 16)}, Training(shapes_backbone()), options.rounds)


def frames(options: argparse.Namespace) -> list[Point]:
    """Frames of a clip."""
    backbone = FAMILIES["animatediff"](build_pipeline("animatediff", narrow=True))
    return of_training({f: (1, 4, f, 8, 8) for f in (1, 2, 4, 8, 16)}, Training(backbone), options.rounds)


# sampling


def steps(options: argparse.Namespace) -> list[Point]:
    """Pictures in ever more steps through the stock pipeline."""
    pipe = DiffusionPipeline.from_pretrained(SHAPES, safety_checker=None).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = PCMScheduler.from_config(pipe.scheduler.config)
    told = pipe.encode_prompt(["a red star"], "cpu", 1, False)[0]
    call = {"prompt_embeds": told, "guidance_scale": 1.0, "height": 128, "width": 128, "output_type": "latent"}
    counts = (1, 2, 4, 8, 16, 32)
    times = in_turns({str(k): lambda k=k: pipe(num_inference_steps=k, **call) for k in counts}, options.rounds)
    return [Point(k, times[str(k)], k) for k in counts]


def set_timesteps(options: argparse.Namespace) -> list[Point]:
    """The scheduler's own preparation."""
    scheduler = PCMScheduler(num_phases=50, num_solver_steps=500)
    counts = (1, 4, 16, 64, 256)
    times = in_turns({str(k): lambda k=k: scheduler.set_timesteps(k) for k in counts}, 20 * options.rounds)
    return [Point(k, times[str(k)], k) for k in counts]


# data


class Averages:
    """In place of VAE and text encoders: as many numbers as the smallest model's, made in no time."""

    class unet:  # noqa: N801
        device = CPU

    alone = Lock()

    def encode_images(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = torch.nn.functional.avg_pool2d(images, 8)[:, :1].expand(-1, 4, -1, -1)
        return mean, torch.ones_like(mean)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": torch.tensor([[[float(len(prompt))]] for prompt in prompts])}

    def empty_conditioning(self) -> dict[str, torch.Tensor]:
        return self.encode_prompts([""])

    def frame_conditioning(self, *frame: tuple[int, int]) -> dict[str, torch.Tensor]:
        return {}


@dataclass(frozen=True)
class InMemory:
    """So many records of the same picture, made when they are asked for. Its identity looks at each, as a folder's does."""

    count: int
    content: bytes

    @property
    def identity(self) -> object:
        return [f"record {i}" for i in range(self.count)]

    @property
    def total(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Record]:
        return (Record(f"record {i}", self.content, f"caption {i}") for i in range(self.count))


def source(count: int) -> InMemory:
    """Of 8 x 8 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(file, format="PNG")
    return InMemory(count, file.getvalue())


def counts_up_to(most: int) -> list[int]:
    """Powers of ten below, and the number itself."""
    return [count for count in (1_000, 10_000, 100_000) if count < most] + [most]


def cache_of(count: int, folder: Path) -> LatentCache:
    """Shards of a thousand."""
    backbone: Any = Averages()
    data, model = DataConfig(resolution=8, encode_batch_size=64), ModelConfig(path="averages")
    return LatentCache(source(count), data, backbone, model, folder)


class Caches:
    """Built once for all the axes that need them."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._built: dict[int, float] = {}

    def built(self, count: int) -> float:
        """Seconds that it took to build the cache of so many."""
        if count not in self._built:
            self._built[count] = seconds(cache_of(count, Path(self._folder.name)).encode)
        return self._built[count]

    def opened(self, count: int) -> TrainingData:
        """What a run that finds the cache has to draw from."""
        self.built(count)
        return cache_of(count, Path(self._folder.name)).open()


CACHES = Caches()


def build(options: argparse.Namespace) -> list[Point]:
    """A cache of latents, from pictures to shards."""
    return [Point(count, CACHES.built(count), count) for count in counts_up_to(options.records)]


def reopen(options: argparse.Namespace) -> list[Point]:
    """A cache that is there: its source is looked through, shards are mapped, reports are read."""
    counts = counts_up_to(options.records)
    times = in_turns({str(count): lambda count=count: CACHES.opened(count) for count in counts}, options.rounds)
    return [Point(count, times[str(count)], count) for count in counts]


def draw(options: argparse.Namespace) -> list[Point]:
    """A batch out of a cache: the same work, however large the set."""
    found = {count: CACHES.opened(count) for count in counts_up_to(options.records)}

    def drawn(data: TrainingData) -> None:
        generator = torch.Generator().manual_seed(0)
        for _ in range(50):
            data.draw(BATCH, generator, CPU)

    times = in_turns({str(count): lambda data=data: drawn(data) for count, data in found.items()}, options.rounds)
    return [Point(count, times[str(count)] / 50, BATCH) for count in found]


def shuffle(options: argparse.Namespace) -> list[Point]:
    """Order of a stream, through the shuffle buffer, up to its end: what a run that goes on does without decoding anything."""
    points = []
    for count in counts_up_to(options.records):
        backbone: Any = Averages()
        config = DataConfig(resolution=8, streaming=True, shuffle_buffer=100)  # that the smallest set fills many times
        stream = StreamingData(source(count), config, backbone, seed=0)
        points.append(Point(count, seconds(lambda: stream.skip(count // BATCH, BATCH)), count))  # noqa: B023
    return points


def buffer(options: argparse.Namespace) -> list[Point]:
    """The same stream through ever larger buffers is the same work."""
    points = []
    for size in (10, 100, 1_000, 10_000):
        backbone: Any = Averages()
        config = DataConfig(resolution=8, streaming=True, shuffle_buffer=size)
        stream = StreamingData(source(20_000), config, backbone, seed=0)
        points.append(Point(size, seconds(lambda: stream.skip(20_000 // BATCH, BATCH)), 20_000))  # noqa: B023
    return points


# processes


def processes(options: argparse.Namespace) -> list[Point]:
    """Real runs of the trainer on the shapes model, launched by accelerate; the steps' own time, out of two lengths of run."""
    points = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_pictures(folder / "pictures", 128)
        for count in (1, 2):
            launched(folder, count, 1)  # fills the cache
            short, long = launched(folder, count, 2), launched(folder, count, 2 + options.process_steps)
            points.append(Point(count, (long - short) / options.process_steps, 4 * count))
    return points


def launched(folder: Path, count: int, steps: int) -> float:
    """Seconds of a whole run in so many processes."""
    given = {
        "config": ROOT / "examples/configs/shapes_pcm4.yaml", "model.path": SHAPES, "data.path": folder / "pictures",
        "data.cache": folder / "cache", "output": folder / f"of{count}.safetensors", "optimizer.steps": steps,
        "optimizer.batch_size": 4, "resume": "no", "mixed_precision": "no", "validation.steps": "[1]",
        "validation.guidance_scales": "[1.0]", "objective.starts": "data", "objective.name": "pcm",
    }  # fmt: skip
    launcher = [
        "-m", "accelerate.commands.accelerate_cli", "launch",
        "--config_file", str(ROOT / "examples/accelerate/two_processes_cpu.yaml"), "--num_processes", str(count),
    ]  # fmt: skip
    told = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    command = [sys.executable, *(launcher if count > 1 else []), str(ROOT / "lora_training/train.py"), *told]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

    def run() -> None:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise RuntimeError(f"A run in {count} process(es) failed:\n{done.stderr[-2000:]}")

    return seconds(run)


AXES = {
    "phases": Axis("phases", "TFLOP", 1e12, phases),
    "resolution": Axis("latents a side", "TFLOP", 1e12, resolution),
    "batch": Axis("pictures a step", "TFLOP", 1e12, batch),
    "frames": Axis("frames", "TFLOP", 1e12, frames),
    "steps": Axis("steps", "UNet pass", 1, steps),
    "set_timesteps": Axis("steps", "step", 1, set_timesteps),
    "build": Axis("records", "record", 1, build),
    "reopen": Axis("records", "record", 1, reopen),
    "draw": Axis("records", "sample", 1, draw),
    "shuffle": Axis("records", "record", 1, shuffle),
    "buffer": Axis("records held", "record", 1, buffer),
    "processes": Axis("processes", "sample", 1, processes),
}


def figures_of(points: Sequence[Point]) -> Figures:
    """Points, and the exponent: against work where that grows, else against the size, and then 1 more than work's own 0."""
    constant = len({point.work for point in points}) == 1
    x = [point.size if constant else point.work for point in points]
    p = exponent(x, [point.seconds for point in points]) if len(points) > 1 else None
    return {"points": [[p.size, p.seconds, p.work] for p in points], "constant": constant, "exponent": p}


def verdict(axis: Axis, figures: Figures) -> str:
    """In words."""
    p = figures["exponent"]
    if p is None:
        return "one size tells nothing of growth"
    if figures["constant"]:
        outgrows = p > OUTGROWS - 1
        return f"{axis.size}^{p:.2f} at constant work" + (": outgrows its work" if outgrows else "")
    return f"work^{p:.2f}" + (": outgrows its work" if p > OUTGROWS else "")


def section(book: Book) -> str:
    """All that is known, as README.md has it."""
    text = f"{book.conditions('cpu')}:"
    for name, axis in AXES.items():
        figures = book.get("cpu", name)
        about = (axis.measure.__doc__ or "").strip()
        if figures is None:
            text += f"\n\n{name}: {about} {UNMEASURED}"
            continue
        rows = [[f"{size:,}", f"{s:.3g}", f"{s / work * axis.unit:.3g}"] for size, s, work in figures["points"]]
        text += f"\n\n{name}: {about} {verdict(axis, figures)}\n\n{table(rows, [axis.size, 's', f's a {axis.work}'])}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", action="append", choices=tuple(AXES), help="one alone; may be given several times")
    parser.add_argument("--records", type=int, default=1_000_000, help="the largest set")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns")
    parser.add_argument("--process-steps", type=int, default=40, help="timed steps of the runs in processes")
    parser.add_argument("--figures", type=Path, default=Path("outputs/benchmarks/scaling.json"))
    parser.add_argument("--write", action="store_true", help="then rewrite the tables in README.md from the file of figures")
    parser.add_argument("--render", action="store_true", help="measure nothing, rewrite the tables")
    args = parser.parse_args()
    if args.records < 100:
        parser.error(f"--records must be at least 100; got {args.records}.")

    book = Book(args.figures)
    if args.render:
        return write_section("scaling", section(book))
    print(conditions("cpu"), flush=True)
    keep_freed_memory()
    for name in args.axis or AXES:
        figures = figures_of(AXES[name].measure(args))
        book.keep("cpu", name, figures)
        held = psutil.Process().memory_info().rss / 2**30
        print(f"{name}: {verdict(AXES[name], figures)}; {held:.2f} GiB held", flush=True)
    print(section(book), flush=True)
    return write_section("scaling", section(book)) if args.write else None


if __name__ == "__main__":
    main()

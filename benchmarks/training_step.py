"""One optimisation step of our trainer against the shape of work of others: seconds, memory, and the share of the bare UNet.

    python benchmarks/training_step.py                                       (measures this device's cases and prints)
    python benchmarks/training_step.py --write                               (also rewrites the tables in benchmarks/README.md)
    python benchmarks/training_step.py --only "sd15, batch 1" --rounds 1     (the cases so named)
    python benchmarks/training_step.py --missing --figures OUT/steps.json    (what that file has not yet)

Ours is `lora_training.loop.Run.step`, the trainer itself, on a latent cache. Theirs is `reference_step.ReferenceStep`, written
from reading PCM's trainer and diffusers' LCM example: a second UNet as teacher, its prompt and empty prompt in two passes, VAE
and text encoders in the loop, float32 weights under autocast. Same networks, batch, resolution, rank and precision; blocks of
steps in turn, ours theirs ours theirs; medians. With a critic both alternate, as PCM's does, and a step is the mean of two.

On CUDA the networks are as large as SD1.5's and SDXL's, in bfloat16; on a CPU they are as deep and a fifth as wide, in float32.
Weights are random, which costs the same. Peak memory is torch.cuda.max_memory_allocated, on a CPU the resident memory of a
process that does nothing else, what Python and its libraries take included.

"of UNet" is the step over the bare UNet passes that it needs (those that it was seen to make, forward and backward, each
repeated by itself in the same run): 1.00 is a trainer that costs nothing beside its networks. FLOPs are counted by torch,
without what checkpointing computes again; utilisation is their share of the device's peak.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import resource
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from measuring import (
    UNMEASURED,
    Book,
    Figures,
    alone,
    conditions,
    named_cases,
    peak_operations,
    seconds,
    synchronize,
    table,
    write_section,
)
from networks import build_pipeline, build_unet, latent_side
from peft.tuners.lora import LoraLayer
from PIL import Image
from reference_step import ReferenceStep
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from lora_training.backbones import FAMILIES
from lora_training.config import AdversarialConfig, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from lora_training.loop import Run

PICTURES, SHOWN_OPERATORS = 32, 8
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        family: sd15 or sdxl.
        batch: pictures a step.
        checkpointing: of gradients.
        critic: the adversarial loss, alternating.
        device: cpu, with narrow networks, or cuda.
    """

    family: str
    batch: int
    checkpointing: bool
    critic: bool
    device: str

    @property
    def name(self) -> str:
        extra = (", checkpointing" if self.checkpointing else "") + (", critic" if self.critic else "")
        return f"{self.family}, batch {self.batch}{extra}"

    @property
    def narrow(self) -> bool:
        return self.device == "cpu"

    @property
    def precision(self) -> torch.dtype:
        return torch.float32 if self.narrow else torch.bfloat16

    @property
    def period(self) -> int:
        """Steps after which the work repeats."""
        return 2 if self.critic else 1


def cases(device: str) -> list[Case]:
    """Those of a device."""
    if device == "cuda":
        kinds = itertools.product(("sd15", "sdxl"), (1, 8, 16), (False, True), (False, True))
        return [Case(*kind, device=device) for kind in kinds]
    kinds = [(1, False, False), (8, False, False), (8, True, False), (8, False, True)]
    return [Case(family, *kind, device=device) for family in ("sd15", "sdxl") for kind in kinds]


class Contender(Protocol):
    """One of the trainers, built for a case."""

    @property
    def unets(self) -> tuple[torch.nn.Module, ...]: ...

    def step(self) -> float: ...


class Ours:
    """The trainer, from its configuration, on a cache of latents in `folder`."""

    def __init__(self, case: Case, folder: Path):
        family = FAMILIES[case.family]
        pixels = 8 * latent_side(case.family, case.narrow)
        config = TrainConfig(
            model=ModelConfig(path=f"random-{case.family}", family=case.family),
            data=DataConfig(path=str(folder / "pictures"), resolution=pixels, cache=str(folder / "cache"), encode_batch_size=4),
            adversarial=AdversarialConfig(weight=0.1 if case.critic else 0.0, cadence="alternate"),
            optimizer=OptimizerConfig(batch_size=case.batch, steps=10**6),
            mixed_precision="no" if case.narrow else "bf16",
            gradient_checkpointing=case.checkpointing,
            output=str(folder / "ours.safetensors"),
        )
        backbone = family(build_pipeline(case.family, case.narrow, case.device))
        with mock.patch.object(family, "load", return_value=backbone):  # random weights are in no folder
            self.run = Run(config)
        self.number = 0

    @property
    def unets(self) -> tuple[torch.nn.Module, ...]:
        return self.run.student.unets

    def step(self) -> float:
        self.number += 1
        return self.run.step(self.number - 1)


class Theirs(ReferenceStep):
    """The others' shape of work, on the same pictures."""

    def __init__(self, case: Case, folder: Path):
        pipe = build_pipeline(case.family, case.narrow, case.device)
        with torch.device(case.device):
            teacher = build_unet(case.family, case.narrow).eval()
        teacher.load_state_dict(pipe.unet.state_dict())
        side = 8 * latent_side(case.family, case.narrow)
        pixels = torch.rand(case.batch, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
        captions = [f"picture {i}" for i in range(case.batch)]
        super().__init__(case.family, pipe, teacher, pixels, captions, case.precision, case.checkpointing, case.critic)


CONTENDERS: dict[str, Callable[[Case, Path], Contender]] = {"ours": Ours, "theirs": Theirs}


@dataclass
class Pass:
    """A call of a UNet: with what, and in which state.

    Attributes:
        backward: gradients went back through it.
    """

    unet: torch.nn.Module
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    grad: bool
    adapter: bool
    autocast: torch.dtype | None
    backward: bool = False


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    return {k: _detached(v) for k, v in value.items()} if isinstance(value, dict) else value


def _layers(unet: torch.nn.Module) -> list[LoraLayer]:
    return [module for module in unet.modules() if isinstance(module, LoraLayer)]


@contextmanager
def recorded(contender: Contender, device: str) -> Iterator[list[Pass]]:
    """All passes of the contender's UNets within the block."""
    found: list[Pass] = []
    running: list[Pass] = []

    def begins(unet: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        adapter = any(not layer.disable_adapters for layer in _layers(unet)[:1])
        copies = tuple(map(_detached, arguments)), _detached(named)
        running.append(Pass(unet, *copies, torch.is_grad_enabled(), adapter, autocast))
        found.append(running[-1])
        _watch(arguments[0], running[-1])

    def ends(unet: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: tuple[torch.Tensor]) -> None:
        _watch(output[0], running.pop())

    handles = [unet.register_forward_pre_hook(begins, with_kwargs=True) for unet in contender.unets]
    handles += [unet.register_forward_hook(ends, with_kwargs=True) for unet in contender.unets]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _watch(tensor: torch.Tensor, call: Pass) -> None:
    """Note when a gradient arrives: at the output of a student, or at the input of a critic's teacher."""

    def note(gradient: torch.Tensor) -> None:
        call.backward = True

    if tensor.requires_grad:
        tensor.register_hook(note)


def repeat(call: Pass, device: str) -> None:
    """The pass by itself, and its way back if it had one."""
    layers = _layers(call.unet)
    for layer in layers:
        layer._disable_adapters = not call.adapter
    cast = torch.autocast(device, dtype=call.autocast) if call.autocast else nullcontext()
    with torch.set_grad_enabled(call.grad), cast:
        output = call.unet(*call.arguments, **call.named)[0]
    if call.backward:  # with the adapter as it was: checkpointing runs the pass again
        output.backward(torch.ones_like(output))
        call.unet.zero_grad()
    for layer in layers:
        layer._disable_adapters = False


def free_memory(device: str) -> None:
    """Of what was built before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def block(who: str, case: Case, folder: Path, periods: int) -> Figures:
    """Some steps of one contender, built for them: what a turn measures."""
    free_memory(case.device)
    try:
        return _block(CONTENDERS[who](case, folder), case, periods)
    except torch.OutOfMemoryError:
        return {"problem": OUT_OF_MEMORY}
    finally:
        free_memory(case.device)


def _block(contender: Contender, case: Case, periods: int) -> Figures:
    def period() -> None:
        for _ in range(case.period):
            contender.step()

    period()  # the first is slow
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # what is held stays counted
    times = [seconds(period, case.device) / case.period for _ in range(periods)]
    peak = torch.cuda.max_memory_allocated() if case.device == "cuda" else most_resident()
    waits = count_waits(period) / case.period if case.device == "cuda" else None
    with recorded(contender, case.device) as passes:
        period()
    bare = []
    for _ in range(periods):
        bare.append(sum(seconds(lambda: repeat(call, case.device), case.device) for call in passes) / case.period)  # noqa: B023
    counted = {"forward": len(passes) / case.period, "backward": sum(call.backward for call in passes) / case.period}
    return {"seconds": times, "bare": bare, "peak": peak, "waits": waits, "passes": counted}


def most_resident() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def count_waits(function: Callable[[], object]) -> int:
    """Times that the CPU waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def operations(who: str, case: Case, folder: Path) -> float:
    """FLOPs a picture, counted by torch at batch 1, without checkpointing."""
    single = replace(case, batch=1, checkpointing=False)
    contender = CONTENDERS[who](single, folder)
    with FlopCounterMode(display=False) as counter:
        for _ in range(single.period):
            contender.step()
    return counter.get_total_flops() / single.period


def operators(who: str, case: Case, folder: Path) -> list[tuple[str, float]]:
    """Where the time goes: operators and their share of all operators' own time, largest first."""
    contender = CONTENDERS[who](case, folder)
    contender.step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if case.device == "cuda" else [])
    with profile(activities=activities) as profiler:
        for _ in range(case.period):
            contender.step()
        synchronize(case.device)
    attribute = "self_device_time_total" if case.device == "cuda" else "self_cpu_time_total"
    # of a GPU every kernel has an event of its own too, beside the operator that launched it
    own = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]
    times = {event.key: getattr(event, attribute) for event in own}
    total = sum(times.values())
    return [(name, t / total) for name, t in sorted(times.items(), key=lambda item: -item[1])[:SHOWN_OPERATORS]]


def write_pictures(folder: Path, side: int) -> None:
    """Captioned pictures for our cache."""
    folder.mkdir()
    for i in range(PICTURES):
        Image.new("RGB", (side, side), (8 * i, 128, 255 - 8 * i)).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"picture {i}", encoding="utf-8")


def separated(device: str) -> Callable[..., Any]:
    """On a CPU in a process of its own, whose memory is measured; on a GPU here, which is faster."""
    return alone if device == "cpu" else lambda function, *arguments: function(*arguments)


def _encoded(case: Case, folder: Path) -> None:
    Ours(replace(case, batch=1, checkpointing=False, critic=False), folder)


def measure(case: Case, folder: Path, rounds: int, periods: int, counted: dict[tuple[str, str, bool], float | None]) -> Figures:
    """Both contenders in turns; `counted` remembers FLOPs by contender, family and critic."""
    separately = separated(case.device)
    blocks: dict[str, list[Figures]] = {who: [] for who in CONTENDERS}
    for _ in range(rounds):
        for who, found in blocks.items():
            if not (found and "problem" in found[0]):
                found.append(separately(block, who, case, folder, periods))
    figures: Figures = {}
    for who, found in blocks.items():
        if "problem" in found[0]:
            figures[who] = found[0]
            continue
        key = (who, case.family, case.critic)
        if key not in counted:
            try:
                counted[key] = separately(operations, who, case, folder)
            except torch.OutOfMemoryError:  # without checkpointing there may be no room for what fits with it
                counted[key] = None
            free_memory(case.device)
        figures[who] = {
            "seconds": statistics.median(t for one in found for t in one["seconds"]),
            "bare": statistics.median(t for one in found for t in one["bare"]),
            "peak": max(one["peak"] for one in found),
            "operations": counted[key],
            "waits": found[0]["waits"],
            "passes": found[0]["passes"],
        }
    peak = peak_operations(case.device)
    return figures | ({"device_peak": peak} if peak else {})


def fits(figures: Figures) -> bool:
    """Whether both contenders had room."""
    return not any("problem" in figures[who] for who in CONTENDERS)


HEADERS = (
    "model, batch", "s a step", "images/s", "of UNet", "TFLOP an image", "utilisation", "GiB",
    "theirs: s a step", "of UNet", "TFLOP an image", "GiB", "time: theirs / ours", "memory: theirs / ours",
)  # fmt: skip


def row(case: Case, figures: Figures | None) -> list[str]:
    """Of the table."""
    if figures is None:
        return [case.name, UNMEASURED, *[""] * (len(HEADERS) - 2)]
    ours, theirs = figures["ours"], figures["theirs"]

    def told(of: Figures, text: Callable[[Figures], str], first: bool = False) -> str:
        return text(of) if "problem" not in of else of["problem"] if first else ""

    def operations_told(of: Figures) -> str:
        return "" if of["operations"] is None else f"{of['operations'] / 1e12:.3g}"

    def utilisation(of: Figures) -> str:
        if "device_peak" not in figures or of["operations"] is None:
            return ""
        return f"{case.batch * of['operations'] / of['seconds'] / figures['device_peak']:.0%}"

    both = not any("problem" in of for of in (ours, theirs))
    return [
        case.name,
        told(ours, lambda f: f"{f['seconds']:.3g}", first=True),
        told(ours, lambda f: f"{case.batch / f['seconds']:.3g}"),
        told(ours, lambda f: f"{f['seconds'] / f['bare']:.2f}"),
        told(ours, operations_told),
        told(ours, utilisation),
        told(ours, lambda f: f"{f['peak'] / 2**30:.2f}"),
        told(theirs, lambda f: f"{f['seconds']:.3g}", first=True),
        told(theirs, lambda f: f"{f['seconds'] / f['bare']:.2f}"),
        told(theirs, operations_told),
        told(theirs, lambda f: f"{f['peak'] / 2**30:.2f}"),
        f"{theirs['seconds'] / ours['seconds']:.2f}" if both else "",
        f"{theirs['peak'] / ours['peak']:.2f}" if both else "",
    ]


def section(device: str, book: Book) -> str:
    """All that is known of a device, as README.md has it."""
    text = f"{book.conditions(device)}:\n\n{table([row(c, book.get(device, c.name)) for c in cases(device)], HEADERS)}"
    measured = [figures["ours"] for case in cases(device) if (figures := book.get(device, case.name))]
    waits = [ours["waits"] for ours in measured if ours.get("waits") is not None]
    if waits:
        text += f"\n\nA step of ours waits for the GPU {min(waits):g} to {max(waits):g} times."
    found = book.get(device, "operators")
    if found:
        rows = [[who, ", ".join(f"{name} {share:.0%}" for name, share in found[who])] for who in CONTENDERS]
        text += f"\n\nWhere the time of operators goes ({found['case']}):\n\n{table(rows, ['', 'largest first'])}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", action="append", default=[], help="a case by name; may be given several times")
    parser.add_argument("--missing", action="store_true", help="only what the file of figures has not")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=5, help="timed in a turn")
    parser.add_argument("--figures", type=Path, default=Path("outputs/benchmarks/training_step.json"))
    parser.add_argument("--write", action="store_true", help="then rewrite the tables in README.md from the file of figures")
    parser.add_argument("--render", action="store_true", help="measure nothing, rewrite the tables")
    args = parser.parse_args()

    if args.render:
        return show(Book(args.figures), write=True)
    known = {case.name: case for case in cases(args.device)}
    chosen = named_cases(parser, args.only, known, args.device) or list(known.values())
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    book = Book(args.figures)
    counted: dict[tuple[str, str, bool], float | None] = {}
    print(conditions(args.device), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for family in dict.fromkeys(case.family for case in chosen):
            own = [c for c in chosen if c.family == family and not (args.missing and book.get(args.device, c.name))]
            folder = Path(temporary) / family
            if own:
                folder.mkdir()
                write_pictures(folder / "pictures", 8 * latent_side(family, own[0].narrow))
                separated(args.device)(_encoded, own[0], folder)
            for case in own:
                book.keep(args.device, case.name, measure(case, folder, args.rounds, args.steps, counted))
                print(table([row(case, book.get(args.device, case.name))], HEADERS), flush=True)
                figures = book.get(args.device, case.name)
                for who in CONTENDERS:
                    print(who, figures[who], flush=True)
            profiled = next((c for c in own if not c.critic and fits(book.get(args.device, c.name))), None)
            if profiled and family == "sd15":
                found = {who: separated(args.device)(operators, who, profiled, folder) for who in CONTENDERS}
                book.keep(args.device, "operators", {"case": profiled.name, **found})
    return show(book, args.write)


def show(book: Book, write: bool) -> None:
    """Print what is known of each device, and write it into README.md; what is there of others stays."""
    for device in ("cpu", "cuda"):
        if not book.content.get(device):
            continue
        print(section(device, book), flush=True)
        if write:
            write_section(f"training_step {device}", section(device, book))


if __name__ == "__main__":
    main()

"""Seconds a picture, from prompt to pixels, through the stock pipelines: PCMScheduler beside others, and beside the teacher.

    python benchmarks/sampling.py                                        (measures this device's cases and prints)
    python benchmarks/sampling.py --write                                (also rewrites the tables in benchmarks/README.md)
    python benchmarks/sampling.py --video                                (clips, through AnimateDiff)
    python benchmarks/sampling.py --model shapes --part steps --rounds 1 (one model's, one table's)

On a CPU the model is shapes; on CUDA the networks of SD1.5 and SDXL at 512 and 1024 pixels, in bfloat16, with random weights,
which cost what trained ones do. Three tables: numbers of steps of every scheduler on the same UNet, the teacher with guidance
(two UNet passes a step, as one batch), all others without; batch sizes; the adapter merged, not merged, and with the UNet's
blocks compiled (CUDA). Clips are of 16 frames and have the table of steps alone, as have the networks of SD1.5 on a CPU, in
float32 and by PCMScheduler alone: there a step takes seconds.

"UNet and VAE" is the time within them, taken by a clock around their calls in the same runs, on CUDA by its events; "text" that
of the text encoders; "overhead" all the rest over UNet and VAE: scheduler, guidance, tokenizer, the pipeline itself and the way
to PIL pictures. At most 3 % is aimed at. Medians; contenders take turns, A B C A B C, but for the
adapter's cases: each changes the pipeline, so they follow each other, and differ by whatever else the machine does, too.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, LCMScheduler, TCDScheduler
from measuring import UNMEASURED, Book, Clock, Figures, conditions, seconds, table, write_section
from networks import build_pipeline, latent_side
from peft import LoraConfig as PeftLoraConfig

from lora_training.config import LoraConfig
from lora_training.students import adapted_modules
from pcm_scheduler import PCMScheduler

SHAPES = Path(__file__).parent.parent / "examples" / "shapes" / "model"
GUIDANCE, FRAMES, RANK, BATCH_STEPS = 5.0, 16, 64, 4
STEPS, TEACHER_STEPS, BATCHES = (1, 2, 4, 8), (25, 50), (1, 2, 4, 8, 16, 32, 64)
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "PCMScheduler": lambda config: PCMScheduler.from_config(config),
    "LCMScheduler": lambda config: LCMScheduler.from_config(config),
    "TCDScheduler": lambda config: TCDScheduler.from_config(config),
    "Euler, trailing": lambda config: EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing"),
    "teacher, DDIM": lambda config: DDIMScheduler.from_config(config),
}
PARTS = ("steps", "batches", "adapter")
VIDEO = f"AnimateDiff, {FRAMES} frames"
TABLES = {
    "cpu": {"shapes": PARTS, "sd15": ("steps",), VIDEO: ("steps",)},
    "cuda": {"sd15": PARTS, "sdxl": PARTS, VIDEO: ("steps",)},
}


class Bench:
    """A pipeline, and what it takes to draw with it.

    Args:
        model: of the device's `TABLES`; the networks of clips are narrow on a CPU.
        device: cpu or cuda.
    """

    def __init__(self, model: str, device: str):
        self.device, self.video = device, model == VIDEO
        self.schedulers = ["PCMScheduler"] if model == "sd15" and device == "cpu" else list(SCHEDULERS)
        if model == "shapes":
            self.pipe: Any = DiffusionPipeline.from_pretrained(SHAPES, safety_checker=None).to(torch.float32)
            self.side, modules = 128, [self.pipe.text_encoder]
        else:
            family = "animatediff" if self.video else model
            narrow = self.video and device == "cpu"
            self.pipe = build_pipeline(family, narrow=narrow, device=device)
            self.side = 8 * latent_side(family, narrow=narrow)
            modules = [getattr(self.pipe, name) for name in ("text_encoder", "text_encoder_2") if hasattr(self.pipe, name)]
        if device == "cuda":
            self.pipe.to(torch.bfloat16)
        self.pipe.set_progress_bar_config(disable=True)
        self.schedule = self.pipe.scheduler.config
        methods = {"unet": (self.pipe.unet, "forward"), "vae": (self.pipe.vae, "decode")}
        methods |= {f"text {i}": (module, "forward") for i, module in enumerate(modules)}
        self.clock = Clock(device, methods)

    def draw(self, scheduler: str, steps: int, batch: int = 1) -> None:
        """From prompts to PIL pictures, or frames."""
        self.pipe.scheduler = SCHEDULERS[scheduler](self.schedule)
        call = {"num_frames": FRAMES} if self.video else {}
        self.pipe(
            ["a red star"] * batch, height=self.side, width=self.side, num_inference_steps=steps,
            guidance_scale=GUIDANCE if scheduler.startswith("teacher") else 1.0,
            generator=torch.Generator(self.device).manual_seed(0), **call,
        )  # fmt: skip

    def timed(self, calls: dict[str, Callable[[], None]], rounds: int, pictures: dict[str, int]) -> dict[str, Figures]:
        """Medians of seconds a picture, and how they divide, of each call, in turns; without memory for one: why not."""
        found: dict[str, list[Figures]] = {name: [] for name in calls}
        failed: set[str] = set()
        for number in range(rounds + 1):  # the first warms up
            for name, call in calls.items():
                if name in failed:
                    continue
                try:
                    with self.clock.running():
                        total = seconds(call, self.device)
                except torch.OutOfMemoryError:
                    failed.add(name)
                    torch.cuda.empty_cache()
                    continue
                finally:
                    parts = self.clock.read()
                if number:
                    text = sum(value for part, value in parts.items() if part.startswith("text"))
                    found[name].append({"total": total, "networks": parts["unet"] + parts["vae"], "text": text})
        return {
            name: {"problem": "out of memory"}
            if name in failed
            else {part: statistics.median(one[part] for one in turns) / pictures[name] for part in turns[0]}
            for name, turns in found.items()
        }

    def steps(self, rounds: int) -> dict[str, Figures]:
        """Every scheduler at every number of steps, one picture."""
        kinds = [(s, k) for s in self.schedulers for k in (TEACHER_STEPS if s.startswith("teacher") else STEPS)]
        calls = {f"{s}, {k} step{'s' * (k > 1)}": lambda s=s, k=k: self.draw(s, k) for s, k in kinds}
        return self.timed(calls, rounds, dict.fromkeys(calls, 1))

    def batches(self, rounds: int) -> dict[str, Figures]:
        """PCMScheduler at every batch size."""
        calls = {f"batch {b}": lambda b=b: self.draw("PCMScheduler", BATCH_STEPS, b) for b in BATCHES}
        return self.timed(calls, rounds, {f"batch {b}": b for b in BATCHES})

    def adapter(self, rounds: int) -> dict[str, Figures]:
        """No adapter, one beside the weights, merged into them, and on CUDA compiled. Changes the pipeline: last."""
        found = {}

        def add(name: str) -> None:
            found.update(self.timed({name: lambda: self.draw("PCMScheduler", BATCH_STEPS)}, rounds, {name: 1}))

        add("none")
        unet = self.pipe.unet
        targets = adapted_modules(unet, LoraConfig())
        unet.add_adapter(PeftLoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights=False))
        unet.to(unet.dtype)
        add(f"rank {RANK}, not merged")
        self.pipe.fuse_lora()
        self.pipe.unload_lora_weights()
        add(f"rank {RANK}, merged")
        if self.device == "cuda":
            unet.compile_repeated_blocks()
            add("merged, blocks compiled")
        return found


def section(device: str, book: Book) -> str:
    """All that is known of a device, as README.md has it."""
    text = f"{book.conditions(device)}:"
    for model, part in ((model, part) for model, parts in TABLES[device].items() for part in parts):
        figures = book.get(device, f"{model}, {part}")
        text += f"\n\n{model}, {part}:" + (f" {UNMEASURED}" if figures is None else "")
        if figures is not None:
            headers = ["", f"ms a {'clip' if model == VIDEO else 'picture'}", "UNet and VAE", "text", "overhead"]
            rows = [row(name, f) for name, f in figures.items() if name != "conditions"]
            text += f"\n\n{table(rows, headers)}"
    return text


def row(name: str, figures: Figures) -> list[str]:
    """Of the table."""
    if "problem" in figures:
        return [name, figures["problem"], "", "", ""]
    total, networks, text = (figures[part] for part in ("total", "networks", "text"))
    return [name, *(f"{1000 * s:.4g}" for s in (total, networks, text)), f"{(total - networks - text) / networks:.1%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(TABLES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=("shapes", "sd15", "sdxl"), help="one alone")
    parser.add_argument("--part", choices=PARTS, help="one table alone")
    parser.add_argument("--video", action="store_true", help="clips instead of pictures")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each")
    parser.add_argument("--figures", type=Path, default=Path("outputs/benchmarks/sampling.json"))
    parser.add_argument("--write", action="store_true", help="then rewrite the tables in README.md from the file of figures")
    parser.add_argument("--render", action="store_true", help="measure nothing, rewrite the tables")
    args = parser.parse_args()
    tables = {
        model: [part for part in parts if args.part in (None, part)]
        for model, parts in TABLES[args.device].items()
        if (model == VIDEO) == args.video and args.model in (None, model)
    }
    if not any(tables.values()):
        told = "; ".join(f"{model}: {', '.join(parts)}" for model, parts in TABLES[args.device].items())
        parser.error(f"no such table is made on {args.device}; there are {told}.")

    if args.render:
        return show(Book(args.figures), write=True)
    print(conditions(args.device), flush=True)
    book = Book(args.figures)
    for model, parts in tables.items():
        if not parts:
            continue
        bench = Bench(model, args.device)
        for part in parts:
            book.keep(args.device, f"{model}, {part}", getattr(bench, part)(args.rounds))
        del bench  # its memory, before the next is built
    return show(book, args.write)


def show(book: Book, write: bool) -> None:
    """Print what is known of each device, and write it into README.md; what is there of others stays."""
    for device in TABLES:
        if not book.content.get(device):
            continue
        print(section(device, book), flush=True)
        if write:
            write_section(f"sampling {device}", section(device, book))


if __name__ == "__main__":
    main()

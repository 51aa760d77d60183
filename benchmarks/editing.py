"""Editing measured: is the constraint true in the saved file, is the picture what it was, and what do others make of it.

    python benchmarks/editing.py                 every task, an hour or two on one core; writes docs/editing.md
    python benchmarks/editing.py --task inpaint  one of them, so that cores can share; the page needs them all
    python benchmarks/editing.py --search        what `STRATEGIES` are chosen from, on other scenes; the page says what it found

Of drawn scenes a part is hidden (a disc around the first object), or the colours, or the detail, or noise is
laid over it; every method gets the same measurement, caption and noise.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
from diffusers import AutoPipelineForInpainting
from tabulate import tabulate
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "shapes"))

from evaluate import (
    TEACHER_GUIDANCE,
    TEACHER_STEPS,
    Judge,
    Studio,
    fingerprint,
    held_out_scenes,
    model_fingerprint,
    noise,
    prompts_of,
)

from lora_training.cpu import fast_precision
from lora_training.files import write_text
from pcm_scheduler import PCMScheduler
from pcm_scheduler.edit_tasks import STRATEGIES, Strategy
from pcm_scheduler.editing import measured
from pcm_scheduler.operators import BlockMean, Everything, KeepRegion, Luminance, Operator
from pcm_scheduler.pipelines.pcm_edit import PCMEditPipeline
from pcm_scheduler.sampling import jump

from model import RUNS_DIR
from scenes import COLOURS, IMAGE_SIZE, PLACES, SEARCH_SEED, TEST_SEED, Scene, render

DOCS = Path(__file__).parent.parent / "docs"
SIZE = (IMAGE_SIZE, IMAGE_SIZE)
STEPS, BATCH = (2, 4, 8), 64
SOFTNESS = 0.01  # noise that the soft method assumes in a measurement; best of 0.05, 0.01 and 0.002, or within 0.4 dB of it
FACTOR, NOISE_LEVEL = 8, 40.0  # of enlargement; in grey levels
INVERTED = 64  # scenes, for what costs a hundred forwards a picture
CANDIDATE_STRENGTHS = (0.4, 0.6, 0.8, 1.0)
SEARCH_SCENES, SEARCH_STEPS = 128, 4
HIDDEN = 36  # radius of the hidden disc, in pixels
SCRATCHES, SCRATCH_WIDTH = 8, 3.0  # a picture; pixels


EXACT_TASKS = ("inpaint", "colorize", "super_resolve")
TASKS = ("inpaint", "scratches", *EXACT_TASKS[1:], "denoise")


@dataclass(frozen=True)
class Case:
    """A task on N scenes.

    Attributes:
        truth: (N, 3, H, W) in [-1, 1].
        naive: what someone without a model would do, and its name.
        noise: standard deviation of the measurement's noise, in units of [-1, 1].
    """

    task: str
    truth: torch.Tensor
    operator: Operator
    measurement: torch.Tensor
    start: torch.Tensor
    naive: torch.Tensor
    naive_name: str
    noise: float = 0.0

    @property
    def strategy(self) -> Strategy:
        """The pipeline's own."""
        return STRATEGIES["inpaint" if self.task == "scratches" else self.task]


def hidden_regions(scenes: list[Scene]) -> torch.Tensor:
    """Kept pixels (N, 1, H, W): all but a disc around the first object, whose rim cuts through latents as people's masks do."""
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in SIZE), indexing="ij")
    centres = torch.tensor([PLACES[scene.objects[0].place] for scene in scenes])
    away = (columns - centres[:, 0, None, None]) ** 2 + (rows - centres[:, 1, None, None]) ** 2
    return (away > HIDDEN**2).unsqueeze(1)


def scratched(count: int) -> torch.Tensor:
    """Kept pixels (N, 1, H, W): all but straight scratches between random points, among which most latents have kept pixels."""
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in SIZE), indexing="ij")
    pixels = torch.stack([columns, rows], dim=-1).float()
    ends = IMAGE_SIZE * torch.rand(count, SCRATCHES, 2, 1, 1, 2, generator=torch.Generator().manual_seed(7))
    first, along = ends[:, :, 0], ends[:, :, 1] - ends[:, :, 0]
    share = ((pixels - first) * along).sum(-1, keepdim=True) / along.square().sum(-1, keepdim=True)
    away = (pixels - first - share.clamp(0, 1) * along).norm(dim=-1)
    return (away > SCRATCH_WIDTH / 2).all(dim=1).unsqueeze(1)


def in_eight_bits(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1] as a file holds them."""
    return (((pictures + 1) * 127.5).round() / 127.5 - 1).clamp(-1, 1)


def cases(scenes: list[Scene]) -> Iterator[Case]:
    """Every task, one after the other."""
    truth = in_eight_bits(render(scenes))
    for task, kept in (("inpaint", hidden_regions(scenes)), ("scratches", scratched(len(scenes)))):
        region = KeepRegion(kept)
        y = region.measure(truth)
        share = region.mask.float().mean(dim=(2, 3), keepdim=True)
        mean = (y.mean(dim=(2, 3), keepdim=True) / share).expand_as(truth)
        filled = torch.where(region.mask, truth, mean)
        yield Case(task, truth, region, y, filled, filled, "mean fill")
    luminance = Luminance()
    y = in_eight_bits(luminance.measure(truth))
    grey = y.expand(-1, 3, -1, -1)
    yield Case("colorize", truth, luminance, y, grey, grey, "grey")
    blocks = BlockMean(FACTOR)
    y = in_eight_bits(blocks.measure(truth))
    bicubic = F.interpolate(y, SIZE, mode="bicubic").clamp(-1, 1)
    yield Case("super_resolve", truth, blocks, y, blocks.project(bicubic, y), bicubic, "bicubic")
    level = NOISE_LEVEL / 127.5
    y = in_eight_bits(truth + level * torch.randn(truth.shape, generator=torch.Generator().manual_seed(6)))
    blurred = gaussian_blur(y, [7, 7], [1.5, 1.5])
    yield Case("denoise", truth, Everything(), y, y, blurred, "Gaussian blur", level)


@dataclass(frozen=True)
class Method:
    """Something that fills in what was not measured."""

    name: str
    draw: Callable[[Case, list[str], torch.Tensor, int], torch.Tensor]
    steps: tuple[int, ...] = STEPS
    tasks: tuple[str, ...] = EXACT_TASKS


class Bench:
    """The shapes pipeline with both adapters, and the methods on it."""

    def __init__(self):
        self.studio, self.jury = Studio(fast=True), Judge()
        self.pipe = self.studio.pipe

    def using(self, adapter: str | None) -> tuple[PCMEditPipeline, float, float]:
        """The edit pipeline with an adapter or the bare teacher, with guidance and eta."""
        name = "teacher" if adapter is None else adapter
        self.studio.select(name)
        if adapter is None:
            self.pipe.scheduler = PCMScheduler.from_config(self.pipe.scheduler.config, num_phases=TEACHER_STEPS)
        method = self.studio.methods[name]
        return PCMEditPipeline.from_pipe(self.pipe), method.guidance_scale, method.eta

    def edits(self, adapter: str | None, strategy: Strategy | None = None):
        """`PCMEditPipeline` with a strategy; None: its own for the task."""

        def draw(case: Case, prompts: list[str], latents: torch.Tensor, steps: int) -> torch.Tensor:
            edit, guidance, own_eta = self.using(adapter)
            chosen = case.strategy if strategy is None else strategy
            return edit(
                case.operator, case.measurement, SIZE, start=case.start, strategy=chosen, prompt=prompts, noise=latents,
                measurement_noise=case.noise, num_inference_steps=steps, guidance_scale=guidance,
                eta=own_eta if chosen.eta is None else chosen.eta, output_type="pt",
                generator=torch.Generator().manual_seed(0),
            ).images  # fmt: skip

        return draw

    def soft(self, adapter: str):
        """In the manner of LATINO (arXiv 2503.12615): a proximal step in pixels at every stop, and a bare decode at the end."""

        def draw(case: Case, prompts: list[str], latents: torch.Tensor, steps: int) -> torch.Tensor:
            edit, guidance, _ = self.using(adapter)
            model = edit.model
            levels, codec = model.levels(model.grid.stops(steps)), model.codec(SIZE)
            denoise = model.denoiser(levels, model.prompts(prompts, [""] * len(prompts), guidance, SIZE))
            x, generator = latents, torch.Generator().manual_seed(0)
            for i in range(steps):
                weight = (0.3 * levels.sigmas[i] / SOFTNESS) ** 2
                x0 = codec.encode(measured(codec.decode(denoise(x, i)), case.operator, case.measurement, weight))
                fresh = torch.randn(x.shape, generator=generator)
                x = jump(x, x0, levels.alphas[i], levels.sigmas[i], levels.alphas[i + 1], levels.sigmas[i + 1], 1.0, fresh)
            return (codec.decode(x) / 2 + 0.5).clamp(0, 1)

        return draw

    def stock_inpaint(self, adapter: str):
        """diffusers' inpainting pipeline with the same adapter and scheduler, and its own pasting in pixels."""

        def draw(case: Case, prompts: list[str], latents: torch.Tensor, steps: int) -> torch.Tensor:
            _, guidance, eta = self.using(adapter)
            pipe = AutoPipelineForInpainting.from_pipe(self.pipe)
            pipe.set_progress_bar_config(disable=True)
            assert isinstance(case.operator, KeepRegion)
            pictures = pipe(
                prompts, image=case.start / 2 + 0.5, mask_image=(~case.operator.mask).float(), height=SIZE[0],
                width=SIZE[1], latents=latents, strength=1.0, num_inference_steps=steps, guidance_scale=guidance,
                eta=eta, output_type="pt", generator=torch.Generator().manual_seed(0),
            ).images  # fmt: skip
            return torch.where(case.operator.mask, case.measurement / 2 + 0.5, pictures)

        return draw

    def naive(self, case: Case, prompts: list[str], latents: torch.Tensor, steps: int) -> torch.Tensor:
        return case.naive / 2 + 0.5

    def denoise(self, case: Case, prompts: list[str], latents: torch.Tensor, steps: int) -> torch.Tensor:
        """`PCMEditPipeline.denoise`, told the level."""
        edit, guidance, _ = self.using("PCM")
        return edit.denoise(
            case.measurement / 2 + 0.5, NOISE_LEVEL, prompt=prompts, noise=latents, num_inference_steps=steps,
            guidance_scale=guidance, output_type="pt",
        ).images  # fmt: skip

    def denoisers(self) -> Iterator[Method]:
        """Where to start, and whether the proximal step acts at every step or at the end."""
        for strength in (0.2, 0.4):
            for name, projected, eta in (
                ("every step", "all", 0.0),
                ("every step, new noise", "all", 1.0),
                ("end", "end", 0.0),
            ):
                draw = self.edits("PCM", Strategy(projected, strength=strength, eta=eta))
                yield Method(f"PCM, {name}, from {strength}", draw, tasks=("denoise",))

    def candidates(self) -> Iterator[Method]:
        """What `STRATEGIES` are chosen from."""
        for projected, known, strength, eta in product(("all", "end"), (False, True), CANDIDATE_STRENGTHS, (0.0, 1.0)):
            strategy = Strategy(projected, known, strength, eta)
            yield Method(str(strategy), self.edits("PCM", strategy), (SEARCH_STEPS,), ("inpaint",) if known else EXACT_TASKS)

    def methods(self) -> list[Method]:
        everywhere, anew = Strategy("all", eta=0.0), Strategy("all", eta=1.0)
        last, end = Strategy("last phase", eta=0.0), Strategy("end", eta=0.0)
        anew_end = Strategy("end", strength=STRATEGIES["inpaint"].strength, eta=1.0)
        inpaint, both = ("inpaint",), ("inpaint", "scratches")
        return [
            Method("PCMEditPipeline", self.edits("PCM"), tasks=(*EXACT_TASKS, "scratches")),
            Method("PCMEditPipeline", self.denoise, tasks=("denoise",)),
            *self.denoisers(),
            Method("PCM, every step", self.edits("PCM", everywhere)),
            Method("PCM, every step, new noise", self.edits("PCM", anew)),
            Method("PCM, last phase", self.edits("PCM", last)),
            Method("PCM, end", self.edits("PCM", end)),
            Method("PCM, known latents, end", self.edits("PCM", replace(end, known=True)), tasks=both),
            Method("PCM, known latents, end, new noise", self.edits("PCM", replace(anew_end, known=True)), tasks=both),
            Method("PCM, known latents, last phase", self.edits("PCM", replace(last, known=True)), tasks=inpaint),
            Method("LCM, every step, new noise", self.edits("LCM", anew)),
            Method("LCM, known latents, end", self.edits("LCM", replace(end, known=True)), tasks=inpaint),
            Method("soft proximal, PCM", self.soft("PCM")),
            Method("soft proximal, LCM", self.soft("LCM")),
            Method("diffusers' inpaint pipeline, PCM", self.stock_inpaint("PCM"), tasks=both),
            Method("diffusers' inpaint pipeline, LCM", self.stock_inpaint("LCM"), tasks=both),
            Method("teacher, every step", self.edits(None, everywhere), steps=(TEACHER_STEPS,)),
            Method("naive", self.naive, steps=(0,), tasks=TASKS),
        ]


@dataclass(frozen=True)
class Figures:
    """Of one method at one number of steps.

    Attributes:
        error: of the measurement in the saved file, the worst pixel or block of all pictures, in grey levels.
        psnr: to the original, dB, the mean over pictures.
        right: share of pictures whose every shape and colour is right.
        likeness: cosine between the classifier's embeddings of result and original, the mean.
        seconds: per picture.
    """

    method: str
    steps: int
    error: float
    psnr: float
    right: float
    likeness: float
    seconds: float

    def row(self) -> list[str]:
        error = "" if math.isnan(self.error) else f"{self.error:.2f}"
        shown = [f"{self.psnr:.2f}", f"{100 * self.right:.1f}%", f"{self.likeness:.3f}", f"{self.seconds:.3f}"]
        return [self.method, str(self.steps or ""), error, *shown]


HEADERS = ["method", "steps", "error", "PSNR", "right", "likeness", "seconds"]


def figures(
    name: str, steps: int, pictures: torch.Tensor, case: Case, scenes: list[Scene], jury: Judge, seconds: float
) -> Figures:
    """Of pictures (N, 3, H, W) in [0, 1], as they are once saved in 8 bits."""
    saved = (pictures.clamp(0, 1) * 255).round().byte()
    given = saved.float() / 127.5 - 1
    squared = ((given - case.truth) / 2).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
    return Figures(
        name,
        steps,
        error=float("nan") if case.noise else case.operator.residual(given, case.measurement).max().item() * 127.5,
        psnr=(-10 * squared.log10()).mean().item(),
        right=jury.alignment(saved, scenes)["shape_and_colour"],
        likeness=jury.consistency(saved, ((case.truth + 1) * 127.5).round().byte()),
        seconds=seconds,
    )


def part(case: Case, rows: slice) -> Case:
    """The case of some of its scenes."""
    operator = KeepRegion(case.operator.mask[rows]) if isinstance(case.operator, KeepRegion) else case.operator
    cut = {name: getattr(case, name)[rows] for name in ("truth", "measurement", "start", "naive")}
    return replace(case, operator=operator, **cut)


def measure(
    bench: Bench, methods: Iterable[Method], case: Case, scenes: list[Scene], seed: int, wanted: str
) -> Iterator[Figures]:
    """Of these methods every one whose name the expression finds, at each of its numbers of steps."""
    prompts, latents = prompts_of(scenes), noise(len(scenes), seed)
    for method in methods:
        if case.task not in method.tasks or not re.search(wanted, method.name):
            continue
        for steps in method.steps:
            begun, drawn = time.perf_counter(), []
            for first in range(0, len(scenes), BATCH):
                rows = slice(first, first + BATCH)
                drawn.append(method.draw(part(case, rows), prompts[rows], latents[rows], steps))
            seconds = (time.perf_counter() - begun) / len(scenes)
            name = case.naive_name if method.name == "naive" else method.name
            found = figures(name, steps, torch.cat(drawn), case, scenes, bench.jury, seconds)
            print(case.task, *found.row(), sep="  ", flush=True)
            yield found


@torch.no_grad()
def inversion(bench: Bench, scenes: list[Scene]) -> list[list[str]]:
    """Pictures to their noise and back, PSNR; and with another colour of the first object, from that noise or another."""
    truth, prompts = in_eight_bits(render(scenes)), prompts_of(scenes)

    def psnr(pictures: torch.Tensor) -> str:
        return f"{(-10 * ((pictures - truth) / 2).square().mean(dim=(1, 2, 3)).log10()).mean().item():.2f}"

    def judged(pictures: torch.Tensor, wanted: list[Scene]) -> list[str]:
        rates = bench.jury.alignment((pictures.clamp(0, 1) * 255).round().byte(), wanted)
        return [f"{100 * rates[name]:.1f}%" for name in ("shape_and_colour", "place", "background", "texture")]

    edit, _, _ = bench.using(None)
    codec = edit.model.codec(SIZE)
    rows = [["VAE alone", "", psnr(codec.decode(codec.encode(truth)))]]
    noises = edit.invert(truth / 2 + 0.5, prompts)
    back = edit.sample(noises, SIZE, prompt=prompts, num_inference_steps=50, guidance_scale=1.0, output_type="pt").images
    rows.append(["up and down the unguided teacher's grid", "50", psnr(back * 2 - 1)])
    others = [replace(s, objects=(replace(s.objects[0], colour=other(s.objects[0].colour)), *s.objects[1:])) for s in scenes]
    told = prompts_of(others)
    edit, guidance, _ = bench.using("PCM")
    for steps in (4, 8, 16):
        options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
        again = edit.sample(noises, SIZE, prompt=prompts, **options).images
        rows.append(["up with the teacher, down with PCM", str(steps), psnr(again * 2 - 1)])
        for name, start in (("its own noise", noises), ("fresh noise", noise(len(scenes), seed=5))):
            redrawn = edit.sample(start, SIZE, prompt=told, **options).images
            rows.append([f"another colour, from {name}", str(steps), psnr(redrawn * 2 - 1), *judged(redrawn, others)])
    return rows


def other(colour: str) -> str:
    """The next colour."""
    names = list(COLOURS)
    return names[(names.index(colour) + 1) % len(names)]


TITLES = {
    "inpaint": f"Inpainting: a disc of radius {HIDDEN} pixels around the first object is hidden",
    "scratches": f"Inpainting: {SCRATCHES} scratches, {SCRATCH_WIDTH:g} pixels wide",
    "colorize": "Colouring: the luminance is given",
    "super_resolve": f"Enlarging {FACTOR} times: the means of blocks of {FACTOR} x {FACTOR} pixels are given",
    "denoise": f"Taking out noise of {NOISE_LEVEL:g} grey levels",
}


def read_figures(path: Path) -> list[Figures]:
    """What was measured so far; nothing where nothing was."""
    return [Figures(**row) for row in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []


def in_words(task: str, rows: list[Figures]) -> str:
    """What the pipeline does by default, and what of all came nearest to the original in the search."""

    def said(row: Figures) -> str:
        return f"{row.psnr:.2f} dB, {100 * row.right:.1f} % right"

    (own,) = (row for row in rows if row.method == str(STRATEGIES[task]))
    nearest = max(rows, key=lambda row: row.psnr)
    words = f"- `{task}`: {own.method}: {said(own)}"
    return words + ("" if nearest == own else f"; nearest to the original is {nearest.method}: {said(nearest)}")


def report(found: dict[str, list[Figures]], searched: dict[str, list[Figures]], inverted: list[list[str]], images: int) -> str:
    """docs/editing.md."""
    headers = ["", "steps", "PSNR", "shapes and colours asked for", "place", "background", "texture"]
    noise_table = tabulate(inverted, headers=headers, tablefmt="github", disable_numparse=True)
    tables = "\n\n".join(
        f"## {TITLES[task]}\n\n"
        + tabulate([row.row() for row in found[task]], headers=HEADERS, tablefmt="github", disable_numparse=True)
        for task in TASKS
    )
    chosen = "\n".join(in_words(task, searched[task]) for task in EXACT_TASKS)
    best = {
        task: max((row for row in found[task] if row.steps and row.steps <= max(STEPS)), key=lambda row: row.psnr)
        for task in TASKS
    }
    leaders = "\n".join(f"- {task}: {row.method} at {row.steps} steps, {row.psnr:.2f} dB" for task, row in best.items())
    return f"""# Editing, measured on the shapes model

Written by `benchmarks/editing.py`; no figure is typed by hand. They are of a small model on drawn scenes and say nothing about
Stable Diffusion. {images} held-out scenes a row, the same measurement, caption and noise for every method; UNet in
{fast_precision()}, one thread, on a machine that did other work, so seconds are rough.

- error: of the measurement in the 8-bit file, the worst pixel or block of all pictures, in grey levels. Below half a level is
  rounding.
- PSNR: to the original, dB. right: every shape and colour as in the original. likeness: cosine of the classifier's embeddings
  of result and original.
- "every step": x_0 goes through pixels and the projection at each step; "last phase": only there, where x_0 is the ODE's end;
  "end": only the result does. "new noise": eta 1, all noise is drawn anew between steps. "known latents": those of the kept
  region are put back between steps. "soft proximal": in the manner of LATINO (arXiv 2503.12615), nothing exact. "teacher": no
  adapter, {TEACHER_STEPS} steps, guidance {TEACHER_GUIDANCE:g}.

Nearest to the original of all methods of at most {max(STEPS)} steps:

{leaders}

What `PCMEditPipeline` does by default, in {SEARCH_STEPS} steps on {SEARCH_SCENES} other scenes (`--search`); strengths are
from a search with an earlier adapter:

{chosen}

An x_0 of an early phase is not the ODE's end, so one might expect projections there to harm. Measured, they help most, and most
with new noise: the projected x_0 is nearer to the truth than the network's, and new noise lets the next step believe it, while
eps = (x - alpha x_0) / sigma of a changed x_0 carries the change into the noise. Where a region is hidden, known latents do as
well and cost no passes through the VAE on the way; but they know nothing of kept pixels that share a latent with hidden ones,
as many do around scratches.

{tables}

## Through the noise: `invert`, `rewrite`

{INVERTED} scenes. PSNR to the original of what comes back from its noise; then the same with the first object in another
colour, from its own noise and from fresh noise: how much of what was asked for is there, and of what was to stay.

{noise_table}

![a picture each: what is measured, and 2, 4 and 8 steps](editing.png)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--task", choices=[*TASKS, "inversion"], help="this one only")
    parser.add_argument("--search", action="store_true", help="strategies on other scenes, to choose from")
    parser.add_argument("--methods", default="", help="those whose name this expression finds; others keep their rows")
    args = parser.parse_args()

    bench = Bench()
    bench.pipe.set_progress_bar_config(disable=True)
    kept = RUNS_DIR / "editing" / f"{model_fingerprint()}-{fingerprint(list(bench.studio.adapters.values()))}"
    if args.search:
        count, seed, suffix = SEARCH_SCENES, 4, "search"
        scenes, methods = held_out_scenes(count, SEARCH_SEED), list(bench.candidates())
    else:
        count, seed, suffix = args.images, 5, str(args.images)
        scenes, methods = held_out_scenes(count, TEST_SEED), bench.methods()
    for case in cases(scenes):
        if args.task not in (None, case.task) or not any(case.task in method.tasks for method in methods):
            continue
        path = kept / f"{case.task}-{suffix}.json"
        rows = {(row.method, row.steps): row for row in read_figures(path)}
        rows |= {(row.method, row.steps): row for row in measure(bench, methods, case, scenes, seed, args.methods)}
        write_text(path, json.dumps([asdict(row) for row in rows.values()]))
    if args.task in (None, "inversion") and not args.search:
        write_text(kept / "inversion.json", json.dumps(inversion(bench, scenes[:INVERTED])))
    found = {task: read_figures(kept / f"{task}-{args.images}.json") for task in TASKS}
    searched = {task: read_figures(kept / f"{task}-search.json") for task in EXACT_TASKS}
    inverted = kept / "inversion.json"
    if all([*found.values(), *searched.values(), inverted.is_file()]):
        page = report(found, searched, json.loads(inverted.read_text(encoding="utf-8")), args.images)
        write_text(DOCS / "editing.md", page)


if __name__ == "__main__":
    main()

"""Every editing task on one sheet: the picture, what was measured of it, the result at 2, 4 and 8 steps. A minute on two cores.

make demo-edit        (or: python examples/shapes/demo_edit.py --out outputs/demo)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from evaluate import ADAPTERS, held_out_scenes, prompts_of
from pictures import contact_sheet, save
from PIL import Image, ImageDraw
from tqdm import tqdm

from pcm_scheduler import PCMEditPipeline, load_pcm_lora
from pcm_scheduler.pipelines.pictures import to_pictures

from model import load_pipeline
from scenes import BACKGROUNDS, COLOURS, render


@dataclass(frozen=True)
class Row:
    """A task on one picture.

    Attributes:
        shown: the picture, and what was measured of it; (3, H, W) in [0, 1].
        draw: the result in so many steps.
    """

    task: str
    shown: tuple[torch.Tensor, torch.Tensor]
    draw: Callable[[int], torch.Tensor]


def tasks(edit: PCMEditPipeline) -> Iterator[Row]:
    """Each on its own scene."""
    scenes = held_out_scenes(8)
    prompts = prompts_of(scenes)
    pictures = (render(scenes) + 1) / 2
    grey_box = torch.full((3, 128, 128), 0.5)

    def options(i: int, steps: int) -> dict[str, object]:
        generator = torch.Generator().manual_seed(i)
        return {"prompt": prompts[i], "num_inference_steps": steps, "generator": generator, "output_type": "pt"}

    mask = torch.zeros(1, 128, 128)
    mask[:, 16:112, 16:80] = 1
    hidden = torch.where(mask > 0, grey_box, pictures[0])
    yield Row("inpaint", (pictures[0], hidden), lambda k: edit.inpaint(pictures[0], mask, **options(0, k)).images[0])

    part = pictures[1][:, :, 32:]
    framed = torch.cat([grey_box[:, :, :32], part], dim=2)
    yield Row("outpaint", (part, framed), lambda k: edit.outpaint(part, left=32, **options(1, k)).images[0])

    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    grey = (pictures[2] * weights).sum(0, keepdim=True)
    yield Row("colorize", (pictures[2], grey.expand(3, -1, -1)), lambda k: edit.colorize(grey, **options(2, k)).images[0])

    small = torch.nn.functional.avg_pool2d(pictures[3][None], 8)[0]
    blocks = small.repeat_interleave(8, 1).repeat_interleave(8, 2)
    yield Row("super_resolve x 8", (pictures[3], blocks), lambda k: edit.super_resolve(small, 8, **options(3, k)).images[0])

    sketch = Image.new("RGB", (128, 128), BACKGROUNDS["sky"])
    ImageDraw.Draw(sketch).line([(40, 84), (64, 40), (88, 84), (40, 84)], fill=COLOURS["red"], width=14)
    strokes = to_pictures(sketch)[0] / 2 + 0.5
    wanted = {"prompt": "a large red triangle in the center on a plain sky background"}
    yield Row("stroke", (strokes, strokes), lambda k: edit.stroke(sketch, **options(4, k) | wanted).images[0])

    noise = 40 / 255 * torch.randn(3, 128, 128, generator=torch.Generator().manual_seed(0))
    noisy = (pictures[5] + noise).clamp(0, 1)
    yield Row("denoise", (pictures[5], noisy), lambda k: edit.denoise(noisy, **options(5, k)).images[0])

    yield Row("vary", (pictures[6], pictures[6]), lambda k: edit.vary(pictures[6], 0.25, 1, **options(6, k)).images[0])

    halfway = {"prompt": prompts[7]}
    yield Row(
        "interpolate",
        (pictures[6], pictures[7]),
        lambda k: edit.interpolate(pictures[6], pictures[7], 3, **options(7, k) | halfway).images[1],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 8], help="a column for each")
    args = parser.parse_args()
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    edit = PCMEditPipeline.from_pipe(pipe, load_pcm_lora(pipe, ADAPTERS["PCM"]))
    sheet = {}
    for row in tqdm(list(tasks(edit)), desc="tasks"):
        pictures = [*row.shown, *(row.draw(steps) for steps in args.steps)]
        sheet[row.task] = [(picture.clamp(0, 1) * 255).round().byte() for picture in pictures]
    path = args.out / "editing.png"
    save(contact_sheet(sheet), path)
    print(f"{path}: columns are the picture, what was measured, and {', '.join(map(str, args.steps))} steps")


if __name__ == "__main__":
    main()

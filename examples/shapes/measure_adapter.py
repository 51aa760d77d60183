"""Measure adapters of the shapes model that you trained, as docs/results.md measures the shipped ones. A minute or two each.

python examples/shapes/measure_adapter.py outputs/my_pcm.safetensors --steps 2 4 8
python examples/shapes/measure_adapter.py outputs/my_xl_pcm.safetensors --model shapes-xl

The distance is to the same model's teacher, so figures of one model say nothing beside the other's. The first measurement
after the shapes-xl model has changed draws its teacher's pictures, half an hour on one core.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

from evaluate import (
    TEACHER_GUIDANCE,
    TEACHER_STATISTICS,
    TEACHER_STEPS,
    XL_TEACHER_STATISTICS,
    Judge,
    Studio,
    add_reference,
    held_out_scenes,
    model_fingerprint,
    noise,
    prompts_of,
    teacher_pictures,
    teacher_state,
)
from safetensors import safe_open
from tabulate import tabulate

from lora_training.cpu import fast_precision
from pcm_scheduler.lora_file import write_safetensors

from model import MODEL_DIR, XL_MODEL_DIR

MODELS = {"shapes": (MODEL_DIR, TEACHER_STATISTICS), "shapes-xl": (XL_MODEL_DIR, XL_TEACHER_STATISTICS)}
REFERENCE_NOISE, NOISE = 1, 2


def keep_statistics(statistics: Path, studio: Studio, jury: Judge, prompts: list[str]) -> None:
    """The teacher's statistics for these prompts, unless the file has this very model's."""
    fingerprint = model_fingerprint(studio.model)
    if statistics.is_file():
        with safe_open(statistics, framework="pt") as file:
            if file.metadata()["model"] == fingerprint:
                return
    metric = jury.frechet()
    add_reference(metric, teacher_pictures(studio, prompts, REFERENCE_NOISE, TEACHER_STEPS))
    write_safetensors(teacher_state(metric), statistics, {"images": str(len(prompts)), "model": fingerprint})


def report(model: str, images: int, table: str) -> str:
    """The table with what it needs to be read alone."""
    return f"""# Adapters of {model}, measured

Written by `examples/shapes/measure_adapter.py`. {images} pictures a row of held-out prompts, UNet in
{fast_precision()}; Frechet distance to the pictures of {model}'s own teacher of the same prompts from other noise
({TEACHER_STEPS} DDIM steps, guidance {TEACHER_GUIDANCE:g}), so tables of different models are not to be compared.

{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--model", choices=list(MODELS), default="shapes", help="what they adapt")
    parser.add_argument("--steps", type=int, nargs="+", default=[4], help="one row for each")
    parser.add_argument("--images", type=int, default=2048, help="fewer are no measure of distance: it grows as they get fewer")
    parser.add_argument("--out", type=Path, help="write the table into this file, too, in Markdown")
    args = parser.parse_args()

    model, statistics = MODELS[args.model]
    missing = [str(path) for path in args.files if not path.is_file()]
    if missing:
        parser.error(f"there is no file {', '.join(missing)}")
    studio, jury = Studio({str(path): path for path in args.files}, model, fast=True), Judge()
    scenes, latents = held_out_scenes(args.images), noise(args.images, NOISE)
    prompts, rows = prompts_of(scenes), []
    keep_statistics(statistics, studio, jury, prompts)
    for steps, path in product(args.steps, args.files):
        method = studio.methods[str(path)]
        images = studio.generate(method, prompts, latents, steps, progress=f"{path.name}, {steps} steps")
        right = jury.alignment(images, scenes)
        shares = [f"{100 * right[key]:.1f}%" for key in ("shape_and_colour", "place", "background")]
        rows.append(
            [path.name, steps, f"{method.guidance_scale:g}", f"{jury.frechet_to_teacher(images, statistics):.2f}", *shares]
        )
    headers = ["file", "steps", "guidance", "Frechet distance x 1000", "shape and colour", "place", "background"]
    print(tabulate(rows, headers=headers, disable_numparse=True))
    if args.out:
        table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
        args.out.write_text(report(args.model, args.images, table), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Measure adapters of the shapes model that you trained, as docs/results.md measures the shipped ones. A minute or two each.

python examples/shapes/measure_adapter.py outputs/my_pcm.safetensors --steps 4
"""

from __future__ import annotations

import argparse
from pathlib import Path

from evaluate import Judge, Studio, held_out_scenes, noise, prompts_of
from tabulate import tabulate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--images", type=int, default=2048, help="fewer are no measure of distance: it grows as they get fewer")
    args = parser.parse_args()

    studio, jury = Studio({path.stem: path for path in args.files}, fast=True), Judge()
    scenes, latents = held_out_scenes(args.images), noise(args.images, seed=2)
    rows = []
    for path in args.files:
        method = studio.methods[path.stem]
        images = studio.generate(method, prompts_of(scenes), latents, args.steps, progress=path.stem)
        right = jury.alignment(images, scenes)
        shares = [f"{100 * right[key]:.1f}%" for key in ("shape_and_colour", "place", "background")]
        rows.append([path.name, args.steps, f"{method.guidance_scale:g}", f"{jury.frechet_to_teacher(images):.2f}", *shares])
    headers = ["file", "steps", "guidance", "Frechet distance x 1000", "shape and colour", "place", "background"]
    print(tabulate(rows, headers=headers, disable_numparse=True))


if __name__ == "__main__":
    main()

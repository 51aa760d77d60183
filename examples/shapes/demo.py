"""What this project does, in two minutes on two cores: a picture, a contact sheet, a table. No download.

make demo        (or: python examples/shapes/demo.py --out outputs/demo)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from evaluate import STEPS, TEACHER_STEPS, Judge, Studio, held_out_scenes, noise, prompts_of
from pictures import contact_sheet, save, to_pil
from tabulate import tabulate

PROMPT = "a large red star on the left and a small blue ring on the right on a dotted mint background"
SHOWN = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--pictures", type=int, default=32, help="that are judged, of each method and number of steps")
    args = parser.parse_args()

    studio, jury = Studio(), Judge()
    pcm = studio.methods["PCM"]
    for method in studio.methods.values():
        print(f"{method.name}: guidance {method.guidance_scale:g}, eta {method.eta:g}")
    picture = studio.generate(pcm, [PROMPT], noise(1, seed=0), steps=4)[0]
    save(to_pil(picture).resize((512, 512)), args.out / "picture.png")
    print(f'"{PROMPT}", 4 steps: {args.out / "picture.png"}')

    scenes = held_out_scenes(args.pictures)
    prompts, latents = prompts_of(scenes), noise(args.pictures, seed=3)
    runs = [(method, steps) for method in ("PCM", "LCM") for steps in STEPS] + [("teacher", TEACHER_STEPS)]
    images: dict[tuple[str, int], torch.Tensor] = {}
    for name, steps in runs:
        label = f"{name} {steps}"
        images[name, steps] = studio.generate(studio.methods[name], prompts, latents, steps, batch=16, progress=label)
    sheet = contact_sheet({f"{name}, {steps} step{'s' * (steps > 1)}": images[name, steps][:SHOWN] for name, steps in runs})
    save(sheet, args.out / "contact_sheet.png")
    print(f"contact sheet: {args.out / 'contact_sheet.png'}\n")

    rows = []
    for name, steps in runs:
        alignment = jury.alignment(images[name, steps], scenes)
        consistent = "" if name == "teacher" else f"{jury.consistency(images[name, 1], images[name, 16]):.3f}"
        seconds = studio.seconds_per_image(studio.methods[name], prompts, steps)
        rows.append(
            [
                name,
                steps,
                f"{alignment['shape_and_colour']:.2f}",
                f"{alignment['place']:.2f}",
                consistent,
                f"{seconds:.3f}",
            ]
        )
    headers = ["", "steps", "shape and colour", "place", "1 against 16 steps", "seconds per image"]
    print(tabulate(rows, headers=headers, disable_numparse=True))
    print(
        f"\n{args.pictures} held-out prompts; shares of pictures judged right; cosine between the pictures of 1 and 16 steps."
    )


if __name__ == "__main__":
    main()

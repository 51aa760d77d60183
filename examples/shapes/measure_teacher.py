"""Measure the shapes model itself; writes the teacher's statistics and MODEL_CARD.md. About half an hour on two cores.

python examples/shapes/measure_teacher.py
"""

from __future__ import annotations

import argparse
import json

from evaluate import (
    FRECHET_BLOCKS,
    TEACHER_GUIDANCE,
    TEACHER_STATISTICS,
    TEACHER_STEPS,
    Judge,
    Studio,
    add_reference,
    distance,
    held_out_scenes,
    model_fingerprint,
    prompts_of,
    teacher_pictures,
    teacher_state,
)
from safetensors import safe_open
from tabulate import tabulate

from lora_training.cpu import fast_precision
from pcm_scheduler.lora_file import write_safetensors

from attributes import CLASSIFIER_FILE, AttributeClassifier
from model import HERE, MODEL_DIR

REFERENCE_NOISE, OTHER_NOISE = 1, 2
CARD = HERE / "MODEL_CARD.md"
BARS = {
    "shape_and_colour": 0.90,
    "size": 0.80,
    "place": 0.80,
    "count": 0.80,
    "background": 0.80,
    "bound": 0.70,
}
NAMES = {
    "shape_and_colour": "shape and colour of every object",
    "size": "size of every object",
    "place": "place of every object",
    "count": "count",
    "background": "background colour",
    "texture": "background texture",
    "bound": "two objects, both bound right",
}


def card(alignment: dict[str, float], distances: dict[int, tuple[float, float]], images: int, judged: int) -> str:
    """MODEL_CARD.md: what the model is, and the figures just measured."""
    with safe_open(CLASSIFIER_FILE, framework="pt") as file:
        accuracy = {k.removeprefix("accuracy."): float(v) for k, v in file.metadata().items()}
    megabytes = sum(p.stat().st_size for p in MODEL_DIR.rglob("*") if p.is_file()) / 1e6
    judge = ", ".join(f"{name} {100 * value:.1f}%" for name, value in accuracy.items())
    depths = [
        [
            f"**{b}**" if b == FRECHET_BLOCKS else b,
            AttributeClassifier.widths[b - 1],
            *map("{:.3f}".format, (near, far, far / near)),
        ]
        for b, (near, far) in distances.items()
    ]
    headers = ["blocks", "channels", "floor", "plain DDIM, 8 steps", "times the floor"]
    rows = [[NAMES[k], f"{100 * v:.1f}%", f"{100 * BARS[k]:.0f}%" if k in BARS else ""] for k, v in alignment.items()]
    return f"""# Shapes: a latent diffusion model small enough to ship

A `StableDiffusionPipeline` in diffusers' own folder format ({megabytes:.1f} MB, fp16): AutoencoderKL (8x, 4 channels),
CLIP text encoder and tokenizer with a vocabulary learned from the caption grammar, UNet2DConditionModel with cross
attention, epsilon prediction, scaled_linear betas. It draws one or two of eight shapes in eight colours, three sizes and
nine places on six backgrounds in four textures, at 128 x 128 pixels, from captions such as *"a large red star at the top
left and a small blue ring in the bottom right corner on a dotted mint background"*.

It was trained by the scripts of `make shapes` on procedurally drawn scenes; no other data. The run behind these weights was
continued with a longer last stage (6,000 steps instead of 4,000) at step 1,800 of that stage, and drew its noise from other
seeds, so running the scripts again gives a model of this kind and not these bytes. Eight of the 64 pairs of shape and colour
were never drawn in training. It is a test bench for few-step sampling and nothing more.

Written by `examples/shapes/measure_teacher.py`; every figure below was measured by it.

## Alignment

{TEACHER_STEPS} DDIM steps, guidance {TEACHER_GUIDANCE:g}, {judged} held-out prompts, half of which name a pair of shape and
colour never seen in training; judged by the attribute classifier. UNet in {fast_precision()}, here and below.

{tabulate(rows, headers=["right", "measured", "asked for"], tablefmt="github", disable_numparse=True)}

The classifier itself, on 2,048 held-out renders: {judge}.

## How hard few steps are

Frechet distance x 1000 to the teacher's pictures of the same prompts from other noise, {images} pictures, in the averaged
channels of the classifier after so many of its blocks. The floor is the teacher at {TEACHER_STEPS} steps against itself; it is
what is left of chance in so many pictures. The project's tables use the row in bold: deeper blocks know what is in the picture
(which alignment measures already) and were trained not to see blur.

{tabulate(depths, headers=headers, tablefmt="github", disable_numparse=True)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--judged", type=int, default=512)
    parser.add_argument(
        "--draw", type=int, metavar="SEED", help="only draw the 50-step pictures of this noise, 1 or 2, and stop"
    )
    args = parser.parse_args()

    studio = Studio(adapters={}, fast=True)
    scenes = held_out_scenes(args.images)
    prompts = prompts_of(scenes)
    if args.draw is not None:
        teacher_pictures(studio, prompts, args.draw, TEACHER_STEPS)
        return
    jury = Judge()
    reference = teacher_pictures(studio, prompts, REFERENCE_NOISE, TEACHER_STEPS)
    alignment = jury.alignment(reference[: args.judged], scenes[: args.judged])
    print(json.dumps(alignment, indent=1), flush=True)

    others = [teacher_pictures(studio, prompts, OTHER_NOISE, steps) for steps in (TEACHER_STEPS, 8)]
    distances = {}
    for blocks in range(1, len(AttributeClassifier.widths) + 1):
        metric = jury.frechet(blocks)
        add_reference(metric, reference)
        floor, ddim8 = (distance(metric, images) for images in others)
        distances[blocks] = (floor, ddim8)
        print(f"{blocks} blocks: floor {floor:.3f}, plain DDIM at 8 steps {ddim8:.3f}", flush=True)
        if blocks == FRECHET_BLOCKS:
            write_safetensors(
                teacher_state(metric),
                TEACHER_STATISTICS,
                {"images": str(args.images), "floor": f"{floor:.4f}", "model": model_fingerprint()},
            )
    CARD.write_text(card(alignment, distances, args.images, args.judged), encoding="utf-8")


if __name__ == "__main__":
    main()

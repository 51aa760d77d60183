"""Measure the shipped adapters against the teacher; writes docs/results.md and docs/contact_sheet.png. About 15 minutes.

make measure        (or: python examples/shapes/measure.py)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from evaluate import (
    ADAPTERS,
    STEPS,
    TEACHER_GUIDANCE,
    TEACHER_STATISTICS,
    TEACHER_STEPS,
    Judge,
    Studio,
    held_out_scenes,
    noise,
    prompts_of,
)
from pictures import contact_sheet, save
from safetensors import safe_open
from tabulate import tabulate

from model import HERE

DOCS = HERE.parent.parent / "docs"
SHOWN = 9


def report(rows: list[list[str]], consistency: dict[str, float], images: int, teacher: dict[str, str], search: dict) -> str:
    """docs/results.md."""
    chosen = {name: found["rows"][0] for name, found in search.items()}
    settings = "; ".join(
        f"{name} learning rate {b['learning_rate']:g}, sampling guidance {b['guidance_scale']:g}" for name, b in chosen.items()
    )
    headers = [
        "method",
        "steps",
        "Frechet distance x 1000",
        "shape and colour",
        "place",
        "background",
        "seconds per image",
    ]
    return f"""# Results on the shapes model

Written by `examples/shapes/measure.py` (`make measure`); no figure is typed by hand. They are of a small model on drawn scenes
and say nothing about Stable Diffusion.

One 4-phase PCM adapter at every step count against an LCM adapter (one phase, stochastic) distilled on the same data with the
same rank, updates and guidance, and against plain DDIM (trailing) without an adapter.
Learning rate and sampling guidance of each by the same search: {settings}.
{images} pictures a row, held-out prompts, UNet in bfloat16 for all. Frechet distance in averaged channels of the attribute
classifier (which ones, and why, in [the model card](../examples/shapes/MODEL_CARD.md)) to the teacher's pictures of the same
prompts from other noise ({TEACHER_STEPS} DDIM steps, guidance {TEACHER_GUIDANCE:g}). The teacher against itself, the floor, is
at **{float(teacher["floor"]):.2f}**.

{tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)}

Consistency, cosine between the embeddings of the 1-step and the 16-step picture of a prompt (read it beside the 1-step
distance: a blur is consistent too): {", ".join(f"{name} {value:.3f}" for name, value in consistency.items())}.

![rows: PCM and LCM at 1 to 16 steps, the teacher at 50; same prompts and noise](contact_sheet.png)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args()

    studio, jury = Studio(fast=True), Judge()
    scenes = held_out_scenes(args.images)
    prompts, latents = prompts_of(scenes), noise(args.images, seed=2)
    rows, consistency, shown = [], {}, {}
    for name, label in {"PCM": "PCM", "LCM": "LCM", "teacher": "plain DDIM"}.items():
        method, ends = studio.methods[name], {}
        for steps in STEPS:
            images = studio.generate(method, prompts, latents, steps, progress=f"{label} {steps}")
            distance, right = jury.frechet_to_teacher(images), jury.alignment(images, scenes)
            seconds = studio.seconds_per_image(method, prompts, steps)
            shares = [f"{100 * right[key]:.1f}%" for key in ("shape_and_colour", "place", "background")]
            rows.append([label, steps, f"{distance:.2f}", *shares, f"{seconds:.3f}"])
            print(rows[-1], flush=True)
            if name in ADAPTERS:
                shown[f"{name}, {steps} step{'s' * (steps > 1)}"] = images[:SHOWN]
            if steps in (STEPS[0], STEPS[-1]):
                ends[steps] = images
        consistency[label] = jury.consistency(ends[STEPS[0]], ends[STEPS[-1]])
    shown[f"teacher, {TEACHER_STEPS} steps"] = studio.generate(
        studio.methods["teacher"], prompts[:SHOWN], latents[:SHOWN], TEACHER_STEPS
    )
    save(contact_sheet(shown), args.out / "contact_sheet.png")
    with safe_open(TEACHER_STATISTICS, framework="pt") as file:
        teacher = file.metadata()
    search = {name: json.loads(path.with_suffix(".search.json").read_text(encoding="utf-8")) for name, path in ADAPTERS.items()}
    (args.out / "results.md").write_text(report(rows, consistency, args.images, teacher, search), encoding="utf-8")


if __name__ == "__main__":
    main()

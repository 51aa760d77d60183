"""Measure the shipped adapters against the teacher; writes docs/results.md and docs/contact_sheet.png. About 15 minutes.

make measure        (or: python examples/shapes/measure.py)
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from evaluate import (
    ADAPTERS,
    MATCHED,
    STEPS,
    TEACHER_GUIDANCE,
    TEACHER_STATISTICS,
    TEACHER_STEPS,
    Judge,
    Studio,
    held_out_scenes,
    model_fingerprint,
    noise,
    prompts_of,
)
from pictures import contact_sheet, save
from safetensors import safe_open
from safetensors.torch import load_file
from tabulate import tabulate

from pcm_scheduler.lora_file import write_safetensors

from model import HERE, RUNS_DIR

DOCS = HERE.parent.parent / "docs"
SHOWN = 9
LABELS = {"PCM": "PCM, 4 phases", "LCM": "LCM", "teacher": "plain DDIM"}
MATCHED_NAMES = {m: f"PCM-{m}" for m in MATCHED}
FILES = ADAPTERS | {MATCHED_NAMES[m]: path for m, path in MATCHED.items()}


@dataclasses.dataclass(frozen=True)
class Row:
    """A method at one number of steps: figures, what consistency needs, and pictures to show."""

    frechet: float
    right: dict[str, float]
    embeddings: torch.Tensor  # (N, width), fp16
    shown: torch.Tensor  # uint8 (SHOWN, 3, 128, 128)


def overtaken(rows: dict[tuple[str, int], Row]) -> str:
    """From how many steps on plain DDIM is nearer to the teacher than PCM's adapter, in words."""
    found = [steps for steps in STEPS if rows["teacher", steps].frechet < rows["PCM", steps].frechet]
    return (
        f"Plain DDIM is nearer to the teacher than the PCM adapter at {' and '.join(map(str, found))} steps." if found else ""
    )


def report(
    table: list[list[str]], remark: str, consistency: dict[str, float], images: int, teacher: dict[str, str], search: dict
) -> str:
    """docs/results.md."""
    chosen = {name: found["rows"][0] for name, found in search.items()}
    settings = "; ".join(
        f"{name} learning rate {b['learning_rate']:g}, sampling guidance {b['guidance_scale']:g}" for name, b in chosen.items()
    )
    headers = ["method", "steps", "Frechet distance x 1000", "shape and colour", "place", "background"]
    return f"""# Results on the shapes model

Written by `examples/shapes/measure.py` (`make measure`); no figure is typed by hand. They are of a small model on drawn scenes
and say nothing about Stable Diffusion.

One 4-phase PCM adapter at every step count against an LCM adapter (one phase, stochastic) distilled on the same data with the
same rank, updates and teacher's guidance, and against plain DDIM (trailing) without an adapter.
Learning rate and sampling guidance of each by the same search:
{settings}.
{images} pictures a row, held-out prompts, UNet in bfloat16 for all. Frechet distance in averaged channels of the attribute
classifier (which ones, and why, in [the model card](../examples/shapes/MODEL_CARD.md)) to the teacher's pictures of the same
prompts from other noise ({TEACHER_STEPS} DDIM steps, guidance {TEACHER_GUIDANCE:g}). The teacher against itself, the floor, is
at **{float(teacher["floor"]):.2f}**.

{tabulate(table, headers=headers, tablefmt="github", disable_numparse=True)}

{remark}

The last rows are adapters with as many phases as steps, by PCM's own settings. With fewer steps than phases a step jumps over
an edge, which no training has taught it: the direction it takes is right for the first edge only. Compare the rows at 2 steps.

Consistency, cosine between the embeddings of the 1-step and the 16-step picture of a prompt (read it beside the 1-step
distance: a blur is consistent too): {", ".join(f"{name} {value:.3f}" for name, value in consistency.items())}.

![rows: PCM and LCM at 1 to 16 steps, the teacher at 50; same prompts and noise](contact_sheet.png)
"""


def weights_fingerprint(path: Path) -> str:
    """Of the tensors alone, whatever the header says."""
    digest = hashlib.sha256()
    for key, tensor in sorted(load_file(path).items()):
        digest.update(key.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:12]


def measured(name: str, steps: int, images: int, studio: Studio, jury: Judge) -> Row:
    """From disk if this very adapter has been measured before, for a row takes minutes."""
    weights = weights_fingerprint(FILES[name]) if name in FILES else "none"
    guidance = f"{studio.methods[name].guidance_scale:g}"
    path = RUNS_DIR / "measured" / model_fingerprint() / f"{weights}-guidance{guidance}-{steps}steps-{images}.safetensors"
    if not path.exists():
        scenes = held_out_scenes(images)
        latents = noise(images, seed=2)
        drawn = studio.generate(studio.methods[name], prompts_of(scenes), latents, steps, progress=f"{name}, {steps} steps")
        figures = {"frechet": jury.frechet_to_teacher(drawn), "right": jury.alignment(drawn, scenes)}
        kept = {"embeddings": jury.embeddings(drawn).half(), "shown": drawn[:SHOWN]}
        write_safetensors(kept, path, {"figures": json.dumps(figures)})
    with safe_open(path, framework="pt") as file:
        figures = json.loads(file.metadata()["figures"])
    print(f"{name}, {steps} steps: {figures}", flush=True)
    return Row(**figures, **load_file(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=DOCS)
    parser.add_argument("--only", choices=[*LABELS, "matched"], help="measure this one, keep its rows, and stop")
    args = parser.parse_args()

    studio, jury = Studio(FILES, fast=True), Judge()
    wanted = [(name, steps) for name in LABELS for steps in STEPS if args.only in (None, name)]
    wanted += [(name, phases) for phases, name in MATCHED_NAMES.items() if args.only in (None, "matched")]
    rows = {(name, steps): measured(name, steps, args.images, studio, jury) for name, steps in wanted}
    if args.only:
        return
    labels = LABELS | {name: f"PCM, {phases} phases" for phases, name in MATCHED_NAMES.items()}
    table = [
        [labels[name], steps, f"{row.frechet:.2f}"]
        + [f"{100 * row.right[key]:.1f}%" for key in ("shape_and_colour", "place", "background")]
        for (name, steps), row in rows.items()
    ]
    consistency = {
        label: torch.nn.functional.cosine_similarity(
            *(rows[name, steps].embeddings.float() for steps in (STEPS[0], STEPS[-1]))
        ).mean()
        for name, label in LABELS.items()
    }
    shown = {f"{n}, {steps} step{'s' * (steps > 1)}": row.shown for (n, steps), row in rows.items() if n in ADAPTERS}
    prompts, latents = prompts_of(held_out_scenes(args.images))[:SHOWN], noise(SHOWN, seed=2)
    shown[f"teacher, {TEACHER_STEPS} steps"] = studio.generate(studio.methods["teacher"], prompts, latents, TEACHER_STEPS)
    save(contact_sheet(shown), args.out / "contact_sheet.png")
    with safe_open(TEACHER_STATISTICS, framework="pt") as file:
        teacher = file.metadata()
    search = {name: json.loads(path.with_suffix(".search.json").read_text(encoding="utf-8")) for name, path in ADAPTERS.items()}
    (args.out / "results.md").write_text(
        report(table, overtaken(rows), consistency, args.images, teacher, search), encoding="utf-8"
    )


if __name__ == "__main__":
    main()

"""Measure the shapes model's motion modules; writes motion_adapter/MODEL_CARD.md. A quarter of an hour on two cores.

accelerate launch --config_file examples/accelerate/two_processes_cpu.yaml examples/shapes/measure_motion.py
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict

import torch
from agreement import motion_agreement, motion_and_scene_agreement
from tabulate import tabulate
from video_model import captions_of, held_out_clips, load_fast_pipeline, teacher_clips, teacher_guidance

from lora_training.cpu import fast_precision, keep_freed_memory
from lora_training.files import write_text

from model import MOTION_DIR
from moving import KINDS, NUM_FRAMES
from scenes import MOST_TILT
from training import processes_here

STEPS, NOISE = 25, 1
BAR = 0.85


def card(motion: dict[str, float], whole: float, judged: int, guidance_scale: float) -> str:
    """MODEL_CARD.md: what the motion modules are, and the figures just measured."""
    megabytes = sum(path.stat().st_size for path in MOTION_DIR.glob("*.safetensors")) / 1e6
    rows = [[kind, f"{100 * share:.1f}%"] for kind, share in motion.items()]
    return f"""# Shapes that move: motion modules for the shapes model

A diffusers `MotionAdapter` in AnimateDiff's v2 layout ({megabytes:.1f} MB, fp16; the words of motion are in
`motion_words.safetensors`), for clips of {NUM_FRAMES} frames at 128 x 128 pixels: one of the shapes moves left, right, up or
down, turns, grows, shrinks, bounces or stands still, slowly or fast, as the caption says. The image model has
`domain_adapter.safetensors` merged into its UNet, a LoRA that draws what motion makes of a frame, and is otherwise as it ships;
`video_model.py` puts all together.

Trained by `examples/shapes/domain_adapter.py` and `train_motion.py` on procedurally drawn clips; no other data.

Written by `examples/shapes/measure_motion.py`; every figure below was measured by it.

{STEPS} DDIM steps, guidance {guidance_scale:g}, {judged} held-out prompts; in
every second one a shape moves in a colour that it never had in training. The motion is measured by following the object, see
`motion.py`. UNet in {fast_precision()}.

{tabulate(rows, ["kind and speed right", "measured"], tablefmt="github", disable_numparse=True)}

Asked for: {100 * BAR:.0f}% over all. Motion and everything else that the prompt names, in the middle frame: {100 * whole:.1f}%.

The image model was only ever shown objects within {math.degrees(MOST_TILT):.0f} degrees of upright; at every other angle it
draws what the domain adapter knows.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=256)
    args = parser.parse_args()

    keep_freed_memory()
    pipe = load_fast_pipeline()
    told = held_out_clips(args.clips)
    texts = captions_of(told)
    guidance_scale = teacher_guidance()
    shown = teacher_clips(pipe, "measured", texts, NOISE, STEPS, guidance_scale).float() / 127.5 - 1
    if not processes_here().is_main_process:
        return
    right = motion_agreement()(shown, texts)
    whole = motion_and_scene_agreement()(shown, texts).mean().item()
    by_kind = defaultdict(list)
    for clip, value in zip(told, right.tolist(), strict=True):
        by_kind[clip.motion.kind].append(value)
    motion = {"all": right.mean().item()}
    motion |= {kind: torch.tensor(by_kind[kind]).mean().item() for kind in KINDS if kind in by_kind}
    write_text(MOTION_DIR / "MODEL_CARD.md", card(motion, whole, args.clips, guidance_scale))
    print("\n".join(f"{kind}: {share:.1%}" for kind, share in motion.items()), f"motion and scene: {whole:.1%}", sep="\n")


if __name__ == "__main__":
    main()

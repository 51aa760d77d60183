"""Few-step clips in some minutes on two cores: one moving sheet of methods and prompts, and a table. No download.

make demo-video        (or: python examples/shapes/demo_video.py --out outputs/demo)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from agreement import embedding_features, motion_agreement, motion_and_scene_agreement
from evaluate import Method
from pictures import contact_sheet
from PIL.Image import Image
from tabulate import tabulate
from video_model import (
    ADAPTERS,
    PCM_OF_PHASES,
    captions_of,
    clip_noise,
    draw_clips,
    held_out_clips,
    load_fast_pipeline,
    teacher_guidance,
)
from write_clips import FRAMES_PER_SECOND

from lora_training.cpu import keep_freed_memory
from lora_training.evaluation.video import temporal_consistency
from pcm_scheduler import export_clip, load_pcm_lora

from model import build_scheduler

FILES = {f"PCM, {m} phase{'s' * (m > 1)}": file for m, file in PCM_OF_PHASES.items()} | {"LCM": ADAPTERS["LCM"]}
PCM_RUNS = (("PCM, 1 phase", 1), ("PCM, 2 phases", 2), ("PCM, 4 phases", 4), ("PCM, 4 phases", 8))
RUNS = (*PCM_RUNS, *(("LCM", steps) for steps in (1, 2, 4, 8)), ("teacher", 25))
SHOWN, JUDGED, NOISE = 6, 12, 3


def moving_sheet(rows: Mapping[str, torch.Tensor]) -> list[Image]:
    """A sheet for each frame of uint8 clips (N, F, 3, h, w) by their rows' names."""
    frames = next(iter(rows.values())).shape[1]
    return [contact_sheet({name: clips[:, i] for name, clips in rows.items()}) for i in range(frames)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--clips", type=int, default=JUDGED, help="prompts that every method draws")
    args = parser.parse_args()

    keep_freed_memory()
    pipe = load_fast_pipeline()
    methods, schedulers = {"teacher": Method("teacher", teacher_guidance())}, {"teacher": build_scheduler()}
    for name, path in FILES.items():
        settings = load_pcm_lora(pipe, path, adapter_name=name)
        methods[name], schedulers[name] = Method(name, settings.guidance_scale, settings.eta), pipe.scheduler

    texts, latents = captions_of(held_out_clips(args.clips)), clip_noise(args.clips, NOISE)
    judges = {"motion": motion_agreement(), "motion and scene": motion_and_scene_agreement()}
    embedding = embedding_features()
    sheet, rows = {}, []
    for name, steps in RUNS:
        method, pipe.scheduler = methods[name], schedulers[name]
        if name in FILES:
            pipe.enable_lora()
            pipe.set_adapters(name)
        else:
            pipe.disable_lora()
        label, begun = f"{name}, {steps} step{'s' * (steps > 1)}", time.perf_counter()
        drawn = draw_clips(pipe, texts, latents, steps, method.guidance_scale, method.eta, progress=label)
        seconds = (time.perf_counter() - begun) / len(texts)
        clips = drawn.float() / 127.5 - 1
        steady = temporal_consistency(embedding, (clips,))
        shares = [f"{judge(clips, texts).mean().item():.2f}" for judge in judges.values()]
        rows.append([name, steps, *shares, f"{steady:.3f}", f"{seconds:.1f}"])
        sheet[label] = drawn[:SHOWN]
    for text in texts[:SHOWN]:
        print(text)
    for suffix in ("webp", "mp4"):
        print(f"moving sheet: {export_clip(moving_sheet(sheet), args.out / f'clips.{suffix}', FRAMES_PER_SECOND)}")
    headers = ["", "steps", *judges, "neighbouring frames, cosine", "seconds per clip"]
    print(tabulate(rows, headers=headers, disable_numparse=True))
    print(f"\n{args.clips} held-out prompts; shares of clips judged right.")


if __name__ == "__main__":
    main()

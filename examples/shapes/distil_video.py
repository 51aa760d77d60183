"""Distil the adapters for clips that ship, PCM and its rival LCM, under the same conditions.

Clips, rank, updates, batch and the teacher's guidance are the same; the guidance that each is sampled with is searched in the
same way, in 4 steps: which one shows most clips as asked, motion and scene. The table is kept beside the adapter. An hour on
two cores; of two processes with one `--only` each, both would encode the clips.

    python examples/shapes/distil_video.py
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from distil import overridden, publish, train
from video_model import (
    ADAPTERS,
    captions_of,
    clip_noise,
    clips_fingerprint,
    draw_clips,
    held_out_clips,
    load_fast_pipeline,
    shares_right,
    write_image_model,
    write_search,
)
from write_clips import write_folder

from lora_training.config import TrainConfig
from lora_training.cpu import keep_freed_memory
from lora_training.train import parse
from pcm_scheduler import load_pcm_lora

from model import HERE, RUNS_DIR
from scenes import MOTION_SEARCH_SEED

CONFIGS = {name: HERE.parent / "configs" / f"shapes_video_{file}.yaml" for name, file in (("PCM", "pcm4"), ("LCM", "lcm"))}
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0)
CLIPS, STEPS, NOISE = 1024, 4, 3


def prepared(name: str) -> TrainConfig:
    """The configuration of an adapter; model and clips are written for these weights, unless they are there."""
    folder = RUNS_DIR / "search" / clips_fingerprint()
    model, clips, cache = folder / "model", folder / "clips", folder / "cache"
    if not (model / "model_index.json").is_file():
        write_image_model(model)
    write_folder(clips, CLIPS)
    told = {"model.path": model, "data.path": clips, "data.cache": cache, "output": folder / f"{name}.safetensors"}
    return overridden(CONFIGS[name], told)


@torch.no_grad()
def search(path: Path, count: int) -> list[dict[str, float]]:
    """What is right of clips by a trained file, at each guidance."""
    pipe = load_fast_pipeline()
    settings = load_pcm_lora(pipe, path)
    texts = captions_of(held_out_clips(count, MOTION_SEARCH_SEED))
    latents = clip_noise(count, NOISE)
    rows = []
    for guidance_scale in GUIDANCE_SCALES:
        name = f"{path.stem}, guidance {guidance_scale:g}"
        drawn = draw_clips(pipe, texts, latents, STEPS, guidance_scale, settings.eta, progress=name)
        rows.append({"guidance_scale": guidance_scale} | shares_right(drawn, texts))
        print(path.stem, rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CONFIGS), help="default: both")
    parser.add_argument("--search-clips", type=int, default=96)
    args = parser.parse_args()

    keep_freed_memory()
    for name in [args.only] if args.only else CONFIGS:
        config = prepared(name)
        path = Path(config.output)
        if not path.exists():
            train(config)
        rows = search(path, args.search_clips)
        guidance_scale = write_search(ADAPTERS[name].with_suffix(".search.json"), args.search_clips, STEPS, rows)
        plain = parse(["--config", str(CONFIGS[name])])
        sampling = dataclasses.replace(plain.sampling, guidance_scale=guidance_scale)
        publish(path, ADAPTERS[name], dataclasses.replace(plain, sampling=sampling))


if __name__ == "__main__":
    main()

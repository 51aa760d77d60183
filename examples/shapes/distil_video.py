"""Distil the adapters for clips that ship, PCM and its rival LCM, under the same conditions.

Clips, rank, updates, batch and the teacher's guidance are the same; the learning rates are those that the searches on pictures
chose. PCM's jumps begin on the teacher's trajectories; whether the rival is better off there is searched, and so is the
sampling guidance of both: with what most clips are right in 4 steps, motion and scene. The table is kept beside the adapter.
There are further adapters of PCM, of as many phases as steps. Two hours on two cores; of two processes with one `--only` each,
both would encode the clips.

    python examples/shapes/distil_video.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from distil import Settings, overridden, publish, search, train, trained_with
from video_model import (
    ADAPTERS,
    PCM_OF_PHASES,
    captions_of,
    clip_noise,
    clips_fingerprint,
    draw_clips,
    held_out_clips,
    load_fast_pipeline,
    most_right,
    shares_right,
    write_image_model,
    write_search,
)
from write_clips import write_folder

from lora_training.config import TrainConfig
from lora_training.cpu import keep_freed_memory
from pcm_scheduler import load_pcm_lora

from model import HERE, RUNS_DIR
from scenes import MOTION_SEARCH_SEED

CONFIGS = {name: HERE.parent / "configs" / f"shapes_video_{file}.yaml" for name, file in (("PCM", "pcm4"), ("LCM", "lcm"))}
SEARCHED: dict[str, dict[str, tuple[Any, ...]]] = {
    "PCM": {},
    "LCM": {"objective.starts": ("data", "teacher")},
}
FURTHER: dict[int, Settings] = {  # by phases; what differs from PCM's configuration
    m: {
        "objective.num_phases": m, "sampling.num_inference_steps": m, "title": f"Shapes video PCM, {m} phase{'s' * (m > 1)}",
        "lora.init_adapter": f"examples/shapes/adapters/pcm_{m}phase.safetensors",
    }
    for m in (1, 2)
}  # fmt: skip
GUIDANCE_SCALES = (1.0, 1.5, 2.0)
CLIPS, STEPS, NOISE = 1024, 4, 3
FOLDER = RUNS_DIR / "search" / clips_fingerprint()  # of what is trained, and of what that takes


def prepared(name: str, settings: Settings) -> TrainConfig:
    """PCM's or LCM's configuration with some settings changed; model and clips are written for these weights, unless there."""
    model, clips, cache = FOLDER / "model", FOLDER / "clips", FOLDER / "cache"
    if not (model / "model_index.json").is_file():
        write_image_model(model)
    write_folder(clips, CLIPS)
    return overridden(CONFIGS[name], settings | {"model.path": model, "data.path": clips, "data.cache": cache})


@torch.no_grad()
def sampled(path: Path, count: int, steps: int) -> Iterator[Settings]:
    """What is right of clips by a trained file, at each guidance."""
    pipe = load_fast_pipeline()
    recommended = load_pcm_lora(pipe, path)
    texts = captions_of(held_out_clips(count, MOTION_SEARCH_SEED))
    latents = clip_noise(count, NOISE)
    for guidance_scale in GUIDANCE_SCALES:
        name = f"{path.stem}, guidance {guidance_scale:g}"
        drawn = draw_clips(pipe, texts, latents, steps, guidance_scale, recommended.eta, progress=name)
        row = {"guidance_scale": guidance_scale} | shares_right(drawn, texts)
        print(path.stem, row, flush=True)
        yield row


def search_clips(name: str, count: int) -> list[Settings]:
    """Of PCM or LCM; the most right first."""

    def measured(settings: Settings) -> Iterator[Settings]:
        path = trained_with(FOLDER, name, settings)
        if not path.exists():
            train(prepared(name, settings | {"output": path}))
        return sampled(path, count, STEPS)

    return search(CONFIGS[name], SEARCHED[name], measured, most_right)


def publish_clips(
    path: Path, output: Path, config: Path, chosen: Settings, rows: list[Settings], count: int, steps: int
) -> None:
    """A trained file and the table of its search under their final names."""
    guidance_scale = write_search(output.with_suffix(".search.json"), count, steps, rows)
    publish(path, output, overridden(config, chosen | {"sampling.guidance_scale": guidance_scale}))


def distil_further(phases: int, count: int) -> None:
    """One of the further adapters; its sampling guidance is searched in its own number of steps."""
    output, settings = PCM_OF_PHASES[phases], FURTHER[phases]
    path = FOLDER / output.name
    if not path.exists():
        train(prepared("PCM", settings | {"output": path}))
    publish_clips(path, output, CONFIGS["PCM"], settings, list(sampled(path, count, phases)), count, phases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CONFIGS), help="default: both")
    parser.add_argument("--search-clips", type=int, default=96)
    args = parser.parse_args()

    keep_freed_memory()
    for name in [args.only] if args.only else CONFIGS:
        rows = search_clips(name, args.search_clips)
        chosen = {key: rows[0][key] for key in SEARCHED[name]}
        path = trained_with(FOLDER, name, chosen)
        publish_clips(path, ADAPTERS[name], CONFIGS[name], chosen, rows, args.search_clips, STEPS)
        for phases in FURTHER if name == "PCM" else ():
            distil_further(phases, args.search_clips)


if __name__ == "__main__":
    main()

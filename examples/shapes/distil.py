"""Distil the adapters that ship, PCM and its rival LCM, under the same conditions.

Data, rank, updates, batch and the teacher's guidance are the same. The learning rate and the sampling guidance of each
are chosen by the same small search: a whole run at each learning rate, sampled at each guidance in 4 steps, Frechet
distance to the teacher's pictures of the same prompts from other noise. (Short runs mislead: they have not taken in the
teacher's guidance yet, so they ask for more of it when sampled.) The table is kept beside the adapters. PCM's choice also
makes the further adapters: of as many phases as steps, and of an unguided teacher, which leaves guidance to the sampler.
About two hours on two cores, with one `--only` on each.

    python examples/shapes/distil.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from evaluate import (
    ADAPTERS,
    TEACHER_STEPS,
    Judge,
    Studio,
    add_reference,
    distance,
    held_out_scenes,
    model_fingerprint,
    noise,
    prompts_of,
    teacher_pictures,
)
from torchmetrics.image.fid import FrechetInceptionDistance
from write_dataset import write_dataset

from lora_training.config import TrainConfig
from lora_training.files import write_text
from lora_training.loop import run
from lora_training.train import parse
from pcm_scheduler.lora_file import read_settings, restate

from model import HERE, RUNS_DIR
from scenes import SEARCH_SEED

FURTHER: dict[str, dict[str, Any]] = {  # by file; what differs from PCM's configuration
    f"pcm_{m}phase": {
        "objective.num_phases": m, "sampling.num_inference_steps": m, "title": f"Shapes PCM, {m} phases",
    }
    for m in (2, 8)
} | {
    "pcm_1phase": {  # for one step, which is where a critic has most to say; the learning rate is LCM's, also of one phase
        "objective.num_phases": 1, "sampling.num_inference_steps": 1, "adversarial.weight": 0.1,
        "optimizer.learning_rate": 1e-4, "title": "Shapes PCM, 1 phase, adversarial",
    },
    "pcm_4phase_unguided": {
        "objective.guidance_scale": 1.0, "data.caption_dropout": 0.1, "sampling.guidance_scale": 5.0,
        "title": "Shapes PCM, 4 phases, unguided teacher",
    }
}  # fmt: skip
LEARNING_RATES = (3e-5, 1e-4, 3e-4)
REFERENCE_NOISE, SEARCH_NOISE = 1, 2
GUIDANCE_SCALES = (1.0, 1.5, 2.0)
CONFIGS = {name: HERE.parent / "configs" / f"{file}.yaml" for name, file in (("PCM", "shapes_pcm4"), ("LCM", "shapes_lcm"))}


def with_learning_rate(config: TrainConfig, learning_rate: float, output: Path) -> TrainConfig:
    """The configuration with what the runs of the search differ in."""
    optimizer = dataclasses.replace(config.optimizer, learning_rate=learning_rate)
    return dataclasses.replace(config, optimizer=optimizer, output=str(output))


def overridden(config: Path, settings: Mapping[str, Any]) -> TrainConfig:
    """A configuration file with some settings changed, as on the trainer's command line."""
    return parse(["--config", str(config), *(part for key, value in settings.items() for part in (f"--{key}", str(value)))])


def trained(name: str, learning_rate: float) -> Path:
    """Where a run of the search ends."""
    return RUNS_DIR / "search" / model_fingerprint() / f"{name}-{learning_rate:g}.safetensors"


def search_set(images: int) -> tuple[list[str], torch.Tensor, FrechetInceptionDistance]:
    """What settings are chosen by: prompts of other scenes, noise, the distance to the teacher's pictures."""
    prompts, latents = prompts_of(held_out_scenes(images, SEARCH_SEED)), noise(images, SEARCH_NOISE)
    metric = Judge().frechet()
    add_reference(metric, teacher_pictures(Studio(adapters={}, fast=True), prompts, REFERENCE_NOISE, TEACHER_STEPS))
    return prompts, latents, metric


def search(name: str, config: TrainConfig, images: int) -> list[dict[str, float]]:
    """A run at each learning rate, sampled at each guidance; the best row first."""
    prompts, latents, metric = search_set(images)
    rows = []
    for learning_rate in LEARNING_RATES:
        path = trained(name, learning_rate)
        if not path.exists():
            run(with_learning_rate(config, learning_rate, path))
        studio = Studio(adapters={name: path}, fast=True)
        for guidance_scale in GUIDANCE_SCALES:
            method = dataclasses.replace(studio.methods[name], guidance_scale=guidance_scale)
            found = distance(metric, studio.generate(method, prompts, latents, steps=4))
            rows.append({"learning_rate": learning_rate, "guidance_scale": guidance_scale, "frechet": round(found, 3)})
            print(name, rows[-1], flush=True)
    return sorted(rows, key=lambda row: row["frechet"])


def publish(path: Path, output: Path, config: TrainConfig) -> None:
    """A trained file under its final name, with the settings that were chosen and no path of this machine."""
    settings = dataclasses.replace(read_settings(path), guidance_scale=config.sampling.guidance_scale)
    plain = dataclasses.asdict(dataclasses.replace(config, output=output.name))
    restate(path, output, settings, {"pcm_trainer.config": json.dumps(plain)})
    print(
        f"{output}: learning rate {config.optimizer.learning_rate:g}, guidance {config.sampling.guidance_scale:g}", flush=True
    )


def distil_further(name: str, learning_rate: float) -> None:
    """One of the further adapters, at PCM's learning rate unless it says another."""
    path = RUNS_DIR / "search" / model_fingerprint() / f"{name}.safetensors"
    told = {"optimizer.learning_rate": learning_rate, "output": path} | FURTHER[name]
    config = overridden(CONFIGS["PCM"], told)
    if not path.exists():
        run(config)
    publish(path, ADAPTERS["PCM"].with_stem(name), config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CONFIGS), help="default: both")
    parser.add_argument("--further", choices=list(FURTHER), help="of PCM's further adapters, this one; default: all")
    parser.add_argument("--search-images", type=int, default=512)
    args = parser.parse_args()

    for name in [args.only] if args.only else CONFIGS:
        config = parse(["--config", str(CONFIGS[name])])
        write_dataset(Path(config.data.path), 8192)
        rows = search(name, config, args.search_images)
        table = {"model": model_fingerprint(), "images": args.search_images, "rows": rows}
        output = ADAPTERS[name]
        write_text(output.with_suffix(".search.json"), json.dumps(table, indent=1) + "\n")
        best = rows[0]
        sampling = dataclasses.replace(config.sampling, guidance_scale=best["guidance_scale"])
        path = trained(name, best["learning_rate"])
        config = dataclasses.replace(with_learning_rate(config, best["learning_rate"], path), sampling=sampling)
        publish(path, output, config)
        if name != "PCM":
            continue
        for further in [args.further] if args.further else FURTHER:
            distil_further(further, best["learning_rate"])


if __name__ == "__main__":
    main()

"""Distil the two adapters that ship, PCM and its rival LCM, under the same conditions.

Data, rank, updates, batch and the teacher's guidance are the same. The learning rate and the sampling guidance of each
are chosen by the same small search: a whole run at each learning rate, sampled at each guidance in 4 steps, Frechet
distance to the teacher. (Short runs mislead: they have not taken in the teacher's guidance yet, so they ask for more of
it when sampled.) The table is kept beside the adapters. About an hour on two cores, half with one `--only` on each.

    python examples/shapes/distil.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from evaluate import ADAPTERS, Judge, Studio, held_out_scenes, model_fingerprint, noise, prompts_of
from write_dataset import write_dataset

from lora_training.config import TrainConfig
from lora_training.loop import run
from lora_training.train import parse
from pcm_scheduler.lora_file import read_settings, restate

from model import HERE, RUNS_DIR
from scenes import SEARCH_SEED

LEARNING_RATES = (1e-4, 3e-4)
GUIDANCE_SCALES = (1.0, 1.5, 2.0)
CONFIGS = {"PCM": HERE / "configs" / "pcm_4phase.yaml", "LCM": HERE / "configs" / "lcm.yaml"}


def with_learning_rate(config: TrainConfig, learning_rate: float, output: Path) -> TrainConfig:
    """The configuration with what the runs of the search differ in."""
    optimizer = dataclasses.replace(config.optimizer, learning_rate=learning_rate)
    return dataclasses.replace(config, optimizer=optimizer, output=str(output))


def trained(name: str, learning_rate: float) -> Path:
    """Where a run of the search ends."""
    return RUNS_DIR / "search" / model_fingerprint() / f"{name}-{learning_rate:g}.safetensors"


def search(name: str, config: TrainConfig, images: int) -> list[dict[str, float]]:
    """A run at each learning rate, sampled at each guidance; the best row first."""
    jury, scenes = Judge(), held_out_scenes(images, SEARCH_SEED)
    prompts, latents = prompts_of(scenes), noise(images, SEARCH_SEED)
    rows = []
    for learning_rate in LEARNING_RATES:
        path = trained(name, learning_rate)
        if not path.exists():
            run(with_learning_rate(config, learning_rate, path))
        studio = Studio(adapters={name: path}, fast=True)
        for guidance_scale in GUIDANCE_SCALES:
            method = dataclasses.replace(studio.methods[name], guidance_scale=guidance_scale)
            distance = jury.frechet_to_teacher(studio.generate(method, prompts, latents, steps=4))
            rows.append({"learning_rate": learning_rate, "guidance_scale": guidance_scale, "frechet": round(distance, 3)})
            print(name, rows[-1], flush=True)
    return sorted(rows, key=lambda row: row["frechet"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CONFIGS), help="default: both")
    parser.add_argument("--search-images", type=int, default=512)
    args = parser.parse_args()

    for name in [args.only] if args.only else CONFIGS:
        config = parse(["--config", str(CONFIGS[name])])
        write_dataset(Path(config.data.folder), 8192)
        rows = search(name, config, args.search_images)
        table = {"model": model_fingerprint(), "images": args.search_images, "rows": rows}
        output = ADAPTERS[name]
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".search.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        best = rows[0]
        sampling = dataclasses.replace(config.sampling, guidance_scale=best["guidance_scale"])
        config = dataclasses.replace(with_learning_rate(config, best["learning_rate"], output), sampling=sampling)
        path = trained(name, best["learning_rate"])
        settings = dataclasses.replace(read_settings(path), guidance_scale=best["guidance_scale"])
        restate(
            path, output, settings, {"pcm_trainer.config": json.dumps(dataclasses.asdict(config) | {"output": output.name})}
        )
        print(f"{name}: learning rate {best['learning_rate']:g}, sampling guidance {best['guidance_scale']:g}: {output}")


if __name__ == "__main__":
    main()

"""Distil the two adapters that ship, PCM and its rival LCM, under the same conditions.

Data, rank, updates, batch and the teacher's guidance are the same. The learning rate and the sampling guidance of each
are chosen by the same small search: short runs, 4 steps, Frechet distance to the teacher. Settings are printed and
kept beside the adapters. About 40 minutes on two cores.

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

from model import HERE, RUNS_DIR
from scenes import SEARCH_SEED

LEARNING_RATES = (1e-4, 3e-4, 1e-3)
GUIDANCE_SCALES = (1.0, 1.5, 2.0)
CONFIGS = {"PCM": HERE / "configs" / "pcm_4phase.yaml", "LCM": HERE / "configs" / "lcm.yaml"}


def with_changes(config: TrainConfig, *, output: Path, learning_rate: float, guidance_scale: float, steps: int) -> TrainConfig:
    """The configuration with what the search varies."""
    optimizer = dataclasses.replace(config.optimizer, learning_rate=learning_rate, steps=steps)
    sampling = dataclasses.replace(config.sampling, guidance_scale=guidance_scale)
    return dataclasses.replace(config, output=str(output), optimizer=optimizer, sampling=sampling)


def search(name: str, config: TrainConfig, steps: int, images: int) -> list[dict[str, float]]:
    """Short runs at each learning rate, sampled at each guidance; the best row first."""
    jury, scenes = Judge(), held_out_scenes(images, SEARCH_SEED)
    prompts, latents = prompts_of(scenes), noise(images, SEARCH_SEED)
    rows = []
    for learning_rate in LEARNING_RATES:
        path = RUNS_DIR / "search" / model_fingerprint() / f"{name}-{steps}-{learning_rate:g}.safetensors"
        if not path.exists():
            run(with_changes(config, output=path, learning_rate=learning_rate, guidance_scale=1.0, steps=steps))
        studio = Studio(adapters={name: path}, fast=True)
        for guidance_scale in GUIDANCE_SCALES:
            method = dataclasses.replace(studio.methods[name], guidance_scale=guidance_scale)
            distance = jury.frechet_to_teacher(studio.generate(method, prompts, latents, steps=4))
            rows.append({"learning_rate": learning_rate, "guidance_scale": guidance_scale, "frechet": round(distance, 3)})
            print(name, rows[-1], flush=True)
    return sorted(rows, key=lambda row: row["frechet"])


def chosen(name: str, config: TrainConfig, steps: int, images: int) -> dict[str, float]:
    """The search's best row. The table is kept beside the adapter and made anew for another model."""
    path, model = ADAPTERS[name].with_suffix(".search.json"), model_fingerprint()
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if kept.get("model") != model:
        kept = {"model": model, "steps": steps, "images": images, "rows": search(name, config, steps, images)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return kept["rows"][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CONFIGS), help="default: both")
    parser.add_argument("--search-steps", type=int, default=150)
    parser.add_argument("--search-images", type=int, default=256)
    args = parser.parse_args()

    for name in [args.only] if args.only else CONFIGS:
        config = parse(["--config", str(CONFIGS[name])])
        write_dataset(Path(config.data.folder), 8192)
        best = chosen(name, config, args.search_steps, args.search_images)
        print(f"{name}: learning rate {best['learning_rate']:g}, sampling guidance {best['guidance_scale']:g}", flush=True)
        run(
            with_changes(
                config,
                output=ADAPTERS[name],
                learning_rate=best["learning_rate"],
                guidance_scale=best["guidance_scale"],
                steps=config.optimizer.steps,
            )
        )


if __name__ == "__main__":
    main()

"""Distil the two adapters that ship, PCM and its rival LCM, under the same conditions.

Data, rank, updates, batch and the teacher's guidance are the same. The learning rate and the sampling guidance of each
are chosen by the same small search: short runs, 4 steps, Frechet distance to the teacher. Settings are printed and
kept in adapters/search.json. About 40 minutes on two cores.

    python examples/shapes/distil.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from evaluate import ADAPTERS, Judge, Studio, noise, prompts_of, test_scenes
from model import HERE, RUNS_DIR
from write_dataset import write_dataset

from lora_training.config import TrainConfig
from lora_training.loop import run
from lora_training.train import parse

LEARNING_RATES = (1e-4, 3e-4, 1e-3)
GUIDANCE_SCALES = (1.0, 1.5, 2.0)
SEARCH_SEED = 4  # of the noise; measurements use another
CONFIGS = {"PCM": HERE / "configs" / "pcm_4phase.yaml", "LCM": HERE / "configs" / "lcm.yaml"}


def with_changes(config: TrainConfig, *, output: Path, learning_rate: float, guidance_scale: float, steps: int) -> TrainConfig:
    """The configuration with what the search varies."""
    optimizer = dataclasses.replace(config.optimizer, learning_rate=learning_rate, steps=steps)
    sampling = dataclasses.replace(config.sampling, guidance_scale=guidance_scale)
    return dataclasses.replace(config, output=str(output), optimizer=optimizer, sampling=sampling)


def search(name: str, config: TrainConfig, steps: int, images: int) -> list[dict[str, float]]:
    """Short runs at each learning rate, sampled at each guidance; the best row first."""
    jury, scenes = Judge(), test_scenes(images)
    prompts, latents = prompts_of(scenes), noise(images, SEARCH_SEED)
    rows = []
    for learning_rate in LEARNING_RATES:
        path = RUNS_DIR / "search" / f"{name}-{learning_rate:g}.safetensors"
        if not path.exists():
            run(with_changes(config, output=path, learning_rate=learning_rate, guidance_scale=1.0, steps=steps))
        studio = Studio(adapters={name: path})
        for guidance_scale in GUIDANCE_SCALES:
            method = dataclasses.replace(studio.methods[name], guidance_scale=guidance_scale)
            distance = jury.frechet_to_teacher(studio.generate(method, prompts, latents, steps=4))
            rows.append({"learning_rate": learning_rate, "guidance_scale": guidance_scale, "frechet": round(distance, 3)})
            print(name, rows[-1], flush=True)
    return sorted(rows, key=lambda row: row["frechet"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search-steps", type=int, default=150)
    parser.add_argument("--search-images", type=int, default=512)
    parser.add_argument("--steps", type=int, default=None, help="updates of the final runs; default: the configurations'")
    args = parser.parse_args()

    configs = {name: parse(["--config", str(path)]) for name, path in CONFIGS.items()}
    write_dataset(Path(configs["PCM"].data.folder), 8192)
    found = {name: search(name, config, args.search_steps, args.search_images) for name, config in configs.items()}
    (HERE / "adapters").mkdir(exist_ok=True)
    (HERE / "adapters" / "search.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, config in configs.items():
        best = found[name][0]
        print(f"{name}: learning rate {best['learning_rate']:g}, sampling guidance {best['guidance_scale']:g}")
        run(
            with_changes(
                config,
                output=ADAPTERS[name],
                learning_rate=best["learning_rate"],
                guidance_scale=best["guidance_scale"],
                steps=args.steps or config.optimizer.steps,
            )
        )


if __name__ == "__main__":
    main()

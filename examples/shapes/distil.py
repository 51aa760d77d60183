"""Distil the adapters that ship, PCM and its rival LCM, under the same conditions.

Data, rank, updates, batch and the teacher's guidance are the same. What else each is trained with and the sampling guidance are
chosen by the same small search, one setting after the other: a whole run at each value, sampled at each guidance in 4 steps,
Frechet distance to the teacher's pictures of the same prompts from other noise. (Short runs mislead: they have not taken in the
teacher's guidance yet, so they ask for more of it when sampled.) PCM's jumps begin on the teacher's trajectories; whether the
rival is better off there, and how far down a step of its teacher goes, is searched too. The table is kept beside the adapters.
PCM's choice also makes the further adapters: of as many phases as steps, and of an unguided teacher, which leaves guidance to
the sampler. About two hours on two cores, with one `--only` on each.

    python examples/shapes/distil.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
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

from lora_training.checkpoint import flat
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
    # for one step, where a critic has most to say; from noised pictures, at the learning rate of LCM, which also has one phase
    "pcm_1phase": {
        "objective.name": "pcm", "objective.starts": "data", "objective.num_phases": 1, "optimizer.learning_rate": 1e-4,
        "sampling.num_inference_steps": 1, "adversarial.weight": 0.1, "title": "Shapes PCM, 1 phase, adversarial",
    },
    "pcm_4phase_unguided": {
        "objective.guidance_scale": 1.0, "data.caption_dropout": 0.1,
        "title": "Shapes PCM, 4 phases, unguided teacher",
    }
}  # fmt: skip
SEARCHED: dict[str, dict[str, tuple[Any, ...]]] = {  # one after the other, the others as the best so far had them
    "PCM": {"optimizer.learning_rate": (3e-4, 1e-3, 3e-3)},
    "LCM": {
        "objective.solver_skip": (1, 4, 7),
        "objective.starts": ("data", "teacher"),
        "optimizer.learning_rate": (3e-5, 1e-4, 3e-4),
    },
}
REFERENCE_NOISE, SEARCH_NOISE = 1, 2
GUIDANCE_SCALES = (1.0, 1.5, 2.0)
UNGUIDED_GUIDANCE_SCALES = (2.0, 3.5, 5.0)  # of adapters that have not taken in the teacher's
STEPS = 4
CONFIGS = {name: HERE.parent / "configs" / f"{file}.yaml" for name, file in (("PCM", "shapes_pcm4"), ("LCM", "shapes_lcm"))}
FOLDER = RUNS_DIR / "search" / model_fingerprint()  # of what is trained
Settings = dict[str, Any]  # by their full names


def overridden(config: Path, settings: Mapping[str, Any]) -> TrainConfig:
    """A configuration file with some settings changed, as on the trainer's command line."""
    return parse(["--config", str(config), *(part for key, value in settings.items() for part in (f"--{key}", str(value)))])


def train(config: TrainConfig) -> None:
    """A run, beside others that begin on the same trajectories: of these the first follows the teacher."""
    shared = {"trajectory_cache": str(RUNS_DIR / "trajectories")} if config.objective.starts == "teacher" else {}
    run(dataclasses.replace(config, objective=dataclasses.replace(config.objective, **shared)))


def trained_with(folder: Path, name: str, settings: Settings) -> Path:
    """Where a run with these settings ends."""
    told = "".join(f"-{key.rpartition('.')[2]}-{value}" for key, value in settings.items())
    return folder / f"{name}{told}.safetensors"


def search(
    config: Path,
    values: Mapping[str, Sequence[Any]],
    measured: Callable[[Settings], Iterable[Settings]],
    order: Callable[[Settings], Any],
) -> list[Settings]:
    """Every value of one setting after the other, the other settings as the best so far had them.

    Args:
        config: says where it begins.
        values: the settings that are searched.
        measured: what is found with some of their values, a row for each guidance that is sampled with.
        order: of rows, the best first.

    Returns:
        Settings and what was found with them, the best row first.
    """
    told = dict(flat(dataclasses.asdict(parse(["--config", str(config)]))))
    best = {key: told[key] for key in values}
    rows = sorted((best | found for found in measured(best)), key=order)
    for key, options in values.items():
        for settings in ({**best, key: option} for option in options):
            if not any(settings.items() <= row.items() for row in rows):
                rows += [settings | found for found in measured(settings)]
        rows.sort(key=order)
        best = {key: rows[0][key] for key in best}
    return rows


@cache
def search_set(images: int) -> tuple[list[str], torch.Tensor, FrechetInceptionDistance]:
    """What settings are chosen by: prompts of other scenes, noise, the distance to the teacher's pictures."""
    prompts, latents = prompts_of(held_out_scenes(images, SEARCH_SEED)), noise(images, SEARCH_NOISE)
    metric = Judge().frechet()
    add_reference(metric, teacher_pictures(Studio(adapters={}, fast=True), prompts, REFERENCE_NOISE, TEACHER_STEPS))
    return prompts, latents, metric


def sampled(path: Path, images: int, guidance_scales: Sequence[float]) -> Iterator[Settings]:
    """How near to the teacher a trained file draws, at each guidance."""
    prompts, latents, metric = search_set(images)
    studio = Studio(adapters={path.stem: path}, fast=True)
    for guidance_scale in guidance_scales:
        method = dataclasses.replace(studio.methods[path.stem], guidance_scale=guidance_scale)
        found = distance(metric, studio.generate(method, prompts, latents, STEPS))
        row = {"guidance_scale": guidance_scale, "frechet": round(found, 3)}
        print(path.stem, row, flush=True)
        yield row


def nearest_to_the_teacher(row: Settings) -> float:
    """The order of rows."""
    return row["frechet"]


def search_images(name: str, images: int) -> list[Settings]:
    """Of PCM or LCM; the nearest to the teacher first."""

    def measured(settings: Settings) -> Iterator[Settings]:
        path = trained_with(FOLDER, name, settings)
        if not path.exists():
            train(overridden(CONFIGS[name], settings | {"output": path}))
        return sampled(path, images, GUIDANCE_SCALES)

    return search(CONFIGS[name], SEARCHED[name], measured, nearest_to_the_teacher)


def write_search(output: Path, images: int, rows: list[Settings]) -> None:
    """The table of a search, beside the adapter that it chose."""
    table = {"model": model_fingerprint(), "images": images, "rows": rows}
    write_text(output.with_suffix(".search.json"), json.dumps(table, indent=1) + "\n")


def publish(path: Path, output: Path, config: TrainConfig) -> None:
    """A trained file under its final name, with the settings that were chosen and no path of this machine."""
    settings = dataclasses.replace(read_settings(path), guidance_scale=config.sampling.guidance_scale)
    plain = dataclasses.asdict(dataclasses.replace(config, output=output.name))
    restate(path, output, settings, {"pcm_trainer.config": json.dumps(plain)})
    print(f"{output}: guidance {config.sampling.guidance_scale:g}", flush=True)


def distil_further(name: str, chosen: Settings, images: int) -> None:
    """One of the further adapters, with what the search chose for PCM unless it says another.

    Of one that has not taken in its teacher's guidance the sampling guidance is searched.
    """
    path, output = FOLDER / f"{name}.safetensors", ADAPTERS["PCM"].with_stem(name)
    settings = chosen | {"output": path} | FURTHER[name]
    config = overridden(CONFIGS["PCM"], settings)
    if not path.exists():
        train(config)
    if config.objective.guidance_scale == 1:
        rows = sorted(sampled(path, images, UNGUIDED_GUIDANCE_SCALES), key=nearest_to_the_teacher)
        write_search(output, images, rows)
        config = overridden(CONFIGS["PCM"], settings | {"sampling.guidance_scale": rows[0]["guidance_scale"]})
    publish(path, output, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CONFIGS), help="default: both")
    parser.add_argument("--further", choices=list(FURTHER), help="of PCM's further adapters, this one; default: all")
    parser.add_argument("--search-images", type=int, default=512)
    args = parser.parse_args()

    for name in [args.only] if args.only else CONFIGS:
        write_dataset(Path(parse(["--config", str(CONFIGS[name])]).data.path), 8192)
        rows = search_images(name, args.search_images)
        output = ADAPTERS[name]
        output.parent.mkdir(parents=True, exist_ok=True)
        write_search(output, args.search_images, rows)
        chosen = {key: rows[0][key] for key in SEARCHED[name]}
        sampling = {"sampling.guidance_scale": rows[0]["guidance_scale"]}
        publish(trained_with(FOLDER, name, chosen), output, overridden(CONFIGS[name], chosen | sampling))
        if name != "PCM":
            continue
        for further in [args.further] if args.further else FURTHER:
            distil_further(further, chosen, args.search_images)


if __name__ == "__main__":
    main()

"""Train and measure what the report compares: the objectives, and the four-phase adapter with one setting changed.

    python examples/shapes/ablate.py                  every variant that has no figures yet, one after the other
    python examples/shapes/ablate.py --only 'ct|ctm'  those whose names match
    python examples/shapes/ablate.py --list

All have the same data, batch, seed and updates; each the best of three sampling guidances at every number of steps, by the
distance of 256 pictures of other scenes. A variant takes about a quarter of an hour on one core, and its figures are a
small file in `ablations/`, with the command and a hash of the configuration that made it. Interrupted runs go on where they
stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from distil import (
    CONFIGS,
    GUIDANCE_SCALES,
    REFERENCE_NOISE,
    UNGUIDED_GUIDANCE_SCALES,
    overridden,
    search_set,
    train,
)
from evaluate import (
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
    teacher_state,
)
from write_dataset import write_dataset

from lora_training.config import ModelConfig, TrainConfig, chosen
from lora_training.cpu import fast_precision, precision_here
from lora_training.evaluation.config import EvaluationConfig, OdeConfig
from lora_training.evaluation.methods import Gallery, MethodConfig
from lora_training.evaluation.ode import ode_rows
from lora_training.files import write_text
from pcm_scheduler.lora_file import write_safetensors

from model import HERE, MODEL_DIR, RUNS_DIR, load_pipeline
from scenes import IMAGE_SIZE

FIGURES = HERE / "ablations"
TEACHER = FIGURES / "teacher_statistics.safetensors"  # of the same prompts: of others, distances would be of scenes too
UPDATES = 500
IMAGES, SEARCH_IMAGES = 1024, 256
ODE_PROMPTS, ODE_SOLVER_STEPS = 32, 100
NOISE = 2
STEPS = (1, 2, 4, 8)
BASE = {  # of all rows; else they are as the configuration that ships
    "objective.name": "pcm", "objective.starts": "data", "optimizer.learning_rate": 3e-4,
}  # fmt: skip
ONE_PHASE = {"objective.num_phases": 1, "optimizer.learning_rate": 1e-4}  # what the search for LCM chose


@dataclass(frozen=True)
class Variant:
    """A run.

    Attributes:
        name: of its files.
        table: of the report, in which it is a row.
        settings: what differs from the base configuration.
        seed: of training.
    """

    name: str
    table: str
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def guidance_scales(self) -> tuple[float, ...]:
        """The sampling guidances that it has the choice of."""
        return UNGUIDED_GUIDANCE_SCALES if self.settings.get("objective.guidance_scale") == 1 else GUIDANCE_SCALES


def variants() -> list[Variant]:
    """Every row, the more telling ones first."""
    objectives: dict[str, dict[str, Any]] = {
        "pcm-4": {},
        "lcm": ONE_PHASE | {"objective.name": "lcm"},
        "ctm": ONE_PHASE | {"objective.name": "ctm"},
        "direct": ONE_PHASE | {"objective.name": "direct", "objective.solver_skip": 5},
        "ct": ONE_PHASE | {"objective.name": "ct", "objective.guidance_scale": 1.0, "data.caption_dropout": 0.1},
        "pcm-4-adversarial": {"adversarial.weight": 0.1},
        "pcm-1-adversarial": ONE_PHASE | {"adversarial.weight": 0.1},
    }
    changes: dict[str, dict[str, dict[str, Any]]] = {
        "phases": {"pcm-1": ONE_PHASE},
        "direct": {
            "direct-100": ONE_PHASE
            | {"objective.name": "direct", "objective.solver_skip": 10, "objective.num_solver_steps": 100},
            "direct-unguided": ONE_PHASE
            | {"objective.name": "direct", "objective.solver_skip": 5, "objective.guidance_scale": 1.0},
            "pcm-1-unguided": ONE_PHASE | {"objective.guidance_scale": 1.0},
        },
        "distance": {"l2": {"objective.distance": "l2"}},
        "solver": {"heun": {"objective.solver": "heun"}},
        "solver steps": {f"n-{n}": {"objective.num_solver_steps": n} for n in (20, 100)},
        "solver skip": {
            **{f"skip-{k}": {"objective.solver_skip": k} for k in (2, 4, 7)},
            "direct-4": {"objective.name": "direct", "objective.solver_skip": 3},
            "lcm-skip-4": objectives["lcm"] | {"objective.solver_skip": 4},
            "pcm-1-skip-4": ONE_PHASE | {"objective.solver_skip": 4},
        },
        "starts": {
            "teacher-pcm-4": {"objective.starts": "teacher"},
            "teacher-direct-4": {"objective.starts": "teacher", "objective.name": "direct"},
            "teacher-lcm": objectives["lcm"] | {"objective.starts": "teacher"},
        },
        "rank": {f"rank-{r}": {"lora.rank": r} for r in (8, 64)},
        "edges": {  # as `python -m lora_training.phase_edges` proposes them, by either of its measures
            "edges-epsilon": {"objective.phase_edges": [999, 659, 359, 119]},
            "edges-sample": {"objective.phase_edges": [999, 939, 839, 639]},
        },
        "consistency training": {"ct-4": objectives["ct"] | {"objective.num_phases": 4}},
    }
    rows = [Variant(name, "objectives", settings) for name, settings in objectives.items()]
    rows += [Variant(name, table, settings) for table, group in changes.items() for name, settings in group.items()]
    main = ("pcm-4", "lcm", "ctm")
    rows += [Variant(f"{name}-seed{seed}", "objectives", objectives[name], seed) for seed in (1, 2) for name in main]
    return rows


def configuration(variant: Variant) -> TrainConfig:
    """What the trainer is told."""
    path = RUNS_DIR / "ablations" / model_fingerprint() / f"{variant.name}.safetensors"
    told = BASE | {"optimizer.steps": UPDATES, "seed": variant.seed} | variant.settings | {"output": path}
    config = overridden(CONFIGS["PCM"], told)
    return dataclasses.replace(config, title=f"Shapes, {variant.name}")


def identity(config: TrainConfig) -> str:
    """Changes when the model does, or what the configuration says beside defaults; a new setting changes nothing."""
    plain = dataclasses.replace(config, output="a.safetensors", checkpoint_every=500, title="")
    return hashlib.sha256(json.dumps([model_fingerprint(), chosen(plain)], sort_keys=True).encode()).hexdigest()[:12]


def best_guidance(studio: Studio, name: str, guidance_scales: Sequence[float]) -> dict[int, float]:
    """Of these, for every number of steps, by distance on other scenes; in one step they ask for less of it than in four."""
    prompts, latents, metric = search_set(SEARCH_IMAGES)

    def found(steps: int, guidance_scale: float) -> float:
        method = dataclasses.replace(studio.methods[name], guidance_scale=guidance_scale)
        return distance(metric, studio.generate(method, prompts, latents, steps))

    return {steps: min(guidance_scales, key=lambda guidance_scale: found(steps, guidance_scale)) for steps in STEPS}


def teacher_statistics() -> Path:
    """The file of them; the teacher's pictures are drawn if it is not here, which takes a quarter of an hour."""
    if not TEACHER.exists():
        FIGURES.mkdir(exist_ok=True)
        metric, prompts = Judge().frechet(), prompts_of(held_out_scenes(IMAGES))
        add_reference(metric, teacher_pictures(Studio({}, fast=True), prompts, REFERENCE_NOISE, TEACHER_STEPS))
        write_safetensors(teacher_state(metric), TEACHER, {"images": str(IMAGES), "model": model_fingerprint()})
    return TEACHER


def measure(path: Path, guidance_scales: Sequence[float]) -> dict[str, Any]:
    """Distance and alignment of an adapter at every number of steps, with the best of these guidances at each."""
    studio, jury = Studio({path.stem: path}, fast=True), Judge()
    best = best_guidance(studio, path.stem, guidance_scales)
    scenes, latents = held_out_scenes(IMAGES), noise(IMAGES, NOISE)
    prompts, figures = prompts_of(scenes), {}
    for steps, guidance_scale in best.items():
        method = dataclasses.replace(studio.methods[path.stem], guidance_scale=guidance_scale)
        pictures = studio.generate(method, prompts, latents, steps, progress=f"{path.stem}, {steps} steps")
        right = jury.alignment(pictures, scenes)
        frechet = jury.frechet_to_teacher(pictures, teacher_statistics())
        figures[str(steps)] = {"guidance_scale": guidance_scale, "frechet": frechet} | right
    return {"eta": studio.methods[path.stem].eta, "images": IMAGES, "steps": figures}


def keep(variant: Variant, figures: dict[str, Any]) -> None:
    """For the report."""
    write_text(FIGURES / f"{variant.name}.json", json.dumps(figures, indent=1) + "\n")


def figures_of(variant: Variant) -> dict[str, Any]:
    """What was measured of it; nothing if it was another configuration, or never."""
    file = FIGURES / f"{variant.name}.json"
    figures = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return figures if figures.get("identity") == identity(configuration(variant)) else {}


def trained(variant: Variant) -> Path:
    """Its file; trains it if that is not here, and goes on where it was interrupted."""
    config = configuration(variant)
    path = Path(config.output)
    if not path.exists():
        write_dataset(Path(config.data.path), 8192)
        AcceleratorState._reset_state()  # accelerate would keep the precision of the run before
        train(config)
    return path


def all_figures(variant: Variant) -> dict[str, Any]:
    """Of its pictures, with what they are of."""
    config, command = configuration(variant), f"python examples/shapes/ablate.py --only {variant.name}"
    told = {"name": variant.name, "table": variant.table, "settings": variant.settings, "seed": variant.seed}
    told |= {"updates": UPDATES, "precision": fast_precision(), "identity": identity(config), "command": command}
    return told | measure(trained(variant), variant.guidance_scales)


def measure_ode(asked: Sequence[Variant]) -> None:
    """Adds to the figures how far they leave the teacher's ODE; solves it once for all. What is no longer here is trained."""
    left = [variant for variant in asked if (found := figures_of(variant)) and not found.get("ode")]
    if not left:
        return
    # guided as in training, not as pictures are best: an adapter's own guidance is in its weights
    methods = tuple(MethodConfig(variant.name, str(trained(variant)), guidance_scale=1.0) for variant in left)
    model = ModelConfig(path=str(MODEL_DIR))
    ode = OdeConfig(ODE_PROMPTS, steps=STEPS, solver_steps=ODE_SOLVER_STEPS)
    device = torch.device("cpu")
    precision = precision_here("bf16", device)
    config = EvaluationConfig(model, methods, size=(IMAGE_SIZE, IMAGE_SIZE), precision=precision, ode=ode)
    gallery = Gallery(load_pipeline(MODEL_DIR), methods)
    rows = ode_rows(gallery, config, prompts_of(held_out_scenes(ODE_PROMPTS)), NOISE, device)
    for variant in left:
        errors = {str(row["steps"]): row["ode_error"] for row in rows if row["method"] == variant.name}
        keep(variant, figures_of(variant) | {"ode": errors})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression: those whose whole name matches")
    parser.add_argument("--list", action="store_true", help="name them, and whether they have figures")
    args = parser.parse_args()
    asked = [variant for variant in variants() if not args.only or re.fullmatch(args.only, variant.name)]
    for variant in asked:
        figures = figures_of(variant)
        if args.list:
            print(f"{variant.name:30} {'measured' if figures else ''}{', ODE errors' if 'ode' in figures else ''}")
        elif not figures:
            figures = all_figures(variant)
            keep(variant, figures)
            print(f"{variant.name}: {figures['steps']['4']}", flush=True)
    if not args.list:
        measure_ode(asked)


if __name__ == "__main__":
    main()

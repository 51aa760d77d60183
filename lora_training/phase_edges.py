"""Phase edges where this teacher's ODE bends, for `objective.phase_edges`.

    python -m lora_training.phase_edges --config examples/configs/shapes_pcm4.yaml
    python -m lora_training.phase_edges --measure sample --config examples/configs/shapes_pcm4.yaml

`--measure epsilon` is of the ODE's direction, the default; `--measure sample` of the x_0 that it leads to, which puts the edges
higher: see `pcm_scheduler/curvature.py`. Otherwise this takes the trainer's own configuration and overrides: the model, the
data (for prompts), the guidance, the solver's grid and the number of phases. It prints where the bend is and the edges, and
trains nothing.
"""

from __future__ import annotations

import argparse
import sys

import torch
from tqdm import tqdm

from pcm_scheduler.curvature import MEASURES, Measure, edges_by_curvature, measure_curvature
from pcm_scheduler.phases import PhaseGrid

from .backbones.conditioning import expanded
from .loop import Run
from .randomness import generator_of
from .teacher import draw_guidance, guided_prediction, levels_of
from .train import parse

SAMPLES = 32
_FINEST = 250  # points that the ODE is followed on, at most; first order, so a few percent off at 50


def teacher_curvature(run: Run, samples: int = SAMPLES, of: Measure = "epsilon") -> torch.Tensor:
    """The curvature of the run's teacher, guided as its objective guides it, on a fine grid; of `measure_curvature`.

    Args:
        run: of which nothing is trained.
        samples: prompts of its data, each from its own noise.
        of: whose change, see there.
    """
    backbone, config, device = run.backbone, run.config, run.accelerator.device
    steps = config.objective.num_solver_steps
    grid = PhaseGrid.even(1, steps * max(1, _FINEST // steps) if _FINEST % steps == 0 else steps, run.grid.num_train_timesteps)
    levels = levels_of(backbone, grid)
    generator = generator_of(config.seed, 0)
    latents, conditioning = run.data.draw(samples, generator, device)
    empty = {name: tensor.to(device, torch.float32) for name, tensor in run.data.empty.items()}
    guidance = draw_guidance(config.objective, samples, generator)
    teacher = guided_prediction(backbone, levels, conditioning, expanded(empty, samples), guidance)
    noise = torch.randn(latents.shape, generator=generator).to(device)
    with tqdm(total=grid.num_solver_steps + 1, desc="curvature") as bar, run.accelerator.autocast():

        def denoiser(sample: torch.Tensor, n: int) -> torch.Tensor:
            bar.update()
            return teacher(sample, torch.full((samples,), n, device=device))

        return measure_curvature(denoiser, noise, grid, backbone.alphas, backbone.sigmas, of)


def main() -> None:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--measure", choices=MEASURES, default="epsilon")
    chosen, settings = own.parse_known_args()
    config = parse(settings)
    try:
        run = Run(config)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"phase_edges: {error}")
    objective = run.config.objective
    curvature = teacher_curvature(run, of=chosen.measure)
    shares = [part.sum() / curvature.sum() for part in curvature.tensor_split(min(10, len(curvature)))]
    parts = "tenth" if len(shares) == 10 else f"of {len(shares)} parts"
    print(
        f"share of the bend in each {parts} of the schedule, from the end of the ODE: " + ", ".join(f"{s:.0%}" for s in shares)
    )
    grid = edges_by_curvature(
        curvature, objective.num_phases, objective.num_solver_steps, num_train_timesteps=run.grid.num_train_timesteps
    )
    print(f"objective.phase_edges: [{','.join(map(str, grid.edges[1:]))}]")


if __name__ == "__main__":
    main()

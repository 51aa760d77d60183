"""Adapters beside their teacher's ODE, with the prompts and the guidance they were trained for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from pcm_scheduler.lora_file import AdapterSettings
from pcm_scheduler.phases import PhaseGrid

from ..backbones import FAMILIES, Backbone
from ..backbones.conditioning import expanded
from ..config import DTYPES
from ..teacher import Levels, Prediction, guided_prediction, levels_of
from .config import EvaluationConfig
from .methods import Gallery
from .trajectory import END, States, ode_errors, student_states, teacher_states


def ode_rows(
    gallery: Gallery, config: EvaluationConfig, prompts: Sequence[str], seed: int, device: torch.device
) -> list[dict[str, Any]]:
    """The error at the end, and at every edge that is visited, of each adapter at each number of steps.

    Means over prompts, of x_t's elements, whose variance is about 1. Adapters that are sampled with new noise have one in a
    single step alone. The ODE is that of the betas which an adapter's file states, as in drawing.
    """
    measured = _measured(gallery, config)
    if not measured:
        return []
    found: dict[tuple[str, int], list[dict[int, torch.Tensor]]] = {}
    count = min(config.ode.count, len(prompts))
    for start in range(0, count, config.batch_size):
        numbers = range(start, min(start + config.batch_size, count))
        for case, errors in _batch_errors(gallery, config, measured, prompts, numbers, seed, device):
            found.setdefault(case, []).append(errors)
    rows = []
    for (name, steps), batches in found.items():
        means = {timestep: torch.cat([batch[timestep] for batch in batches]).mean().item() for timestep in batches[0]}
        row: dict[str, Any] = {"method": name, "steps": steps, "ode_error": means.pop(END)}
        rows.append(row | {f"at {timestep}": error for timestep, error in means.items()})
    return rows


def _batch_errors(
    gallery: Gallery,
    config: EvaluationConfig,
    measured: Mapping[str, Sequence[int]],
    prompts: Sequence[str],
    numbers: Sequence[int],
    seed: int,
    device: torch.device,
) -> Iterator[tuple[tuple[str, int], dict[int, torch.Tensor]]]:
    """Of each method at each number of steps, the errors of a few prompts, by their number: (N,) by timestep."""
    names = list(measured)
    family = FAMILIES[config.model.family]
    backbone = family(gallery.pipe)
    texts = [prompts[i] for i in numbers]
    conditioning = backbone.encode_prompts(texts)
    frame = {name: tensor.to(device) for name, tensor in backbone.frame_conditioning(config.size, (0, 0), config.size).items()}
    conditioning, empty = conditioning | expanded(frame, len(texts)), expanded(backbone.empty_conditioning(), len(texts))
    noise = gallery.noise(numbers, config.size, seed).to(device)

    def predicting(backbone: Backbone, levels: Levels, guidance_scale: float) -> Prediction:
        """Of the network as it is now."""
        predict = guided_prediction(backbone, levels, conditioning, empty, torch.full((len(texts),), guidance_scale))

        def cast(sample: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device.type, DTYPES[config.precision], enabled=config.precision != "no"):
                return predict(sample, n)

        return cast

    fine = _fine_grid(gallery, names, config.ode.solver_steps)
    solved: dict[tuple[float, ...], States] = {}
    for name in names:
        settings = gallery.settings[name]
        grid, sampled = settings.grid, max(1.0, gallery.guidance_scale(name))  # below 1 pipelines draw without guidance
        # of an unguided teacher guidance is left to sampling, and the ODE to follow is the one guided so
        guidance_scale = sampled if settings.training_guidance_scale == 1 else settings.training_guidance_scale
        gallery.put_in_place(name)
        backbone = family(gallery.pipe)  # on the betas of the scheduler that is in place
        ode = (guidance_scale, *backbone.alphas.tolist())
        if ode not in solved:
            gallery.put_in_place(None)
            levels = levels_of(backbone, fine)
            solved[ode] = teacher_states(predicting(backbone, levels, guidance_scale), levels, noise, fine)
            gallery.put_in_place(name)
        levels = levels_of(backbone, grid)
        predict = predicting(backbone, levels, sampled)
        for steps in measured[name]:
            yield (name, steps), ode_errors(student_states(predict, levels, noise, grid, steps), solved[ode])


def _measured(gallery: Gallery, config: EvaluationConfig) -> dict[str, list[int]]:
    """The methods that are measured, and in which numbers of steps."""
    if config.ode.count == 0:
        return {}
    names = [
        method.name
        for method in config.methods
        if method.name in gallery.settings
        and method.scheduler == "pcm"
        and not method.timesteps  # it measures numbers of steps, which stop at the grid's own
        and _states_its_ode(gallery.stated[method.name])
    ]
    # an adapter that is sampled with new noise leaves the ODE by that noise, if not in a single step
    found = {name: [k for k in config.ode.steps if k == 1 or gallery.eta(name) == 0] for name in names}
    return {name: steps for name, steps in found.items() if steps}


def _states_its_ode(stated: AdapterSettings | None) -> bool:
    """Whether an adapter's file says the guidance of the ODE that it was trained on; a number of phases does not."""
    return stated is not None and not stated.inferred


def _fine_grid(gallery: Gallery, names: Sequence[str], solver_steps: int) -> PhaseGrid:
    """That the teacher is solved on: one for all adapters."""
    edges = {edge for name in names for edge in gallery.settings[name].grid.edges[1:]}
    lengths = {gallery.settings[name].grid.num_train_timesteps for name in names}
    if len(lengths) > 1:
        raise ValueError(f"adapters of {sorted(lengths)} training timesteps are not beside each other")
    return PhaseGrid.from_timesteps(sorted(edges), solver_steps, lengths.pop())


def check_ode(gallery: Gallery, config: EvaluationConfig) -> None:
    """Refuse numbers of steps that the error cannot be measured with, before anything is drawn.

    Raises:
        ValueError: which, and why.
    """
    measured = _measured(gallery, config)
    if not measured:
        return
    try:
        _fine_grid(gallery, list(measured), config.ode.solver_steps)
    except ValueError as error:
        raise ValueError(f"ode.solver_steps: {error}") from error
    for name, steps in measured.items():
        most = gallery.settings[name].grid.num_solver_steps
        wrong = [k for k in steps if not 1 <= k <= most]
        if wrong:
            raise ValueError(f"ode.steps must be from 1 to {most} for {name}; got {wrong[0]}.")

"""What a run would do, in words, and one real step of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch

from .config import DTYPES
from .loop import Run


def describe(run: Run) -> Iterator[str]:
    """Line by line: data, phases, adapter, critic, work and memory."""
    config, backbone, data = run.config, run.backbone, run.data
    yield f"model      {config.model.path} ({backbone.family}, {backbone.prediction_type}, T = {backbone.num_train_timesteps})"
    yield f"data       {config.data.path}: {data.describe()}"
    height, width = (side * backbone.latent_scale for side in run.latent_shape[-2:])
    frames = f"{run.latent_shape[1]} frames of " if len(run.latent_shape) == 4 else ""
    yield f"a sample   {' x '.join(map(str, run.latent_shape))} latents: {frames}{height} x {width} pixels"
    for stage, grid in enumerate(run.grids):
        part = f"stage {stage + 1}: " if len(run.grids) > 1 else ""
        edges = ", ".join(map(str, grid.edges))
        yield f"phases     {part}{grid.num_phases}, edges {edges}, {grid.num_solver_steps} solver steps"
    steps = config.sampling.num_inference_steps
    yield f"sampling   {steps} steps at {', '.join(map(str, run.grid.sampling_timesteps(steps)))}"
    low, high = config.objective.guidance_range
    guidance = "none" if high == 1 else f"{low:g}" if low == high else f"{low:g} to {high:g}"
    yield f"teacher    {config.objective.solver}, {config.objective.solver_skip} grid point(s) a step, guidance {guidance}"
    if run.trajectories:
        kept, every = config.objective.trajectories_kept, config.objective.trajectory_every
        batch = config.optimizer.batch_size
        yield f"starts     on its trajectories from noise: {kept} x {batch} are kept, {batch} new ones every {every} batches"
    count = sum(p.numel() for p in run.student.parameters.values())
    yield f"trained    {run.student.describe()}, {count / 1e6:.2f} M parameters, {_files(run, count)}: {run.output}"
    judged = sum(p.numel() for p in run.critic.parameters.values()) if run.critic else 0
    critic = f"{run.critic.describe()}, {judged / 1e6:.2f} M parameters" if run.critic else "none: adversarial.weight is 0"
    yield f"critic     {critic}"
    seen = (
        f"; every {config.data.noun} is seen {run.samples * config.optimizer.steps / len(data):.1f} times on average"
        if len(data)
        else ""
    )
    yield f"work       {config.optimizer.steps} steps of {run.samples} samples{seen}"
    yield f"precision  {str(DTYPES[run.precision]).removeprefix('torch.')}; what is trained is kept in float32"
    averages = sum(p.numel() for p in run.student.target_parameters.values())
    unets = _bytes(run.student.unets) - 4 * count - 4 * averages
    others = _bytes(run.critic.features.frozen) if run.critic else 0
    trained = 4 * (4 * (count + judged) + averages)  # weights, gradients, two moments; and the average
    yield (
        f"memory     {unets / 2**30:.2f} GiB of frozen UNet, "
        + (f"{others / 2**30:.2f} GiB of VAE and networks that the critic looks through, " if others else "")
        + f"{trained / 2**30:.2f} GiB of what is trained, its gradients and optimiser; activations as measured below"
    )
    going_on = run.checkpoints.latest()
    yield f"start      {going_on if going_on and config.resume == 'latest' else 'from the first step'}"


def _files(run: Run, count: int) -> str:
    """How large what is written will be, in fp16: what is trained, and an image adapter beneath it."""
    image = getattr(run.student, "image", None)
    beneath = sum(parts[name].numel() for parts in image.modules.values() for name in ("down", "up")) if image else 0
    size = f"{2 * (count + beneath) / 2**20:.1f} MiB"
    video = run.config.trainable == "lora" and len(run.latent_shape) == 4
    return f"a file of {size}, and as much again in its parts for ComfyUI" if video else f"a file of {size}"


def _bytes(networks: Iterable[torch.nn.Module]) -> int:
    """Of all their parameters."""
    return sum(p.numel() * p.element_size() for network in networks for p in network.parameters())


def dry_run(run: Run) -> None:
    """Print what would happen, take one real step, and write nothing but the cache of latents."""
    for line in describe(run):
        print(line, flush=True)
    steps, batches = run.config.optimizer.steps, run.config.optimizer.gradient_accumulation * run.config.optimizer.steps
    whole = 0.0
    if run.trajectories:
        begun = time.perf_counter()
        run.follow_teacher(0)
        seconds, kept = time.perf_counter() - begun, run.config.objective.trajectories_kept
        whole += seconds * (1 + run.trajectories.oldest(batches - 1) / kept)
        size = f"{run.trajectories.size / 2**30:.2f} GiB of the computer's memory"
        print(f"first      the {kept} batches of trajectories: {seconds:.2f} s, {size}", flush=True)
    begun = time.perf_counter()
    loss = run.step(0)
    seconds = time.perf_counter() - begun
    whole += seconds * steps
    on_gpu = run.accelerator.device.type == "cuda"
    peak = f", {'peak ' if on_gpu else ''}{run.memory / 2**30:.2f} GiB{'' if on_gpu else ' held after it'}"
    pace = timedelta(seconds=round(whole))
    print(f"one step   loss {loss:.4f}, {seconds:.2f} s{peak}; at this pace the run takes {pace} (first steps are slower)")

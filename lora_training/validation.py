"""What a run looks like while it goes on: a sheet of pictures from fixed seeds, the loss of fixed samples, consistency."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from pcm_scheduler.phases import PhaseGrid
from pcm_scheduler.scheduling_pcm import PCMScheduler

from .backbones import Backbone
from .config import ValidationConfig
from .data.latent_cache import TrainingData
from .files import replaced
from .objectives import ConsistencyObjective, total
from .randomness import generator_of

_STREAM = 2**32 - 1  # of random numbers, beside those of training's processes


@dataclass(frozen=True)
class Sheet:
    """Pictures of the same prompts and noise, a row for every (steps, guidance)."""

    rows: tuple[tuple[int, float], ...]
    latents: torch.Tensor  # (rows, prompts, 4, h, w), of clips (rows, prompts, 4, F, h, w)
    pictures: tuple[tuple[Image.Image, ...], ...]

    def save(self, path: Path) -> None:
        """As one PNG with names at the left; to a temporary name first."""
        width, height = self.pictures[0][0].size
        label, gap = 120, 4
        columns = len(self.pictures[0])
        sheet = Image.new("RGB", (label + columns * (width + gap), len(self.rows) * (height + gap)), "white")
        draw = ImageDraw.Draw(sheet)
        for i, ((steps, guidance), row) in enumerate(zip(self.rows, self.pictures, strict=True)):
            draw.text((6, i * (height + gap) + height // 2), f"{steps} steps, g {guidance:g}", fill="black")
            for j, picture in enumerate(row):
                sheet.paste(picture, (label + j * (width + gap), i * (height + gap)))
        with replaced(path) as temporary:
            sheet.save(temporary, format="PNG")

    def consistency(self) -> float:
        """Mean cosine between the latents of the fewest and of the most steps, at the lowest guidance; 1: the same picture."""
        lowest = min(guidance for _, guidance in self.rows)
        ends = sorted((steps, i) for i, (steps, guidance) in enumerate(self.rows) if guidance == lowest)
        few, many = (self.latents[i].flatten(1).float() for i in (ends[0][1], ends[-1][1]))
        return torch.nn.functional.cosine_similarity(few, many).mean().item()


@contextmanager
def _evaluating(network: torch.nn.Module) -> Iterator[None]:
    """No dropout within it. Every module keeps its own mode beyond it: in a UNet that evaluates, PEFT's dropout trains."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _whole_pipeline(backbone: Backbone) -> Iterator[None]:
    """Text encoders and VAE beside the UNet, and back to where they were."""
    parts = (backbone.vae, *backbone.text_encoders)
    homes = [next(part.parameters()).device for part in parts]
    for part in parts:
        part.to(backbone.unet.device)
    try:
        yield
    finally:
        for part, home in zip(parts, homes, strict=True):
            part.to(home)


def latent_shape(data: TrainingData) -> tuple[int, ...]:
    """Of one sample's latents in the largest bucket, (4, h, w) or (4, F, h, w)."""
    return tuple(data.buckets[data.largest_bucket].parts[0].tensors["latent_means"].shape[2:])


@torch.no_grad()
def draw_sheet(
    backbone: Backbone,
    grid: PhaseGrid,
    config: ValidationConfig,
    prompts: Sequence[str],
    shape: tuple[int, ...],
    eta: float,
    at_once: int,
    stopping: Callable[[], bool] = lambda: False,
) -> Sheet | None:
    """The student's pictures through the family's own pipeline; None if it was to stop before they were drawn.

    Args:
        backbone: with its adapter.
        grid: sampled on.
        config: steps, guidance scales, seed.
        prompts: one column each.
        shape: of one sample's latents, (4, h, w) or (4, F, h, w).
        eta: of the sampler.
        at_once: prompts in a call of the pipeline. They change nothing beyond rounding: every picture has noise of its own.
        stopping: asked before every row.
    """
    pipe, before = backbone.pipe, backbone.pipe.scheduler
    pipe.scheduler = PCMScheduler.from_config(
        before.config, num_solver_steps=grid.num_solver_steps, phase_edges=list(grid.edges), num_phases=grid.num_phases
    )
    pipe.set_progress_bar_config(disable=True)
    height, width = (side * backbone.latent_scale for side in shape[-2:])
    noise = torch.stack([torch.randn(shape, generator=generator_of(config.seed, i)) for i in range(len(prompts))])
    parts = torch.arange(len(prompts)).split(at_once)
    rows = tuple((steps, guidance) for guidance in config.guidance_scales for steps in config.steps)
    latents, pictures = [], []
    try:
        with backbone.alone, _whole_pipeline(backbone), _evaluating(backbone.unet):
            for steps, guidance in rows:
                if stopping():
                    return None
                call = {"height": height, "width": width, "eta": eta, "num_inference_steps": steps, "guidance_scale": guidance}
                drawn = [
                    backbone.sample_latents(
                        noise[part].to(backbone.unet.device),
                        prompt=[prompts[i] for i in part],
                        generator=[generator_of(config.seed, int(i), 1) for i in part],
                        **call,
                    )
                    for part in parts
                ]
                row = torch.cat(drawn)
                latents.append(row.cpu())
                pictures.append(tuple(backbone.pictures(row)))
    finally:
        pipe.scheduler = before
    return Sheet(rows, torch.stack(latents), tuple(pictures))


@torch.no_grad()
def fixed_loss(
    objective: ConsistencyObjective,
    data: TrainingData,
    batch_size: int,
    seed: int,
    autocast: Callable[[], AbstractContextManager[None]],
    batches: int = 4,
) -> float:
    """The loss of the same samples, noise and grid points at every call, so that its course is not hidden by chance.

    Args:
        objective: whose loss.
        data: drawn from.
        batch_size: samples in a batch.
        seed: of what is drawn.
        autocast: of the run, entered for the networks alone: on the CPU it refuses to stack the data's fp16.
        batches: to take the mean of.
    """
    device = objective.backbone.unet.device
    empty = {name: tensor.to(device, torch.float32) for name, tensor in data.empty.items()}
    summed = 0.0
    for i in range(batches):
        generator = generator_of(seed, _STREAM, i)
        batch = data.draw(batch_size, generator, device)
        with autocast(), _evaluating(objective.backbone.unet):
            summed += total(objective.losses(*batch, empty, generator)).item()
    return summed / batches

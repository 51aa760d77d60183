"""The run: one training step after another, a progress bar, checkpoints in and out, and the adapter file at the end."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import cast_training_params
from tqdm import tqdm

from pcm_scheduler import __version__
from pcm_scheduler.lora_file import AdapterSettings, write_adapter

from .backbones import StableDiffusion15, load_backbone
from .checkpoint import load_checkpoint, save_checkpoint
from .config import OptimizerConfig, TrainConfig
from .cpu import keep_freed_memory, use_plain_attention
from .data.latent_cache import TrainingData, load_training_data
from .objectives import ConsistencyObjective
from .randomness import generator_of


def run(config: TrainConfig) -> Path:
    """Train one adapter; returns the file it was written to.

    A run that was interrupted goes on from its last checkpoint and ends with the same weights: the batch and the noise of
    a step are functions of the seed and the step's number.

    Raises:
        RuntimeError: the loss is not a number; the checkpoints before it are kept.
    """
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    set_seed(config.seed)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    output = Path(config.output)
    checkpoint = output.with_suffix(".checkpoint.safetensors")
    backbone = load_backbone(config.model)
    if accelerator.device.type == "cpu":
        use_plain_attention(backbone.unet)
    for part in (backbone.unet, backbone.vae, backbone.text_encoder):
        part.to(accelerator.device)
    cache = Path(config.data.cache) if config.data.cache else output.parent / "cache"
    with accelerator.main_process_first():
        data = load_training_data(config.data, backbone, config.model.path, cache)
    backbone.vae.to("cpu")
    backbone.text_encoder.to("cpu")

    grid = config.grid(backbone.num_train_timesteps)
    parameters = backbone.add_adapter(config.lora, config.seed)
    cast_training_params(backbone.unet, dtype=torch.float32)
    optimizer = torch.optim.AdamW(parameters, lr=config.optimizer.learning_rate, weight_decay=config.optimizer.weight_decay)
    optimizer = accelerator.prepare(optimizer)  # the UNet stays bare: only the adapter's gradients travel, in _average
    objective = ConsistencyObjective(backbone, grid, config.objective.guidance_scale, config.objective.huber_c)
    told = json.dumps({k: v for k, v in asdict(config).items() if k not in ("output", "title", "checkpoint_every")})
    names = {name: p for name, p in backbone.unet.named_parameters() if p.requires_grad}
    first = load_checkpoint(checkpoint, names, optimizer.optimizer, run=told) if checkpoint.exists() else 0

    bar = tqdm(
        range(first, config.optimizer.steps), initial=first, total=config.optimizer.steps,
        desc=output.stem, disable=not accelerator.is_main_process, mininterval=1.0,
    )  # fmt: skip
    smoothed = None
    for step in bar:
        generator = generator_of(config.seed, accelerator.process_index, step)
        latents, prompt_embeds = _batch(data, config.optimizer.batch_size, generator, accelerator.device)
        learning_rate = _learning_rate(config.optimizer, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        with accelerator.autocast():
            loss = objective(latents, prompt_embeds, data.empty_embeds.to(accelerator.device, torch.float32), generator)
        optimizer.zero_grad()
        accelerator.backward(loss)
        _average_gradients(accelerator, parameters)
        accelerator.clip_grad_norm_(parameters, config.optimizer.max_grad_norm)
        optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            raise RuntimeError(
                f"The loss is {value} at step {step}. Lower optimizer.learning_rate; the last good state is {checkpoint}."
            )
        smoothed = value if smoothed is None else 0.98 * smoothed + 0.02 * value
        shown = {"loss": f"{smoothed:.4f}", "lr": f"{learning_rate:.1e}"} | _memory()
        bar.set_postfix(shown, refresh=False)
        due = (step + 1) % config.checkpoint_every == 0 and step + 1 < config.optimizer.steps
        if due and accelerator.is_main_process:
            save_checkpoint(checkpoint, names, optimizer.optimizer, step + 1, run=told)

    if accelerator.is_main_process:
        _write(config, backbone, output)
        checkpoint.unlink(missing_ok=True)
    accelerator.end_training()
    return output


def _write(config: TrainConfig, backbone: StableDiffusion15, output: Path) -> None:
    grid = config.grid(backbone.num_train_timesteps)
    settings = AdapterSettings(
        base_model=backbone.family,
        phase_edges=grid.edges,
        num_solver_steps=grid.num_solver_steps,
        num_train_timesteps=grid.num_train_timesteps,
        prediction_type=backbone.prediction_type,
        training_guidance_scale=config.objective.guidance_scale,
        guidance_scale=config.sampling.guidance_scale,
        num_inference_steps=config.sampling.num_inference_steps,
        eta=1.0 if config.objective.name == "lcm" else 0.0,
    )
    extra = {"pcm_trainer.version": __version__, "pcm_trainer.config": json.dumps(asdict(config))}
    write_adapter(output, backbone.adapter_state(), backbone.adapter_alphas(), settings, config.title, extra)


def _average_gradients(accelerator: Accelerator, parameters: list[torch.nn.Parameter]) -> None:
    """Over processes, as one flat tensor; nothing to do in one process."""
    if accelerator.num_processes == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _learning_rate(config: OptimizerConfig, step: int) -> float:
    """Linear warm-up, then constant or a cosine to zero; a function of the step, so that resuming needs no state."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def _batch(
    data: TrainingData, batch_size: int, generator: torch.Generator, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents drawn from their posterior, and text embeddings, float32."""
    which = torch.randint(len(data), (batch_size,), generator=generator)
    mean, std = data.latent_means[which].float(), data.latent_stds[which].float()
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    return latents.to(device), data.prompt_embeds[which].float().to(device)


def _memory() -> dict[str, str]:
    return {"gpu": f"{torch.cuda.max_memory_allocated() / 2**30:.1f}GiB"} if torch.cuda.is_available() else {}

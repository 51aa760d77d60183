"""Train the shapes UNet jointly with its text encoder on cached latents, and save the pipeline; about 90 minutes on two cores.

The text encoder first learns for a few minutes to name what a caption says (as CLIP's has learned from pictures
before Stable Diffusion sees it); then both are trained on the noise prediction. Places are decided at the highest noise
levels, where the plain loss hardly looks, and a trace of the picture is left even at the last timestep of Stable
Diffusion's schedule, although sampling starts from pure noise. So a last stage weighs those levels up, shows pure noise
at the last, and keeps up a little of the first lesson, for by then the text encoder has begun to forget the places.

    python examples/shapes/train_denoiser.py
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from lora_training.cpu import keep_freed_memory, use_plain_attention
from pcm_scheduler.lora_file import write_safetensors

from attributes import AttributeHeads, attribute_loss
from model import MODEL_DIR, RUNS_DIR, assemble_pipeline, build_scheduler, build_text_encoder, build_tokenizer, build_unet
from scenes import TRAIN_SEED, all_wordings, caption, labels, render, sample_scene
from training import train

OMIT = 0.12  # each of size, place, background is left unsaid this often
CAPTION_DROPOUT = 0.1  # for classifier-free guidance
LAYOUT_FROM, LAYOUT_WEIGHT = 600, 50.0  # timesteps that decide where things are, and the most that one of them weighs


@dataclass(frozen=True)
class Stage:
    """A part of the training of UNet and text encoder, from the weights that the one before has left."""

    name: str
    seed: int
    steps: int
    learning_rate: float
    layout: bool  # look mostly at the noise levels that decide where things are
    reading_weight: float  # of naming the scene, beside the noise prediction


STAGES = (
    Stage("all", seed=1, steps=6000, learning_rate=1.2e-3, layout=False, reading_weight=0.0),
    Stage("layout", seed=2, steps=6000, learning_rate=0.8e-3, layout=True, reading_weight=0.02),
)


@torch.no_grad()
def cached_moments(vae: AutoencoderKL, count: int) -> dict[str, torch.Tensor]:
    """Mean and standard deviation of the latents of `count` scenes, (count, 4, 16, 16) each, fp16; from disk if there."""
    path = RUNS_DIR / f"moments-{count}.safetensors"
    if not path.exists():
        parts: dict[str, list[torch.Tensor]] = {"mean": [], "std": []}
        for j in tqdm(range(0, count, 64), desc="encode"):
            images = render([sample_scene(TRAIN_SEED, i) for i in range(j, min(j + 64, count))])
            with torch.autocast("cpu", torch.bfloat16):
                posterior = vae.encode(images).latent_dist
            parts["mean"].append(posterior.mean.half())
            parts["std"].append(posterior.std.half())
        write_safetensors({name: torch.cat(tensors) for name, tensors in parts.items()}, path)
    return load_file(path)


class CaptionReader(nn.Module):
    """The text encoder with heads that name the scene from its pooled output."""

    def __init__(self, text_encoder: nn.Module, width: int):
        super().__init__()
        self.text_encoder = text_encoder
        self.heads = AttributeHeads(width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--scenes", type=int, default=20480)
    parser.add_argument("--reading-steps", type=int, default=1500)
    args = parser.parse_args()

    keep_freed_memory()
    torch.manual_seed(0)
    vae_folder = next(folder / "vae" for folder in (RUNS_DIR, MODEL_DIR) if (folder / "vae" / "config.json").is_file())
    vae = AutoencoderKL.from_pretrained(vae_folder).float().eval().requires_grad_(False)
    vae.register_to_config(_name_or_path="")  # no path of this machine in what ships
    tokenizer = build_tokenizer(all_wordings())
    text_encoder, unet, scheduler = build_text_encoder(tokenizer), build_unet(), build_scheduler()
    scenes = [sample_scene(TRAIN_SEED, i) for i in range(args.scenes)]
    moments = cached_moments(vae, args.scenes)
    use_plain_attention(unet)
    text_encoder.set_attn_implementation("eager")

    def tokens(indices: list[int], generator: torch.Generator, dropout: float) -> tuple[torch.Tensor, list[bool]]:
        """Captions in random wordings, (batch, tokens), and which of them were dropped."""
        rng = np.random.default_rng(torch.randint(2**62, (), generator=generator).item())
        dropped = (rng.random(len(indices)) < dropout).tolist()
        texts = ["" if drop else caption(scenes[i], rng, OMIT) for i, drop in zip(indices, dropped, strict=True)]
        padded = tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
        return torch.tensor(padded.input_ids), dropped

    reader = CaptionReader(text_encoder, text_encoder.config.hidden_size)

    def reading_loss(generator: torch.Generator) -> torch.Tensor:
        which = torch.randint(len(scenes), (128,), generator=generator).tolist()
        ids, _ = tokens(which, generator, dropout=0.0)
        return attribute_loss(reader.heads(text_encoder(ids).pooler_output), labels([scenes[i] for i in which]))

    train(
        reader,
        reading_loss,
        steps=args.reading_steps,
        peak_learning_rate=1e-3,
        checkpoint=RUNS_DIR / "reader.safetensors",
    )

    def denoising_loss(generator: torch.Generator, stage: Stage) -> torch.Tensor:
        which = torch.randint(len(scenes), (args.batch,), generator=generator)
        mean, std = moments["mean"][which].float(), moments["std"][which].float()
        latents = (mean + std * torch.randn(mean.shape, generator=generator)) * vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (args.batch,), generator=generator)
        weight = torch.ones(args.batch)
        seen = torch.ones(args.batch, 1, 1, 1)  # how much of the picture the network gets to see
        if stage.layout:
            draw = torch.rand(args.batch, generator=generator)
            noisiest = torch.randint(LAYOUT_FROM, scheduler.config.num_train_timesteps, (args.batch,), generator=generator)
            timesteps = torch.where(draw < 0.6, noisiest, timesteps)
            timesteps[draw < 0.3] = scheduler.config.num_train_timesteps - 1
            seen[draw < 0.3] = 0.0
            weight = (1 / scheduler.alphas_cumprod[timesteps]).clamp(max=LAYOUT_WEIGHT)
        alpha = scheduler.alphas_cumprod[timesteps].sqrt().view(-1, 1, 1, 1)
        sigma = (1 - alpha**2).sqrt()
        noisy = seen * alpha * latents + sigma * noise
        target = (noisy - alpha * latents) / sigma
        with torch.autocast("cpu", torch.bfloat16):
            ids, dropped = tokens(which.tolist(), generator, CAPTION_DROPOUT)
            text = text_encoder(ids)
            predicted = unet(noisy, timesteps, text.last_hidden_state).sample
        loss = (weight * (predicted.float() - target).square().mean(dim=(1, 2, 3))).mean()
        if not stage.reading_weight:
            return loss
        told = [i for i, drop in enumerate(dropped) if not drop]
        named = reader.heads(text.pooler_output[told].float())
        return loss + stage.reading_weight * attribute_loss(named, labels([scenes[which[i]] for i in told]))

    denoiser = nn.ModuleDict({"unet": unet, "reader": reader})
    for stage in STAGES:
        train(
            denoiser,
            partial(denoising_loss, stage=stage),
            steps=stage.steps,
            peak_learning_rate=stage.learning_rate,
            checkpoint=RUNS_DIR / f"denoiser-{stage.name}.safetensors",
            seed=stage.seed,
        )
    pipeline = assemble_pipeline(vae, text_encoder, tokenizer, unet)
    pipeline.to(dtype=torch.float16).save_pretrained(RUNS_DIR / "pipeline", safe_serialization=True)
    shutil.copytree(RUNS_DIR / "pipeline", MODEL_DIR, dirs_exist_ok=True)


if __name__ == "__main__":
    main()

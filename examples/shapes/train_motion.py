"""Train AnimateDiff's motion modules for the shapes UNet, whose own weights stay; about an hour on two cores.

The rows of the words of motion (`motion_words.py`) go on training with them, for until now the UNet has only learned to
overlook these words. Which motion it is, is decided at the highest noise levels, as the places of things are, so the loss
looks mostly there, as in the last stage of the UNet's own training. Neighbouring frames hardly differ, so a first stage shows
a few frames of many clips, each at its own position, and a second one all frames of some.

    python examples/shapes/train_motion.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from diffusers import AutoencoderKL, UNetMotionModel
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from motion_words import OMIT, WordRows, add_words, load_words, tokens
from torch import nn

from lora_training.cpu import keep_freed_memory, use_plain_attention
from lora_training.frames import batch_as_frames
from pcm_scheduler.lora_file import write_safetensors

import moving
from denoising import CAPTION_DROPOUT, cached_moments, denoising_loss, drawn_latents, noised
from model import MOTION_DIR, RUNS_DIR, build_motion_adapter, load_pipeline
from moving import NUM_FRAMES, sample_clip
from scenes import MOTION_TRAIN_SEED
from training import train


@dataclass(frozen=True)
class Stage:
    """A part of the training, from the weights that the one before has left."""

    name: str
    seed: int
    steps: int
    learning_rate: float
    frames: int  # of each clip
    batch: int  # clips


STAGES = (
    Stage("few-frames", seed=0, steps=4000, learning_rate=1e-3, frames=4, batch=16),
    Stage("all-frames", seed=1, steps=1500, learning_rate=5e-4, frames=NUM_FRAMES, batch=4),
)


class FramePositions:
    """Which positions the frames that motion modules are shown have in their clip.

    Args:
        unet: whose embeddings of positions ask here from now on.
    """

    def __init__(self, unet: UNetMotionModel):
        self.frames = torch.arange(NUM_FRAMES)
        for module in unet.modules():
            if isinstance(module, SinusoidalPositionalEmbedding):
                module.forward = partial(self._embedded, module)

    def _embedded(self, embedding: SinusoidalPositionalEmbedding, x: torch.Tensor) -> torch.Tensor:
        return x + embedding.pe[:, self.frames]


def random_frames(count: int, generator: torch.Generator) -> torch.Tensor:
    """Frames of a clip, in their order: one of each of `count` equal parts, (count,)."""
    parts = torch.arange(NUM_FRAMES).view(count, -1)
    return parts[torch.arange(count), torch.randint(parts.shape[1], (count,), generator=generator)]


class Moves(nn.Module):
    """What is trained: the motion modules of a UNet, and the rows of the words."""

    def __init__(self, unet: UNetMotionModel, rows: WordRows):
        super().__init__()
        self.modules_of_motion = nn.ModuleList(m for name, m in unet.named_modules() if name.endswith("motion_modules"))
        self.rows = rows


def clip_moments(vae: AutoencoderKL, count: int) -> dict[str, torch.Tensor]:
    """Of the latents of every frame of the training clips, one clip after the other: (count F, 4, 16, 16) each."""

    def drawn(numbers: Sequence[int]) -> torch.Tensor:
        which = range(numbers[0] // NUM_FRAMES, numbers[-1] // NUM_FRAMES + 1)
        clips = moving.render([sample_clip(MOTION_TRAIN_SEED, i) for i in which]).flatten(0, 1)
        return clips[numbers[0] - which[0] * NUM_FRAMES :][: len(numbers)]

    return cached_moments(vae, count * NUM_FRAMES, drawn, "clips")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=4096)
    args = parser.parse_args()

    keep_freed_memory()
    torch.manual_seed(0)
    pipe = load_pipeline()
    tokenizer, text_encoder, vae, scheduler = pipe.tokenizer, pipe.text_encoder, pipe.vae, pipe.scheduler
    words = load_words()
    add_words(tokenizer, text_encoder, words)
    text_encoder.requires_grad_(False).set_attn_implementation("eager")
    moments = clip_moments(vae, args.clips)
    unet = UNetMotionModel.from_unet2d(pipe.unet, build_motion_adapter()).requires_grad_(False)
    use_plain_attention(unet)
    student = Moves(unet, WordRows(tokenizer, text_encoder, list(words)))
    student.modules_of_motion.requires_grad_(True)
    clips = [sample_clip(MOTION_TRAIN_SEED, i) for i in range(args.clips)]

    positions = FramePositions(unet)

    def stage_loss(generator: torch.Generator, stage: Stage) -> torch.Tensor:
        which = torch.randint(len(clips), (stage.batch,), generator=generator)
        positions.frames = random_frames(stage.frames, generator)
        frames = (which[:, None] * NUM_FRAMES + positions.frames).flatten()
        latents = batch_as_frames(drawn_latents(moments, frames, vae, generator), stage.batch)
        given = noised(latents, scheduler, generator, layout=True)
        rng = np.random.default_rng(torch.randint(2**62, (), generator=generator).item())
        shown = [clips[i] for i in which.tolist()]
        texts = ["" if rng.random() < CAPTION_DROPOUT else moving.caption(clip, rng, OMIT) for clip in shown]
        with torch.autocast("cpu", torch.bfloat16):
            embeds = student.rows.encode(tokens(tokenizer, texts))
            predicted = unet(given.sample, given.timesteps, embeds.repeat_interleave(stage.frames, 0)).sample
        return denoising_loss(predicted, given)

    for stage in STAGES:
        train(
            student,
            partial(stage_loss, stage=stage),
            steps=stage.steps,
            peak_learning_rate=stage.learning_rate,
            checkpoint=RUNS_DIR / f"motion-{stage.name}.safetensors",
            seed=stage.seed,
        )
    unet.half().save_motion_modules(MOTION_DIR)
    rows = {word: row.detach().half() for word, row in zip(words, student.rows.rows, strict=True)}
    write_safetensors(rows, MOTION_DIR / "words.safetensors", {})


if __name__ == "__main__":
    main()

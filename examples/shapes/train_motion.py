"""Train AnimateDiff's motion modules for the shapes UNet, whose own weights stay; about an hour on two cores.

The rows of the words of motion (`motion_words.py`) go on training with them, for until now the UNet has only learned to
overlook these words. Which motion it is, is decided at the highest noise levels, as the places of things are, so the loss
looks mostly there, as in the last stage of the UNet's own training.

    python examples/shapes/train_motion.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, UNetMotionModel
from motion_words import OMIT, MotionReader, add_words, load_words, tokens
from torch import nn
from torch.nn import functional as F

from lora_training.clips import batch_as_frames
from lora_training.cpu import keep_freed_memory, use_plain_attention
from pcm_scheduler.lora_file import write_safetensors

import moving
from denoising import CAPTION_DROPOUT, cached_moments, denoising_loss, drawn_latents, noised
from model import MOTION_DIR, RUNS_DIR, build_motion_adapter, load_pipeline
from moving import KINDS, NUM_FRAMES, sample_clip
from scenes import MOTION_TRAIN_SEED
from training import train

READING_WEIGHT = 0.02  # of naming the motion, beside the noise prediction
_NOT_SAID = -100


class Moves(nn.Module):
    """What is trained: the motion modules of a UNet, and the reader with the rows of the words."""

    def __init__(self, unet: UNetMotionModel, reader: MotionReader):
        super().__init__()
        self.modules_of_motion = nn.ModuleList(m for name, m in unet.named_modules() if name.endswith("motion_modules"))
        self.reader = reader


def clip_moments(vae: AutoencoderKL, count: int) -> dict[str, torch.Tensor]:
    """Of the latents of every frame of the training clips, one clip after the other: (count F, 4, 16, 16) each."""

    def drawn(numbers: Sequence[int]) -> torch.Tensor:
        which = range(numbers[0] // NUM_FRAMES, numbers[-1] // NUM_FRAMES + 1)
        clips = moving.render([sample_clip(MOTION_TRAIN_SEED, i) for i in which]).flatten(0, 1)
        return clips[numbers[0] - which[0] * NUM_FRAMES :][: len(numbers)]

    return cached_moments(vae, count * NUM_FRAMES, drawn, "clips")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--clips", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
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
    student = Moves(unet, MotionReader(tokenizer, text_encoder, list(words)))
    student.modules_of_motion.requires_grad_(True)
    clips = [sample_clip(MOTION_TRAIN_SEED, i) for i in range(args.clips)]

    def loss(generator: torch.Generator) -> torch.Tensor:
        which = torch.randint(len(clips), (args.batch,), generator=generator)
        frames = (which[:, None] * NUM_FRAMES + torch.arange(NUM_FRAMES)).flatten()
        latents = batch_as_frames(drawn_latents(moments, frames, vae, generator), args.batch)
        given = noised(latents, scheduler, generator, layout=True)
        rng = np.random.default_rng(torch.randint(2**62, (), generator=generator).item())
        shown = [clips[i] for i in which.tolist()]
        texts = ["" if rng.random() < CAPTION_DROPOUT else moving.caption(clip, rng, OMIT) for clip in shown]
        with torch.autocast("cpu", torch.bfloat16):
            embeds = student.reader.encode(tokens(tokenizer, texts))
            predicted = unet(given.sample, given.timesteps, embeds.repeat_interleave(NUM_FRAMES, 0)).sample
        named = zip(shown, texts, strict=True)
        kinds = torch.tensor([list(KINDS).index(clip.motion.kind) if text else _NOT_SAID for clip, text in named])
        scores = student.reader.head(embeds.float().mean(1))[:, : len(KINDS)]
        reading = F.cross_entropy(scores, kinds, ignore_index=_NOT_SAID, reduction="sum") / args.batch
        return denoising_loss(predicted, given) + READING_WEIGHT * reading

    train(
        student,
        loss,
        steps=args.steps,
        peak_learning_rate=args.learning_rate,
        checkpoint=RUNS_DIR / "motion_adapter.safetensors",
    )
    unet.half().save_motion_modules(MOTION_DIR)
    rows = {word: row.detach().half() for word, row in zip(words, student.reader.rows, strict=True)}
    write_safetensors(rows, MOTION_DIR / "words.safetensors", {})


if __name__ == "__main__":
    main()

"""Train AnimateDiff's motion modules for the shapes UNet, whose own weights stay: on a GPU if there is one, else for hours.

The rows of the words of motion (`motion_words.py`) go on training with them, for until now the UNet has only learned to
overlook these words. Which motion it is, is decided at the highest noise levels, as the places of things are, so the loss
looks mostly there, as in the last stage of the UNet's own training. Neighbouring frames hardly differ, so a first stage shows
a few frames of many clips, each at its own position, and a second one all frames of some.

The noise prediction says little of where the object is in each frame while noise hides it. So beside it the features behind
motion modules are read by linear layers that say where objects are; these were trained before, on the UNet's features as they
are without motion, and stay as they are: in the UNet's own code, the motion modules learn to move what the later layers draw.

What a frame must look like depends on the words and on its position together, and of words that ask for opposite things
neither is worth anything alone: shown all of them from the beginning, the modules learn none for thousands of steps. So the
first stages show one direction, then its opposite too, then the others.

    python examples/shapes/train_motion.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from diffusers import AutoencoderKL, MotionAdapter, UNetMotionModel
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from motion_words import OMIT, WordRows, add_words, load_words, tokens
from torch import nn
from torch.nn import functional as F

from lora_training.cpu import fast_autocast, keep_freed_memory, use_plain_attention
from lora_training.frames import batch_as_frames
from pcm_scheduler.lora_file import write_safetensors

import moving
from denoising import CAPTION_DROPOUT, Layout, Noised, cached_moments, denoising_loss, drawn_latents, noised
from model import MOTION_DIR, RUNS_DIR, build_motion_adapter, load_pipeline
from moving import KINDS, NUM_FRAMES, Clip, sample_clip
from scenes import IMAGE_SIZE, MOTION_TRAIN_SEED
from training import train

LATENT = 8  # pixels of a picture to one of its latents
HEADS_STEPS, HEADS_LEARNING_RATE, HEADS_BATCH = 200, 5e-3, 4  # clips, all frames
PLACE_WEIGHT = 5.0  # of saying where objects are, beside the noise prediction
STRAIGHT = ("left", "right", "up", "down")
NOISY, NOISIEST = Layout(), Layout(nothing=0.4, noisy=0.6, least=700)


@dataclass(frozen=True)
class Stage:
    """A part of the training, from the weights that the one before has left."""

    name: str
    steps: int
    learning_rate: float = 1e-3
    kinds: tuple[str, ...] = tuple(KINDS)  # of motion
    layout: Layout = NOISY
    frames: int = 4  # of each clip
    batch: int = 16  # clips


STAGES = (
    Stage("leftward", steps=200, kinds=("left",), layout=NOISIEST),
    Stage("sideways", steps=400, kinds=("left", "right"), layout=NOISIEST),
    Stage("straight", steps=400, kinds=STRAIGHT, layout=NOISIEST),
    Stage("without-opposites", steps=500, kinds=(*STRAIGHT, "clockwise", "growing", "bouncing", "still"), layout=NOISIEST),
    Stage("few-frames", steps=2500, learning_rate=5e-4),
    Stage("all-frames", steps=600, learning_rate=3e-4, frames=NUM_FRAMES, batch=4),
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


def covered(clips: Sequence[Clip]) -> torch.Tensor:
    """How much of each latent pixel objects cover, about: their circles, (clips, F, 16, 16)."""
    side = IMAGE_SIZE // LATENT
    centres = (np.arange(side) + 0.5) * LATENT
    maps = np.zeros((len(clips), NUM_FRAMES, side, side), dtype=np.float16)
    for number, clip in enumerate(clips):
        for i, scene in enumerate(moving.frames(clip)):
            for x, y, radius in map(moving.circle_around, scene.objects):
                away = np.hypot(centres[None, :] - x, centres[:, None] - y)
                maps[number, i] = np.maximum(maps[number, i], np.clip((0.8 * radius - away) / LATENT + 0.5, 0, 1))
    return torch.from_numpy(maps)


class PlaceHeads(nn.Module):
    """Say where objects are from the features behind motion modules, from the middle block on.

    Args:
        unet: whose features are read, of its last forward.
    """

    def __init__(self, unet: UNetMotionModel):
        super().__init__()
        modules = [*unet.mid_block.motion_modules, *(m for block in unet.up_blocks[:2] for m in block.motion_modules)]
        self.heads = nn.ModuleList(nn.Conv2d(module.proj_out.out_features, 1, 1) for module in modules)
        self.seen: dict[int, torch.Tensor] = {}
        for number, module in enumerate(modules):
            module.register_forward_hook(partial(self._see, number))

    def _see(self, number: int, _module: nn.Module, _given: object, output: object) -> None:
        self.seen[number] = output if isinstance(output, torch.Tensor) else output[0]

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy beside maps (N F, 16, 16), of those that are not negative."""
        losses = []
        for number, head in enumerate(self.heads):
            said = head(self.seen[number].float())[:, 0]
            asked = F.adaptive_avg_pool2d(maps[:, None], said.shape[1:])[:, 0]
            each = F.binary_cross_entropy_with_logits(said, asked.clamp(min=0), reduction="none")
            losses.append((each * (asked >= 0)).mean())
        return torch.stack(losses).mean()


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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = load_pipeline().to(device)
    tokenizer, text_encoder, vae, scheduler = pipe.tokenizer, pipe.text_encoder, pipe.vae, pipe.scheduler
    words = load_words()
    add_words(tokenizer, text_encoder, words)
    text_encoder.requires_grad_(False).set_attn_implementation("eager")
    moments = clip_moments(vae, args.clips)
    unet = UNetMotionModel.from_unet2d(pipe.unet, build_motion_adapter()).requires_grad_(False).to(device)
    if device.type == "cpu":
        use_plain_attention(unet)
    student = Moves(unet, WordRows(tokenizer, text_encoder, list(words)))
    clips = [sample_clip(MOTION_TRAIN_SEED, i) for i in range(args.clips)]

    of_kinds = {
        stage.kinds: torch.tensor([i for i, clip in enumerate(clips) if clip.motion.kind in stage.kinds]) for stage in STAGES
    }
    positions, heads, maps = FramePositions(unet), PlaceHeads(unet).to(device), covered(clips)

    def losses(generator: torch.Generator, stage: Stage) -> tuple[torch.Tensor, torch.Tensor]:
        among = of_kinds[stage.kinds]
        which = among[torch.randint(len(among), (stage.batch,), generator=generator)]
        positions.frames = random_frames(stage.frames, generator)
        frames = (which[:, None] * NUM_FRAMES + positions.frames).flatten()
        latents = batch_as_frames(drawn_latents(moments, frames, vae, generator), stage.batch)
        given = Noised(*(part.to(device) for part in noised(latents, scheduler, generator, stage.layout)))
        rng = np.random.default_rng(torch.randint(2**62, (), generator=generator).item())
        shown = [clips[i] for i in which.tolist()]
        texts = ["" if rng.random() < CAPTION_DROPOUT else moving.caption(clip, rng, OMIT) for clip in shown]
        with fast_autocast(device.type):
            embeds = student.rows.encode(tokens(tokenizer, texts))
            predicted = unet(given.sample, given.timesteps, embeds.repeat_interleave(stage.frames, 0)).sample
        said = torch.tensor([bool(text) for text in texts])  # nobody knows of clips without words
        asked = torch.where(said[:, None, None, None], maps[which][:, positions.frames].float(), -1.0)
        return denoising_loss(predicted, given), heads(asked.flatten(0, 1).to(device))

    def places(generator: torch.Generator) -> torch.Tensor:
        return losses(generator, replace(STAGES[-1], batch=HEADS_BATCH))[1]

    def both(generator: torch.Generator, stage: Stage) -> torch.Tensor:
        prediction, place = losses(generator, stage)
        return prediction + PLACE_WEIGHT * place

    student.requires_grad_(False)
    train(
        heads,
        places,
        steps=HEADS_STEPS,
        peak_learning_rate=HEADS_LEARNING_RATE,
        checkpoint=RUNS_DIR / "motion-places.safetensors",
        average_decay=0.98,
    )
    heads.requires_grad_(False)
    student.requires_grad_(True)
    for number, stage in enumerate(STAGES):
        train(
            student,
            partial(both, stage=stage),
            steps=stage.steps,
            peak_learning_rate=stage.learning_rate,
            checkpoint=RUNS_DIR / f"motion-{stage.name}.safetensors",
            seed=number,
            warmup=20,
        )
    unet.save_motion_modules(MOTION_DIR)
    MotionAdapter.from_pretrained(MOTION_DIR).half().save_pretrained(MOTION_DIR)
    rows = {word: row.detach().half().cpu() for word, row in zip(words, student.rows.rows, strict=True)}
    write_safetensors(rows, MOTION_DIR / "words.safetensors", {})


if __name__ == "__main__":
    main()

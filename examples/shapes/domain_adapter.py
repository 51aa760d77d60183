"""What frames of clips look like and pictures do not: objects at any angle and size, on their way from place to place.

The image model has only seen objects that stand almost upright. Motion modules may tell it to turn one, and it would not know
what to draw. AnimateDiff's third version therefore begins with a "domain adapter", a LoRA that the image UNet learns from
single frames, and trains its motion modules on top of it; so do we. What draws clips has it merged into its weights.

Beside its caption, the UNet is told what motion has made of the frame, by what stands in for motion modules, and its features
are asked what objects cover (`frame_features.py`): so it learns to draw what motion modules will say. They will read the words
of motion at every place, which the UNet might learn to pass over. So linear layers are trained beside, as in `motion_words.py`,
that read these words there.

What ships was trained in two parts: 4400 steps of 32 frames with two waves of the angle, 3000 of 64 with six.

    accelerate launch --config_file examples/accelerate/two_processes_cpu.yaml examples/shapes/domain_adapter.py
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from frame_features import FrameFeatures, before_motion, colour_masks, frame_state
from motion_words import PlaceReader, add_words, everywhere, load_words, tokens, told
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from lora_training.config import TARGET_SETS
from lora_training.cpu import fast_autocast, keep_freed_memory, use_plain_attention
from pcm_scheduler.lora_file import write_safetensors

import moving
from denoising import CAPTION_DROPOUT, Layout, Noised, cached_moments, denoising_loss, drawn_latents, noised
from model import HERE, RUNS_DIR, load_pipeline
from moving import NUM_FRAMES, TURNING, Clip, sample_clip
from scenes import MOTION_TRAIN_SEED, render
from training import processes_here, train

DOMAIN_FILE = HERE / "domain_adapter.safetensors"
FEATURES_FILE = RUNS_DIR / "frame-features.safetensors"  # stand-ins and heads: of use to nothing but `train_motion.py`
RANK = 64
STEPS, LEARNING_RATE, BATCH = 6000, 2e-3, 64
LEVELS = Layout(nothing=0.1, noisy=0.6, least=300)  # what is drawn where, and how it is turned, is decided where it is noisy
MASK_WEIGHT, READING_WEIGHT = 0.5, 0.02  # of masks and of naming the motion, beside the error of the noise: some tenths
FRAMES, TESTED = 16384, 256  # the first of them are not trained on
TESTED_TIMESTEPS = (200, 400, 600, 800)


def load_domain_adapter(pipe: StableDiffusionPipeline, path: Path = DOMAIN_FILE) -> None:
    """Merge the adapter that ships into the weights of the image UNet."""
    pipe.load_lora_weights(load_file(path))
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()


def single_frames(number: int) -> list[tuple[Clip, int]]:
    """Training clips with a frame of each; those that turn are half of them."""
    found: list[tuple[Clip, int]] = []
    for i in count():
        clip = sample_clip(MOTION_TRAIN_SEED, i)
        if clip.motion.kind in TURNING or i % 4 == 0:
            found.append((clip, 5 * len(found) % NUM_FRAMES))
            if len(found) == number:
                return found
    raise AssertionError("clips never end")


class Lesson:
    """The networks and the frames.

    Args:
        pipe: whose text encoder knows the words of motion, and whose UNet gets the adapter.
    """

    def __init__(self, pipe: StableDiffusionPipeline):
        self.pipe, self.frames = pipe, single_frames(FRAMES)
        scenes = [moving.frames(clip)[frame] for clip, frame in self.frames]
        self.moments = cached_moments(pipe.vae, FRAMES, lambda some: render([scenes[i] for i in some]), "single-frames")
        pipe.text_encoder.requires_grad_(False)
        pipe.unet.requires_grad_(False)
        use_plain_attention(pipe.unet)
        self.reader = PlaceReader(pipe.unet)
        self.features = FrameFeatures(pipe.unet, before_motion(pipe.unet))
        moved = ((clip, scene.objects[clip.moving]) for (clip, _), scene in zip(self.frames, scenes, strict=True))
        self.states = torch.tensor([frame_state(now, clip.scene.objects[clip.moving]) for clip, now in moved])
        self.masks = colour_masks(scenes)
        pipe.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGET_SETS["all"])))
        self.adapter = nn.ParameterList(p for p in pipe.unet.parameters() if p.requires_grad)

    def errors(
        self, which: torch.Tensor, given: Noised, generator: torch.Generator, dropout: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of noise, of masks, of naming the motion; and the share of places that name it rightly."""
        rng = np.random.default_rng(torch.randint(2**62, (), generator=generator).item())
        texts, kinds, speeds = told([self.frames[i][0] for i in which.tolist()], rng)
        said = torch.from_numpy(rng.random(len(texts)) >= dropout)
        texts = [text if say else "" for text, say in zip(texts, said.tolist(), strict=True)]
        self.features.stand_ins.states = self.states[which] * said[:, None]
        with fast_autocast():
            embeds = self.pipe.text_encoder(tokens(self.pipe.tokenizer, texts)).last_hidden_state
            predicted = self.pipe.unet(given.sample, given.timesteps, embeds).sample
        masks = self.features.masks.loss(self.masks[which], said)
        scores = [(s[said], classes[said]) for pair in self.reader() for s, classes in zip(pair, (kinds, speeds), strict=True)]
        reading = torch.stack([F.cross_entropy(s, everywhere(classes, s)) for s, classes in scores]).mean()
        right = torch.stack([(s.argmax(1) == everywhere(classes, s)).float().mean() for s, classes in scores[::2]]).mean()
        return denoising_loss(predicted, given), masks, reading, right

    def loss(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        which = torch.randint(TESTED, FRAMES, (batch,), generator=generator)
        given = noised(drawn_latents(self.moments, which, self.pipe.vae, generator), self.pipe.scheduler, generator, LEVELS)
        error, masks, reading, _ = self.errors(which, given, generator, CAPTION_DROPOUT)
        return error + MASK_WEIGHT * masks + READING_WEIGHT * reading

    @torch.no_grad()
    def tested(self) -> dict[str, tuple[float, float]]:
        """Of untrained frames of turning objects, by timestep: the error of the noise, and the share of places that name the
        kind of motion rightly.
        """
        which = torch.tensor([i for i in range(TESTED) if self.frames[i][0].motion.kind in TURNING])
        figures = {}
        for timestep in TESTED_TIMESTEPS:
            generator = torch.Generator().manual_seed(timestep)
            latents = drawn_latents(self.moments, which, self.pipe.vae, generator)
            noise = torch.randn(latents.shape, generator=generator)
            timesteps = torch.full((len(which),), timestep)
            given = Noised(self.pipe.scheduler.add_noise(latents, noise, timesteps), timesteps, noise, torch.ones(len(which)))
            error, _, _, right = self.errors(which, given, generator, 0.0)
            figures[str(timestep)] = (error.item(), right.item())
        return figures


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

    processes = processes_here()
    keep_freed_memory()
    torch.manual_seed(0)
    pipe = load_pipeline()
    add_words(pipe.tokenizer, pipe.text_encoder, load_words())
    lesson = Lesson(pipe)
    before = lesson.tested()
    train(
        nn.ModuleList([lesson.adapter, lesson.features, lesson.reader]),
        partial(lesson.loss, BATCH // processes.num_processes),
        steps=STEPS,
        peak_learning_rate=LEARNING_RATE,
        checkpoint=RUNS_DIR / "domain-adapter.safetensors",
        average_decay=0.99,
    )
    if not processes.is_main_process:
        return
    figures = {}
    for timestep, (error, right) in lesson.tested().items():
        figures[f"error at {timestep}"] = f"{before[timestep][0]:.4f} -> {error:.4f}"
        figures[f"motion named right at {timestep}"] = f"{right:.3f}"
    print(figures)
    state = {f"unet.{name}": p.detach().half() for name, p in get_peft_model_state_dict(pipe.unet).items()}
    write_safetensors(state, DOMAIN_FILE, figures)
    write_safetensors(lesson.features.state_dict(), FEATURES_FILE)


if __name__ == "__main__":
    main()

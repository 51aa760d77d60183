"""Train AnimateDiff's motion modules for the shapes UNet, whose own weights stay: most of an hour on two cores with bfloat16.

What a frame must look like depends on the words of motion and on the frame's position together, and neither is worth anything
alone. From the noise prediction by itself the modules learn that product in thousands of steps, if at all. So they are asked
for it first, in the UNet's own code. While its domain adapter was trained, the UNet was told what motion has made of a frame,
by vectors added where motion modules stand, and its features were asked what objects of each colour cover
(`frame_features.py`). The modules learn to add the same vectors, and to agree on which of two objects is where.

Of these questions the first half of the UNet need not know the answers. Motion modules on the way down stay as they begin,
where they change nothing; what the middle and the way up are given is then the same in every epoch, and is kept (`Lower`).

    1. layout: the modules learn what they are asked, from kept features, at the noise levels where it is decided;
    2. pictures: they learn to predict noise, at all levels and then where forms are decided, and are asked the same beside it.

Two processes of one thread are twice as fast as one of two. Until `forms-again`, what ships was shown clips that grow or shrink
as often as those that only move; from there on twice as often, like those that turn.

    accelerate launch --config_file examples/accelerate/two_processes_cpu.yaml examples/shapes/train_motion.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial

import numpy as np
import torch
from diffusers import AutoencoderKL, MotionAdapter, StableDiffusionPipeline, UNetMotionModel
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from domain_adapter import DOMAIN_FILE, FEATURES_FILE
from frame_features import (
    FrameFeatures,
    StandIns,
    colour_masks,
    motion_modules_of,
    own_places,
    shares_of_places,
    states_of,
)
from motion_words import OMIT, tokens
from safetensors.torch import load_file
from timm.optim import Muon, muon
from torch import nn
from tqdm import tqdm
from unet_halves import Lower, layout, lower
from video_model import load_image_pipeline

from lora_training.cpu import fast_autocast, has_bfloat16, keep_freed_memory, use_plain_attention
from lora_training.frames import batch_as_frames

import moving
from denoising import CAPTION_DROPOUT, Layout, cached_moments, denoising_loss, drawn_latents, noised, random_of
from model import MOTION_DIR, RUNS_DIR, build_motion_adapter, fingerprint
from moving import NUM_FRAMES, RESIZING, TURNING, sample_clip
from scenes import MOTION_TRAIN_SEED
from training import processes_here, train

MASK_WEIGHT, STATE_WEIGHT = 5.0, 2.0  # of what modules are asked, beside the noise prediction
# AdamW needs over half as many steps again; what is no matrix has it, at a tenth of the learning rate
MUON = partial(Muon, adjust_lr_fn="original", nesterov=True, weight_decay=0.1, betas=(0.9, 0.99), fallback_lr_scale=0.1)
PAIR_WEIGHT, FORM_WEIGHT = 3.0, 2.0  # how much more often clips of two objects, and of changing forms, are shown: the hardest
NOISY, ALL = Layout(nothing=0.5, noisy=0.5, least=700), Layout()  # layout is decided where it is noisy
FORMS = Layout(nothing=0.1, noisy=0.6, least=300)  # forms are decided later than places


@dataclass(frozen=True)
class Stage:
    """A part of the training, from the weights that the one before has left."""

    name: str
    steps: int
    learning_rate: float
    frames: int  # of each clip
    batch: int  # clips, of all processes
    levels: Layout = ALL  # of noise, where clips are noised anew


LAYOUT = (
    Stage("layout", steps=1600, learning_rate=1e-2, frames=4, batch=16),
    Stage("layout-all-frames", steps=300, learning_rate=4e-3, frames=NUM_FRAMES, batch=4),
)
PICTURES = (
    Stage("pictures", steps=800, learning_rate=5e-3, frames=4, batch=16),
    Stage("forms", steps=1900, learning_rate=5e-3, frames=8, batch=8, levels=FORMS),
    Stage("forms-again", steps=900, learning_rate=3e-3, frames=8, batch=8, levels=FORMS),
    Stage("all-frames", steps=200, learning_rate=2e-3, frames=NUM_FRAMES, batch=4, levels=FORMS),
)
CLIPS = 2048  # different ones


# ---------------------------------------------------------------------------------------------- frames and what is true of them


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


# ---------------------------------------------------------------------------------------------- what reads features


class Said(nn.Module):
    """What motion modules add to the features, beside what stand-ins would (`StandIns`).

    Args:
        modules: of motion.
        stand_ins: the maps of the same places.
        states: whose vectors' mean square is the unit of errors, (N, F, STATE).
    """

    def __init__(self, modules: Sequence[nn.Module], stand_ins: StandIns, states: torch.Tensor):
        super().__init__()
        self.maps = [linear.weight.detach() for linear in stand_ins.maps]
        self.spans = [torch.linalg.qr(weight)[0] for weight in self.maps]
        self.units = [(states.to(weight) @ weight.T).square().sum(-1).mean() for weight in self.maps]
        self.seen: dict[int, torch.Tensor] = {}
        for number, module in enumerate(modules):
            module.proj_out.register_forward_hook(partial(self._see, number))

    def _see(self, number: int, _layer: nn.Module, _given: object, output: torch.Tensor) -> None:
        self.seen[number] = output  # (N h w, F, C)

    def forward(self, states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Mean squared error at every place of the modules that were called, as a share of what there is to say: (N, F).

        What modules add beside, at right angles to all that stand-ins say, is free.

        Args:
            states: (N, F, STATE).
            places: the own ones of the objects that they are of, (N, F, COARSE, COARSE); elsewhere there is nothing to say.
        """
        losses = []
        for number, added in self.seen.items():
            aim = (states @ self.maps[number].T) @ self.spans[number]
            said = (added.float() @ self.spans[number]).unflatten(0, (len(states), -1))  # (N, h w, F, STATE)
            side = math.isqrt(said.shape[1])
            shares = shares_of_places(places.flatten(0, 1), (side, side)).unflatten(0, places.shape[:2])
            errors = (said - aim[:, None] * shares.flatten(2).transpose(1, 2)[..., None]).square().sum(-1).mean(1)
            losses.append(errors / self.units[number])
        self.seen.clear()
        return torch.stack(losses).mean(0)


# ---------------------------------------------------------------------------------------------- training


def clip_moments(vae: AutoencoderKL, count: int) -> dict[str, torch.Tensor]:
    """Of the latents of every frame of the training clips, one clip after the other: (count F, 4, 16, 16) each."""

    def drawn(numbers: Sequence[int]) -> torch.Tensor:
        which = range(numbers[0] // NUM_FRAMES, numbers[-1] // NUM_FRAMES + 1)
        clips = moving.render([sample_clip(MOTION_TRAIN_SEED, i) for i in which]).flatten(0, 1)
        return clips[numbers[0] - which[0] * NUM_FRAMES :][: len(numbers)]

    return cached_moments(vae, count * NUM_FRAMES, drawn, "clips")


class Lesson:
    """What the stages share: the networks, the training clips, and the two losses.

    Args:
        pipe: whose text encoder knows the words of motion.
        device: where to train.
    """

    def __init__(self, pipe: StableDiffusionPipeline, device: torch.device):
        self.pipe, self.device = pipe.to(device), device
        pipe.text_encoder.requires_grad_(False)
        pipe.unet.requires_grad_(False)
        self.unet = UNetMotionModel.from_unet2d(pipe.unet, build_motion_adapter()).requires_grad_(False).to(device)
        if device.type == "cpu":
            use_plain_attention(pipe.unet)
            use_plain_attention(self.unet)
        self.modules = nn.ModuleList(motion_modules_of(self.unet))
        self.features = FrameFeatures(pipe.unet, list(self.modules)).requires_grad_(False).to(device)
        self.features.load_state_dict(load_file(FEATURES_FILE))
        self.positions = FramePositions(self.unet)
        self.moments = clip_moments(pipe.vae, CLIPS)
        self.clips = [sample_clip(MOTION_TRAIN_SEED, i) for i in range(CLIPS)]
        scenes = [moving.frames(clip) for clip in self.clips]
        self.masks = torch.stack([colour_masks(of_clip) for of_clip in scenes])
        places = [own_places(s, clip.moving) for clip, of_clip in zip(self.clips, scenes, strict=True) for s in of_clip]
        self.places = torch.stack(places).unflatten(0, (CLIPS, NUM_FRAMES))
        self.states = torch.tensor([states_of(clip, of_clip) for clip, of_clip in zip(self.clips, scenes, strict=True)])
        self.said = Said(self.modules, self.features.stand_ins, self.states)
        two = torch.tensor([len(clip.scene.objects) == 2 for clip in self.clips])
        changing = torch.tensor([clip.motion.kind in (*TURNING, *RESIZING) for clip in self.clips])
        self.weights = torch.where(two, PAIR_WEIGHT, 1.0) * torch.where(changing, FORM_WEIGHT, 1.0)
        self.processes = processes_here()

    def drawn(self, among: torch.Tensor, batch: int, generator: torch.Generator) -> torch.Tensor:
        """A process's share of a batch: positions in `among`, the numbers of clips."""
        share = batch // self.processes.num_processes
        return torch.multinomial(self.weights[among], share, replacement=True, generator=generator)

    def latents(self, which: torch.Tensor, frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Of clips that are encoded, (N, 4, frames, 16, 16)."""
        numbers = (which[:, None] * NUM_FRAMES + frames).flatten()
        return batch_as_frames(drawn_latents(self.moments, numbers, self.pipe.vae, generator), len(which))

    def embeds(self, texts: list[str]) -> torch.Tensor:
        ids = tokens(self.pipe.tokenizer, texts).to(self.device)
        with torch.no_grad():
            return self.pipe.text_encoder(ids).last_hidden_state

    @torch.no_grad()
    def keep(self, batch: int = 8) -> tuple[torch.Tensor, Lower]:
        """What the way down makes of all clips, as noisy as where layout is decided.

        Returns:
            The numbers of the clips that this process keeps, which are its share, and what it keeps of them, in fp16.
        """
        parts: list[Lower] = []
        own = torch.arange(self.processes.process_index, CLIPS, self.processes.num_processes)
        for which in tqdm(own.split(batch), desc="keep features", mininterval=2.0, disable=not self.processes.is_main_process):
            first = int(which[0])
            generator, rng = torch.Generator().manual_seed(first), np.random.default_rng(first)
            given = noised(self.latents(which, torch.arange(NUM_FRAMES), generator), self.pipe.scheduler, generator, NOISY)
            texts = [moving.caption(self.clips[i], rng, OMIT) for i in which.tolist()]
            with fast_autocast(self.device.type):
                sample, timesteps = given.sample.to(self.device), given.timesteps.to(self.device)
                made = lower(self.pipe.unet, sample, timesteps, self.embeds(texts))
            parts.append(made.map(torch.Tensor.half, torch.Tensor.half))
        residuals = zip(*(part.residuals for part in parts), strict=True)
        shared = (torch.cat([getattr(part, name) for part in parts]) for name in ("hidden", "temb", "embeds"))
        return own, Lower(*shared, tuple(map(torch.cat, residuals)))

    def asked(self, which: torch.Tensor, said: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses of masks and of motion; nobody knows of clips without words, which are not `said`, (N,)."""
        frames = self.positions.frames
        each = said.float().repeat_interleave(len(frames)).to(self.device)
        masks = self.masks[which][:, frames].flatten(0, 1).to(self.device)
        states = self.states[which][:, frames] * said[:, None, None]
        places = self.places[which][:, frames].to(self.device)
        return self.features.masks.loss(masks, each), self.said(states.to(self.device), places).mean()

    def layout_losses(
        self, kept: tuple[torch.Tensor, Lower], frames: int, batch: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, ...]:
        """Of masks and of motion, on kept features."""
        numbers, features = kept
        which = self.drawn(numbers, batch, generator)
        shown = random_frames(frames, generator)
        self.positions.frames = shown
        given = features.map(lambda part: part[which].float(), lambda part: part[which][:, shown].float())
        with fast_autocast(self.device.type):
            layout(self.unet, given)
        return self.asked(numbers[which], torch.ones(len(which), dtype=torch.bool))

    def picture_loss(self, stage: Stage, generator: torch.Generator) -> torch.Tensor:
        """Of the noise, and of what is asked beside it."""
        which = self.drawn(torch.arange(CLIPS), stage.batch, generator)
        self.positions.frames = random_frames(stage.frames, generator)
        given = noised(self.latents(which, self.positions.frames, generator), self.pipe.scheduler, generator, stage.levels)
        given = type(given)(*(part.to(self.device) for part in given))
        rng = random_of(generator)
        clips = [self.clips[i] for i in which.tolist()]
        texts = ["" if rng.random() < CAPTION_DROPOUT else moving.caption(clip, rng, OMIT) for clip in clips]
        embeds = self.embeds(texts).repeat_interleave(stage.frames, 0)
        with fast_autocast(self.device.type):
            predicted = self.unet(given.sample, given.timesteps, embeds).sample
        masks, motion = self.asked(which, torch.tensor([bool(text) for text in texts]))
        return denoising_loss(predicted, given) + MASK_WEIGHT * masks + STATE_WEIGHT * motion


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

    keep_freed_memory()
    torch.manual_seed(0)
    if not has_bfloat16():  # which Muon computes in, unless told
        muon.zeropower_via_newtonschulz = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
    lesson = Lesson(load_image_pipeline(), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    kept = cache(lesson.keep)  # minutes that a run which goes on after those stages does without

    lesson.modules.requires_grad_(True)

    def layout_loss(stage: Stage, generator: torch.Generator) -> torch.Tensor:
        masks, motion = lesson.layout_losses(kept(), stage.frames, stage.batch, generator)
        return MASK_WEIGHT * masks + STATE_WEIGHT * motion

    stages = [(stage, partial(layout_loss, stage)) for stage in LAYOUT]
    stages += [(stage, partial(lesson.picture_loss, stage)) for stage in PICTURES]
    for number, (stage, loss) in enumerate(stages):
        train(
            lesson.modules,
            loss,
            steps=stage.steps,
            peak_learning_rate=stage.learning_rate,
            checkpoint=RUNS_DIR / f"motion-{stage.name}.safetensors",
            seed=number,
            warmup=20,
            optimizer_of=MUON,
            settings=asdict(stage) | {"given": fingerprint((DOMAIN_FILE, FEATURES_FILE))},
        )
    if not lesson.processes.is_main_process:
        return
    lesson.unet.save_motion_modules(MOTION_DIR)
    adapter = MotionAdapter.from_pretrained(MOTION_DIR).half()
    adapter.register_to_config(_name_or_path="")  # no path of this machine in what ships
    adapter.save_pretrained(MOTION_DIR)


if __name__ == "__main__":
    main()

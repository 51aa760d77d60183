"""Train AnimateDiff's motion modules for the shapes UNet, whose own weights stay: hours on two cores with bfloat16.

What a frame must look like depends on the words of motion and on the frame's position together, and neither is worth anything
alone. From the noise prediction by itself the modules learn that product in thousands of steps, if at all. So they are asked
for it first, in the UNet's own code. While its domain adapter was trained, the UNet was told what motion has made of a frame,
by vectors added where motion modules stand, and its features were asked what objects of each colour cover
(`frame_features.py`). The modules learn to add the same vectors, and to agree on which of two objects is where.

Of these questions the first half of the UNet need not know the answers. Motion modules on the way down stay as they begin,
where they change nothing; what the middle and the way up are given is then the same in every epoch, and is kept (`Lower`).

    1. layout: the modules learn what they are asked, from kept features, at the noise levels where it is decided;
    2. pictures: they learn to predict noise, at all levels and then where forms are decided, and are asked the same beside it.

Two processes of one thread are twice as fast as one of two.

    accelerate launch --config_file examples/accelerate/two_processes_cpu.yaml examples/shapes/train_motion.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial

import numpy as np
import torch
from diffusers import AutoencoderKL, MotionAdapter, StableDiffusionPipeline, UNet2DConditionModel, UNetMotionModel
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from domain_adapter import DOMAIN_FILE, FEATURES_FILE
from frame_features import FrameFeatures, StandIns, colour_masks, frame_states, motion_modules_of
from motion_words import OMIT, tokens
from safetensors.torch import load_file
from timm.optim import Muon, muon
from torch import nn
from tqdm import tqdm
from video_model import load_image_pipeline

from lora_training.cpu import fast_autocast, has_bfloat16, keep_freed_memory, use_plain_attention
from lora_training.frames import batch_as_frames

import moving
from denoising import CAPTION_DROPOUT, Layout, cached_moments, denoising_loss, drawn_latents, noised
from model import MOTION_DIR, RUNS_DIR, build_motion_adapter, fingerprint
from moving import NUM_FRAMES, sample_clip
from scenes import MOTION_TRAIN_SEED
from training import processes_here, train

MASK_WEIGHT, STATE_WEIGHT = 5.0, 2.0  # of what modules are asked, beside the noise prediction
# AdamW needs over half as many steps again; what is no matrix has it, at a tenth of the learning rate
MUON = partial(Muon, adjust_lr_fn="original", nesterov=True, weight_decay=0.1, betas=(0.9, 0.99), fallback_lr_scale=0.1)
PAIR_WEIGHT = 3.0  # how much more often clips with two objects are shown, which are a quarter of all and the hardest
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

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Mean squared error at every place of the modules that were called, as a share of what there is to say: (N, F).

        What modules add beside, at right angles to all that stand-ins say, is free.

        Args:
            states: (N, F, STATE).
        """
        losses = []
        for number, added in self.seen.items():
            aim = (states @ self.maps[number].T) @ self.spans[number]
            said = added.float() @ self.spans[number]
            errors = (said.unflatten(0, (len(states), -1)) - aim[:, None]).square().sum(-1).mean(1)
            losses.append(errors / self.units[number])
        self.seen.clear()
        return torch.stack(losses).mean(0)


# ---------------------------------------------------------------------------------------------- the two halves of the UNet


@dataclass(frozen=True)
class Lower:
    """What the middle and the way up are given of N clips; fp16 where it is kept.

    Attributes:
        hidden: what comes out of the way down, (N, F, C, h, w).
        temb: embedding of the timestep, (N, C).
        embeds: of the text, (N, L, C).
        residuals: along the way down, each (N, F, C, h, w); without those of the first block, whose resolution only the
            last block of the way up has, which `layout` leaves out.
    """

    hidden: torch.Tensor
    temb: torch.Tensor
    embeds: torch.Tensor
    residuals: tuple[torch.Tensor, ...]

    def map(self, of_clips, of_frames) -> Lower:
        """Another, of what functions make of the parts that frames share, and of those that each has of its own."""
        own = (of_frames(part) for part in self.residuals)
        return Lower(of_frames(self.hidden), of_clips(self.temb), of_clips(self.embeds), tuple(own))


@torch.no_grad()
def lower(unet: UNet2DConditionModel, sample: torch.Tensor, timesteps: torch.Tensor, embeds: torch.Tensor) -> Lower:
    """The way down, which knows of no motion.

    Args:
        unet: of pictures.
        sample: (N, 4, F, 16, 16).
        timesteps: (N,).
        embeds: (N, L, C).
    """
    count, frames = sample.shape[0], sample.shape[2]
    temb = unet.time_embedding(unet.time_proj(timesteps).to(sample.dtype))
    each_temb, each_text = (part.repeat_interleave(frames, 0) for part in (temb, embeds))
    hidden = unet.conv_in(sample.transpose(1, 2).flatten(0, 1))
    kept = []
    for block in unet.down_blocks:
        text = {"encoder_hidden_states": each_text} if getattr(block, "has_cross_attention", False) else {}
        hidden, residuals = block(hidden, each_temb, **text)
        kept.extend(residuals)
    smaller = [part for part in kept if part.shape[-1] < sample.shape[-1]]
    own = [part.unflatten(0, (count, frames)) for part in (hidden, *smaller)]
    return Lower(own[0], temb, embeds, tuple(own[1:]))


def layout(unet: UNetMotionModel, given: Lower) -> None:
    """The middle and the way up but for its last block, for those that see features there.

    Args:
        unet: of clips.
        given: of frames that `FramePositions` knows, in fp32.
    """
    frames = given.hidden.shape[1]
    each = given.map(lambda part: part.repeat_interleave(frames, 0), lambda part: part.flatten(0, 1))
    text = {"encoder_hidden_states": each.embeds}
    hidden, residuals = unet.mid_block(each.hidden, each.temb, num_frames=frames, **text), each.residuals
    for block in unet.up_blocks[:-1]:
        own, residuals = residuals[-len(block.resnets) :], residuals[: -len(block.resnets)]
        of_text = text if getattr(block, "has_cross_attention", False) else {}
        hidden = block(hidden, temb=each.temb, res_hidden_states_tuple=own, num_frames=frames, **of_text)


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
        self.states = frame_states(self.clips)
        self.masks = torch.stack([colour_masks(moving.frames(clip)) for clip in self.clips])
        self.said = Said(self.modules, self.features.stand_ins, self.states)
        self.weights = torch.tensor([PAIR_WEIGHT if len(clip.scene.objects) == 2 else 1.0 for clip in self.clips])
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

    def keep(self, batch: int = 8) -> tuple[torch.Tensor, Lower]:
        """What the way down makes of all clips, as noisy as where layout is decided.

        Returns:
            The numbers of the clips that this process keeps, which are its share, and what it keeps of them.
        """
        parts: list[Lower] = []
        own = torch.arange(self.processes.process_index, CLIPS, self.processes.num_processes)
        for which in tqdm(own.split(batch), desc="keep features", mininterval=2.0, disable=not self.processes.is_main_process):
            first = int(which[0])
            generator, rng = torch.Generator().manual_seed(first), np.random.default_rng(first)
            given = noised(self.latents(which, torch.arange(NUM_FRAMES), generator), self.pipe.scheduler, generator, NOISY)
            embeds = self.embeds([moving.caption(self.clips[i], rng, OMIT) for i in which.tolist()])
            with fast_autocast(self.device.type):
                made = lower(self.pipe.unet, given.sample.to(self.device), given.timesteps.to(self.device), embeds)
            parts.append(made.map(torch.Tensor.half, torch.Tensor.half))
        residuals = zip(*(part.residuals for part in parts), strict=True)
        shared = (torch.cat([getattr(part, name) for part in parts]) for name in ("hidden", "temb", "embeds"))
        return own, Lower(*shared, tuple(map(torch.cat, residuals)))

    def asked(self, which: torch.Tensor, said: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses of masks and of motion; nobody knows of clips without words, which are not `said`, (N,)."""
        frames = self.positions.frames
        each = said.float().repeat_interleave(len(frames)).to(self.device)
        masks = self.masks[which][:, frames].flatten(0, 1).to(self.device)
        states = self.states[which][:, frames].to(self.device) * said[:, None, None].to(self.device)
        return self.features.masks.loss(masks, each), self.said(states).mean()

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
        rng = np.random.default_rng(torch.randint(2**62, (), generator=generator).item())
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

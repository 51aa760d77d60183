"""What frames of clips look like and pictures do not: objects at any angle and size, on their way from place to place.

The image model has only seen objects that stand almost upright. Motion modules may tell it to turn one, and it would not know
what to draw. AnimateDiff's third version therefore begins with a "domain adapter", a LoRA that the image UNet learns from
single frames, and trains its motion modules on top of it; so do we. What draws clips has it merged into its weights.

It is learned in two parts:

    1. naming: of two objects the caption says which one moves, and in the image model's features nothing at the objects' places
       says it. Its way down and its middle are asked, for nothing else: it takes hundreds of steps in which nothing seems to
       happen until it is learned (`ObjectReader`);
    2. drawing: beside its caption, the UNet is told what motion has made of the frame, by what stands in for motion modules,
       and its features are asked what objects cover (`frame_features.py`). So it learns to draw what motion modules will say.
       Motion modules will read the words of motion at every place, which the UNet might learn to pass over: linear layers are
       trained beside, as in `motion_words.py`, that read these words there, and naming is asked further.

    accelerate launch --config_file examples/accelerate/two_processes_cpu.yaml examples/shapes/domain_adapter.py

What ships began, with `--onto`, from an adapter that an earlier form of this script had made: without naming, and told at every
place of a frame.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import StableDiffusionPipeline
from frame_features import FrameFeatures, ObjectReader, before_motion, colour_masks, own_places, states_of
from motion_words import PlaceReader, add_words, everywhere, load_words, tokens, told
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from unet_halves import lower

from lora_training.config import TARGET_SETS
from lora_training.cpu import fast_autocast, keep_freed_memory, use_plain_attention
from pcm_scheduler.lora_file import write_safetensors

import moving
from denoising import CAPTION_DROPOUT, Layout, Noised, cached_moments, denoising_loss, drawn_latents, noised, random_of
from model import HERE, RUNS_DIR, fingerprint, load_pipeline
from moving import NUM_FRAMES, TURNING, Clip, sample_clip
from scenes import COLOURS, MOTION_TRAIN_SEED, render
from training import processes_here, train

DOMAIN_FILE = HERE / "domain_adapter.safetensors"
FEATURES_FILE = RUNS_DIR / "frame-features.safetensors"  # stand-ins and heads: of use to nothing but `train_motion.py`
RANK = 64
NAMING_STEPS, DRAWING_STEPS, LEARNING_RATE, BATCH = 1600, 2000, 2e-3, 64
LEVELS = Layout(nothing=0.1, noisy=0.35, least=300)  # what is drawn where, and how it is turned, is decided where it is noisy
SEEN = 500  # at timesteps below, frames are seen for what they are: half of them are told nothing, and learned all the same
MASK_WEIGHT, READING_WEIGHT, NAMING_WEIGHT = 0.5, 0.02, 0.1  # beside the error of the noise, some tenths
FRAMES, TESTED = 16384, 256  # the first of them are not trained on
TESTED_TIMESTEPS = (200, 400, 600, 800)


def load_domain_adapter(pipe: StableDiffusionPipeline, path: Path = DOMAIN_FILE) -> None:
    """Merge the adapter that ships into the weights of the image UNet."""
    pipe.load_lora_weights(load_file(path))
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()


def single_frames(number: int) -> list[tuple[Clip, int]]:
    """Training clips with a frame of each; half of them turn, and half of both have two objects."""
    found: list[tuple[Clip, int]] = []
    room = dict.fromkeys(product((False, True), repeat=2), number // 4)
    for i in count():
        clip = sample_clip(MOTION_TRAIN_SEED, i)
        sort = clip.motion.kind in TURNING, len(clip.scene.objects) == 2
        if room[sort]:
            room[sort] -= 1
            found.append((clip, 5 * len(found) % NUM_FRAMES))
            if not any(room.values()):
                return found
    raise AssertionError("clips never end")


class Asked(NamedTuple):
    """Answers to a batch of frames: errors of noise, masks, words and naming; of the last, shares of places that are right."""

    noise: torch.Tensor
    masks: torch.Tensor
    reading: torch.Tensor
    naming: torch.Tensor
    who: torch.Tensor
    kind: torch.Tensor


class Lesson:
    """The networks and the frames.

    Args:
        pipe: whose text encoder knows the words of motion, and whose UNet gets the adapter.
        onto: an adapter to begin from.
    """

    def __init__(self, pipe: StableDiffusionPipeline, onto: Path | None = None):
        self.pipe, self.frames = pipe, single_frames(FRAMES)
        scenes = [moving.frames(clip)[frame] for clip, frame in self.frames]
        self.moments = cached_moments(pipe.vae, FRAMES, lambda some: render([scenes[i] for i in some]), "single-frames")
        pipe.text_encoder.requires_grad_(False)
        pipe.unet.requires_grad_(False)
        use_plain_attention(pipe.unet)
        self.words, self.objects = PlaceReader(pipe.unet), ObjectReader(pipe.unet)
        self.features = FrameFeatures(pipe.unet, before_motion(pipe.unet))
        states = (states_of(clip, [scene])[0] for scene, (clip, _) in zip(scenes, self.frames, strict=True))
        self.states = torch.tensor(list(states))
        self.places = torch.stack([own_places(s, clip.moving) for s, (clip, _) in zip(scenes, self.frames, strict=True)])
        self.masks = colour_masks(scenes)
        movers = [clip.scene.objects[clip.moving].colour for clip, _ in self.frames]
        self.movers = torch.tensor([list(COLOURS).index(colour) for colour in movers])
        self.two = torch.tensor([len(scene.objects) == 2 for scene in scenes])
        pipe.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGET_SETS["all"])))
        if onto is not None:
            set_peft_model_state_dict(pipe.unet, {k.removeprefix("unet."): v.float() for k, v in load_file(onto).items()})
        adapter = {name: p for name, p in pipe.unet.named_parameters() if p.requires_grad}
        self.adapter = nn.ParameterList(adapter.values())
        self.lower_adapter = nn.ParameterList(p for name, p in adapter.items() if not name.startswith("up_blocks"))

    def named(self, which: torch.Tensor, kinds: torch.Tensor, said: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What `ObjectReader` says of the last forward, of frames that have captions."""
        masks = self.masks[which].float() / 255 * said[:, None, None, None]
        moving_ones = masks[torch.arange(len(which)), self.movers[which]]
        return self.objects(kinds, moving_ones, masks.sum(1) - moving_ones)

    def encoded(self, texts: list[str]) -> torch.Tensor:
        return self.pipe.text_encoder(tokens(self.pipe.tokenizer, texts)).last_hidden_state

    def given(self, which: torch.Tensor, generator: torch.Generator) -> Noised:
        return noised(drawn_latents(self.moments, which, self.pipe.vae, generator), self.pipe.scheduler, generator, LEVELS)

    def naming_loss(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Of frames with two objects, by the way down and the middle alone."""
        among = self.two.nonzero()[:, 0]
        among = among[among >= TESTED]
        which = among[torch.randint(len(among), (batch,), generator=generator)]
        given = self.given(which, generator)
        self.features.stand_ins.say_nothing()
        texts, kinds, _ = told([self.frames[i][0] for i in which.tolist()], random_of(generator))
        with fast_autocast():
            half = lower(self.pipe.unet, given.sample[:, :, None], given.timesteps, self.encoded(texts))
            self.pipe.unet.mid_block(half.hidden[:, 0], half.temb, encoder_hidden_states=half.embeds)
        return self.named(which, kinds, torch.ones(batch))[0]

    def asked(
        self, which: torch.Tensor, given: Noised, generator: torch.Generator, telling: torch.Tensor, dropout: float = 0.0
    ) -> Asked:
        """What the whole UNet answers; of frames without a caption nothing is told or asked but the noise.

        Args:
            which: frames.
            given: of them.
            generator: of captions.
            telling: whether a frame is told what motion has made of it, (N,).
            dropout: share of frames without a caption.
        """
        rng = random_of(generator)
        texts, kinds, speeds = told([self.frames[i][0] for i in which.tolist()], rng)
        said = torch.from_numpy(rng.random(len(texts)) >= dropout)
        texts = [text if say else "" for text, say in zip(texts, said.tolist(), strict=True)]
        self.features.stand_ins.tell(self.states[which] * (said & telling)[:, None], self.places[which])
        with fast_autocast():
            predicted = self.pipe.unet(given.sample, given.timesteps, self.encoded(texts)).sample
        masks = self.features.masks.loss(self.masks[which], said)
        scores = [(s[said], classes[said]) for pair in self.words() for s, classes in zip(pair, (kinds, speeds), strict=True)]
        reading = torch.stack([F.cross_entropy(s, everywhere(classes, s)) for s, classes in scores]).mean()
        return Asked(denoising_loss(predicted, given), masks, reading, *self.named(which, kinds, said))

    def drawing_loss(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        which = torch.randint(TESTED, FRAMES, (batch,), generator=generator)
        given = self.given(which, generator)
        telling = (given.timesteps >= SEEN) | (torch.rand(batch, generator=generator) < 0.5)
        asked = self.asked(which, given, generator, telling, CAPTION_DROPOUT)
        beside = MASK_WEIGHT * asked.masks + READING_WEIGHT * asked.reading + NAMING_WEIGHT * asked.naming
        return asked.noise + beside

    @torch.no_grad()
    def tested(self) -> dict[str, float]:
        """Of untrained frames of turning objects, by timestep: the error of the noise, told and untold; and of those with two
        objects, the share of places that say rightly whether their object moves, and that name its motion.
        """
        turning = torch.tensor([clip.motion.kind in TURNING for clip, _ in self.frames[:TESTED]])
        figures = {}
        for timestep in TESTED_TIMESTEPS:
            for name, these, telling in (
                ("told", turning, True),
                ("untold", turning, False),
                ("of two", self.two[:TESTED], True),
            ):
                which, generator = these.nonzero()[:, 0], torch.Generator().manual_seed(timestep)
                latents = drawn_latents(self.moments, which, self.pipe.vae, generator)
                noise = torch.randn(latents.shape, generator=generator)
                timesteps = torch.full((len(which),), timestep)
                sample = self.pipe.scheduler.add_noise(latents, noise, timesteps)
                given = Noised(sample, timesteps, noise, torch.ones(len(which)))
                asked = self.asked(which, given, generator, torch.full((len(which),), telling))
                if name == "of two":
                    figures |= {f"who moves at {timestep}": asked.who.item(), f"motion at {timestep}": asked.kind.item()}
                else:
                    figures[f"error {name} at {timestep}"] = asked.noise.item()
        return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onto", type=Path, help="a domain adapter to begin from, safetensors")
    args = parser.parse_args()

    processes = processes_here()
    keep_freed_memory()
    torch.manual_seed(0)
    pipe = load_pipeline()
    add_words(pipe.tokenizer, pipe.text_encoder, load_words())
    lesson = Lesson(pipe, args.onto)
    before = lesson.tested()
    share = BATCH // processes.num_processes
    learn = partial(
        train,
        peak_learning_rate=LEARNING_RATE,
        average_decay=0.99,
        settings={"onto": None if args.onto is None else fingerprint([args.onto])},
    )
    learn(
        nn.ModuleList([lesson.lower_adapter, lesson.objects]),
        partial(lesson.naming_loss, share),
        steps=NAMING_STEPS,
        checkpoint=RUNS_DIR / "domain-adapter-naming.safetensors",
    )
    if processes.is_main_process:
        print(lesson.tested())
    learn(
        nn.ModuleList([lesson.adapter, lesson.features, lesson.words, lesson.objects]),
        partial(lesson.drawing_loss, share),
        steps=DRAWING_STEPS,
        checkpoint=RUNS_DIR / "domain-adapter.safetensors",
    )
    if not processes.is_main_process:
        return
    figures = {name: f"{before[name]:.4f} -> {figure:.4f}" for name, figure in lesson.tested().items()}
    print(figures)
    state = {f"unet.{name}": p.detach().half() for name, p in get_peft_model_state_dict(pipe.unet).items()}
    write_safetensors(state, DOMAIN_FILE, figures)
    write_safetensors(lesson.features.state_dict(), FEATURES_FILE)


if __name__ == "__main__":
    main()

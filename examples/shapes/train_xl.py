"""Train the shapes model's sibling of SDXL's shape, and measure it: writes model_xl. About half an hour on one core.

Everything starts from the shapes model, so that before the first step the UNet says what that one's says:

* SDXL reads the penultimate layer of its text encoders, which no normalisation follows. The first text encoder learns for
  two minutes to say there what the shapes encoder says at its end; the second starts as that encoder, its pooled output and
  all.
* The UNet attends to both, one after the other along the channels: its keys and values read the first as they did and start
  with zeros for the second. So does the last layer of the embedding of pooled text and frame.

Then all three learn together, from whole scenes and from scenes that are cut at an edge or come from a small file, told by
the six numbers of SDXL's micro-conditioning (arXiv 2307.01952, section 2.2). Captions always speak of the whole scene.

    python examples/shapes/train_xl.py
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from evaluate import TEACHER_GUIDANCE, Judge, Studio, held_out_scenes, noise, prompts_of
from pictures import contact_sheet, save
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lora_training.cpu import fast_autocast, fast_precision, keep_freed_memory, use_plain_attention

from denoising import CAPTION_DROPOUT, Layout, cached_moments, denoising_loss, drawn_latents, noised, random_tokens
from model import (
    RUNS_DIR,
    XL_MODEL_DIR,
    assemble_xl_pipeline,
    build_scheduler,
    build_xl_text_encoders,
    build_xl_unet,
    load_pipeline,
)
from scenes import BACKGROUNDS, COLOURS, IMAGE_SIZE, TRAIN_SEED, Scene, render, sample_scene
from training import train


@dataclass(frozen=True)
class Stage:
    """A part of the joint training, from the weights that the one before has left."""

    name: str
    seed: int
    steps: int
    learning_rate: float
    framed_share: float  # of every batch that is not whole scenes


@dataclass(frozen=True)
class Recipe:
    """How much of everything."""

    batch: int = 64
    scenes: int = 20480  # whole ones: what the shapes model learned from
    framed: int = 6144  # the first of them again, cut or from other files
    reading_steps: int = 800
    reading_rate: float = 1e-3
    stages: tuple[Stage, ...] = (
        Stage("xl-denoiser", seed=1, steps=1000, learning_rate=4e-4, framed_share=0.35),
        Stage("xl-frames", seed=2, steps=700, learning_rate=6e-4, framed_share=0.65),
    )
    average_decay: float = 0.99  # of the weights that are kept; a short run forgets faster


@dataclass(frozen=True)
class Frame:
    """How a picture of a scene came about. The default is a whole scene from a file of the model's own size.

    Attributes:
        original_size: height and width of the file in pixels.
        crop: (top, left) of what was cut out of it unscaled; (0, 0): the whole file, scaled.
    """

    original_size: int = IMAGE_SIZE
    crop: tuple[int, int] = (0, 0)

    def for_pipeline(self) -> dict[str, tuple[int, int]]:
        """SDXL's arguments for such a picture; together they are its time_ids, in this order."""
        return {
            "original_size": (self.original_size, self.original_size),
            "crops_coords_top_left": self.crop,
            "target_size": (IMAGE_SIZE, IMAGE_SIZE),
        }

    def time_ids(self) -> list[float]:
        return [float(number) for pair in self.for_pipeline().values() for number in pair]


# Few, so that a short training suffices. (0, 0) is no cut: it would read as the whole file.
CUT_SIZE, CROPS = 160, [(top, left) for top in (0, 16, 32) for left in (0, 16, 32) if top or left]
SMALL_SIZES = (32, 48, 64)
SHOWN_FRAMES = {
    "whole": Frame(),
    "cut at the top and left": Frame(CUT_SIZE, (32, 32)),
    "from a file of 32 pixels": Frame(32),
}


def sample_frame(index: int) -> Frame:
    """Half are cut, so that objects near an edge lose a part; most others come from a small file, blurred."""
    rng = np.random.default_rng((TRAIN_SEED, index, 1))
    kind = rng.random()
    if kind < 0.5:
        top, left = CROPS[rng.integers(len(CROPS))]
        return Frame(CUT_SIZE, (top, left))
    return Frame(SMALL_SIZES[rng.integers(len(SMALL_SIZES))] if kind < 0.9 else int(rng.integers(96, 257)))


def photograph(scenes: Sequence[Scene], frames: Sequence[Frame]) -> torch.Tensor:
    """Each scene in its frame, (N, 3, 128, 128)."""
    images = []
    for scene, frame in zip(scenes, frames, strict=True):
        file = render([scene], frame.original_size)
        if frame.crop == (0, 0):
            images.append(F.interpolate(file, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True))
        else:
            top, left = frame.crop
            images.append(file[:, :, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE])
    return torch.cat(images)


def framed_scenes(indices: Sequence[int]) -> torch.Tensor:
    """The training scenes of these numbers in frames of their own."""
    return photograph([sample_scene(TRAIN_SEED, i) for i in indices], [sample_frame(i) for i in indices])


# ---------------------------------------------------------------------------------------------- warm start


@torch.no_grad()
def start_text_encoders(
    shapes: CLIPTextModel, first: CLIPTextModel, second: CLIPTextModelWithProjection, scale: float = 0.1
) -> None:
    """Both start as the shapes encoder, the second with its pooled output.

    Every layer normalises what it reads, so its stream may be scaled as a whole: `scale` brings the first encoder's to the
    size of the normalised state it is to say.
    """
    first.load_state_dict(shapes.state_dict())
    writers = ("token_embedding", "position_embedding", "out_proj", "fc2")  # what adds to the stream
    for name, parameter in first.named_parameters():
        if any(writer in name for writer in writers):
            parameter.mul_(scale)
    second.text_model.load_state_dict(shapes.state_dict())
    second.text_projection.weight.copy_(torch.eye(second.config.projection_dim))


@torch.no_grad()
def start_unet(shapes: UNet2DConditionModel, unet: UNet2DConditionModel) -> None:
    """The shapes UNet's weights; zeros where SDXL's shape has more."""
    given = shapes.state_dict()
    for name, parameter in unet.state_dict().items():
        if name not in given:
            if name.startswith("add_embedding.linear_2"):
                parameter.zero_()
        elif given[name].numel() == parameter.numel():
            parameter.copy_(given[name].view_as(parameter))  # SDXL's proj_in and proj_out are linear, not 1 x 1 convolutions
        else:
            parameter.zero_()[:, : given[name].shape[1]] = given[name]  # keys and values: (inner, 160) -> (inner, 320)


def warm_started(shapes: Any) -> StableDiffusionXLPipeline:
    """The pipeline before training.

    Args:
        shapes: the shapes pipeline, in float32.
    """
    text_encoder, text_encoder_2 = build_xl_text_encoders(shapes.tokenizer)
    unet = build_xl_unet()
    start_text_encoders(shapes.text_encoder, text_encoder, text_encoder_2)
    start_unet(shapes.unet, unet)
    shapes.vae.register_to_config(_name_or_path="")  # no path of this machine in what ships
    return assemble_xl_pipeline(shapes.vae, text_encoder, text_encoder_2, shapes.tokenizer, unet)


# ---------------------------------------------------------------------------------------------- training


def encoded(pipe: StableDiffusionXLPipeline, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the UNet is told of tokens (N, tokens): (N, tokens, 320) and the pooled (N, 160)."""
    first = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
    second = pipe.text_encoder_2(ids, output_hidden_states=True)
    return torch.cat([first, second.hidden_states[-2]], dim=-1), second.text_embeds


def train_pipeline(recipe: Recipe) -> StableDiffusionXLPipeline:
    """The trained pipeline, in float32; interrupted runs go on."""
    torch.manual_seed(0)
    shapes = load_pipeline()
    pipe, scheduler = warm_started(shapes), build_scheduler()
    pipe.vae.requires_grad_(False)
    use_plain_attention(pipe.unet)
    for encoder in (shapes.text_encoder, pipe.text_encoder, pipe.text_encoder_2):
        encoder.set_attn_implementation("eager")
    scenes = [sample_scene(TRAIN_SEED, i) for i in range(recipe.scenes)]
    frames = [Frame()] * recipe.scenes + [sample_frame(i) for i in range(recipe.framed)]
    time_ids = torch.tensor([frame.time_ids() for frame in frames])
    whole = cached_moments(pipe.vae, recipe.scenes)
    framed = cached_moments(pipe.vae, recipe.framed, framed_scenes, "moments-framed")
    moments = {name: torch.cat([whole[name], framed[name]]) for name in whole}

    def reading_loss(generator: torch.Generator) -> torch.Tensor:
        which = torch.randint(recipe.scenes, (recipe.batch,), generator=generator).tolist()
        ids, _ = random_tokens(pipe.tokenizer, [scenes[i] for i in which], generator, dropout=0.0)
        with fast_autocast():
            with torch.no_grad():
                asked = shapes.text_encoder(ids).last_hidden_state
            said = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        return (said.float() - asked.float()).square().mean()

    train(
        pipe.text_encoder,
        reading_loss,
        steps=recipe.reading_steps,
        peak_learning_rate=recipe.reading_rate,
        checkpoint=RUNS_DIR / "xl-reader.safetensors",
        average_decay=recipe.average_decay,
    )

    def joint_loss(generator: torch.Generator, stage: Stage) -> torch.Tensor:
        is_framed = torch.rand(recipe.batch, generator=generator) < stage.framed_share
        which = torch.randint(recipe.scenes, (recipe.batch,), generator=generator)
        scene_of = torch.where(is_framed, which % recipe.framed, which)
        picture = torch.where(is_framed, recipe.scenes + scene_of, scene_of)
        given = noised(drawn_latents(moments, picture, pipe.vae, generator), scheduler, generator, Layout())
        shown = [scenes[i] for i in scene_of.tolist()]
        ids, dropped = random_tokens(pipe.tokenizer, shown, generator, CAPTION_DROPOUT)
        kept = 1.0 - torch.tensor(dropped, dtype=torch.float32)
        with fast_autocast():
            embeds, pooled = encoded(pipe, ids)
            embeds, pooled = embeds * kept[:, None, None], pooled * kept[:, None]  # zeros, as for SDXL's empty prompt
            added = {"text_embeds": pooled, "time_ids": time_ids[picture]}
            predicted = pipe.unet(given.sample, given.timesteps, embeds, added_cond_kwargs=added).sample
        return denoising_loss(predicted, given)

    denoiser = nn.ModuleDict({name: getattr(pipe, name) for name in ("unet", "text_encoder", "text_encoder_2")})
    for stage in recipe.stages:
        train(
            denoiser,
            partial(joint_loss, stage=stage),
            steps=stage.steps,
            peak_learning_rate=stage.learning_rate,
            checkpoint=RUNS_DIR / f"{stage.name}.safetensors",
            seed=stage.seed,
            average_decay=recipe.average_decay,
        )
    return pipe


# ---------------------------------------------------------------------------------------------- measuring


def object_share_of_edge(images: torch.Tensor, scenes: Sequence[Scene], width: int = 4) -> float:
    """How much of the outermost pixels of uint8 pictures is nearer in colour to an asked object than to the background."""
    edge = torch.ones(images.shape[-2:], dtype=torch.bool)
    edge[width:-width, width:-width] = False
    shares = []
    for image, scene in zip(images, scenes, strict=True):
        colours = [BACKGROUNDS[scene.background], *(COLOURS[obj.colour] for obj in scene.objects)]
        nearest = torch.cdist(image[:, edge].T.float(), torch.tensor(colours, dtype=torch.float32)).argmin(dim=1)
        shares.append((nearest > 0).float().mean())
    return torch.stack(shares).mean().item()


def detail(images: torch.Tensor) -> float:
    """Mean absolute difference of neighbouring pixels, in grey levels."""
    return images.float().diff(dim=-1).abs().mean().item()


def distance(images: torch.Tensor, others: torch.Tensor) -> float:
    """Root mean square difference in grey levels."""
    return (images.float() - others.float()).square().mean().sqrt().item()


@dataclass(frozen=True)
class Figures:
    """What README.md shows."""

    alignment: dict[str, float]
    frames: list[list[str]]  # a row for each of SHOWN_FRAMES
    sheet: dict[str, torch.Tensor]  # pictures to look at


def measure(steps: int, judged: int, framed: int) -> Figures:
    """Draw held-out prompts with the shipped pipeline.

    Args:
        steps: of DDIM.
        judged: pictures that are judged for alignment.
        framed: pictures in each frame.
    """
    studio = Studio(adapters={}, model=XL_MODEL_DIR, fast=True)
    teacher = studio.methods["teacher"]
    scenes = held_out_scenes(judged)
    prompts, latents = prompts_of(scenes), noise(judged, seed=1)
    whole = studio.generate(teacher, prompts, latents, steps, progress="held-out prompts")
    alignment = Judge().alignment(whole, scenes)

    scenes, prompts, latents = scenes[:framed], prompts[:framed], latents[:framed]
    truths = [(photograph(scenes, [frame] * framed) + 1) * 127.5 for frame in SHOWN_FRAMES.values()]
    rows, sheet = [], {}
    for (name, frame), own in zip(SHOWN_FRAMES.items(), truths, strict=True):
        drawn = studio.generate(teacher, prompts, latents, steps, progress=name, **frame.for_pipeline())
        row = [name, *(f"{distance(drawn, truth):.1f}" for truth in truths)]
        row.append(" / ".join(f"{100 * object_share_of_edge(images, scenes):.1f}" for images in (drawn, own)))
        row.append(" / ".join(f"{detail(images):.1f}" for images in (drawn, own)))
        rows.append(row)
        sheet[name] = drawn[:9]
    return Figures(alignment, rows, sheet)


def card(figures: Figures, recipe: Recipe, steps: int, judged: int, framed: int, guidance: float) -> str:
    """README.md of the model's folder."""
    megabytes = sum(path.stat().st_size for path in XL_MODEL_DIR.rglob("*") if path.suffix != ".md") / 1e6
    alignment = tabulate(
        [[name, f"{100 * share:.1f}%"] for name, share in figures.alignment.items()],
        headers=["right", "measured"],
        tablefmt="github",
        disable_numparse=True,
    )
    steps_in_all = sum(stage.steps for stage in recipe.stages)
    asked = "\n".join(
        f"- {name}: {', '.join(f'`{argument}={value}`' for argument, value in frame.for_pipeline().items())}"
        for name, frame in SHOWN_FRAMES.items()
    )
    headers = ["asked for", *(f"distance: {name}" for name in SHOWN_FRAMES), "objects on the edge, % / true", "detail / true"]
    return f"""# shapes-xl: the shapes model in SDXL's shape

A `StableDiffusionXLPipeline` in diffusers' own folder format ({megabytes:.1f} MB, fp16), for tests and examples of everything
that is different in SDXL: two text encoders read at their penultimate layers, a pooled embedding, size and crop
micro-conditioning, zeros for the empty prompt. It draws what [the shapes model](../MODEL_CARD.md) draws, at 128 x 128 pixels,
and was trained from its weights for {steps_in_all} steps of {recipe.batch} by `examples/shapes/train_xl.py`, which measured
every figure below. In the run behind these weights the first stage saw other frames (cut from files of 136 to 176 pixels at any
offset; whole from files of 40 to 200), so running the script again gives a model of this kind and not these bytes. The
autoencoder is the shapes model's, unchanged.

## Alignment

{steps} DDIM steps, guidance {guidance:g}, {judged} held-out prompts, half of which name a pair of shape and colour that was
never drawn in training; judged by the attribute classifier. UNet in {fast_precision()}, here and below.

{alignment}

## Micro-conditioning

{framed} of these prompts from the same noise, asked for in {len(SHOWN_FRAMES)} frames:

{asked}

Distance: root mean square difference, in grey levels, to a drawing of the same scene in each frame; a frame is understood when
its column is least in its own row. Objects on the edge: share of the outermost four pixels that is nearer in colour to an
asked object than to the background. Detail: mean difference of neighbouring pixels, in grey levels. True: of those drawings.

{tabulate(figures.frames, headers=headers, tablefmt="github", disable_numparse=True)}
"""


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    keep_freed_memory()
    recipe, steps, judged, framed = Recipe(), 25, 256, 128
    pipe = train_pipeline(recipe)
    pipe.to(dtype=torch.float16).save_pretrained(RUNS_DIR / "pipeline_xl", safe_serialization=True)
    shutil.copytree(RUNS_DIR / "pipeline_xl", XL_MODEL_DIR, dirs_exist_ok=True)
    figures = measure(steps, judged, framed)
    save(contact_sheet(figures.sheet), RUNS_DIR / "pictures_xl.png")
    text = card(figures, recipe, steps, judged, framed, guidance=TEACHER_GUIDANCE)
    (XL_MODEL_DIR / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

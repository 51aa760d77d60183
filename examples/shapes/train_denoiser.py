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

import torch
from diffusers import AutoencoderKL
from torch import nn

from lora_training.cpu import fast_autocast, keep_freed_memory, use_plain_attention

from attributes import AttributeHeads, attribute_loss
from denoising import CAPTION_DROPOUT, Layout, cached_moments, denoising_loss, drawn_latents, noised, random_tokens
from model import MODEL_DIR, RUNS_DIR, assemble_pipeline, build_scheduler, build_text_encoder, build_tokenizer, build_unet
from scenes import TRAIN_SEED, all_wordings, labels, sample_scene
from training import train


@dataclass(frozen=True)
class Stage:
    """A part of the training of UNet and text encoder, from the weights that the one before has left."""

    name: str
    seed: int
    steps: int
    learning_rate: float
    layout: Layout | None  # None: all noise levels alike
    reading_weight: float  # of naming the scene, beside the noise prediction


STAGES = (
    Stage("all", seed=1, steps=6000, learning_rate=1.2e-3, layout=None, reading_weight=0.0),
    Stage("layout", seed=2, steps=6000, learning_rate=0.8e-3, layout=Layout(), reading_weight=0.02),
)


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

    reader = CaptionReader(text_encoder, text_encoder.config.hidden_size)

    def reading_loss(generator: torch.Generator) -> torch.Tensor:
        which = torch.randint(len(scenes), (128,), generator=generator).tolist()
        told = [scenes[i] for i in which]
        ids, _ = random_tokens(tokenizer, told, generator, dropout=0.0)
        return attribute_loss(reader.heads(text_encoder(ids).pooler_output), labels(told))

    train(
        reader,
        reading_loss,
        steps=args.reading_steps,
        peak_learning_rate=1e-3,
        checkpoint=RUNS_DIR / "reader.safetensors",
    )

    def stage_loss(generator: torch.Generator, stage: Stage) -> torch.Tensor:
        which = torch.randint(len(scenes), (args.batch,), generator=generator)
        given = noised(drawn_latents(moments, which, vae, generator), scheduler, generator, stage.layout)
        shown = [scenes[i] for i in which.tolist()]
        with fast_autocast():
            ids, dropped = random_tokens(tokenizer, shown, generator, CAPTION_DROPOUT)
            text = text_encoder(ids)
            predicted = unet(given.sample, given.timesteps, text.last_hidden_state).sample
        loss = denoising_loss(predicted, given)
        if not stage.reading_weight:
            return loss
        told = [i for i, drop in enumerate(dropped) if not drop]
        named = reader.heads(text.pooler_output[told].float())
        return loss + stage.reading_weight * attribute_loss(named, labels([shown[i] for i in told]))

    denoiser = nn.ModuleDict({"unet": unet, "reader": reader})
    for stage in STAGES:
        train(
            denoiser,
            partial(stage_loss, stage=stage),
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

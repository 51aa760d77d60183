"""The shapes model with motion modules and the words of motion, as a pipeline and as a folder that others load.

python examples/shapes/video_model.py outputs/shapes_video_model     # what `model.path` of clips' configurations names
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter, StableDiffusionPipeline
from domain_adapter import load_domain_adapter
from motion_words import add_words, load_words
from tqdm import tqdm

from lora_training.randomness import generator_of

import moving
from model import MOTION_DIR, load_pipeline
from moving import NUM_FRAMES, Clip, sample_clip
from scenes import IMAGE_SIZE, MOTION_TEST_SEED


def load_image_pipeline() -> StableDiffusionPipeline:
    """The shapes pipeline whose text encoder knows the words of motion, and whose UNet what frames look like, in float32."""
    pipe = load_pipeline()
    add_words(pipe.tokenizer, pipe.text_encoder, load_words())
    load_domain_adapter(pipe)
    return pipe


def write_image_model(folder: Path) -> None:
    """What `model.path` of clips' configurations names, fp16."""
    load_image_pipeline().to(dtype=torch.float16).save_pretrained(folder)


def load_video_pipeline() -> AnimateDiffPipeline:
    """Clips of moving shapes, in float32."""
    image = load_image_pipeline()
    parts = {name: getattr(image, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    return AnimateDiffPipeline(**parts, motion_adapter=MotionAdapter.from_pretrained(MOTION_DIR).float())


def held_out_clips(count: int) -> list[Clip]:
    """Clips that nothing was trained on; in every second one a shape moves in a colour that it never had in training."""
    return [sample_clip(MOTION_TEST_SEED, i, held_out=i % 2 == 0) for i in range(count)]


def captions_of(clips: Sequence[Clip]) -> list[str]:
    """Full captions in varied wordings."""
    return [moving.caption(clip, np.random.default_rng((MOTION_TEST_SEED, i))) for i, clip in enumerate(clips)]


def clip_noise(count: int, seed: int) -> torch.Tensor:
    """Initial latents (count, 4, F, 16, 16), one generator per clip, so that batches do not matter."""
    return torch.stack([torch.randn(4, NUM_FRAMES, 16, 16, generator=generator_of(seed, i)) for i in range(count)])


def draw_clips(
    pipe: AnimateDiffPipeline,
    prompts: Sequence[str],
    latents: torch.Tensor,
    steps: int,
    guidance_scale: float,
    eta: float = 0.0,
    batch: int = 4,
    progress: str | None = None,
) -> torch.Tensor:
    """One clip per prompt through the stock pipeline.

    Args:
        pipe: with the scheduler and adapters that draw.
        prompts: N texts.
        latents: initial noise (N, 4, F, 16, 16).
        steps: num_inference_steps.
        guidance_scale: g; 1 is none.
        eta: of the scheduler.
        batch: clips at a time.
        progress: name of a progress bar; None shows none.

    Returns:
        uint8 clips (N, F, 3, 128, 128).
    """
    clips = []
    for start in tqdm(range(0, len(prompts), batch), desc=progress, disable=progress is None):
        noise = latents[start : start + batch]
        frames = pipe(
            prompt=list(prompts[start : start + batch]),
            latents=noise,
            num_frames=noise.shape[2],
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            eta=eta,
            generator=torch.Generator().manual_seed(start),
            output_type="pt",
        ).frames
        clips.append((frames * 255).round().byte())
    return torch.cat(clips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    write_image_model(args.folder)


if __name__ == "__main__":
    main()

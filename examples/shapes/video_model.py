"""The shapes model with motion modules and the words of motion, as a pipeline and as a folder that others load.

python examples/shapes/video_model.py outputs/shapes_video_model     # what `model.path` of clips' configurations names
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from agreement import motion_agreement, motion_and_scene_agreement
from diffusers import AnimateDiffPipeline, MotionAdapter, StableDiffusionPipeline
from domain_adapter import DOMAIN_FILE, load_domain_adapter
from evaluate import in_fast_precision
from motion_words import WORDS_FILE, add_words, load_words
from safetensors.torch import load_file
from tqdm import tqdm

from lora_training.files import write_text
from lora_training.randomness import generator_of
from pcm_scheduler.lora_file import write_safetensors

import moving
from model import HERE, MODEL_DIR, MOTION_DIR, RUNS_DIR, fingerprint, load_pipeline
from moving import NUM_FRAMES, Clip, sample_clip
from scenes import IMAGE_SIZE, MOTION_TEST_SEED
from training import processes_here

PCM_OF_PHASES = {m: HERE / "adapters" / f"video_pcm_{m}phase.safetensors" for m in (1, 2, 4)}
ADAPTERS = {"PCM": PCM_OF_PHASES[4], "LCM": HERE / "adapters" / "video_lcm.safetensors"}
GUIDANCE_FILE = MOTION_DIR / "guidance.json"


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


def load_fast_pipeline() -> AnimateDiffPipeline:
    """The same for drawing many clips: the UNet in this processor's fast precision, without a progress bar for each."""
    pipe = load_video_pipeline()
    pipe.set_progress_bar_config(disable=True)
    in_fast_precision(pipe.unet)
    return pipe


def held_out_clips(count: int, seed: int = MOTION_TEST_SEED) -> list[Clip]:
    """Clips that nothing was trained on; in every second one a shape moves in a colour that it never had in training."""
    return [sample_clip(seed, i, held_out=i % 2 == 0) for i in range(count)]


def captions_of(clips: Sequence[Clip]) -> list[str]:
    """Full captions in varied wordings."""
    return [moving.caption(clip, np.random.default_rng((MOTION_TEST_SEED, i))) for i, clip in enumerate(clips)]


def clips_fingerprint() -> str:
    """Changes when the weights do that draw clips."""
    image = sorted(MODEL_DIR.rglob("*.safetensors"))
    return fingerprint([*image, DOMAIN_FILE, WORDS_FILE, *sorted(MOTION_DIR.glob("*.safetensors"))])


def teacher_guidance() -> float:
    """At which most clips show what they were asked for, as `video_guidance.py` found it."""
    return json.loads(GUIDANCE_FILE.read_text(encoding="utf-8"))["rows"][0]["guidance_scale"]


def shares_right(drawn: torch.Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Of uint8 clips (N, F, 3, 128, 128): how many move as told, and how many show all that their prompts name."""
    shown = drawn.float() / 127.5 - 1
    judges = {"motion": motion_agreement(), "motion_and_scene": motion_and_scene_agreement()}
    return {name: round(judge(shown, prompts).mean().item(), 4) for name, judge in judges.items()}


def most_right(row: Mapping[str, float]) -> tuple[float, float]:
    """The order of rows of a search: most clips as asked first, and of these the least guidance."""
    return -row["motion_and_scene"], row["guidance_scale"]


def write_search(path: Path, clips: int, steps: int, rows: Sequence[Mapping[str, Any]]) -> float:
    """The table of a search, with these weights' fingerprint, the best row first.

    Returns:
        The guidance of that row.
    """
    ordered = sorted(rows, key=most_right)
    found = {"weights": clips_fingerprint(), "clips": clips, "steps": steps, "rows": ordered}
    write_text(path, json.dumps(found, indent=1) + "\n")
    return ordered[0]["guidance_scale"]


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


def shared_clips(name: str, prompts: Sequence[str], draw: Callable[[Sequence[int]], torch.Tensor]) -> torch.Tensor:
    """Clips of all prompts, of which every process that `accelerate launch` started draws a share.

    They are kept on disk, for they take minutes: what is asked for again is not drawn again.

    Args:
        name: says by what they are drawn; another name is drawn anew, and so are other prompts or weights.
        prompts: N texts.
        draw: of the prompts of some numbers, (n, F, 3, 128, 128).

    Returns:
        uint8 clips (N, F, 3, 128, 128).
    """
    processes = processes_here()
    asked = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:8]
    folder = RUNS_DIR / "drawn" / clips_fingerprint() / f"{name}-{asked}"
    shares = [range(part, len(prompts), processes.num_processes) for part in range(processes.num_processes)]
    files = [folder / f"{part}of{processes.num_processes}.safetensors" for part in range(processes.num_processes)]
    own = files[processes.process_index]
    if not own.exists():
        write_safetensors({"clips": draw(shares[processes.process_index])}, own)
    processes.wait_for_everyone()
    parts = [load_file(file)["clips"] for file in files]
    clips = parts[0].new_empty(len(prompts), *parts[0].shape[1:])
    for share, part in zip(shares, parts, strict=True):
        clips[list(share)] = part
    return clips


def teacher_clips(
    pipe: AnimateDiffPipeline, name: str, prompts: Sequence[str], noise: int, steps: int, guidance_scale: float
) -> torch.Tensor:
    """Those of the motion modules alone, from the noise of a seed, shared as in `shared_clips`."""
    latents = clip_noise(len(prompts), noise)

    def draw(numbers: Sequence[int]) -> torch.Tensor:
        texts, own = [prompts[i] for i in numbers], latents[list(numbers)]
        return draw_clips(pipe, texts, own, steps, guidance_scale, progress=f"{name}, guidance {guidance_scale:g}")

    return shared_clips(f"{name}-{steps}steps-guidance{guidance_scale:g}-noise{noise}", prompts, draw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    write_image_model(args.folder)


if __name__ == "__main__":
    main()

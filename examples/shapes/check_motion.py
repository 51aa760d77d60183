"""How often the judge of motion is right: on drawings, and on what the shapes model's autoencoder makes of them.

python examples/shapes/check_motion.py --clips 512
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from diffusers import AutoencoderKL
from motion import measure_motion
from tabulate import tabulate
from tqdm import tqdm

from lora_training.cpu import fast_autocast, keep_freed_memory

import moving
from model import MODEL_DIR
from moving import KINDS
from scenes import MOTION_TEST_SEED


@torch.no_grad()
def round_trip(vae: AutoencoderKL, clips: torch.Tensor) -> torch.Tensor:
    """Clips (N, F, 3, H, W) encoded, frame by frame, and decoded again."""
    with fast_autocast():
        shown = [vae.decode(vae.encode(clip).latent_dist.mode()).sample.float() for clip in clips]
    return torch.stack(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=512)
    args = parser.parse_args()

    keep_freed_memory()
    vae = AutoencoderKL.from_pretrained(MODEL_DIR / "vae").float().eval()
    right = defaultdict(list)  # (kind, column) -> whether each clip is read rightly
    for i in tqdm(range(args.clips), desc="judge"):
        clip = moving.sample_clip(MOTION_TEST_SEED, i, held_out=i % 2 == 0)
        drawing = moving.render([clip])
        colour = clip.scene.objects[clip.moving].colour
        for name, pixels in (("drawn", drawing), ("after the VAE", round_trip(vae, drawing))):
            measured = measure_motion(pixels, [colour])[0]
            right[clip.motion.kind, name].append(measured.kind == clip.motion.kind)
            right[clip.motion.kind, f"{name}, speed too"].append(
                (measured.kind, measured.speed) == (clip.motion.kind, clip.motion.speed)
            )
    columns = list(dict.fromkeys(column for _, column in right))
    rows = []
    for kind in KINDS:
        shares = [right[kind, column] for column in columns]
        if shares[0]:
            rows.append([kind, len(shares[0]), *(f"{sum(values) / len(values):.1%}" for values in shares)])
    print(tabulate(rows, ["kind", "clips", *columns]))


if __name__ == "__main__":
    main()

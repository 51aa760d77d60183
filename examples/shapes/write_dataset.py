"""Write shapes scenes as a folder of captioned pictures: what the trainer and tests of real loaders read.

python examples/shapes/write_dataset.py outputs/shapes_data --count 8192
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from scenes import TRAIN_SEED, caption, render, sample_scene


def write_dataset(folder: Path, count: int, seed: int = TRAIN_SEED) -> None:
    """`count` pictures as `00000.png` with `00000.txt` beside each; those already there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, count, 64), desc="write pictures"):
        indices = [i for i in range(start, min(start + 64, count)) if not (folder / f"{i:05d}.txt").exists()]
        if not indices:
            continue
        scenes = [sample_scene(seed, i) for i in indices]
        pixels = ((render(scenes) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for i, scene, image in zip(indices, scenes, pixels, strict=True):
            Image.fromarray(image).save(folder / f"{i:05d}.png")
            words = caption(scene, np.random.default_rng((seed, i)), omit=0.1)
            (folder / f"{i:05d}.txt").write_text(words + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=TRAIN_SEED)
    args = parser.parse_args()
    write_dataset(args.folder, args.count, args.seed)


if __name__ == "__main__":
    main()

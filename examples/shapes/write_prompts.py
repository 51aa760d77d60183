"""Write what an evaluation draws: captions of held-out scenes or clips, and prompts with one thing in them to be kept out.

python examples/shapes/write_prompts.py outputs/shapes_prompts.txt --count 2048
python examples/shapes/write_prompts.py outputs/shapes_video_prompts.txt --count 128 --moving
python examples/shapes/write_prompts.py outputs/shapes_pairs.jsonl --count 512
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from evaluate import held_out_scenes, prompts_of

import moving
from scenes import COLOURS, MOTION_TEST_SEED, SHAPES, TEST_SEED


def pairs(count: int) -> list[dict[str, str]]:
    """A prompt for two objects of one shape, and the second as the thing that a negative prompt names.

    The prompt asks for it, so it is there without a negative prompt, and what takes it away is the negative prompt alone.
    """
    rng = np.random.default_rng(TEST_SEED)
    found = []
    for _ in range(count):
        shape = str(rng.choice(SHAPES))
        first, second = (str(colour) for colour in rng.choice(list(COLOURS), 2, replace=False))
        one, other = (f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}" for colour in (first, second))
        found.append({"prompt": f"{one} and {other}", "thing": other})
    return found


def moving_prompts(count: int) -> list[str]:
    """Full captions, in varied wordings, of clips never trained on; every second one's moving object is of a held-out pair."""
    clips = [moving.sample_clip(MOTION_TEST_SEED, i, held_out=i % 2 == 0) for i in range(count)]
    return [moving.caption(clip, np.random.default_rng((MOTION_TEST_SEED, i))) for i, clip in enumerate(clips)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help=".txt for prompts, .jsonl for pairs")
    parser.add_argument("--count", type=int, default=2048)
    parser.add_argument("--moving", action="store_true", help="prompts for clips")
    args = parser.parse_args()
    if args.moving and args.file.suffix == ".jsonl":
        parser.error("--moving is for prompts, and pairs are of pictures: name a .txt file.")
    if args.moving:
        lines = moving_prompts(args.count)
    elif args.file.suffix == ".jsonl":
        lines = [json.dumps(pair) for pair in pairs(args.count)]
    else:
        lines = prompts_of(held_out_scenes(args.count))
    args.file.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.file.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(args.file)


if __name__ == "__main__":
    main()

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
from video_model import captions_of, held_out_clips

from lora_training.files import write_text

from scenes import COLOURS, SHAPES, TEST_SEED


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help=".txt for prompts, .jsonl for pairs")
    parser.add_argument("--count", type=int, default=2048)
    parser.add_argument("--moving", action="store_true", help="prompts for clips")
    args = parser.parse_args()
    if args.moving and args.file.suffix == ".jsonl":
        parser.error("--moving is for prompts, and pairs are of pictures: name a .txt file.")
    if args.moving:
        lines = captions_of(held_out_clips(args.count))
    elif args.file.suffix == ".jsonl":
        lines = [json.dumps(pair) for pair in pairs(args.count)]
    else:
        lines = prompts_of(held_out_scenes(args.count))
    write_text(args.file, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

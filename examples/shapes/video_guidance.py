"""At which guidance do the motion modules draw most clips as asked? Writes motion_adapter/guidance.json in ten minutes.

The image model draws its pictures best at guidance 5, which is too much for clips. What is asked for is that the motion and
all else that the prompt names are right. The prompts are of a stream that nothing else is measured on.

    accelerate launch --config_file examples/accelerate/two_processes_cpu.yaml examples/shapes/video_guidance.py
"""

from __future__ import annotations

import argparse

from video_model import (
    GUIDANCE_FILE,
    captions_of,
    held_out_clips,
    load_fast_pipeline,
    shares_right,
    teacher_clips,
    write_search,
)

from lora_training.cpu import keep_freed_memory

from scenes import MOTION_SEARCH_SEED
from training import processes_here

GUIDANCE_SCALES = (1.5, 2.0, 3.0, 5.0)
STEPS, NOISE = 25, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=48)
    args = parser.parse_args()

    keep_freed_memory()
    processes = processes_here()
    pipe = load_fast_pipeline()
    texts = captions_of(held_out_clips(args.clips, MOTION_SEARCH_SEED))
    rows = []
    for guidance_scale in GUIDANCE_SCALES:
        drawn = teacher_clips(pipe, "search", texts, NOISE, STEPS, guidance_scale)
        if processes.is_main_process:
            rows.append({"guidance_scale": guidance_scale} | shares_right(drawn, texts))
            print(rows[-1], flush=True)
    if processes.is_main_process:
        write_search(GUIDANCE_FILE, args.clips, STEPS, rows)


if __name__ == "__main__":
    main()

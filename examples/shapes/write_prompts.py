"""Write captions of held-out scenes, a line each: the prompts of an evaluation.

python examples/shapes/write_prompts.py outputs/shapes_prompts.txt --count 2048
"""

from __future__ import annotations

import argparse
from pathlib import Path

from evaluate import held_out_scenes, prompts_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=2048)
    args = parser.parse_args()
    args.file.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.file.with_suffix(".tmp")
    temporary.write_text("\n".join(prompts_of(held_out_scenes(args.count))) + "\n", encoding="utf-8")
    temporary.replace(args.file)


if __name__ == "__main__":
    main()

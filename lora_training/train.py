"""Train an adapter.

    accelerate launch lora_training/train.py --config examples/shapes/configs/pcm_4phase.yaml
    accelerate launch lora_training/train.py --config my.yaml --lora.rank 16 --optimizer.learning_rate 1e-5

`--help` lists every setting.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import ArgumentParser

if __package__ in (None, ""):  # run as a script: `accelerate launch` puts this folder, not the repository, on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lora_training.config import TrainConfig
from lora_training.loop import run


def parse(arguments: list[str] | None = None) -> TrainConfig:
    """Configuration file and overrides into a checked `TrainConfig`; exits with a message that names the bad setting."""
    parser = ArgumentParser(prog="train.py", description=__doc__)
    parser.add_argument("--config", action="config", help="a YAML file with the settings below")
    parser.add_class_arguments(TrainConfig)
    settings = vars(parser.instantiate(parser.parse_args(arguments)))
    settings.pop("config")
    try:
        return TrainConfig(**settings)
    except ValueError as error:
        sys.exit(f"train.py: {error}")


def main() -> None:
    config = parse()
    try:
        path = run(config)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        sys.exit(f"train.py: {error}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

"""Train an adapter.

    accelerate launch lora_training/train.py --config examples/configs/shapes_pcm4.yaml
    accelerate launch lora_training/train.py --config my.yaml --lora.rank 16 --optimizer.learning_rate 1e-5

`--help` lists every setting.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import re
import signal
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import get_args, get_type_hints

if __package__ in (None, ""):  # run as a script: `accelerate launch` puts this folder, not the repository, on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lora_training.config import TrainConfig
from lora_training.dry_run import dry_run
from lora_training.loop import Interrupted, Run
from lora_training.settings_parser import SettingsParser

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


class Parser(SettingsParser):
    """Says which setting was probably meant."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        known = list(setting_names(TrainConfig))
        in_group = [".".join(found) for found in re.findall(r"Group '(\S+)' does not accept option '(\S+)'", message)]
        # of a group that may be left out
        in_group += [".".join(found) for found in re.findall(r"(?s)key \"(\S+)\":.*?Option '(\S+)' is not accepted", message)]
        for word in in_group or [word.strip(".") for word in re.findall(r"[\w.]+", message)]:
            near = get_close_matches(word, known, n=1, cutoff=0.75)
            if near and word not in known and not any(name.startswith(word + ".") for name in known):
                message += f"\nDid you mean {near[0]}?"
                break
        super().error(message, ex)


def setting_names(config: type, prefix: str = "") -> Iterator[str]:
    """Every setting's full name, such as `lora.rank`."""
    for name, kind in get_type_hints(config).items():
        group = next((k for k in (kind, *get_args(kind)) if isinstance(k, type) and dataclasses.is_dataclass(k)), None)
        if group is not None:
            yield from setting_names(group, f"{prefix}{name}.")
        else:
            yield prefix + name


def parse(arguments: list[str] | None = None) -> TrainConfig:
    """Configuration file and overrides into a checked `TrainConfig`; exits with a message that names the bad setting."""
    parser = Parser(prog="train.py", description=__doc__)
    parser.add_argument("--config", action="config", help="a YAML file with the settings below")
    parser.add_class_arguments(TrainConfig)
    settings = parser.settings(TrainConfig, arguments)
    settings.pop("config")
    try:
        return TrainConfig(**settings)
    except ValueError as error:
        sys.exit(f"train.py: {error}")


def end_with_launcher() -> None:
    """Be asked to stop (SIGTERM) when `accelerate launch` ends: with one process it passes on no signals, and a run that was
    left behind would write beside the one that goes on from it. On Linux; elsewhere do nothing.
    """
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:  # which the launcher sets
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def main() -> None:
    end_with_launcher()
    config = parse()
    try:
        run = Run(config)
        if config.dry_run:
            dry_run(run)
            return
        path = run.train()
    except Interrupted as stopped:
        if run.accelerator.is_main_process:
            print(stopped)
        return
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"train.py: {error}")
    if run.accelerator.is_main_process:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()

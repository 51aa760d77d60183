"""Draw, measure and report.

    python -m lora_training.evaluation examples/evaluation/shapes.yaml
    accelerate launch -m lora_training.evaluation my.yaml --batch_size 32

`--help` lists every setting. An interrupted run goes on where it stopped; pictures that are there are not drawn again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from ..files import CannotWrite
from ..settings_parser import SettingsParser
from .config import EvaluationConfig
from .report import write_report
from .run import Evaluation


def config_first(arguments: Sequence[str]) -> list[str]:
    """`FILE ...` as `--config FILE ...`, which the parser knows."""
    return ["--config"][: bool(arguments) and not arguments[0].startswith("-")] + list(arguments)


def parse(arguments: list[str] | None = None) -> EvaluationConfig:
    """Configuration file and overrides; exits with a message that names the bad setting.

    Raises:
        ValueError: settings that are of the right kind and do not go together.
    """
    usage = "%(prog)s CONFIG.yaml [settings]"
    parser = SettingsParser(prog="python -m lora_training.evaluation", usage=usage, description=__doc__)
    parser.add_argument(
        "--config", action="config", help="a YAML file with the settings below; may come first without this name"
    )
    parser.add_class_arguments(EvaluationConfig)
    settings = parser.settings(EvaluationConfig, config_first(sys.argv[1:] if arguments is None else arguments))
    settings.pop("config")
    return EvaluationConfig(**settings)


def main() -> None:
    try:
        evaluation = Evaluation(parse())
        report = evaluation.run()
        if report is not None:
            print(write_report(evaluation, report).read_text(encoding="utf-8"))
    except torch.OutOfMemoryError as error:
        sys.exit(f"evaluation: memory is short: choose a smaller batch_size; what is drawn is kept. {error}")
    except (ValueError, OSError, CannotWrite) as error:
        sys.exit(f"evaluation: {error}")


if __name__ == "__main__":
    main()

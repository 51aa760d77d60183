"""Draw, measure and report.

    python -m lora_training.evaluation --config examples/configs/shapes_evaluation.yaml
    accelerate launch -m lora_training.evaluation --config my.yaml

`--help` lists every setting. An interrupted run goes on where it stopped; pictures that are there are not drawn again.
"""

from __future__ import annotations

import sys

from jsonargparse import ArgumentParser

from .config import EvaluationConfig
from .report import write_report
from .run import Evaluation


def parse(arguments: list[str] | None = None) -> EvaluationConfig:
    """Configuration file and overrides; exits with a message that names the bad setting."""
    parser = ArgumentParser(prog="python -m lora_training.evaluation", description=__doc__)
    parser.add_argument("--config", action="config", help="a YAML file with the settings below")
    parser.add_class_arguments(EvaluationConfig)
    settings = vars(parser.instantiate(parser.parse_args(arguments)))
    settings.pop("config")
    return EvaluationConfig(**settings)


def main() -> None:
    try:
        evaluation = Evaluation(parse())
        report = evaluation.run()
        if report is not None:
            print(write_report(evaluation, report).read_text(encoding="utf-8"))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"evaluation: {error}")


if __name__ == "__main__":
    main()

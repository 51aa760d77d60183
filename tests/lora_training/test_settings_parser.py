"""Configurations that are broken, or made to take all memory, end the program with a sentence."""

from __future__ import annotations

import pytest

from lora_training.evaluation.__main__ import parse as parse_evaluation
from lora_training.settings_parser import load_yaml
from lora_training.train import parse as parse_training

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n" for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + LAUGHS.partition("\n")[2].replace("[", "{<<: [").replace("]", "]}")


@pytest.mark.parametrize("parse", [parse_training, parse_evaluation])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (LAUGHS, "letters when its aliases are written out"),  # a billion
        (MERGES, "letters when its aliases are written out"),
        ("title: &a [*a]", "means nothing before it, or what it is in"),
        ("&a {title: x, model: *a}", "means nothing before it, or what it is in"),
        ("title: " + "[" * 100_000, "nested in more than 50 layers"),
        ("x" * 2**21, "a configuration has at most"),
        ("title: !!python/object/apply:os.system ['exit 9']", "python/object/apply:os.system"),
        ("title: !!bool x", "not of the kind that it seems to be"),
        ("title: !!timestamp x", "not of the kind that it seems to be"),
        ("count: 1" + "0" * 5000, "not of the kind that it seems to be"),
        (b"\xff\xfe", "not UTF-8"),
        ("model: null", r"model is a group of settings, `model: {...}`; got None"),
        ("model: 3", r"model is a group of settings"),
        ("title: null", "title is empty, which is no value"),
        ("model: {family: null}", "model.family is empty, which is no value"),
    ],
)
def test_what_is_no_configuration_is_said(tmp_path, capsys, parse, content, says):
    file = tmp_path / "my.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit):
        parse(["--config", str(file)])
    words = capsys.readouterr().err
    assert says in words or ("nested" in says and "exceeded maximum nesting depth" in words)  # new PyYAMLs say it first
    assert len(words) < 10_000


def test_no_is_a_word_where_a_setting_says_so_and_false_elsewhere(tmp_path):
    """As messages advise it. YAML takes it for false."""
    file = tmp_path / "my.yaml"
    file.write_text("mixed_precision: no\nresume: No\ngradient_checkpointing: no\noptimizer: {learning_rate: 1e-4}\n")
    config = parse_training(["--config", str(file)])
    assert (config.mixed_precision, config.resume, config.gradient_checkpointing) == ("no", "no", False)
    assert config.optimizer.learning_rate == 1e-4
    assert load_yaml("resume: 'no'") == {"resume": "no"}
    assert load_yaml("a: {precision: no, b: no}") == {"a": {"precision": "no", "b": False}}


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate must be a finite number"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate must be a finite number"),
        ("optimizer.learning_rate=1" + "0" * 400, "A number is too large"),
        ("validation.guidance_scales=[.nan]", "validation.guidance_scales must be a finite number"),
        ("adversarial.weight=.nan", "adversarial.weight must be a finite number"),
        ("seed=1" + "0" * 400, "seed must be less than 2^63"),
        ("lora.alpha=0", "lora.alpha must be positive"),
        ("optimizer.max_grad_norm=-1", "optimizer.max_grad_norm must be positive"),
        ("objective={num_phases: 1000000000, num_solver_steps: 1000000000}", "nearest possible"),
    ],
)
def test_numbers_that_are_none_are_refused_by_name(capsys, setting, says):
    with pytest.raises(SystemExit) as stopped:
        parse_training([f"--{setting}"])
    assert says in f"{stopped.value.code} {capsys.readouterr().err}"


def test_an_argument_that_is_not_utf8_is_a_text_as_others(tmp_path):
    assert parse_training(["--title", "caf\udce9"]).title == "caf\udce9"


def test_aliases_that_people_write_are_followed(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("validation: {prompts: &both [a cat, a dog], every: 5}\nlora: {targets: *both}\n")
    config = parse_training(["--config", str(file)])
    assert config.validation.prompts == config.lora.targets == ("a cat", "a dog")


@pytest.mark.parametrize("parse", [parse_training, parse_evaluation])
@pytest.mark.parametrize("config", [["--config", "{}"], ["--config={}"]])
def test_the_command_line_overrules_the_file_before_it_and_after_it(tmp_path, parse, config):
    file, needed = tmp_path / "my.yaml", {parse_training: "", parse_evaluation: "methods: [{name: DDIM, scheduler: ddim}]\n"}
    file.write_text(f"title: of the file\n{needed[parse]}", encoding="utf-8")
    told = [part.format(file) for part in config]
    for arguments in ([*told, "--title", "told"], ["--title", "told", *told], ["--title=told", *told]):
        assert parse(arguments).title == "told"

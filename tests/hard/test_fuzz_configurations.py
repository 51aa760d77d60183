"""Configuration files and command lines that are broken or made to mislead: settings, or a message that ends the program."""

from __future__ import annotations

import contextlib
import io
import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from fuzzing import damaged, edits, fuzz, nested, refused, scalars, texts
from hypothesis import strategies as st

from lora_training.config import TrainConfig
from lora_training.evaluation.__main__ import parse as parse_evaluation
from lora_training.settings_parser import load_yaml
from lora_training.train import parse as parse_training
from lora_training.train import setting_names

pytestmark = pytest.mark.hard

ROOT = Path(__file__).parent.parent.parent
TRAINING = (ROOT / "examples/configs/shapes_pcm4.yaml").read_bytes()
EVALUATION = (ROOT / "examples/evaluation/shapes.yaml").read_bytes()
SETTINGS = sorted(setting_names(TrainConfig))
GROUPS = sorted({name.rpartition(".")[0] for name in SETTINGS} - {""})


def laughs(letters: int, each: int, use: str) -> str:
    """Lists of aliases of lists of aliases: `each` to the power of `letters` entries in a few lines."""
    lines = [f"a0: &a0 [{', '.join(['ha'] * each)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * each)}]" for i in range(1, letters)]
    return "\n".join([*lines, use.format(f"*a{letters - 1}")])


def merges(depth: int, each: int) -> str:
    """The same of mappings, which loading itself writes out."""
    lines = ["a0: &a0 {x: 1}"]
    return "\n".join(lines + [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * each)}]}}" for i in range(1, depth)])


VALUES = [
    ".nan", ".inf", "-.inf", "1e400", "0x1f", "1_000", "1:30:00", "~", "null", "[]", "{}", "[1, 2]", "{a: 1}", "&a [*a]", "*b",
    "!!python/object/apply:os.system ['exit 9']", "!!python/name:os.system", "!!binary '/w=='", "!!int x", "!!float x",
    "!!bool x", "!!timestamp x", "!!set {a}", "!!omap [a: 1]", "!!null x", "2001-99-99", "=", "<<", "'", '"', "|", "- -", "%",
    ".", "/", "/dev/null", "examples/configs/shapes_pcm4.yaml", "=x", "@x", "`x", "${HOME}", "$(exit 9)",
]  # fmt: skip
values = st.one_of(
    scalars.map(lambda value: repr(value) if not isinstance(value, int) or value.bit_length() < 10_000 else "1" * 5000),
    texts,
    st.sampled_from(VALUES),
    st.integers(),
    st.floats().map(repr),
).map(str)
pairs = st.tuples(st.sampled_from(SETTINGS + GROUPS), values)


def in_groups(told: tuple[str, str]) -> str:
    name, value = told
    *groups, last = name.split(".")
    return "\n".join([*(f"{'  ' * i}{group}:" for i, group in enumerate(groups)), f"{'  ' * len(groups)}{last}: {value}"])


traps = st.one_of(
    st.tuples(st.integers(2, 30), st.integers(2, 12), st.sampled_from(["", "title: {}", "validation: {{prompts: {}}}"])).map(
        lambda found: laughs(*found)
    ),
    st.tuples(st.integers(2, 30), st.integers(2, 12)).map(lambda found: merges(*found)),
    nested("[", "]"),
    nested("{a: ", "}"),
    nested("- ", ""),
    st.sampled_from(
        ["title: &a [*a]", "&a {title: x, model: *a}", "a\0b", "a: 1\n---\nb: 2", "? [a]\n: b", "1: 2", "\ufefftitle: x"]
    ),
)
yaml_texts = st.one_of(
    traps,
    st.lists(pairs.map(in_groups), max_size=3).map("\n".join),
    st.tuples(st.sampled_from([TRAINING, EVALUATION]), edits).map(lambda found: damaged(*found).decode(errors="replace")),
)


def test_yaml():
    def check(text):
        refused(lambda: repr(load_yaml(text)), (yaml.YAMLError,))

    fuzz("YAML", yaml_texts, check)


def said_and_done(parse, arguments: list[str]) -> object:
    """The settings, or None if the program ends with words."""
    errors, found = io.StringIO(), []
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            if refused(lambda: found.append(parse(arguments))):
                return None
        except SystemExit as ended:
            if ended.code == 0:  # --help and the like
                return None
            words = ended.code if isinstance(ended.code, str) else errors.getvalue()
            assert re.search(r"error: \S|train\.py: \S", words), words[-500:]
            assert len(words) < 20_000
            assert "Traceback" not in words
            return None
    return found[0]


def numbers_in(value: object) -> list[float]:
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers_in(part)]
    if isinstance(value, (list, tuple)):
        return [number for part in value for number in numbers_in(part)]
    return [value] if isinstance(value, (int, float)) else []


def check_settings(config: object) -> None:
    """Of what is accepted every number is one."""
    if config is not None:
        assert all(math.isfinite(number) and abs(number) < 2**63 for number in numbers_in(asdict(config)))


def files(whole: bytes) -> st.SearchStrategy[bytes]:
    return st.one_of(
        st.tuples(st.just(whole), edits).map(lambda found: damaged(*found)),
        st.tuples(pairs, st.booleans()).map(lambda found: (whole if found[1] else b"") + b"\n" + encoded(in_groups(found[0]))),
        traps.map(encoded),
        st.binary(max_size=20),
    )


def encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


command_lines = st.lists(
    st.one_of(pairs.map(lambda told: f"--{told[0]}={told[1]}"), texts.map(lambda text: f"--{text}"), texts), max_size=2
)


def test_configurations_of_training(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the examples' files are
    file, accepted = tmp_path / "my.yaml", []

    def check(case):
        content, arguments = case
        file.write_bytes(content)
        config = said_and_done(parse_training, [*(["--config", str(file)] if content else []), *arguments])
        check_settings(config)
        if config is not None:
            accepted.append(case)
            assert config.grids(1000)[-1].num_phases == config.objective.num_phases

    for name in SETTINGS:
        check((encoded(in_groups((name, ""))), []))
    told_twice = st.one_of(st.tuples(files(TRAINING), st.just([])), st.tuples(st.just(b""), command_lines))
    fuzz("configurations of training", told_twice, check)
    assert accepted


def test_configurations_of_evaluation(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file, accepted = tmp_path / "my.yaml", []

    def check(case):
        content, arguments = case
        file.write_bytes(content)
        config = said_and_done(parse_evaluation, [str(file), *arguments])
        check_settings(config)
        if config is not None:
            accepted.append(case)

    fuzz("configurations of evaluation", st.tuples(files(EVALUATION), st.just([]) | command_lines), check)
    assert accepted

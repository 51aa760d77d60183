"""A YAML file and a command line into typed settings; what is wrong with them is said in a sentence."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from itertools import islice
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader

from pcm_scheduler.checks import shortened

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first is faster, and not there everywhere
_MOST_LAYERS = 50
_MOST_LETTERS = 2**20
_LONGEST_MESSAGE = 4000
_SAYS_NO = {"mixed_precision", "precision", "resume"}  # settings that may be `no`, which without quotes is false in YAML


class SettingsParser(ArgumentParser):
    """jsonargparse's, for text from anywhere: broken YAML, aliases that multiply, groups that are none, numbers too large."""

    def __init__(self, **options: Any):
        super().__init__(**({"parser_mode": _MODE} | options))  # parsers of groups are told theirs

    def settings(self, config: type, arguments: list[str] | None) -> dict[str, Any]:
        """The arguments that `config`, whose own are added to this parser, is to be made with, groups as dataclasses.

        What the command line says counts more than what a file says, before `--config` and after it.
        Exits with a message that names the bad setting.

        Raises:
            ValueError: of a group's own `__post_init__`.
        """
        try:
            parsed = self.parse_args(_files_first(sys.argv[1:] if arguments is None else arguments))
        except UnicodeDecodeError as error:
            self.error(f"The configuration is not UTF-8 text: {error}")
        except OverflowError as error:
            self.error(f"A number is too large: {error}")
        for misfit in _misfits(config, parsed):
            self.error(misfit)
        return dict(vars(self.instantiate(parsed)))

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Exit; of a message that repeats what it was told at length, with its beginning and its end."""
        if len(message) > _LONGEST_MESSAGE:
            message = f"{message[: _LONGEST_MESSAGE // 2]}\n...\n{message[-_LONGEST_MESSAGE // 2 :]}"
        super().error(message, ex)


def _files_first(arguments: Sequence[str]) -> list[str]:
    """`--config FILE` before all the rest, which jsonargparse would let a later file overrule."""
    files: list[str] = []
    others: list[str] = []
    left = iter(arguments)
    for argument in left:
        if argument == "--config":
            files += [argument, *islice(left, 1)]
        else:
            (files if argument.startswith("--config=") else others).append(argument)
    return files + others


def _misfits(kind: Any, value: Any, name: str = "") -> Iterator[str]:
    """What jsonargparse lets pass: null for whatever has a default, and anything for a group of settings."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    group = next((k for k in kinds if is_dataclass(k)), None)
    if value is None and NoneType in kinds:
        return
    if group is not None and not isinstance(value, (Namespace, dict)):
        yield f"{name} is a group of settings, `{name}: {{...}}`; got {shortened(value)}."
    elif group is not None:
        for part, its_kind in get_type_hints(group).items():
            if part in value:
                yield from _misfits(its_kind, value[part], f"{name}.{part}".removeprefix("."))
    elif value is None:
        yield f"{name} is empty, which is no value. Leave it out for the usual."
    elif get_origin(kind) in (tuple, list):
        for number, part in enumerate(value):
            yield from _misfits(get_args(kind)[0], part, f"{name}[{number}]")


def load_yaml(text: str) -> Any:
    """Plain YAML, as jsonargparse loads it.

    Raises:
        yaml.YAMLError: it is none, a scalar is not what its tag says, or it is too deep, or too large with its aliases written
            out.
    """
    try:
        _check_size(text)
        return get_loader("yaml")(_with_words(text))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # PyYAML's, as of `!!bool x`
        raise yaml.YAMLError(f"a value is not of the kind that it seems to be: {error}") from error


def _check_size(text: str) -> None:
    """Before anything is made of it: loading follows merges, and printing follows aliases, however many they come to."""
    if len(text) > _MOST_LETTERS:
        raise yaml.YAMLError(f"it has {len(text)} letters; a configuration has at most {_MOST_LETTERS}")
    known: dict[str, int] = {}  # letters of what has an anchor
    open_: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            open_.append((event.anchor, 1))
            if len(open_) > _MOST_LAYERS:
                raise yaml.YAMLError(f"it is nested in more than {_MOST_LAYERS} layers")
            continue
        if isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1 + len(event.value)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in known:
                raise yaml.YAMLError(f"its alias *{event.anchor} means nothing before it, or what it is in")
            anchor, size = None, known[event.anchor]
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            anchor, size = open_.pop()
        else:
            continue
        if anchor is not None:
            known[anchor] = size
        around, before = open_[-1]
        open_[-1] = (around, before + size)
        if before + size > _MOST_LETTERS:
            raise yaml.YAMLError(f"it has more than {_MOST_LETTERS} letters when its aliases are written out")


def _with_words(text: str) -> str:
    """The same with `no` in quotes where it is a word."""
    if "no" not in text.lower():
        return text
    root = yaml.compose(text, Loader=_LOADER)
    mappings, seen = [root], set()
    changed = False
    while mappings:
        node = mappings.pop()
        if not isinstance(node, yaml.MappingNode) or id(node) in seen:
            continue
        seen.add(id(node))
        for key, value in node.value:
            mappings.append(value)
            if key.value in _SAYS_NO and value.tag == "tag:yaml.org,2002:bool" and value.value.lower() == "no":
                value.tag, value.value, changed = "tag:yaml.org,2002:str", "no", True
    return yaml.serialize(root) if changed else text


_MODE = "plain_yaml"
set_loader(_MODE, load_yaml, (yaml.YAMLError,))

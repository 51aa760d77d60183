"""Prompts from files in the forms that people have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pcm_scheduler.checks import shortened

from ..text import json_in, json_lines, read_text, words

_KEYS = ("prompt", "caption", "text", "Prompt")


def read_prompts(path: str, count: int = 0) -> list[str]:
    """One prompt for each picture.

    Args:
        path: `.txt` with a prompt on each line, `.jsonl` with a `prompt`, `caption` or `text` on each, or `.json`: a list of
            either, or COCO's captions, of which the first of every picture is taken.
        count: the first so many; 0: all.

    Raises:
        ValueError: no such file, another form, or too few prompts.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"prompts: there is no file {path}.")
    try:
        found = _found_in(file)
    except ValueError as error:
        raise ValueError(f"prompts: {error}") from error
    if len(found) < max(count, 1):
        raise ValueError(f"prompts: {path} has {len(found)}, and count is {count}.")
    return found[: count or None]


def read_pairs(path: str) -> list[tuple[str, str]]:
    """(prompt, thing) of each line of a `.jsonl` file with these keys.

    Raises:
        ValueError: no such file, or a line without them.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"negative.pairs: there is no file {path}.")
    pairs = []
    try:
        for where, row in json_lines(file):
            if not isinstance(row, dict) or not {"prompt", "thing"} <= row.keys():
                raise ValueError(f"{where} has no prompt or no thing: {shortened(row, 80)}")
            pairs.append((_words(row["prompt"], f"the prompt of {where}"), _words(row["thing"], f"the thing of {where}")))
    except ValueError as error:
        raise ValueError(f"negative.pairs: {error}") from error
    if not pairs:
        raise ValueError(f"negative.pairs: {path} has no lines.")
    return pairs


def _found_in(file: Path) -> list[str]:
    suffix = file.suffix.lower()
    if suffix == ".txt":  # at ends of lines alone: other separators of Unicode may be within a prompt
        return [line.strip() for line in read_text(file).replace("\r\n", "\n").replace("\r", "\n").split("\n") if line.strip()]
    if suffix == ".jsonl":
        return [_prompt_of(row, where) for where, row in json_lines(file)]
    if suffix != ".json":
        raise ValueError(f"{file} must be .txt, .jsonl or .json.")
    content = json_in(read_text(file), file)
    if isinstance(content, list):
        return [_prompt_of(row, f"entry {number} of {file}") for number, row in enumerate(content)]
    rows = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f"{file} is neither a list nor COCO's captions.")
    first: dict[str, str] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not {"image_id", "caption"} <= row.keys():
            raise ValueError(f"annotation {number} of {file} has no image_id or no caption: {shortened(row, 80)}")
        # as text, for a number and a name are both usual, and a list is possible
        first.setdefault(repr(row["image_id"]), _words(row["caption"], f"the caption of annotation {number} of {file}"))
    return list(first.values())


def _words(value: Any, where: str) -> str:
    try:
        return words(value)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error


def _prompt_of(row: object, where: str) -> str:
    if isinstance(row, str):
        return _words(row, where)
    for key in _KEYS:
        if isinstance(row, dict) and isinstance(row.get(key), str):
            return _words(row[key], where)
    raise ValueError(f"{where} has none of {', '.join(_KEYS)}: {shortened(row, 80)}")

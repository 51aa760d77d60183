"""Prompts from files in the forms that people have them."""

from __future__ import annotations

import json
from pathlib import Path

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
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".txt":
        found = [line.strip() for line in text.splitlines() if line.strip()]
    elif file.suffix == ".jsonl":
        found = [_prompt_of(json.loads(line), path) for line in text.splitlines() if line.strip()]
    elif file.suffix == ".json":
        content = json.loads(text)
        if isinstance(content, dict) and "annotations" in content:
            first: dict[object, str] = {}
            for row in content["annotations"]:
                first.setdefault(row["image_id"], row["caption"].strip())
            found = list(first.values())
        elif isinstance(content, list):
            found = [_prompt_of(row, path) for row in content]
        else:
            raise ValueError(f"prompts: {path} is neither a list nor COCO's captions.")
    else:
        raise ValueError(f"prompts: {path} must be .txt, .jsonl or .json.")
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
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    for row in rows:
        if not isinstance(row, dict) or not {"prompt", "thing"} <= row.keys():
            raise ValueError(f"negative.pairs: a line of {path} has no prompt or no thing: {str(row)[:80]}")
    return [(row["prompt"], row["thing"]) for row in rows]


def _prompt_of(row: object, path: str) -> str:
    if isinstance(row, str):
        return row
    for key in _KEYS:
        if isinstance(row, dict) and isinstance(row.get(key), str):
            return row[key]
    raise ValueError(f"prompts: a row of {path} has none of {', '.join(_KEYS)}: {str(row)[:80]}")

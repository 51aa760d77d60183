"""Text that people write: UTF-8 with or without a byte-order mark, lines of JSON, captions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pcm_scheduler.checks import parse_json, shortened


def decoded(content: bytes) -> str:
    """UTF-8 bytes as text, all of it.

    Raises:
        ValueError: they are another encoding, or no text.
    """
    try:
        return _checked(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text: {error}") from error


def words(value: object) -> str:
    """A caption or prompt, without the space around it.

    Raises:
        ValueError: it is no text, or text that no tokenizer takes.
    """
    if not isinstance(value, str):
        raise ValueError(f"is not text: {shortened(value)}")
    return _checked(value).strip()


def _checked(text: str) -> str:
    if "\0" in text:  # UTF-16 looks so
        raise ValueError(f"is not UTF-8 text: it holds zeros, {shortened(text, 40)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a character, which JSON's escapes can say
        raise ValueError(f"is not text: {error}") from error
    return text


def read_text(path: str | Path) -> str:
    """The text of a file.

    Raises:
        ValueError: it is not UTF-8; its name is in the message.
    """
    try:
        return decoded(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def json_in(text: str | bytes, where: object) -> Any:
    """JSON, with `where` it is in the message.

    Raises:
        ValueError: as `pcm_scheduler.checks.parse_json`.
    """
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON that can be read: {error}") from error


def json_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """What the lines of a file hold, each with its place for messages; empty ones are passed over.

    Raises:
        ValueError: the file is not UTF-8, or a line is not JSON; which.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # JSON may hold what splitlines() splits at
        if line.strip():
            where = f"{path}, line {number},"
            yield where, json_in(line, where)

"""What comes from a file's header or a configuration, looked at before anything is computed or allocated from it."""

from __future__ import annotations

import json
import math
import operator
from typing import Any


def whole_number(value: object, name: str) -> int:
    """A whole number of any integer type, as Python's own; True and 4.0 are none.

    Raises:
        ValueError: it is not one; `name` says which.
    """
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise ValueError(f"{name} must be a whole number; got {shortened(value)}.")


def finite_number(value: object, name: str, least: float = -math.inf, most: float = math.inf) -> float:
    """A number of any real type, as Python's own.

    Raises:
        ValueError: it is none, not finite, or outside of [least, most]; `name` says which.
    """
    allowed = "a finite number"
    if least > -math.inf:
        allowed += f" from {least:g}" + (f" to {most:g}" if most < math.inf else " on")
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last are torch's, of several numbers
        number = math.nan
    if not (math.isfinite(number) and least <= number <= most):
        raise ValueError(f"{name} must be {allowed}; got {shortened(value)}.")
    return number


def shortened(value: object, length: int = 200) -> str:
    """A value for a message, which what a file holds may be too long for."""
    if isinstance(value, int) and value.bit_length() > 4 * length:
        return f"a number of {value.bit_length()} bits"  # Python refuses to write numbers of thousands of digits
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} of very many layers"
    return text if len(text) <= length else f"{text[:length]}..."


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, with one kind of error for whatever is wrong with the text.

    Raises:
        ValueError: it is not JSON, not UTF-8, nested too deeply, or has a number of too many digits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error

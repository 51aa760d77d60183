"""Malformed input by the thousand: how many cases of what, the bounds of each, and ways to damage what is whole."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

CASES = {
    "phase grids": 24_000,
    "schedulers": 6_000,
    "adapter headers": 20_000,
    "adapter metadata": 6_000,
    "adapter files": 10_000,
    "captions": 6_000,
    "metadata.jsonl": 8_000,
    "prompts": 6_000,
    "tar shards": 5_000,
    "pictures": 5_000,
    "YAML": 6_000,
    "configurations of training": 600,
    "configurations of evaluation": 600,
}
"""Of each subject, how many different inputs; `fuzz` counts that they were run."""

SECONDS_OF_CPU, SECONDS = 10.0, 120.0
"""That one case may take: so many of this process's own, so that a busy machine changes nothing; or so many by the clock."""
ROOM = 2**30
"""Bytes that one case may add to the process's address space."""


class Hang(BaseException):
    """A case takes too long. No `except Exception` of the code under test keeps it."""


def fuzz(subject: str, inputs: st.SearchStrategy[Any], check: Callable[[Any], None], room: int = ROOM) -> None:
    """Run `check` on `CASES[subject]` inputs, the same every time, each within its bounds of time and memory.

    Args:
        subject: of `CASES`.
        inputs: what is drawn.
        check: raises for a defect.
        room: bytes; more than `ROOM` where a valid input needs them.
    """
    count = 0

    @settings(
        max_examples=CASES[subject],
        derandomize=True,
        database=None,
        deadline=timedelta(seconds=SECONDS),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def case(value: Any) -> None:
        nonlocal count
        count += 1
        with in_memory(room), in_time():
            check(value)

    case()
    assert count >= CASES[subject], f"only {count} different cases of {subject}"


@contextmanager
def in_time(seconds_of_cpu: float = SECONDS_OF_CPU) -> Iterator[None]:
    def late(number: int, frame: Any) -> None:
        raise Hang(f"more than {seconds_of_cpu} s of computing, or {SECONDS} s")

    alarms = {signal.SIGPROF: (signal.ITIMER_PROF, seconds_of_cpu), signal.SIGALRM: (signal.ITIMER_REAL, SECONDS)}
    before = {number: signal.signal(number, late) for number in alarms}
    try:
        for timer, seconds in alarms.values():
            signal.setitimer(timer, seconds)
        yield
    finally:
        for timer, _ in alarms.values():
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def in_memory(room: int) -> Iterator[None]:
    """What is allocated beyond `room` bytes fails, as on a machine that has no more; MemoryError is nobody's own error."""
    resource = pytest.importorskip("resource")
    size = Path("/proc/self/statm")
    if not size.exists():
        pytest.skip("only Linux says how large a process is")
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(size.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def refused(call: Callable[[], Any], kinds: tuple[type[BaseException], ...] = (ValueError,), names: str = "") -> bool:
    """Whether a call is refused in words.

    Args:
        call: anything.
        kinds: of errors that are our own. Another is a defect, as are ValueErrors that are really Python's, such as
            UnicodeDecodeError, and those without words.
        names: what the message must have in it.
    """
    try:
        call()
    except kinds as error:
        found = error
    else:
        return False
    if isinstance(found, UnicodeError):
        raise found
    said = str(found)
    assert len(said) > 10, f"{found!r} says nothing"
    assert len(said) < 5000, f"{said[:300]}... is {len(said)} letters long"
    assert names in said, f"{said[:300]} does not name {names}"
    return True


integers = st.one_of(
    st.integers(-3, 60),
    st.sampled_from([0, 1, 2, 40, 50, 100, 250, 500, 999, 1000, 10**6, 2**31, 2**63 - 1, 2**63, 2**64, 10**12, -(10**18)]),
    st.integers(),
    st.integers(1, 5000).map(lambda digits: 10**digits),
)
floats = st.one_of(st.floats(), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 0.5, 1.0, 4.0, 50.0, 1e308, 5e-324]))
texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", " ", "\0", "\ud800", "\u2028", "\ufeff", "é" * 300, "nan", "inf", "1e999", "None", "../../etc", "[", "{"]
    ),
)
scalars = st.one_of(integers, floats, texts, st.booleans(), st.none(), st.binary(max_size=4))
"""Whatever a value may be instead of what it should be."""

edits = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "cut", "repeat", "flip"]),
        st.integers(0, 2**20),
        st.one_of(st.binary(min_size=1, max_size=4), st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\x80", b"[[[[", b"}", b'"'])),
    ),
    min_size=1,
    max_size=5,
)


def damaged(content: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    """Bytes with some of them changed, put in, taken out, written twice or cut off."""
    for kind, place, new in changes:
        at = place % (len(content) + 1)
        if kind == "set":
            content = content[:at] + new + content[at + len(new) :]
        elif kind == "insert":
            content = content[:at] + new + content[at:]
        elif kind == "delete":
            content = content[:at] + content[at + len(new) :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "repeat":
            content = content[:at] + content[max(at - 64, 0) :]
        elif at < len(content):
            content = content[:at] + bytes([content[at] ^ (1 << new[0] % 8)]) + content[at + 1 :]
    return content


def nested(opening: str, closing: str, most: int = 200_000) -> st.SearchStrategy[str]:
    """Brackets in brackets, closed or not."""
    depths = st.sampled_from([1, 10, 500, 1000, 5000, most])
    return st.tuples(depths, st.booleans()).map(lambda found: opening * found[0] + closing * found[0] * found[1])


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)
json_texts = st.one_of(
    nested("[", "]"),
    nested('{"a":', "}"),
    st.sampled_from(["", "{}", "[]", "null", "NaN", '"', '"\\ud800"', "1" * 5000, "1e999", '{"a": 1, "a": 2}', "\ufeff{}"]),
    st.text(max_size=20),
)
"""JSON that is none, or that no reader of ours expects."""

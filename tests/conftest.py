"""Helpers are shared by plain import: the folders of the tests and of the examples are on the path."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [
    str(ROOT / part)
    for part in ("tests", "tests/pcm_scheduler", "benchmarks", "examples", "examples/shapes", "examples/comfyui")
]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network is a broken test

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture
def own_precision() -> Iterator[None]:
    """For a test that trains in a precision of its own: accelerate keeps the first one of a process."""
    from accelerate.state import AcceleratorState  # reads HF_HUB_OFFLINE, which is set above

    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()

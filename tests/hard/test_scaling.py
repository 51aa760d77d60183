"""Benchmarks whose smallest case takes a minute run at all."""

from __future__ import annotations

import argparse

import pytest
import scaling

pytestmark = pytest.mark.hard


def test_steps_of_one_process_and_of_two_are_timed():
    one, two = scaling.processes(argparse.Namespace(process_steps=2))
    assert (one.size, one.work, two.size, two.work) == (1, 4, 2, 8)

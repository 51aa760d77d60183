"""benchmarks/editing.py, every method of every task once, on two scenes."""

from __future__ import annotations

import math
from dataclasses import replace

import editing
import pytest
from evaluate import held_out_scenes

from scenes import SEARCH_SEED


@pytest.fixture(scope="module")
def bench() -> editing.Bench:
    made = editing.Bench()
    made.pipe.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("task", editing.TASKS)
def test_every_method_draws_what_can_be_judged(bench, task):
    scenes = held_out_scenes(2, SEARCH_SEED)
    case = next(case for case in editing.cases(scenes) if case.task == task)
    methods = [replace(method, steps=method.steps[:1]) for method in bench.methods()]
    found = {row.method: row for row in editing.measure(bench, methods, case, scenes, seed=4, wanted="")}
    assert set(found) >= {"PCMEditPipeline", case.naive_name}
    assert len(found) > 5
    for row in found.values():
        assert math.isfinite(row.psnr)
        assert 0 <= row.right <= 1
        assert row.likeness <= 1 + 1e-6
        if task in editing.EXACT_TASKS and "soft" not in row.method and row.method != case.naive_name:
            assert row.error < 0.5, f"{row.method}: what was measured is not in the saved file"
    assert found["PCMEditPipeline"].psnr > found[case.naive_name].psnr


def test_strategies_are_chosen_among_those_that_ship(bench):
    named = {method.name for method in bench.candidates()}
    assert {str(editing.STRATEGIES[task]) for task in editing.EXACT_TASKS} <= named
    assert all(("known=True" in method.name) == (method.tasks == ("inpaint",)) for method in bench.candidates())


def test_a_picture_comes_back_from_its_noise(bench):
    rows = editing.inversion(bench, held_out_scenes(2, SEARCH_SEED))
    alone, again = float(rows[0][2]), float(rows[1][2])
    assert 20 < again <= alone + 1, "up and down the teacher's own grid loses more than the VAE alone may"

"""What benchmarks measure with: a wrong clock or exponent would be a wrong figure in every table."""

from __future__ import annotations

import argparse
import time

import measuring
import pytest
import scaling
import tiny_models
import torch
from measuring import Book, Clock, exponent, write_section
from reference_step import ReferenceStep
from training_step import recorded, repeat


def test_the_exponent_of_a_power_law_is_found():
    sizes = [1, 10, 50, 1000]
    for p in (0.0, 0.5, 1.0, 2.0):
        assert exponent(sizes, [3.0 * size**p for size in sizes]) == pytest.approx(p, abs=1e-12)


@pytest.mark.parametrize(
    ("points", "says"),
    [
        ([(1, 1.0, 5.0), (10, 1.0, 5.0)], "phases^0.00 at constant work"),
        ([(1, 1.0, 5.0), (10, 2.0, 5.0)], "outgrows"),
        ([(1, 1.0, 1.0), (10, 10.0, 10.0)], "work^1.00"),
        ([(1, 1.0, 1.0), (10, 100.0, 10.0)], "outgrows"),
        ([(1, 1.0, 1.0)], "one size"),
    ],
)
def test_what_outgrows_its_work_is_said(points, says):
    figures = scaling.figures_of([scaling.Point(*point) for point in points])
    said = scaling.verdict(scaling.AXES["phases"], figures)
    assert says in said
    assert ("outgrows" in said) == (says == "outgrows")


def test_a_batch_and_the_order_of_a_stream_cost_what_they_are_work_of():
    """Sizes are small: this is about running at all, and about points that are told in the unit that is said."""
    options = argparse.Namespace(records=2000, rounds=1)
    assert [(p.size, p.work) for p in scaling.draw(options)] == [(1000, 16), (2000, 16)]
    assert [(p.size, p.work) for p in scaling.shuffle(options)] == [(1000, 1000), (2000, 2000)]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    ("critic", "checkpointing", "passes"),
    [(False, False, [(4, 1), (4, 1)]), (True, False, [(6, 0), (5, 2)]), (True, True, [(6, 0), (5, 2)])],
)
def test_every_pass_of_the_reference_is_seen_and_can_be_repeated(family, critic, checkpointing, passes):
    """Student, teacher twice, target; the critic's steps judge two points and learn nothing through the UNets."""
    build = {"sd15": tiny_models.image_pipeline, "sdxl": tiny_models.sdxl_pipeline}[family]
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    theirs = ReferenceStep(
        family, build(), build().unet, pixels, ["a", "b"], torch.float32, checkpointing=checkpointing, critic=critic, rank=2
    )
    trained = [p for p in theirs.student.parameters() if p.requires_grad]
    for forward, backward in passes:
        before = [p.detach().clone() for p in trained]
        with recorded(theirs, "cpu") as found:
            loss = theirs.step()
        assert loss > 0
        assert (len(found), sum(call.backward for call in found)) == (forward, backward)
        learnt = any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
        assert learnt == (backward > 0)
    for call in found:
        repeat(call, "cpu")
    assert all(p.grad is None for p in theirs.student.parameters())


class Sleeper:
    def sleep(self, seconds):
        time.sleep(seconds)
        return "slept"


def test_the_clock_times_its_methods_and_leaves_them_as_they_were():
    sleeper = Sleeper()
    clock = Clock("cpu", {"sleep": (sleeper, "sleep")})
    with clock.running():
        assert sleeper.sleep(0.02) == "slept"
        sleeper.sleep(0.02)
        time.sleep(0.05)
    found = clock.read()["sleep"]
    assert 0.04 <= found < 10
    assert "sleep" not in vars(sleeper)
    sleeper.sleep(0.01)
    assert clock.read()["sleep"] == 0


def test_figures_are_kept_by_device_and_tables_are_put_in_their_place(tmp_path, monkeypatch):
    path = tmp_path / "figures" / "some.json"
    Book(path).keep("cpu", "one", {"seconds": 1.5})
    Book(path).keep("cpu", "two", {"seconds": 2.5})
    book = Book(path)
    assert book.get("cpu", "one")["seconds"] == 1.5
    assert book.get("cpu", "two")["seconds"] == 2.5
    assert book.get("cuda", "one") is None
    assert book.conditions("cpu").startswith("cpu (")

    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- first -->\nold\n<!-- end -->\nb\n<!-- second -->\nkept\n<!-- end -->\n", encoding="utf-8")
    monkeypatch.setattr(measuring, "README", readme)
    write_section("first", r"new \1")
    assert readme.read_text(encoding="utf-8") == (
        "a\n<!-- first -->\nnew \\1\n<!-- end -->\nb\n<!-- second -->\nkept\n<!-- end -->\n"
    )
    with pytest.raises(ValueError, match="no <!-- third -->"):
        write_section("third", "")

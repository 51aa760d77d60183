"""What benchmarks measure with: a wrong clock or exponent would be a wrong figure in every table."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from types import SimpleNamespace

import measuring
import pytest
import scaling
import tiny_models
import torch
from measuring import Book, Clock, alone, exponent, named_cases, write_section
from reference_scripts import Case, Marks, Script, timed
from reference_step import ReferenceStep
from training_runs import config_for
from training_step import PICTURES, recorded, repeat, write_pictures
from write_dataset import write_dataset

from lora_training.config import AdversarialConfig
from lora_training.loop import Run


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


def test_passes_of_ours_can_be_repeated_with_a_critic_and_checkpointing(tmp_path):
    """The critic reads the teacher, whose pass is run a second time for its gradient: with the adapter off again."""
    write_dataset(tmp_path / "pictures", 4)
    config = config_for(tmp_path / "pictures", tmp_path / "a.safetensors", gradient_checkpointing=True)
    config.adversarial = AdversarialConfig(weight=0.1, cadence="alternate")
    ours = Run(config)
    with recorded(SimpleNamespace(unets=ours.student.unets), "cpu") as found:
        for step in range(2):
            ours.step(step)
    assert sum(call.backward for call in found) == 3
    for call in found:
        repeat(call, "cpu")


THEIR_SCRIPT = """
import argparse, time
from pathlib import Path
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

class CustomImageDataset(Dataset):
    def __init__(self, folder, size):
        self.names, self.size = sorted(path.name for path in Path(folder).glob("*.png")), size
    def __len__(self):
        return len(self.names)
    def __getitem__(self, i):
        return self.names[i], self.size

def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--train_batch_size", type=int)
    return parser.parse_known_args()[0]

def main(args):
    pictures = CustomImageDataset("/data/of/its/author", args.resolution)
    bar = tqdm(range(100))
    for names, sizes in DataLoader(pictures, batch_size=args.train_batch_size, num_workers=1):
        assert list(sizes) == [128] * len(names)
        time.sleep(0.05)
        bar.update(1)
"""


def of(path: str, batch: int) -> Case:
    return Case(Script("PCM", "sd15", "pcm", path, "pcm"), batch, checkpointing=False, device="cpu")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Scripts like the others' own, and the model and pictures that are given to them and to us."""
    (tmp_path / "theirs.py").write_text(THEIR_SCRIPT, encoding="utf-8")
    (tmp_path / "broken.py").write_text(THEIR_SCRIPT.replace("bar = ", "raise ValueError('no bar') #"), encoding="utf-8")
    tiny_models.image_pipeline().save_pretrained(tmp_path / "model")
    write_pictures(tmp_path / "pictures", 128)
    return tmp_path


@pytest.mark.parametrize(("who", "least"), [("theirs", 0.05), ("ours", 0.0)])
def test_scripts_of_others_and_our_trainer_are_timed_by_their_progress_bars(checkout, who, least, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    figures = alone(timed, who, of("theirs.py", 2), checkout, checkout, 3)
    assert least < figures["seconds"] < 60, figures
    assert figures["peak"] > 2**20


def test_what_stops_a_script_is_told(checkout):
    assert alone(timed, "theirs", of("broken.py", 2), checkout, checkout, 3) == {"problem": "ValueError: no bar"}
    assert PICTURES == 32
    assert alone(timed, "theirs", of("theirs.py", 16), checkout, checkout, 5) == {"problem": "ended after 2 steps"}


def test_steps_of_two_kinds_are_taken_in_pairs():
    marks = Marks("cpu", 4)
    marks.times = [0.0, 1.0, 3.0, 4.0, 8.0]
    assert marks.figures(2)["seconds"] == 2.0
    assert marks.figures(1)["seconds"] == 1.5


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


def test_cases_are_chosen_by_name_and_an_unknown_one_is_answered_with_all_names(capsys):
    parser, known = argparse.ArgumentParser(), {"batch 1": 10, "batch 8": 80}
    assert named_cases(parser, ["batch 8", "batch 1"], known, "cpu") == [80, 10]
    assert named_cases(parser, [], known, "cpu") == []
    with pytest.raises(SystemExit):
        named_cases(parser, ["batch 1", "batch 2"], known, "cpu")
    told = capsys.readouterr().err
    assert "'batch 2' is no case of cpu" in told
    assert all(name in told for name in known)

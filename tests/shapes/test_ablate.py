"""That variants are trained and measured once, and that what is missing of one is made up for."""

from __future__ import annotations

import json
from pathlib import Path

import ablate
import pytest


@pytest.fixture
def work(tmp_path, monkeypatch):
    """What was done, with nothing trained, drawn or solved."""
    done: list[str] = []

    def train(config):
        done.append(f"train {Path(config.output).stem}")
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        Path(config.output).touch()

    def measure(path, guidance_scales):
        done.append(f"measure {path.stem} at {guidance_scales}")
        return {"steps": {"4": {"frechet": 1.0}}}

    def ode_rows(_gallery, config, *_):
        assert all(Path(method.adapter).exists() for method in config.methods)
        done.append(f"solve for {', '.join(method.name for method in config.methods)}")
        return [{"method": method.name, "steps": 1, "ode_error": 0.5} for method in config.methods]

    monkeypatch.setattr(ablate, "RUNS_DIR", tmp_path / "runs")
    monkeypatch.setattr(ablate, "FIGURES", tmp_path / "figures")
    for name, stand_in in (("train", train), ("measure", measure), ("ode_rows", ode_rows)):
        monkeypatch.setattr(ablate, name, stand_in)
    for name in ("write_dataset", "Gallery", "load_pipeline"):
        monkeypatch.setattr(ablate, name, lambda *_: None)
    (tmp_path / "figures").mkdir()
    return done


def ablate_only(names, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ablate.py", "--only", names])
    ablate.main()


def test_each_is_trained_and_measured_once_and_the_ode_solved_once_for_all(work, monkeypatch, tmp_path):
    ablate_only("l2|pcm-1-unguided", monkeypatch)
    assert work == [
        "train pcm-1-unguided",
        f"measure pcm-1-unguided at {ablate.UNGUIDED_GUIDANCE_SCALES}",
        "train l2",
        f"measure l2 at {ablate.GUIDANCE_SCALES}",
        "solve for pcm-1-unguided, l2",
    ]
    kept = json.loads((tmp_path / "figures" / "l2.json").read_text(encoding="utf-8"))
    assert kept["ode"] == {"1": 0.5}
    assert kept["steps"] == {"4": {"frechet": 1.0}}
    work.clear()
    ablate_only("l2|pcm-1-unguided", monkeypatch)
    assert work == []


def test_only_the_ode_errors_are_made_up_for_where_they_alone_are_missing(work, monkeypatch, tmp_path):
    ablate_only("l2", monkeypatch)
    (weights,) = (tmp_path / "runs").rglob("l2.safetensors")
    file = tmp_path / "figures" / "l2.json"
    figures = json.loads(file.read_text(encoding="utf-8"))
    del figures["ode"]
    for gone, expected in ((False, []), (True, ["train l2"])):
        file.write_text(json.dumps(figures), encoding="utf-8")
        work.clear()
        if gone:
            weights.unlink()
        ablate_only("l2", monkeypatch)
        assert work == [*expected, "solve for l2"]
        assert json.loads(file.read_text(encoding="utf-8"))["ode"] == {"1": 0.5}


def test_figures_of_another_configuration_are_not_taken(work, monkeypatch, tmp_path):
    ablate_only("l2", monkeypatch)
    file = tmp_path / "figures" / "l2.json"
    figures = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(figures | {"identity": "another"}), encoding="utf-8")
    work.clear()
    ablate_only("l2", monkeypatch)
    assert work == [f"measure l2 at {ablate.GUIDANCE_SCALES}", "solve for l2"]

"""The command that searches sampling times: known optima, what is kept, what is held out, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from evaluate import ADAPTERS

from lora_training.config import ModelConfig
from lora_training.evaluation import __main__, search
from lora_training.evaluation.alignment import ScorerConfig, load_scorer
from lora_training.evaluation.config import EvaluationConfig, ReferenceConfig
from lora_training.evaluation.features import FeatureConfig
from lora_training.evaluation.methods import MethodConfig
from lora_training.evaluation.run import Evaluation
from lora_training.evaluation.search import Search, SearchConfig, choices, split, text_of
from pcm_scheduler.lora_file import read_settings
from pcm_scheduler.phases import PhaseGrid
from pcm_scheduler.scheduling_pcm import PCMScheduler

from model import HERE, MODEL_DIR

JUDGES = HERE / "agreement.py"
PCM = str(ADAPTERS["PCM"])
PROMPTS = ["a red star", "a blue ring on the left", "a red star", "a green heart", "a yellow cross at the top", "a pink star"]
BEST = (999, 899, 739, 499, 239, 59)  # of 6 steps on 4 phases


@pytest.fixture
def evaluation(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (tmp_path / "brightness.py").write_text("def brightness():\n    return lambda pictures, texts: pictures.mean((1, 2, 3))\n")
    return EvaluationConfig(
        model=ModelConfig(path=str(MODEL_DIR)),
        methods=(MethodConfig("PCM", PCM, steps=(1, 4)), MethodConfig("DDIM", scheduler="ddim")),
        prompts=str(tmp_path / "prompts.txt"),
        size=(128, 128),
        batch_size=2,
        alignment=ScorerConfig("factory", factory=f"{tmp_path}/brightness.py:brightness"),
        output=str(tmp_path / "out"),
    )


@pytest.fixture
def config(evaluation):
    return SearchConfig(evaluation, steps=6, method="PCM", metric="alignment", count=2)


class BrightTimes:
    """A gallery that loads nothing and draws pictures the brighter, the nearer their times are to `BEST`."""

    def __init__(self, methods):
        self.grids = {m.name: read_settings(m.adapter).grid for m in methods if m.adapter}
        self.drawn: list[tuple[tuple[int, ...], tuple[str, ...], int]] = []
        self.stop_at: int | None = None  # the drawing that is interrupted

    def grid(self, name):
        return self.grids[name]

    def use_timesteps(self, name, timesteps):
        self.timesteps = timesteps

    def draw(self, name, steps, prompts, indices, size, seed):
        if len(self.drawn) == self.stop_at:
            raise KeyboardInterrupt
        assert len(self.timesteps) == steps
        assert list(indices) == list(range(len(prompts)))
        self.drawn.append((self.timesteps, tuple(prompts), seed))
        return torch.full((len(prompts), 3, 8, 8), 1 - distance(self.timesteps) / 255)


def distance(timesteps) -> int:
    """From `BEST`, in points of the grid."""
    return sum(abs(a - b) for a, b in zip(timesteps, BEST, strict=True)) // 20


class Light(Evaluation):
    """An evaluation without a model."""

    def __init__(self, config):
        self.config, self.root, self.accelerator = config, Path(config.output), Accelerator()
        self.prompts, self.features, self.scorer = [], None, load_scorer(config.alignment)
        self.gallery = BrightTimes(config.methods)


@pytest.fixture
def light(monkeypatch):
    monkeypatch.setattr(search, "Evaluation", Light)


@pytest.mark.usefixtures("light")
def test_the_best_times_are_found_and_written_with_what_they_are_worth(config, evaluation, tmp_path):
    evaluation.methods = (MethodConfig("PCM", PCM, guidance_scale=2.5, eta=0.0),)
    task = Search(config)
    report, drawn = task.run(), task.evaluation.gallery.drawn
    default = task.grid.sampling_timesteps(6)
    assert tuple(report["timesteps"]) == BEST
    assert tuple(report["default_timesteps"]) == default != BEST
    for part in ("searched", "held out"):
        assert report["scores"][part]["found"]["alignment"] == pytest.approx(1)
        assert report["scores"][part]["default"]["alignment"] == pytest.approx(1 - 2 * distance(default) / 255)
    searched = [(times, prompts) for times, prompts, seed in drawn if seed == 5]
    assert {prompts for _, prompts in searched} == {("a red star", "a blue ring on the left")}
    assert len({times for times, _ in searched}) == len(searched) == report["choices_tried"]
    # the third prompt has been searched
    held_out = ("a green heart", "a yellow cross at the top")
    assert [entry for entry in drawn if entry[2] != 5] == [(BEST, held_out, 6), (default, held_out, 6)]
    assert json.loads(task.path.read_text()) == report
    assert report["precision"] == evaluation.precision
    assert task.path == tmp_path / "out" / "timesteps" / "PCM-6-steps-alignment.json"

    said = text_of(report, task.path)
    assert f"PCMScheduler.from_config(pipe.scheduler.config, timesteps={list(BEST)})" in said
    assert "no better" not in said
    row = json.loads(next(line for line in said.splitlines() if line.strip().startswith("- ")).strip()[2:])
    method = MethodConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in row.items()})
    assert (method.timesteps, method.steps, method.adapter) == (BEST, (6,), PCM)
    assert (method.guidance_scale, method.eta) == (2.5, 0.0)
    assert PCMScheduler(timesteps=row["timesteps"]).grid == task.grid
    report["scores"]["held out"]["found"]["alignment"] = 0.0
    assert "no better. Keep the default" in text_of(report, task.path)


@pytest.mark.usefixtures("light")
def test_an_interrupted_search_goes_on_and_a_finished_one_draws_nothing(config, tmp_path):
    whole = Search(replace(config, output=str(tmp_path / "whole")))
    expected = whole.run()
    first = Search(config)
    first.evaluation.gallery.stop_at = 7
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert not first.path.exists()
    second = Search(config)
    assert second.run() == expected
    assert first.evaluation.gallery.drawn + second.evaluation.gallery.drawn == whole.evaluation.gallery.drawn
    third = Search(config)
    third.evaluation.gallery.stop_at = 0
    assert third.run() == expected


@pytest.mark.usefixtures("light")
def test_what_is_kept_is_of_the_same_method_prompts_noise_and_judges(config, evaluation, tmp_path):
    def file(changed: SearchConfig) -> str:
        return Search(changed).kept.path.name

    own = file(config)
    assert file(replace(config, config=replace(evaluation, batch_size=1, seeds=(0, 1)))) == own  # beyond rounding the same
    (tmp_path / "other.txt").write_text("\n".join(["a heart", *PROMPTS[1:]]))
    for changed in (
        replace(config, seed=7),
        replace(config, steps=7),
        replace(config, method="", adapter=PCM),
        replace(config, method="", adapter=str(ADAPTERS["LCM"])),
        replace(config, config=replace(evaluation, prompts=str(tmp_path / "other.txt"))),
        replace(config, config=replace(evaluation, precision="fp16")),
        replace(config, config=replace(evaluation, alignment=ScorerConfig("factory", factory=f"{JUDGES}:caption_agreement"))),
    ):
        assert file(changed) != own, changed
    judge = tmp_path / "brightness.py"
    judge.write_text(judge.read_text().replace("pictures.mean", "-pictures.mean"))
    assert file(config) != own


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("my pcm (v2).safetensors", "my pcm _v2_"),
        ("+2.safetensors", "adapter +2"),
        ("reference.safetensors", "adapter reference"),
    ],
)
def test_an_adapters_file_may_have_any_name(config, tmp_path, file, name):
    shutil.copy(PCM, tmp_path / file)
    assert replace(config, method="", adapter=str(tmp_path / file)).searched.name == name


def test_a_choice_is_measured_as_the_evaluation_measures_it(evaluation, tmp_path):
    """The same figures, from the times given to the method, for the same prompts and noise."""
    judged = replace(
        evaluation,
        reference=ReferenceConfig(method=MethodConfig("reference", scheduler="ddim", steps=(2,), guidance_scale=5.0)),
        features=FeatureConfig("factory", factory=f"{JUDGES}:form_features"),
        alignment=ScorerConfig("factory", factory=f"{JUDGES}:caption_agreement"),
    )
    config = SearchConfig(judged, steps=3, adapter=PCM, count=2)
    task = Search(config)
    (tmp_path / "two.txt").write_text("\n".join(PROMPTS[:2]))
    times = (999, 499, 239)
    moved = MethodConfig("moved", PCM, steps=(3,), timesteps=times)
    own = MethodConfig("own", PCM, steps=(3,))
    report = Evaluation(
        replace(judged, methods=(moved, own), prompts=str(tmp_path / "two.txt"), seeds=(5,), output=str(tmp_path / "report"))
    )
    report.draw()
    rows = report.measure()
    searched, held_out = task.parts()
    found, default = (task.measure(searched, choice) for choice in (times, task.grid.sampling_timesteps(3)))
    assert rows == [{"method": "moved", "steps": 3} | found, {"method": "own", "steps": 3} | default]
    assert found["frechet_distance"] != default["frechet_distance"]
    assert searched.known.shape == held_out.known.shape == (2, 64)
    assert not torch.equal(searched.known, held_out.known)
    # a folder of pictures is one reference for both
    task.evaluation.config.reference = ReferenceConfig(str(next((tmp_path / "out" / "pictures" / "reference").iterdir())))
    from_folder = task.parts()
    assert from_folder[0].known is from_folder[1].known
    torch.testing.assert_close(from_folder[0].known, torch.cat([searched.known, held_out.known]))


def test_what_the_report_asks_of_other_methods_does_not_keep_a_search_from_one(monkeypatch):
    """The configuration that ships asks for guidance, negative prompts and pairs of several methods."""
    monkeypatch.chdir(HERE.parents[1])
    config = __main__.parse(["examples/evaluation/shapes.yaml"])
    assert config.guidance.methods
    assert config.negative.methods
    assert config.pairs
    for method in config.methods:
        if method.scheduler == "pcm":
            own = SearchConfig(config, steps=8, method=method.name).evaluation
            assert [(m.name, m.steps) for m in own.methods] == [(method.name, (8,))]
            assert (own.features, own.reference, own.prompts) == (config.features, config.reference, config.prompts)


def test_all_choices_are_counted():
    for m, n, k in [(1, 5, 3), (2, 5, 3), (4, 10, 2), (4, 10, 10), (4, 10, 4), (3, 10, 1)]:
        grid = PhaseGrid.even(m, n)
        edges = set(grid.edges[1:])
        subsets = [[t for i, t in enumerate(grid.timesteps[1:]) if bits >> i & 1] for bits in range(2**n)]
        fitting = [s for s in subsets if len(s) == k and 999 in s and (edges <= set(s) or set(s) <= edges)]
        assert choices(grid, k) == len(fitting), (m, n, k)


def test_held_out_prompts_are_none_of_the_searched():
    assert split(["a", "b", "a", "c", "c", "d"], 2, "p") == (["a", "b"], ["c", "c"])
    with pytest.raises(ValueError, match="p has 4, of which 1 are left"):
        split(["a", "b", "a", "c"], 2, "p")


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": ""}, "either a method .PCM. or"),
        ({"adapter": PCM}, "either"),
        ({"method": "DDIM"}, "'DDIM' is not among those whose scheduler is pcm: PCM"),
        ({"metric": "frechet_distance"}, "needs `features`"),
        ({"count": 1}, "at least 2"),
        ({"seed": -1}, "not be negative"),
        ({"seed": 0}, "0 is also the evaluation's"),
        ({"seed": 999}, "1000 is also the evaluation's"),
        ({"count": 4}, "has 6, of which 2 are left"),
        ({"steps": 4}, r"nothing to choose: all stops are \[999, 739, 499, 239\]"),
        ({"steps": 51}, "1 to 50"),
        ({"method": "", "adapter": "nowhere.safetensors"}, "no file nowhere"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_drawn(config, changes, says):
    with pytest.raises(ValueError, match=says):
        Search(replace(config, **changes))


@pytest.mark.parametrize("first", [["{}"], ["--config", "{}"], ["--config={}"]])
def test_the_configuration_may_come_first_or_by_name(tmp_path, first):
    path = tmp_path / "a.yaml"
    path.write_text(
        f"methods:\n- {{name: PCM, adapter: {PCM}}}\nfeatures:\n  kind: factory\n  factory: {JUDGES}:form_features\n"
        "prompts: p.txt\nseeds: [3, 4]\n"
    )
    first = [part.format(path) for part in first]
    found = search.parse([*first, "--method", "PCM", "--steps", "8", "--config.batch_size", "32", "--count", "9"])
    assert (found.method, found.steps, found.count, found.metric) == ("PCM", 8, 9, "frechet_distance")
    assert (found.config.batch_size, found.config.seeds, found.config.methods[0].name) == (32, (3, 4), "PCM")
    assert found.searched.steps == (8,)
    assert __main__.parse([*first, "--batch_size", "32"]) == found.config


def test_times_of_a_method_are_read_and_other_settings_are_refused(tmp_path, capsys):
    path = tmp_path / "a.yaml"
    times = [999, 739, 499, 239]
    path.write_text(f"methods:\n- {{name: PCM, adapter: {PCM}, steps: [4], timesteps: {times}}}\n")
    assert __main__.parse([str(path)]).methods[0].timesteps == tuple(times)
    with pytest.raises(SystemExit):
        search.parse([str(path), "--steps", "4", "--metric", "beauty"])
    assert "beauty" in capsys.readouterr().err

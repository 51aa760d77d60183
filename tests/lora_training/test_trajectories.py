"""Jumps that begin on the teacher's own trajectories: what is on them, which are kept, and that a run goes on with the same."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from training_runs import batch_for, losses_of, stop_at, tiny_config, tiny_folder

from lora_training.backbones import load_backbone
from lora_training.backbones.conditioning import expanded
from lora_training.config import LoraConfig, ModelConfig, ObjectiveConfig
from lora_training.dry_run import dry_run
from lora_training.files import CannotWrite
from lora_training.loop import Interrupted, Run, run
from lora_training.objectives import ConsistencyObjective
from lora_training.students import Adapter
from lora_training.teacher import SOLVERS, Levels, followed, guided_prediction, levels_of
from lora_training.trajectories import Trajectories, TrajectoryCache, TrajectoryPool
from pcm_scheduler.phases import PhaseGrid

from model import MODEL_DIR

STEPS = 10
TEACHER = ObjectiveConfig(
    starts="teacher", num_phases=5, num_solver_steps=STEPS, guidance_scale=3.0, trajectories_kept=3, trajectory_every=2
)
GRID = PhaseGrid.even(5, STEPS)
CAPTIONS = ("a red star", "a blue circle", "a green square", "two cats")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def backbone():
    loaded = load_backbone(ModelConfig(path=str(MODEL_DIR)))
    adapter = Adapter(loaded, LoraConfig(rank=2), seed=0)
    with torch.no_grad():  # a student that is not the teacher
        for parameter in adapter.parameters.values():
            parameter.normal_(0, 0.1, generator=generator())
    return loaded


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m"])
def test_a_teacher_that_knows_one_picture_is_followed_to_it_exactly(solver):
    """Then x_n = alpha_n x_0 + sigma_n eps on the whole trajectory, and every solver's step is exact."""
    alphas = torch.linspace(0.999, 0.05, STEPS + 1).double().sqrt()
    levels = Levels(torch.arange(STEPS + 1), alphas, (1 - alphas**2).sqrt())
    x0, noise = torch.randn(2, 3, 4, 4, 4, generator=generator(), dtype=torch.float64)
    points = followed(SOLVERS[solver], lambda sample, n: x0, levels, noise)
    epsilon = (noise - alphas[-1] * x0) / levels.sigmas[-1]
    assert len(points) == STEPS + 1
    assert torch.equal(points[-1], noise)
    for n, point in enumerate(points):
        torch.testing.assert_close(point.double(), alphas[n] * x0 + levels.sigmas[n] * epsilon, rtol=0, atol=1e-5)


def trajectories(backbone, told, empty, guidance=3.0):
    count = len(told["prompt_embeds"])
    levels = levels_of(backbone, GRID)
    teacher = guided_prediction(backbone, levels, told, expanded(empty, count), torch.full((count,), guidance))
    noise = torch.randn(count, 4, 16, 16, generator=generator(1))
    return Trajectories(tuple(torch.stack(followed(SOLVERS["ddim"], teacher, levels, noise), 1)))


@pytest.mark.parametrize("name", ["pcm", "direct", "ctm"])
def test_jumps_begin_on_trajectories_and_meet_them(backbone, name):
    """`direct` meets the point at the edge; the others what the student makes of the point below."""
    _, told, empty = batch_for(backbone, count=8)
    begun = trajectories(backbone, told, empty)
    objective = ConsistencyObjective(backbone, GRID, dataclasses.replace(TEACHER, name=name))
    landing = objective.land(begun, told, empty, generator())
    n = torch.randint(1, STEPS + 1, (8,), generator=generator())
    edge = GRID.target(n)
    below = torch.maximum(n - 1, edge)
    assert torch.equal(landing.n, n)
    assert torch.equal(landing.sample, begun.at(n))
    if name == "ctm":
        assert ((edge <= landing.stop) & (landing.stop <= below)).all()
    else:
        assert torch.equal(landing.stop, edge)
    expected = begun.at(edge) if name == "direct" else objective.jump_to(begun.at(below), below, landing.stop, told).detach()
    torch.testing.assert_close(landing.target, expected, rtol=0, atol=1e-5)
    there = below == edge if name == "pcm" else torch.full((8,), name == "direct")
    assert torch.equal(landing.target[there], begun.at(edge)[there])
    assert landing.landed.requires_grad
    assert not landing.target.requires_grad
    assert (landing.landed - landing.target).abs().amax((1, 2, 3)).min() > 1e-3, "the student is not the teacher"


def pool_for(backbone, config=TEACHER, seed=0, process=0, sizes=((16, 16),)):
    """A pool, and the captions and sizes that it drew."""
    drawn = []

    def draw(drawing):
        size = sizes[len(drawn) % len(sizes)]
        captions = [CAPTIONS[i] for i in torch.randint(len(CAPTIONS), (2,), generator=drawing).tolist()]
        drawn.append((captions, size))
        return torch.randn(2, 4, *size, generator=drawing), backbone.encode_prompts(captions)

    empty = backbone.encode_prompts([""])
    return TrajectoryPool(backbone, levels_of(backbone, GRID), config, draw, empty, nullcontext, seed, process), drawn


def filled(pool, batch):
    return [None for _ in pool.refill(batch)]


def test_the_window_moves_along_and_asks_for_captions_once_for_each(backbone):
    pool, drawn = pool_for(backbone)
    assert [len(filled(pool, batch)) for batch in range(6)] == [3, 0, 1, 0, 1, 0]
    assert len(drawn) == 5
    assert [pool.oldest(batch) for batch in (0, 1, 2, 5, 6)] == [0, 0, 1, 2, 3]
    assert pool.size == 3 * 2 * (STEPS + 1) * 4 * 16 * 16 * 4
    drawings = [pool.draw(4, generator(seed), torch.device("cpu"))[0] for seed in range(20)]
    assert len({point[0, 0, 0, 0].item() for begun in drawings for point in begun.points}) == 6, (
        "all that is kept, and nothing else"
    )


def test_what_is_drawn_is_what_the_teacher_makes_of_its_own_caption(backbone):
    """A step of the teacher from the top of each, told what is drawn with it, leads to the point below."""
    pool, _ = pool_for(backbone)
    filled(pool, 0)
    begun, told = pool.draw(6, generator(), torch.device("cpu"))
    levels = levels_of(backbone, GRID)
    empty = expanded(backbone.encode_prompts([""]), 6)
    teacher = guided_prediction(backbone, levels, told, empty, torch.full((6,), 3.0))
    top = torch.full((6,), STEPS)
    below = SOLVERS["ddim"](teacher, levels, begun.at(top), top, top - 1)
    torch.testing.assert_close(below, begun.at(top - 1), rtol=0, atol=1e-4)
    others = SOLVERS["ddim"](
        guided_prediction(backbone, levels, expanded(backbone.encode_prompts(["rain"]), 6), empty, torch.full((6,), 3.0)),
        levels, begun.at(top), top, top - 1,
    )  # fmt: skip
    assert (others - begun.at(top - 1)).abs().amax((1, 2, 3)).min() > 1e-3, "captions matter"


def test_trajectories_are_a_function_of_seed_process_and_number(backbone):
    def drawn_at(batch, begin=0, **names):
        pool, _ = pool_for(backbone, **names)
        for number in range(begin, batch + 1):
            filled(pool, number)
        return torch.stack(pool.draw(4, generator(), torch.device("cpu"))[0].points)

    gone_on = drawn_at(4, begin=4)
    assert torch.equal(drawn_at(4), gone_on)
    for names in ({"seed": 1}, {"process": 1}):
        assert not torch.equal(drawn_at(4, begin=4, **names), gone_on)
    assert not torch.equal(drawn_at(2), gone_on)


def test_a_batch_has_one_size_and_all_sizes_come(backbone):
    pool, _ = pool_for(backbone, sizes=((16, 16), (8, 16)))
    filled(pool, 0)  # three batches: two of the first size, one of the second
    seen = set()
    for seed in range(20):
        begun, told = pool.draw(5, generator(seed), torch.device("cpu"))
        sample = begun.at(torch.full((5,), STEPS))
        assert len(told["prompt_embeds"]) == 5
        seen.add(tuple(sample.shape[-2:]))
    assert seen == {(16, 16), (8, 16)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


SETTINGS = {
    "objective.starts": "teacher", "objective.num_solver_steps": STEPS, "objective.num_phases": 5,
    "objective.trajectories_kept": 2, "objective.trajectory_every": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {"objective.name": "direct"},
        {"objective.guidance_scale": "[2.0, 5.0]", "objective.target_ema": 0.9, "optimizer.gradient_accumulation": 2},
        {"data.streaming": "true", "data.shuffle_buffer": 3, "objective.progressive_phases": "[10, 5]"},
        {"adversarial.weight": 0.1, "adversarial.heads": 1, "adversarial.width": 8},
    ],
)
def test_a_run_that_is_stopped_goes_on_bit_for_bit(folder, tmp_path, monkeypatch, settings):
    losses = losses_of(monkeypatch)
    whole = load_file(run(tiny_config(folder, tmp_path / "whole.safetensors", **SETTINGS, **settings)))
    straight = losses[:]
    losses.clear()
    config = tiny_config(folder, tmp_path / "a.safetensors", **SETTINGS, **settings)
    with monkeypatch.context() as patch:
        stop_at(patch, 4 * config.optimizer.gradient_accumulation - 1)
        with pytest.raises(Interrupted, match="after step 4;"):
            run(config)
    run(config)
    assert losses == straight
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_file(config.output).items())


def test_a_run_stops_while_the_teacher_is_followed(folder, tmp_path, monkeypatch):
    config = tiny_config(folder, tmp_path / "a.safetensors", **SETTINGS)
    whole = load_file(run(tiny_config(folder, tmp_path / "whole.safetensors", **SETTINGS)))
    follow, numbers = TrajectoryPool._follow, []

    def asked(self, number):
        numbers.append(number)
        os.kill(os.getpid(), signal.SIGTERM)
        return follow(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(TrajectoryPool, "_follow", asked)
        with pytest.raises(Interrupted):
            run(config)
    assert numbers == [0]
    run(config)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_file(config.output).items())
    assert "whose own trajectories the jumps begin on" in (tmp_path / "a.run" / "README.md").read_text(encoding="utf-8")


def not_followed(self, number):
    raise AssertionError(f"number {number} is there already")


def test_runs_of_one_teacher_follow_it_once(folder, tmp_path, monkeypatch):
    """Also where the first has written files into the working directory meanwhile."""
    monkeypatch.chdir(tmp_path)
    other = SETTINGS | {"objective.num_phases": 2, "optimizer.learning_rate": 1e-2, "objective.name": "direct"}
    alone = load_file(run(tiny_config(folder, tmp_path / "alone.safetensors", **other)))
    shared = {"objective.trajectory_cache": tmp_path / "shared"}
    run(tiny_config(folder, tmp_path / "first.safetensors", **SETTINGS, **shared))
    [cache] = (tmp_path / "shared").iterdir()
    assert sorted(file.name for file in cache.iterdir()) == [f"trajectories-000-00000{n}.safetensors" for n in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(TrajectoryPool, "_follow", not_followed)
        read = load_file(run(tiny_config(folder, tmp_path / "second.safetensors", **other, **shared)))
    assert all(torch.equal(tensor, alone[name]) for name, tensor in read.items())


def test_a_file_of_trajectories_that_is_not_whole_is_written_anew(folder, tmp_path):
    settings = SETTINGS | {"objective.trajectory_cache": tmp_path / "shared"}
    whole = load_file(run(tiny_config(folder, tmp_path / "a.safetensors", **settings)))
    first, *_ = sorted((tmp_path / "shared").rglob("*.safetensors"))
    good = first.read_bytes()
    first.write_bytes(good[: len(good) // 2])
    read = load_file(run(tiny_config(folder, tmp_path / "b.safetensors", **settings)))
    assert first.read_bytes() == good
    assert all(torch.equal(tensor, whole[name]) for name, tensor in read.items())


def test_trajectories_are_shared_by_runs_that_have_the_same_and_by_no_others(folder, tmp_path):
    def cache_of(precision="no", data="pictures", **settings):
        told = SETTINGS | {"objective.trajectory_cache": tmp_path} | settings
        return TrajectoryCache.of(tiny_config(folder, tmp_path / "a.safetensors", **told), precision, data).folder

    same = (
        {"objective.num_phases": 2}, {"objective.name": "direct"}, {"objective.trajectories_kept": 7}, {"lora.rank": 1},
        {"optimizer.learning_rate": 1e-5}, {"optimizer.steps": 99},
        {"objective.num_phases": 2, "objective.phase_edges": "[999, 399]"},
    )  # fmt: skip
    others = (
        {"objective.num_solver_steps": 20}, {"objective.solver": "heun"}, {"objective.guidance_scale": 4.5},
        {"objective.guidance_scale": "[2.0, 5.0]"}, {"seed": 1}, {"optimizer.batch_size": 3},
        {"data.caption_dropout": 0.3}, {"model.prediction_type": "sample"}, {"model.beta_schedule": "linear"},
        {"precision": "bf16"}, {"data": "paintings"},
    )  # fmt: skip
    assert {cache_of(**settings) for settings in same} == {cache_of()}
    assert len({cache_of(), *(cache_of(**settings) for settings in others)}) == 1 + len(others)


def test_a_place_that_cannot_hold_trajectories_is_refused_before_work(folder, tmp_path):
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    with pytest.raises(CannotWrite, match="choose a folder"):
        Run(tiny_config(folder, tmp_path / "a.safetensors", **SETTINGS, **{"objective.trajectory_cache": tmp_path / "file"}))


def test_a_dry_run_says_what_is_kept_and_counts_it_in(folder, tmp_path, capsys):
    dry_run(Run(tiny_config(folder, tmp_path / "a.safetensors", **SETTINGS)))
    said = capsys.readouterr().out
    for words in ("on its trajectories from noise: 2 x 2 are kept, 2 new ones every 3 batches", "the 2 batches of trajector"):
        assert words in said, said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"objective.name": "ct", "objective.guidance_scale": 1.0}, "ct has no teacher whose trajectories"),
        ({"objective.name": "direct", "objective.solver_skip": 2}, "leave objective.solver_skip at 1; got 2"),
        ({"objective.starts": "data"}, "objective.trajectories_kept is of the teacher's trajectories.*got 2"),
        (
            {"objective.trajectory_cache": "x", "data.streaming": "true"},
            "trajectory_cache is for captions that are encoded once",
        ),
        ({"objective.trajectories_kept": 0}, "objective.trajectories_kept must be positive; got 0"),
        ({"objective.trajectory_every": -1}, "objective.trajectory_every must be positive; got -1"),
        ({"objective.starts": "noise"}, "objective.starts"),
    ],
)
def test_settings_that_mean_nothing_are_refused(folder, tmp_path, settings, says, capsys):
    with pytest.raises((ValueError, SystemExit)) as refused:
        tiny_config(folder, tmp_path / "a.safetensors", **(SETTINGS | settings))
    assert re.search(says, f"{refused.value} {capsys.readouterr().err}")

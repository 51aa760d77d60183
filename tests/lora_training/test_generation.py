"""Methods side by side on the shipped model: what is drawn does not depend on batches, processes or interruptions."""

from __future__ import annotations

import dataclasses

import pytest
import tiny_models
import torch
from diffusers import DPMSolverMultistepScheduler
from evaluate import ADAPTERS
from safetensors.torch import save_file

from lora_training.evaluation.generation import Pictures, folder_of, generate
from lora_training.evaluation.methods import RIVALS, Gallery, MethodConfig
from pcm_scheduler.lora_layouts import to_kohya

from model import load_pipeline

PCM, LCM = str(ADAPTERS["PCM"]), str(ADAPTERS["LCM"])
SIZE = (128, 128)
PROMPTS = ["a red star", "a blue ring on the left", "a green heart"]


@pytest.fixture(scope="module")
def gallery():
    methods = [
        MethodConfig("PCM", PCM),
        MethodConfig("LCM", LCM),
        MethodConfig("teacher", scheduler="ddim", guidance_scale=5.0),
    ]
    methods += [MethodConfig(f"PCM, {name}", PCM, name) for name in RIVALS]
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return Gallery(pipe, methods)


def draw(gallery, name, steps=2, numbers=(0, 1, 2)):
    return gallery.draw(name, steps, [PROMPTS[n] for n in numbers], numbers, SIZE)


def test_every_method_draws_and_methods_differ(gallery):
    drawn = {name: draw(gallery, name, steps=4) for name in gallery.methods}
    for name, pictures in drawn.items():
        assert pictures.shape == (3, 3, *SIZE), name
        assert pictures.std() > 0.02, name
    # off the trained edges by 10 timesteps: another picture, though a near one
    assert 1e-4 < (drawn["PCM"] - drawn["PCM, ddim"]).abs().mean() < 0.05
    assert (drawn["PCM"] - drawn["LCM"]).abs().mean() > 1e-3


@pytest.mark.parametrize("name", ["PCM", "LCM", "PCM, tcd"])
def test_a_picture_is_its_number_whatever_is_drawn_with_it(gallery, name):
    """Rounding aside; methods that draw noise on the way have a stream for each picture."""
    together, alone = draw(gallery, name, 4), torch.cat([draw(gallery, name, 4, [n]) for n in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3)


def test_an_interrupted_run_goes_on_and_processes_share_the_work(gallery, tmp_path, monkeypatch):
    prompts = PROMPTS * 2
    whole = Pictures(tmp_path / "whole", 6, 4)
    generate(gallery, "PCM", 1, prompts, SIZE, 0, whole)
    assert whole.missing() == []
    expected = torch.cat(list(whole))
    assert expected.shape == (6, 3, *SIZE)
    assert expected.abs().max() <= 1

    shared = Pictures(tmp_path / "shared", 6, 1)
    generate(gallery, "PCM", 1, prompts, SIZE, 0, shared, process=(1, 2))
    assert shared.missing() == [0, 2, 4]
    with pytest.raises(FileNotFoundError, match="3 of 6"):
        list(shared)
    (shared.folder / "00004.tmp").write_bytes(b"half a file")  # of a run that was killed
    calls = []
    monkeypatch.setattr(gallery, "draw", lambda *args, original=gallery.draw: calls.append(args) or original(*args))
    generate(gallery, "PCM", 1, prompts, SIZE, 0, shared, process=(0, 2))
    assert len(calls) == 3
    assert (torch.cat(list(shared)) - expected).abs().max() <= 1.5 * 2 / 255  # a level: batches round otherwise


def test_other_noise_makes_other_pictures_on_disk_as_they_were_drawn(gallery, tmp_path):
    drawn = {}
    for seed in (0, 1):
        pictures = Pictures(tmp_path / str(seed), 2, 2)
        generate(gallery, "PCM", 2, PROMPTS[:2], SIZE, seed, pictures)
        (drawn[seed],) = pictures
        expected = gallery.draw("PCM", 2, PROMPTS[:2], (0, 1), SIZE, seed) * 2 - 1
        assert (drawn[seed] - expected).abs().max() <= 1.01 / 255
    assert (drawn[0] - drawn[1]).abs().mean() > 0.02


def test_negative_prompts_that_say_nothing_are_none():
    """For SDXL the unguided half is then zeros, as in training, and not the embedding of an empty text."""
    pipe = tiny_models.sdxl_pipeline()
    pipe.set_progress_bar_config(disable=True)
    gallery = Gallery(pipe, [MethodConfig("plain", scheduler="ddim")])

    def drawn(negative_prompts):
        asked = {"negative_prompts": negative_prompts, "guidance_scale": 4.0, "output_type": "latent"}
        return gallery.draw("plain", 2, ["a cat", "a dog"], [0, 1], (32, 32), **asked)

    assert torch.equal(drawn(["", ""]), drawn(None))
    assert not torch.equal(drawn(["a cow", ""]), drawn(None))


def test_other_pictures_go_to_other_folders(tmp_path):
    method = MethodConfig("PCM", PCM)
    folder = folder_of(tmp_path, method, 4, {"seed": 0})
    assert folder == folder_of(tmp_path, MethodConfig("PCM", PCM), 4, {"seed": 0})
    others = [
        folder_of(tmp_path, method, 2, {"seed": 0}),
        folder_of(tmp_path, method, 4, {"seed": 1}),
        folder_of(tmp_path, MethodConfig("PCM", LCM), 4, {"seed": 0}),
        folder_of(tmp_path, MethodConfig("PCM", PCM, guidance_scale=2.0), 4, {"seed": 0}),
        folder_of(tmp_path, MethodConfig("PCM", PCM, steps=(4,), timesteps=(999, 739, 499, 239)), 4, {"seed": 0}),
    ]
    assert len({folder, *others}) == 6


def test_every_method_is_on_the_models_own_noise_and_on_no_sampler_of_somebody():
    """A scheduler's file of the early models does not say prediction_type, and diffusers' from_config forgets what was set."""
    pipe = tiny_models.image_pipeline()
    saved = {"num_train_timesteps": 1000, "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(saved)
    pipe.scheduler.register_to_config(prediction_type="v_prediction", beta_start=0.001, beta_end=0.01)
    gallery = Gallery(pipe, [MethodConfig(name, scheduler=name) for name in ("pcm", *RIVALS)])
    for name in gallery.methods:
        gallery.put_in_place(name)
        told = pipe.scheduler.config
        assert (told.prediction_type, told.beta_start, told.beta_end) == ("v_prediction", 0.001, 0.01), name
        assert told.get("algorithm_type", "dpmsolver++") == "dpmsolver++"
        assert not told.get("use_karras_sigmas")


def test_an_adapter_that_does_not_say_its_phases_is_drawn_with_by_schedulers_that_know_none(tmp_path):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(to_kohya(tiny_models.random_lora(tiny_models.image_unet())), path)
    adapter = str(path)
    methods = [
        MethodConfig("LCM", adapter, "lcm"),
        MethodConfig("DDIM", adapter, "ddim"),
        MethodConfig("told", adapter, num_phases=2, num_solver_steps=40),
        MethodConfig("otherwise", adapter, num_phases=4, num_solver_steps=40),
        MethodConfig("plain", scheduler="ddim"),
    ]
    pipe = tiny_models.image_pipeline()
    pipe.set_progress_bar_config(disable=True)
    gallery = Gallery(pipe, methods)
    assert gallery.settings.keys() == {"told", "otherwise"}
    assert [gallery.grid(name).num_phases for name in gallery.settings] == [2, 4]
    drawn = {name: gallery.draw(name, 2, ["a cat"], [0], (32, 32)) for name in gallery.methods}
    assert not torch.equal(drawn["DDIM"], drawn["plain"])
    with pytest.raises(ValueError, match="Method PCM: The file does not say how it was trained"):
        Gallery(tiny_models.image_pipeline(), [MethodConfig("PCM", adapter)])


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"scheduler": "euler", "eta": 1.0}, "the scheduler euler has no eta; pcm, ddim, tcd have"),
        ({"scheduler": "exact", "num_phases": 4, "eta": 1.0}, "the scheduler exact has no eta"),
        ({"scheduler": "ddim", "num_phases": 4}, "num_phases is of an adapter"),
        ({"adapter": PCM, "num_solver_steps": -1}, "num_solver_steps is of an adapter, from 1 on; got -1"),
    ],
)
def test_settings_that_a_method_would_not_use_are_refused(told, says):
    with pytest.raises(ValueError, match=says):
        MethodConfig("other", **told)


def test_timesteps_of_a_methods_own_are_where_it_stops():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    own, moved = (999, 739, 499, 239), (999, 739, 499, 119)
    methods = [MethodConfig("PCM", PCM)]
    methods += [MethodConfig(name, PCM, steps=(4,), timesteps=times) for name, times in (("own", own), ("moved", moved))]
    gallery = Gallery(pipe, methods)
    assert gallery.grid("moved") == gallery.grid("PCM")
    drawn = {name: draw(gallery, name, 4) for name in gallery.methods}
    torch.testing.assert_close(drawn["own"], drawn["PCM"], rtol=0, atol=0)
    assert (drawn["moved"] - drawn["PCM"]).abs().mean() > 1e-4
    gallery.use_timesteps("PCM", moved)
    torch.testing.assert_close(draw(gallery, "PCM", 4), drawn["moved"], rtol=0, atol=0)
    # for another number of steps they are not meant
    torch.testing.assert_close(draw(gallery, "moved", 2), draw(gallery, "own", 2), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"Method PCM: .*not points of the grid"):
        gallery.use_timesteps("PCM", (999, 500))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "../up"}, "name of a folder|that of a folder"),
        ({"name": "a", "adapter": "nowhere.safetensors"}, "no file nowhere"),
        ({"name": "a", "steps": (0,)}, "from 1"),
        ({"name": "a", "timesteps": (999, 499)}, r"write steps: \[2\] instead of \[1, 2, 4, 8, 16\]"),
        ({"name": "a", "scheduler": "ddim", "steps": (2,), "timesteps": (999, 499)}, "for the scheduler pcm"),
    ],
)
def test_bad_methods_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        MethodConfig(**arguments)
    with pytest.raises(ValueError, match="names of their own"):
        Gallery(load_pipeline(), [MethodConfig("a"), MethodConfig("a")])


def test_a_new_setting_leaves_pictures_where_they_are(tmp_path):
    @dataclasses.dataclass
    class Grown(MethodConfig):
        brightness: float = 0.0

    grown = Grown("PCM", PCM)
    assert folder_of(tmp_path, grown, 4, {}) == folder_of(tmp_path, MethodConfig("PCM", PCM), 4, {})
    grown.brightness = 1.0
    assert folder_of(tmp_path, grown, 4, {}) != folder_of(tmp_path, MethodConfig("PCM", PCM), 4, {})

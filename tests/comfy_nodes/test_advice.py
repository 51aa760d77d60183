"""What nodes say of their inputs. These sentences need nothing of ComfyUI, so they are tested without it."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from pcm_scheduler.lora_file import AdapterSettings
from pcm_scheduler.noise_schedule import BETA_SCHEDULES, make_alphas_cumprod, make_betas, rescale_zero_terminal_snr

ROOT = Path(__file__).parents[2]
SMALLCFG = AdapterSettings("sd15", (0, 239, 499, 739, 999), 50)


@pytest.fixture(scope="module")
def words() -> Iterator[ModuleType]:
    """`comfy_nodes.advice` as part of a pack, whose own `__init__.py` files would import ComfyUI."""
    for name, folder in (("a_pack", ROOT), ("a_pack.comfy_nodes", ROOT / "comfy_nodes")):
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    yield importlib.import_module("a_pack.comfy_nodes.advice")
    for name in [name for name in sys.modules if name.split(".")[0] == "a_pack"]:
        del sys.modules[name]


@pytest.mark.parametrize("negative", ["", "blurry"])
@pytest.mark.parametrize("cfg", [0.0, 0.5, 0.99])
def test_below_cfg_1_the_negative_prompt_is_drawn(words: ModuleType, cfg: float, negative: str) -> None:
    """uncond + cfg (cond - uncond): ComfyUI leaves `uncond` out at 1 alone. Nothing then says that it has no effect."""
    (said,) = words.advice(cfg, 0.0, None, 4, negative)
    assert f"cfg is {cfg:g}: below 1 ComfyUI mixes in what the negative prompt says" in said
    assert "guidance 0 is cfg 1 here" in said


@pytest.mark.parametrize("cfg", [1.0, 1 - 1e-12])
def test_at_cfg_1_a_negative_prompt_has_no_effect(words: ModuleType, cfg: float) -> None:
    """Whatever `math.isclose` calls 1, as ComfyUI does."""
    (said,) = words.advice(cfg, 0.0, SMALLCFG, 4, "blurry")
    assert "the negative prompt has no effect: 'blurry'" in said
    assert words.advice(cfg, 0.0, SMALLCFG, 4, "") == words.advice(1.1, 0.0, SMALLCFG, 4, "blurry") == []


def test_a_cfg_that_diffusers_reads_as_none_is_recommended_as_1(words: ModuleType) -> None:
    unguided = AdapterSettings("sd15", (0, 239, 499, 739, 999), 50, guidance_scale=0.0)
    (said,) = words.advice(7.0, 0.0, unguided, 4, "")
    assert "recommends 1; try 1 to 2" in said


def test_an_adapter_of_another_kind_of_model_is_pointed_out(words: ModuleType) -> None:
    (said,) = words.fit_advice(False, "v_prediction", SMALLCFG)
    assert "predicts epsilon, and this one predicts v_prediction" in said
    (said,) = words.fit_advice(True, "epsilon", SMALLCFG)
    assert "for sd15, and the model is SDXL" in said
    assert words.fit_advice(False, "epsilon", SMALLCFG) == words.fit_advice(False, None, SMALLCFG) == []
    video = dataclasses.replace(SMALLCFG, base_model="animatediff")
    assert words.fit_advice(False, "epsilon", video) == []
    published = dataclasses.replace(SMALLCFG, inferred=True)  # their family is known
    assert len(words.fit_advice(True, "v_prediction", published)) == 2
    silent = dataclasses.replace(SMALLCFG, assumed=True)
    assert words.fit_advice(True, "v_prediction", silent) == words.fit_advice(True, "v_prediction", None) == []


def test_one_text_for_both_prompts_is_no_negative_prompt(words: ModuleType) -> None:
    graph = {"1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat"}}}
    for positive, found in ((["1", 0], ""), (["2", 0], "a cat")):
        graph["7"] = {"class_type": "PCMKSampler", "inputs": {"positive": positive, "negative": ["1", 0]}}
        assert words.negative_prompt(graph, "7") == found


def test_the_grid_of_sd15_on_sdxl_is_pointed_out(words: ModuleType) -> None:
    (said,) = words.grid_advice(True, None, 50)
    assert "set it to 40" in said
    assert words.grid_advice(True, None, 40) == words.grid_advice(False, None, 50) == []
    assert words.grid_advice(True, SMALLCFG, 50) == []  # the settings count
    silent = dataclasses.replace(SMALLCFG, assumed=True)  # in which the points are what a node was told
    (said,) = words.grid_advice(True, silent, 50)
    assert "On the node that gives the settings, set it to 40" in said
    assert words.grid_advice(True, silent, 40) == words.grid_advice(False, silent, 50) == []


@pytest.mark.parametrize("trained", BETA_SCHEDULES)
@pytest.mark.parametrize("sampled", ["linear", "scaled_linear"])
def test_betas_that_the_adapter_was_not_trained_on_are_pointed_out(words: ModuleType, trained: str, sampled: str) -> None:
    betas = make_betas(sampled, 0.00085, 0.012, 1000)
    sigmas = (1 / make_alphas_cumprod(betas) - 1).sqrt()
    said = words.betas_advice(sigmas, dataclasses.replace(SMALLCFG, beta_schedule=trained))
    if trained == sampled:
        assert said == []
    else:
        assert f"trained on {trained} betas from 0.00085 to 0.012, and the model has others" in said[0]
        assert f"set beta_schedule to {words.EVOLVED_SCHEDULES[trained]}." in said[0]
    assert words.betas_advice(sigmas, SMALLCFG) == words.betas_advice(sigmas, None) == []
    zero_snr = (1 / make_alphas_cumprod(rescale_zero_terminal_snr(betas)) - 1).sqrt()
    assert words.betas_advice(zero_snr, dataclasses.replace(SMALLCFG, beta_schedule=trained)) == []


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_betas_that_are_none_are_pointed_out_too(words: ModuleType, beta: float) -> None:
    """A file may state them."""
    sigmas = (1 / make_alphas_cumprod(make_betas("linear", 0.00085, 0.012, 1000)) - 1).sqrt()
    settings = dataclasses.replace(SMALLCFG, beta_schedule="linear", beta_start=beta, beta_end=beta)
    assert len(words.betas_advice(sigmas, settings)) == 1


def test_betas_of_another_range_are_told_by_their_numbers(words: ModuleType) -> None:
    alphas_cumprod = make_alphas_cumprod(make_betas("scaled_linear", 0.00085, 0.012, 1000))
    settings = dataclasses.replace(SMALLCFG, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.02)
    (said,) = words.betas_advice((1 / alphas_cumprod - 1).sqrt(), settings)
    assert "from 0.00085 to 0.02" in said
    assert "AnimateDiff-Evolved" not in said  # which has no name for it

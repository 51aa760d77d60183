"""The nodes in real ComfyUI without its server: which files and batches they take, what they recommend, refuse and point out.

Set COMFYUI_PATH and COMFYUI_PYTHON as for `test_comfyui.py`.
"""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    "COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a ComfyUI checkout, COMFYUI_PYTHON to its Python"
)


@pytest.fixture(scope="module")
def found(run_host, tmp_path_factory):
    """What `comfyui_words_host.py` saw."""
    return run_host("comfyui_words_host.py", tmp_path_factory.mktemp("loras"))


def distance(first, second):
    """Of latents, relative to the second."""
    first, second = torch.tensor(first), torch.tensor(second)
    return ((first - second).norm() / second.norm()).item()


@pytest.mark.parametrize("layout", ["diffusers", "old", "peft/adapter_model"])
def test_an_adapter_draws_the_same_in_every_layout(found, layout):
    """alpha / rank is 1/8. Alpha is in the header or, of PEFT's, in a file beside: without it they act 8 times as strongly."""
    kohya = found["loaded"]["kohya"]
    assert distance(kohya["latents"], found["plain"]) > 1e-2
    loaded = found["loaded"][layout]
    assert distance(loaded["latents"], kohya["latents"]) < 1e-6
    assert loaded["text"] == kohya["text"]
    assert "modules" not in kohya["text"]


def test_a_dora_acts_as_it_was_trained(found):
    """ComfyUI divides by the length of the weight without the LoRA; files of other trainers may have been trained so."""
    assert max(found["dora"][name] for name in ("dora", "peft_dora", "again")) < 1e-5
    assert found["dora"]["other_dora"] > 0.01
    assert "DoRA" not in found["dora"]["said"]
    assert "The DoRA magnitudes of 1 modules act otherwise" in found["dora"]["quantized"]


def test_modules_that_do_not_fit_are_counted(found):
    modules = found["modules"]
    fitting = modules - found["wide_modules"]
    assert 0 < fitting < modules
    assert f"{fitting} of {modules} modules fit this model" in found["loaded"]["wide"]["text"]


def test_what_comfyui_alone_knows_is_loaded_as_it_loads_it(found):
    assert distance(found["loaded"]["loha"]["latents"], found["plain"]) > 1e-4
    assert "modules" not in found["loaded"]["loha"]["text"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other_shapes", "Nothing in this file fits the model, which is SD15"),
        ("garbled", "This file has lora_adapter_metadata in its header that cannot be read"),
        ("not_finite", "This file holds numbers that are not finite, in mid_block_attentions_0_proj_in"),
        ("half", "This file is not whole: mid_block_attentions_0_proj_in has only one of its two matrices"),
        ("no_down", "This file is not whole: mid_block_attentions_0_proj_in has only one of its two matrices"),
        ("no_up", "This file is not whole: mid_block_attentions_0_proj_in has only one of its two matrices"),
    ],
)
def test_files_that_would_act_in_part_or_too_strongly_are_refused(found, name, words):
    assert found["loaded"][name].startswith(f"ValueError: {words}")


def test_no_guidance_is_cfg_1(found):
    """The file says 0, which is diffusers' word for it; in ComfyUI the negative prompt alone would be drawn."""
    loaded = found["loaded"]["unguided"]
    assert loaded["recommended"] == [4, 1.0, 0.0]
    assert "cfg 1," in loaded["text"]
    assert found["unguided_settings"] == [4, 4, 1.0, 0.0]
    assert found["cfg_0_follows"]["positive"] == 0 < found["cfg_0_follows"]["negative"]
    assert all("below 1 ComfyUI mixes in" in text for text in found["cfg"]["0.0"])
    assert not any("below 1" in text for text in found["cfg"]["1.0"])


def test_recommended_steps_of_a_file_that_says_nothing(found):
    """(phases, steps, cfg, eta): a step for each stated phase, 4 for one, and no more than the grid has points."""
    silent = [[8, 8, 1.0, 0.0], [1, 4, 1.0, 0.0], [1, 2, 1.0, 0.0], [2, 2, 1.0, 0.0]]
    stated = [[2, 2, 1.0, 0.0], [8, 4, 1.0, 0.0]]
    assert found["steps"] == silent + stated


def test_a_linked_file_name_leaves_caching_on(found):
    """ComfyUI asks with None then, and takes an error to mean that the node must always run anew."""
    for linked, missing, there in (found["fingerprints"][:3], found["fingerprints"][3:]):
        assert linked == missing == [0, 0]
        assert min(there) > 0
    assert found["config_is_in_the_fingerprint"]


@pytest.mark.parametrize("node", ["PCMInpaint", "PCMColorize"])
def test_masks_are_one_or_one_for_each_image(found, node):
    counts = found["counts"]
    for given in ("3 1", "3 3", "1 3"):
        assert counts[f"{node} {given}"] == [3, 64, 96, 3]
    assert counts[f"{node} 4 2"] == "ValueError: There are 2 masks for 4 images: give one, or one for each."
    assert counts[f"{node} 1 0"] == "ValueError: There are 0 masks for 1 image: give one, or one for each."


def test_frames_in_which_nothing_is_masked_come_back_as_they_were(found):
    first, unmasked, last = found["frames"]
    assert unmasked < 1e-6
    assert min(first, last) > 0.05
    assert "All 3 masks are black everywhere" in found["all_black"]


def test_pixels_that_are_kept_are_the_pictures_own_of_8_bits_or_not(found):
    """Saving cuts off what is behind the point: a pixel that was rounded to 8 bits would often be another in the file."""
    assert found["decoded"] == found["outpainted"] == 0


def test_masks_of_latents_and_grey_pictures_are_taken(found):
    assert found["as_latents_have_it"] == found["grey"] == [1, 64, 96, 3]


def test_a_picture_that_no_bicubic_filter_makes_is_refused_with_a_way_out(found):
    assert found["sharp"]["antialias"] == (
        "ValueError: This picture is sharper than a bicubic kernel leaves one: set kernel to mean."
    )
    assert found["sharp"]["mean"] == found["smooth"] == [1, 128, 128, 3]


def test_the_grid_of_sd15_on_sdxl_is_pointed_out(found):
    assert all("num_solver_steps is 50, which is for SD1.5" in text for text in found["xl"]["50"])
    assert not any("num_solver_steps" in text for text in found["xl"]["40"] + found["xl"]["settings"])
    assert all("set it to 40" in text for text in found["xl"]["silent"])


def test_a_file_that_says_nothing_has_sdxls_grid_on_sdxl(found):
    loader, *others = found["xl"]["loaded"]
    assert found["xl"]["points"] == 40
    assert "the model is SDXL, so 40 points are taken" in loader
    assert not any("num_solver_steps" in text for text in others)
    assert "points are taken" not in found["loaded"]["silent"]["text"]


def test_an_adapter_of_another_kind_of_model_is_pointed_out(found):
    for settings in ("other_family", "published"):
        assert all("of an adapter for sd15, and the model is SDXL" in text for text in found["xl"][settings])
    assert all("predicts epsilon, and this one predicts v_prediction" in text for text in found["velocity"]["stated"])
    assert not any("predicts" in text for text in found["velocity"]["silent"])
    assert found["sd2"].startswith("ValueError: This adapter is for sd15, and the model is SD20")


def test_betas_that_the_adapter_was_not_trained_on_are_pointed_out(found):
    said = "set beta_schedule to sqrt_linear (AnimateDiff)"
    assert all(said in text for text in found["betas"]["linear"])
    assert not any("beta_schedule" in text for text in found["betas"]["scaled_linear"])


def test_an_adapter_without_alpha_is_pointed_out(found):
    assert f"says no alpha of {found['modules']} modules" in found["loaded"]["no_alpha"]["text"]
    assert "no alpha" not in found["loaded"]["kohya"]["text"]


def test_a_run_that_is_not_finite_says_so_every_time(found):
    for scheduler, *drawing in found["torn"]:
        assert "not finite" not in scheduler
        assert all("gave numbers that are not finite" in text for text in drawing)
    assert not any("not finite" in text for text in found["cfg"]["1.0"])


def test_a_scheduler_without_a_schedule_is_not_the_models_fault(found):
    """kl_optimal divides by one less than the steps."""
    assert "not finite: euler, kl_optimal at 1. Choose another" in found["unscheduled"]["text"]
    assert "The model gave" not in found["unscheduled"]["text"]
    assert [brightest > 0 for brightest in found["unscheduled"]["brightest"]] == [True, True, True, True, False, True]


def test_what_is_mistyped_on_a_step_sheet_is_said_once(found):
    sheets = found["refused_sheets"]
    assert sheets["fine"] == []
    for name, words in (("row", "got 'eular simple'"), ("counts", "got 'two'"), ("grid", "cannot be cut")):
        ((marked, said),) = sheets[name]
        assert marked is None  # ComfyUI cannot be told which
        assert words in said


def test_words_go_to_the_client_that_asked(found):
    assert found["sent"] == ["one\ntwo", "7", "client"]


def test_english_texts_are_those_of_the_nodes(found):
    """`examples/comfyui/write_locales.py` writes them anew."""
    node_texts = runpy.run_path(str(ROOT / "examples" / "comfyui" / "write_locales.py"))["node_texts"]
    texts = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    for name, info in found["info"].items():
        assert node_texts(info) == texts[name], name

"""The adapter file: what is written is what is loaded, and it says how it was trained."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file

from lora_training.config import TARGET_SETS
from pcm_scheduler import AdapterSettings, load_pcm_lora, read_settings
from pcm_scheduler.lora_file import main, published_settings, read_adapter, restate, with_overrides, write_adapter
from pcm_scheduler.phases import PhaseGrid

from model import build_unet, load_pipeline

SETTINGS = AdapterSettings("sd15", PhaseGrid.even(4).edges, 50, training_guidance_scale=5.0, num_inference_steps=4)
RANK, ALPHA = 4, 2.0
PCM_TARGET_MODULES = TARGET_SETS["all"]


@pytest.fixture(scope="module")
def trained():
    """A UNet with every one of PCM's 14 kinds of module adapted, alpha unlike rank, nothing zero; and its state."""
    torch.manual_seed(0)
    unet = load_pipeline().unet
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(PCM_TARGET_MODULES), init_lora_weights=False))
    return unet.eval(), get_peft_model_state_dict(unet)


def modules_of(state):
    return sorted({key.rpartition(".lora_")[0] for key in state})


@pytest.fixture
def adapter_file(trained, tmp_path):
    path = tmp_path / "adapter.safetensors"
    write_adapter(path, trained[1], dict.fromkeys(modules_of(trained[1]), ALPHA), SETTINGS, "a title", dtype=torch.float32)
    return path


def test_diffusers_loads_every_module_and_computes_the_same(trained, adapter_file):
    unet, state = trained
    pipe = load_pipeline()
    settings = load_pcm_lora(pipe, adapter_file)
    assert settings == SETTINGS
    assert pipe.scheduler.grid == PhaseGrid.even(4)
    loaded = get_peft_model_state_dict(pipe.unet, adapter_name="pcm")
    assert modules_of(loaded) == modules_of(state)
    assert {kind for kind in PCM_TARGET_MODULES if any(m.endswith(kind) for m in modules_of(state))} == set(PCM_TARGET_MODULES)
    x, t, embeds = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 40, unet.config.cross_attention_dim)
    with torch.no_grad():
        ours, plain = unet(x, t, embeds).sample, load_pipeline().unet(x, t, embeds).sample
        theirs = pipe.unet(x, t, embeds).sample
    assert (ours - plain).abs().max() > 0.1, "the adapter does nothing, so the test would prove nothing"
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_every_module_has_three_tensors_in_kohya_names(trained, adapter_file):
    with safe_open(adapter_file, "pt") as file:
        keys = set(file.keys())
        names = {"lora_unet_" + m.replace(".", "_") for m in modules_of(trained[1])}
        assert keys == {f"{n}.{part}" for n in names for part in ("lora_down.weight", "lora_up.weight", "alpha")}
        assert file.get_tensor(f"{min(names)}.alpha").item() == ALPHA
        header = file.metadata()
    assert header["pcm.phase_edges"] == "0,239,499,739,999"
    assert header["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "2.0")


def test_names_do_not_collide_when_dots_become_underscores():
    names = [n.replace(".", "_") for n, _ in build_unet().named_modules()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "edges", "eta", "steps"),
    [
        ("pcm_sd15_smallcfg_4step_converted.safetensors", (0, 239, 499, 739, 999), 0.0, 4),
        ("pcm_sdxl_normalcfg_8step_converted.safetensors", (0, 124, 249, 374, 499, 624, 749, 874, 999), 0.0, 8),
        ("pcm_sdxl_lcmlike_lora_converted.safetensors", (0, 999), 1.0, 4),
    ],
)
def test_published_names_are_recognised_and_marked_as_inferred(name, edges, eta, steps):
    settings = published_settings(name)
    assert (settings.phase_edges, settings.eta, settings.num_inference_steps) == (edges, eta, steps)
    assert settings.inferred
    assert (settings.guidance_scale > 1) == ("normalcfg" in name)


def test_files_without_a_header_need_to_be_told(tmp_path, adapter_file):
    with safe_open(adapter_file, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    bare = tmp_path / "something.safetensors"
    save_file(tensors, bare)
    assert read_settings(bare) is None
    with pytest.raises(ValueError, match="num_phases"):
        load_pcm_lora(load_pipeline(), bare)
    pipe = load_pipeline()
    assert load_pcm_lora(pipe, bare, num_phases=8, num_solver_steps=40).grid == PhaseGrid.even(8, 40)
    assert pipe.scheduler.config.num_solver_steps == 40


def test_overrides_win_over_the_header(adapter_file):
    pipe = load_pipeline()
    assert load_pcm_lora(pipe, adapter_file, num_phases=2).grid.num_phases == 2
    assert load_pcm_lora(load_pipeline(), adapter_file, phase_edges=(0, 499, 999)).grid.edges == (0, 499, 999)


@pytest.mark.parametrize("stated", [AdapterSettings("sd15", (0, 999), 50), None])
def test_even_and_explicit_edges_are_not_both_given(stated):
    with pytest.raises(ValueError, match="one of the two"):
        with_overrides(stated, num_phases=2, phase_edges=(0, 99, 999))


def test_uneven_edges_stay_on_another_grid_of_the_solver_or_are_refused():
    uneven = AdapterSettings("sd15", (0, 99, 499, 999), 50)
    assert with_overrides(uneven, num_solver_steps=100).phase_edges == (0, 99, 499, 999)
    with pytest.raises(ValueError, match="edge 99 is not a point"):
        with_overrides(uneven, num_solver_steps=25)
    even = AdapterSettings("sd15", PhaseGrid.even(4).edges, 50)
    assert with_overrides(even, num_solver_steps=40).phase_edges == PhaseGrid.even(4, 40).edges


def test_settings_that_no_file_states_are_assumed():
    assumed, stated = with_overrides(None, num_phases=2), AdapterSettings("sd15", PhaseGrid.even(2).edges, 50)
    assert assumed == dataclasses.replace(stated, assumed=True)
    assert AdapterSettings.from_header(assumed.to_header()) == assumed
    assert "pcm.assumed" not in stated.to_header()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_files_are_readable_by_whom_new_files_are(adapter_file, tmp_path):
    (tmp_path / "any").touch()
    assert adapter_file.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_malformed_files_are_named(tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match=r"broken\.safetensors"):
        read_settings(broken)
    with pytest.raises(FileNotFoundError):
        read_settings(tmp_path / "missing.safetensors")
    lying = tmp_path / "lying.safetensors"
    save_file(
        {"x": torch.zeros(1)},
        lying,
        {"pcm.base_model": "sd15", "pcm.phase_edges": "0,250,999", "pcm.num_solver_steps": "50"},
    )
    with pytest.raises(ValueError, match="239 or 259"):
        read_settings(lying)
    save_file({"x": torch.zeros(1)}, lying, {"pcm.base_model": "sd15", "pcm.phase_edges": "0,abc"})
    with pytest.raises(ValueError, match="header"):
        read_settings(lying)
    with pytest.raises(ValueError, match="weight_name"):
        load_pcm_lora(load_pipeline(), "some/repository")


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"pcm.num_train_timesteps": "1" + "0" * 18}, "at most 1000000"),
        ({"pcm.num_solver_steps": "50.0"}, r"pcm\.num_solver_steps is '50\.0', which cannot be read as int"),
        ({"pcm.eta": "nan"}, "eta must be a finite number from 0 to 1"),
        ({"pcm.guidance_scale": "inf"}, "guidance_scale must be a finite number"),
        ({"pcm.beta_start": "-1"}, "beta_start must be a finite number from 0 to 1"),
        ({"pcm.num_inference_steps": "0"}, "num_inference_steps must be from 1 to num_solver_steps=50; got 0"),
        ({"pcm.base_model": "sd9"}, "Unknown base_model 'sd9'; choose one of sd15, sdxl, animatediff"),
        ({"pcm.phase_edges": None, "pcm.num_solver_steps": None}, r"lacks pcm\.phase_edges, pcm\.num_solver_steps"),
    ],
)
def test_a_header_that_cannot_be_is_refused_with_its_file(tmp_path, entries, says):
    header = {key: value for key, value in (SETTINGS.to_header() | entries).items() if value is not None}
    path = tmp_path / "lying.safetensors"
    save_file({"x": torch.zeros(1)}, path, header)
    with pytest.raises(ValueError, match=rf"lying\.safetensors: The adapter's header cannot be used: .*{says}"):
        read_settings(path)


def crafted(path, **tensors):
    """A safetensors file of a LoRA's three tensors, of any type and shape: name = (type, shape, bytes)."""
    header, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        key = f"lora_unet_mid_block_attentions_0_proj_in.{name.replace('_weight', '.weight')}"
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    told = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(told)) + told + bytes(end))
    return path


@pytest.mark.parametrize(
    ("down", "says"),
    [
        (("F32", [0, 2**63], 0), "which no weight has"),
        (("F32", [0, 2**62, 2**62], 0), "which no weight has"),
        (("F32", [1] * 70, 4), "which no weight has"),
        (("F4", [0, 0], 0), "F4"),
        (("F32", [0, 3], 0), "is empty"),
        (("F32", [], 4), "not both are matrices"),
        (("I64", [2, 3], 48), "not of floating-point numbers"),
    ],
)
def test_shapes_and_types_that_no_weight_has_are_refused(tmp_path, capsys, down, says):
    rank = down[1][0] if down[1] else 2
    path = crafted(tmp_path / "odd.safetensors", lora_down_weight=down, lora_up_weight=("F32", [3, rank], 12 * rank))
    assert main([str(path)]) == 1
    said = capsys.readouterr().out
    assert says in said or (says == "F4" and "InvalidHeaderDeserialization" in said)  # which safetensors 0.5 does not know


def test_a_folder_is_no_adapter(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        read_settings(tmp_path)


def test_a_second_adapter_replaces_the_first(trained, adapter_file, tmp_path):
    pipe = load_pipeline()
    load_pcm_lora(pipe, adapter_file)
    other = tmp_path / "other.safetensors"
    eight = AdapterSettings("sd15", PhaseGrid.even(8).edges, 50)
    write_adapter(other, trained[1], dict.fromkeys(modules_of(trained[1]), ALPHA), eight, "eight phases")
    assert load_pcm_lora(pipe, other).grid.num_phases == 8
    assert pipe.scheduler.grid.num_phases == 8
    assert pipe.get_active_adapters() == ["pcm"]


def test_an_adapter_for_another_prediction_type_is_refused_before_it_is_loaded(trained, tmp_path):
    path = tmp_path / "v.safetensors"
    settings = AdapterSettings("sd15", PhaseGrid.even(4).edges, 50, prediction_type="v_prediction")
    write_adapter(path, trained[1], dict.fromkeys(modules_of(trained[1]), ALPHA), settings, "v")
    pipe = load_pipeline()
    with pytest.raises(ValueError, match="v_prediction"):
        load_pcm_lora(pipe, path)
    assert not pipe.get_list_adapters()


def test_an_adapter_for_another_number_of_timesteps_is_refused_by_that_number(trained, tmp_path):
    """And not by its edges, which are no points of the pipeline's grid."""
    path = tmp_path / "few.safetensors"
    settings = AdapterSettings("sd15", PhaseGrid.even(4, 50, 500).edges, 50, num_train_timesteps=500)
    write_adapter(path, trained[1], dict.fromkeys(modules_of(trained[1]), ALPHA), settings, "few")
    with pytest.raises(ValueError, match="trained with num_train_timesteps=500, but the pipeline's scheduler has 1000"):
        load_pcm_lora(load_pipeline(), path)


def test_the_command_line_says_in_words_what_a_file_is(adapter_file, tmp_path, capsys):
    assert main([str(adapter_file)]) == 0
    said = capsys.readouterr().out
    for words in ("rank 4", "999", "deterministic", "stated in its header", "It is whole."):
        assert words in said, said
    published = tmp_path / "pcm_sd15_lcmlike_lora_converted.safetensors"
    with safe_open(adapter_file, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    save_file(tensors, published)
    assert main([str(published)]) == 0
    assert "inferred from what was published" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t: {k: v for k, v in t.items() if not k.endswith(".alpha")}, "no alpha"),
        (lambda t: {k: v for k, v in t.items() if k != max(t)}, "only one of its two matrices"),
        (lambda t: {k: v * float("nan") for k, v in t.items()}, "not finite"),
        (lambda t: {k: v * 0 for k, v in t.items()}, "does nothing"),
        (lambda t: t | {"stranger": torch.zeros(1)}, "stranger"),
        (lambda t: {"unet.weight": torch.zeros(1)}, "no LoRA of a UNet"),
    ],
)
def test_the_command_line_finds_what_is_wrong(adapter_file, tmp_path, capsys, damage, says):
    with safe_open(adapter_file, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    path = tmp_path / "damaged.safetensors"
    save_file(damage(tensors), path)
    assert main([str(path)]) == 1
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_command_line_reads_numbers_of_eight_bits(adapter_file, tmp_path, capsys, dtype):
    """With torch 2.6, which asks nothing of such tensors."""
    with safe_open(adapter_file, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        eight = {k: t.to(dtype) if t.ndim else t for k, t in tensors.items()}
        save_file(eight, tmp_path / "eight.safetensors", file.metadata())
    assert main([str(tmp_path / "eight.safetensors")]) == 0
    assert "It is whole." in capsys.readouterr().out
    first = min(key for key in eight if key.endswith("lora_down.weight"))
    eight[first] = torch.full(eight[first].shape, torch.nan).to(dtype)
    save_file(eight, tmp_path / "nan.safetensors")
    assert main([str(tmp_path / "nan.safetensors")]) == 1
    assert "not finite" in capsys.readouterr().out


def test_a_truncated_file_is_refused(adapter_file, tmp_path, capsys):
    path = tmp_path / "short.safetensors"
    path.write_bytes(adapter_file.read_bytes()[:-100])
    assert main([str(path), str(tmp_path / "nothing.safetensors")]) == 1
    said = capsys.readouterr().out
    assert "not a readable safetensors file" in said
    assert [said.count(name) for name in ("short.safetensors", "nothing.safetensors")] == [1, 1]
    with pytest.raises(ValueError, match="readable"):
        read_adapter(path, {})


def test_reading_is_the_reverse_of_writing(trained, adapter_file):
    state = trained[1]
    same = read_adapter(adapter_file, dict.fromkeys(modules_of(state), ALPHA))
    assert same.keys() == state.keys()
    for key, tensor in state.items():
        torch.testing.assert_close(same[key], tensor)
    stronger = read_adapter(adapter_file, dict.fromkeys(modules_of(state), 2 * ALPHA))
    for key, tensor in state.items():
        torch.testing.assert_close(stronger[key], tensor / 2 if key.endswith("lora_B.weight") else tensor)


def test_a_header_is_stated_anew_and_what_it_says_no_more_is_gone(adapter_file, tmp_path):
    sdxl = AdapterSettings("sdxl", PhaseGrid.even(8, 40).edges, 40, prediction_type="v_prediction", guidance_scale=2.0)
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    restate(adapter_file, first, replace(sdxl, inferred=True, beta_schedule="linear", beta_start=0.001))
    restate(first, second, sdxl, {"pcm_trainer.config": "{}"})
    assert read_settings(second) == sdxl
    with safe_open(adapter_file, "pt") as file:
        title = file.metadata()["modelspec.title"]
    with safe_open(second, "pt") as file:
        header = file.metadata()
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert header["modelspec.prediction_type"] == "v"
    assert "guidance 2" in header["modelspec.usage_hint"]
    assert (header["modelspec.title"], header["pcm_trainer.config"]) == (title, "{}")


def test_a_header_of_a_newer_version_is_not_misread():
    header = AdapterSettings("sd15", PhaseGrid.even(4).edges, 50).to_header()
    assert AdapterSettings.from_header(header) == AdapterSettings("sd15", PhaseGrid.even(4).edges, 50)
    with pytest.raises(ValueError, match=r"version '77'.*Update"):
        AdapterSettings.from_header(header | {"pcm.version": "77"})

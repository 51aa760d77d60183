"""The nodes on models that AnimateDiff-Evolved has put motion modules into, in real ComfyUI.

Set COMFYUI_PATH and COMFYUI_PYTHON as for `test_comfyui.py`, and COMFYUI_ANIMATEDIFF_PATH to a checkout of AnimateDiff-Evolved
that this ComfyUI can load.
"""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
import torch

from pcm_scheduler.lora_file import AdapterSettings, adapter_tensors, write_adapter, write_video_adapter
from pcm_scheduler.noise_schedule import make_alphas_cumprod, make_betas
from pcm_scheduler.phases import PhaseGrid

GRID = PhaseGrid.even(4)
VIDEO_SCALE = 0.5

pytestmark = pytest.mark.skipif(
    not {"COMFYUI_PATH", "COMFYUI_ANIMATEDIFF_PATH"} <= os.environ.keys(),
    reason="set COMFYUI_PATH and COMFYUI_ANIMATEDIFF_PATH to checkouts of both, COMFYUI_PYTHON to ComfyUI's Python",
)


@pytest.fixture(scope="module")
def found(run_host, tmp_path_factory):
    """What `comfyui_animatediff_host.py` saw."""
    base = tmp_path_factory.mktemp("base")
    (base / "models" / "animatediff_models").mkdir(parents=True)
    layers = [f"down_blocks.{i}.attentions.0.transformer_blocks.0.attn1.to_v" for i in range(3)]
    drawn = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in layers:
        tensors[f"{layer}.lora_A.weight"] = torch.randn(4, 32, generator=drawn)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(32, 4, generator=drawn)
    settings = AdapterSettings("sd15", GRID.edges, GRID.num_solver_steps)
    adapter = base / "models" / "loras" / "adapter.safetensors"
    write_adapter(adapter, tensors, dict.fromkeys(layers, 4.0), settings, "of the tiny model")
    video = {}
    for block in ("down_blocks.0", "down_blocks.3", "up_blocks.1"):
        for layer, width in (("attn1.to_q", 32), ("attn2.to_v", 32), ("attn2.to_out.0", 32), ("ff.net.2", 128)):
            name = f"{block}.motion_modules.0.transformer_blocks.0.{layer}"
            video[f"{name}.lora_A.weight"] = torch.randn(4, width, generator=drawn)
            video[f"{name}.lora_B.weight"] = torch.randn(32, 4, generator=drawn)
    alphas = {key.removesuffix(".lora_A.weight"): 4 * VIDEO_SCALE for key in video if key.endswith(".lora_A.weight")}
    settings = AdapterSettings("animatediff", GRID.edges, GRID.num_solver_steps)
    write_video_adapter(
        adapter.parents[1] / "animatediff_motion_lora" / "video.safetensors",
        adapter_tensors(video, alphas),
        settings,
        "of the tiny model",
    )
    return run_host("comfyui_animatediff_host.py", os.environ["COMFYUI_ANIMATEDIFF_PATH"], VIDEO_SCALE, base)


RUNS = pytest.mark.parametrize("run", ["v3", "v2", "StandardUniform", "StandardStatic"])


@RUNS
def test_the_all_in_one_node_is_the_three_wired_by_hand(found, run):
    assert found[run]["finite"]
    assert max(found[run]["by_hand"]) == 0
    assert found[run]["eta_by_hand"] == 0


@RUNS
def test_the_deterministic_jump_is_eulers_step(found, run):
    """To rounding: euler itself moves further when its noise is moved by two of float32's last places.

    The random network makes a hundred times as much of any difference; after one step, with the same input, nothing has.
    """
    for ours, rounding in zip(found[run]["euler"], found[run]["rounding"], strict=True):
        assert ours < rounding < 1e-3
    if run == "v3":
        assert max(found[run]["euler"][:2]) < 1e-6


@RUNS
def test_fresh_noise_is_the_seeds(found, run):
    assert found[run]["eta_again"] == 0
    assert found[run]["eta_matters"] > 0.01


@RUNS
def test_the_network_is_asked_at_the_edges_for_what_euler_asks(found, run):
    for name, asked in found[run]["asked"].items():
        assert asked["ours"] == asked["eulers"]
        timesteps = [timestep for call in asked["ours"] for timestep in call["timesteps"]]
        assert list(dict.fromkeys(timesteps)) == list(GRID.sampling_timesteps(int(name.split()[0])))
    assert found["half_asked"] == [[timestep] for timestep in GRID.sampling_timesteps(4, 0.5)]
    assert found["half"] < 1e-3


@pytest.mark.parametrize("run", ["StandardUniform", "StandardStatic"])
def test_windows_are_windows(found, run):
    """16 of 32 frames at a time. The uniform ones move from step to step, by AnimateDiff-Evolved's count of our steps."""
    by_step = {}
    for call in found[run]["asked"]["4 steps, cfg 1"]["ours"]:
        assert len(call["window"]) == call["batch"] == 16
        by_step.setdefault(call["timesteps"][0], []).append(call["window"])
    for windows in by_step.values():
        assert len(windows) > 1
        assert {frame for window in windows for frame in window} == set(range(32))
    moved = [a != b for a, b in pairwise(by_step.values())]
    assert moved == [run == "StandardUniform"] * 3
    assert found[run]["at_once"] > 0.01


def sigmas_of(beta_schedule):
    """At the edges, of Stable Diffusion's betas, in ComfyUI's coordinates."""
    alphas_cumprod = make_alphas_cumprod(make_betas(beta_schedule, 0.00085, 0.012, 1000)).double()
    table = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    return [*table[list(GRID.sampling_timesteps(4))].tolist(), 0.0]


def test_sigmas_are_the_patched_tables(found):
    """AnimateDiff's `autoselect` is diffusers' `linear`; Stable Diffusion's own is `scaled_linear`."""
    assert found["sigmas"] == pytest.approx(sigmas_of("linear"), rel=1e-4)
    assert found["unpatched_sigmas"] == pytest.approx(sigmas_of("scaled_linear"), rel=1e-4)
    assert found["sigmas"][0] > 1.5 * found["unpatched_sigmas"][0]


def test_every_schedule_is_followed_or_refused(found):
    """Cut tables are refused. ComfyUI 0.3.64 cannot build squaredcos_cap_v2 itself, whatever samples."""
    assert len(found["schedules"]) > 10
    for name, seen in found["schedules"].items():
        if "lcm" in name:
            assert "beta_schedule" in seen["refused"], name
        elif "cannot be built" in seen:
            assert name == "squaredcos_cap_v2"
        else:
            assert seen["asked"] == [[timestep] for timestep in GRID.sampling_timesteps(4)], name
            assert seen["finite"], name
    assert found["schedules"]["autoselect"] == found["schedules"]["sqrt_linear (AnimateDiff)"]


def test_animatelcm_wants_another_schedule(found):
    assert "AnimateLCM" in found["lcm"]["autoselect"]["refused"]
    assert found["lcm"]["sqrt_linear (AnimateDiff)"]["finite"]


def test_frames_hear_of_each_other(found):
    assert found["motion_matters"] > 0.1
    assert found["frames_hear"] > 0.01
    assert found["frames_deaf"] == 0


def test_what_else_a_latent_carries_stays(found):
    kept, drawn = found["masked"]
    assert kept < 1e-5
    assert drawn > 0.01
    assert found["keys"] == ["batch_index", "frames_per_second", "noise_mask", "samples"]
    assert found["keys_same"]


def test_animatediffs_own_noise_is_drawn(found):
    assert found["fresh_noise"]["shared"] < 1e-5
    assert found["fresh_noise"]["own"] == pytest.approx(1, abs=0.1)


def test_the_adapter_goes_before_or_after_the_motion_module(found):
    assert found["adapter_order"] == 0
    assert found["adapter_matters"] > 0.01


def test_the_motion_file_of_a_video_adapter_is_applied(found):
    """As when the matrices of the file for diffusers are added to the motion module by hand; half precision in both files."""
    assert found["motion_lora_matters"] > 0.01
    assert found["motion_lora_by_hand"] < 0.01 * found["motion_lora_matters"]


def test_nothing_stays_behind(found):
    assert found["again"] == [0, 0]
    assert found["without"] == 0

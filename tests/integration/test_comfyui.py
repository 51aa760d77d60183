"""The nodes in real ComfyUI: its server lists them, and they draw what its own samplers draw on the same sigmas.

Set COMFYUI_PATH to a checkout, and COMFYUI_PYTHON to a Python with its requirements (default: the one that runs the tests).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from comfyui_parity import CASES, InDiffusers, difference, in_comfyui

from pcm_scheduler.phases import PhaseGrid

ROOT = Path(__file__).parents[2]
ADAPTER = ROOT / "examples" / "shapes" / "adapters" / "pcm_4phase.safetensors"

pytestmark = pytest.mark.skipif(
    "COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a ComfyUI checkout, COMFYUI_PYTHON to its Python"
)


@pytest.fixture(scope="module")
def found(run_host, tmp_path_factory):
    """What `comfyui_host.py` saw."""
    loras = tmp_path_factory.mktemp("loras")
    shutil.copy(ADAPTER, loras)
    return run_host("comfyui_host.py", loras)


def test_the_all_in_one_node_is_the_three_wired_by_hand(found):
    assert max(found["by_hand"]) == 0


def test_the_deterministic_jump_is_eulers_step(found):
    """Relative to the largest latent; float32 rounding over 16 steps. Any sampler agrees on a network that answers nothing."""
    assert max(found["euler"]) < 1e-5
    assert found["guidance_matters"] > 0.1


def test_the_network_is_asked_at_the_schedulers_own_timesteps(found):
    grid = PhaseGrid.even(4)
    assert found["timesteps"] == {str(k): list(grid.sampling_timesteps(k)) for k in (1, 2, 3, 4, 8)}
    assert found["half"] == list(grid.sampling_timesteps(4, 0.5))


def test_new_noise_is_not_the_initial_noise_again(found):
    """On a CPU ComfyUI 0.3.64 starts both at the same number. Of two of unit variance the difference has a root of 2."""
    deviation, from_initial = found["new_noise"]
    assert deviation == pytest.approx(1, abs=0.1)
    assert from_initial == pytest.approx(2**0.5, abs=0.15)


def test_masks_splits_and_no_denoising(found):
    kept, drawn = found["masked"]
    assert kept < 1e-5
    assert drawn > 0.01
    assert found["split"] < 1e-4
    assert found["nothing_to_do"]


def test_the_loader_reads_the_header(found):
    assert found["settings"] == [50, [0, 239, 499, 739, 999], 4, 1.0, 0.0]
    assert found["from_settings"]
    assert "4 phases" in found["text"]
    assert "modules" not in found["text"]


def test_other_models_are_refused_and_patched_schedules_are_used(found):
    assert "lcm" in found["refused"]["lcm"]
    assert "flow" in found["refused"]["flow"]
    assert found["zero_snr_top"] > 100  # of the unpatched table: 14.6


def test_the_numbers_are_those_of_diffusers(pack):
    """Latents of the shapes models with the trainer's adapters; float32 in two hosts, far below what a picture shows."""
    found = in_comfyui(CASES, pack)
    draws = InDiffusers()
    for case, latents in zip(CASES, found.latents, strict=True):
        assert difference(draws.draw(case), latents) < case.tolerance, case

"""ComfyUI's own loader finds a place for every key of the trainer's files. Needs a ComfyUI checkout and its requirements."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from verify_real import comfyui_placement, full_size_adapter

from lora_training.backbones.full_size import ADAPTED_MODULES

pytestmark = pytest.mark.skipif(
    "COMFYUI_PATH" not in os.environ or find_spec("einops") is None,
    reason="set COMFYUI_PATH to a ComfyUI checkout, and run with a Python that has its requirements",
)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_key_is_mapped_and_every_patch_fits(family, dora):
    tensors = full_size_adapter(family, dora)
    assert len(tensors) == (4 if dora else 3) * ADAPTED_MODULES[family]
    found = comfyui_placement(Path(os.environ["COMFYUI_PATH"]), family, tensors)
    assert not found.left_over
    assert not found.misfits
    assert len(found.patches) == ADAPTED_MODULES[family]
    for patch in found.patches.values():
        _, _, alpha, _, dora_scale, _ = patch.weights
        assert alpha == 3.0
        assert (dora_scale is not None) == dora


def test_the_check_sees_what_comfyui_drops():
    """A name that ComfyUI does not know is left over, with all its tensors."""
    tensors = full_size_adapter("sd15")
    renamed = {key.replace("attn1_to_q", "attn1_to_query"): tensor for key, tensor in tensors.items()}
    found = comfyui_placement(Path(os.environ["COMFYUI_PATH"]), "sd15", renamed)
    assert len(found.left_over) == 3 * sum("attn1_to_q.alpha" in key for key in tensors) > 0

"""Helpers are shared by plain import: the folders of the tests and of the shapes example are on the path.

Where the trained shapes model is not in the checkout, the same architecture with random weights stands in for it, and
the tests that need it trained skip.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / part) for part in ("tests", "tests/pcm_scheduler", "examples/shapes")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network is a broken test

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

import evaluate  # noqa: E402

import model  # noqa: E402
from scenes import all_wordings  # noqa: E402

MODEL_SHIPS = (model.MODEL_DIR / "model_index.json").is_file()
ADAPTERS_SHIP = MODEL_SHIPS and all(path.is_file() for path in evaluate.ADAPTERS.values())

if not MODEL_SHIPS:
    stand_in = tempfile.TemporaryDirectory()  # lives as long as the process
    torch.manual_seed(0)
    tokenizer = model.build_tokenizer(all_wordings())
    parts = (model.build_autoencoder(), model.build_text_encoder(tokenizer), tokenizer, model.build_unet())
    model.assemble_pipeline(*parts).to(dtype=torch.float16).save_pretrained(stand_in.name)
    model.MODEL_DIR = Path(stand_in.name)


@pytest.fixture
def trained_model():
    """Asked for by tests that mean the trained weights."""
    if not MODEL_SHIPS:
        pytest.skip("the trained shapes model is not in this checkout; make shapes trains it")


@pytest.fixture(scope="session")
def trained_adapters():
    """Asked for by tests that mean the distilled adapters."""
    if not ADAPTERS_SHIP:
        pytest.skip("the distilled shapes adapters are not in this checkout; make adapters distils them")

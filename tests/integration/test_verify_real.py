"""The command for people with real weights, run on the shipped model."""

from __future__ import annotations

import pytest
from PIL import Image
from verify_real import main

from pcm_scheduler.lora_file import write_adapter

from model import MODEL_DIR

SHAPES = ["--model", str(MODEL_DIR), "--device", "cpu", "--prompt", "a large red star in the center", "--latent-side", "8"]


def test_every_check_that_can_run_passes_and_the_others_are_named(tmp_path, capsys):
    assert main([*SHAPES, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.count(" pass ") == 4
    assert said.count("not run") == 4
    for words in ("92 modules, rank 4, alpha 3", "999, 739, 499, 239", "needs --adapter", "needs --comfyui"):
        assert words in said, said

    with_adapter = [*SHAPES, "--out", str(tmp_path), "--adapter", str(tmp_path / "random_adapter.safetensors")]
    assert main(with_adapter) == 0
    assert "92 of 92 modules" in capsys.readouterr().out
    assert Image.open(tmp_path / "contact_sheet.png").size == (64, 4 * 64)


def test_a_failing_check_is_told_by_the_exit_code(tmp_path, capsys):
    assert main([*SHAPES, "--out", str(tmp_path), "--comfyui", str(tmp_path)]) == 1
    assert "cannot be imported" in capsys.readouterr().out


def test_an_adapter_that_lost_its_alpha_fails(tmp_path, capsys, monkeypatch):
    def write_with_alpha_as_rank(path, state, alphas, *rest):
        write_adapter(path, state, dict.fromkeys(alphas, 4.0), *rest)

    monkeypatch.setattr("verify_real.write_adapter", write_with_alpha_as_rank)
    assert main([*SHAPES, "--out", str(tmp_path)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_what_to_check_must_be_said():
    with pytest.raises(SystemExit):
        main([])

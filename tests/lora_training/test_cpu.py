"""What is computed in on processors with bfloat16 and without."""

from __future__ import annotations

import pytest
import torch
from training_runs import tiny_config, tiny_folder

from lora_training import cpu
from lora_training.loop import Run


@pytest.fixture(params=[True, False], ids=["with bfloat16", "without"])
def native(request, monkeypatch, own_precision):
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: request.param)
    return request.param


def test_a_run_computes_in_bfloat16_only_where_the_processor_does(native, tmp_path, capsys):
    run = Run(tiny_config(tiny_folder(tmp_path), tmp_path / "a.safetensors", mixed_precision="bf16"))
    assert run.config.mixed_precision == ("bf16" if native else "no")
    with run.accelerator.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if native else torch.float32)
    assert ("no bfloat16" in capsys.readouterr().err) != native


def test_other_precisions_and_devices_are_left_alone(native):
    for asked, device in (("no", "cpu"), ("fp16", "cpu"), ("bf16", "cuda"), ("fp16", "cuda")):
        assert cpu.precision_here(asked, torch.device(device)) == asked


def test_autocast_and_its_name_agree(native):
    with cpu.fast_autocast():
        assert str((torch.ones(2, 2) @ torch.ones(2, 2)).dtype) == f"torch.{cpu.fast_precision()}"

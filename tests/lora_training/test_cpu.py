"""What is computed in on processors with bfloat16 and without."""

from __future__ import annotations

import pytest
import torch
from training_runs import tiny_config, tiny_folder

from lora_training import cpu
from lora_training.dry_run import describe
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


@pytest.mark.parametrize("native", [True], indirect=True)
@pytest.mark.parametrize(
    ("configured", "launched", "taken"), [("auto", "bf16", "bf16"), ("no", "bf16", "no"), ("auto", "no", "no")]
)
def test_the_launchers_precision_is_taken_where_the_configuration_says_auto(
    native, configured, launched, taken, tmp_path, monkeypatch, capsys
):
    """`accelerate launch --mixed_precision` sets this variable."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    run = Run(tiny_config(tiny_folder(tmp_path), tmp_path / "a.safetensors", mixed_precision=configured))
    assert run.config.mixed_precision == run.accelerator.mixed_precision == taken
    assert ("not accelerate's bf16" in capsys.readouterr().err) == (configured == "no")
    assert any(line.split()[:2] == ["precision", {"no": "float32;", "bf16": "bfloat16;"}[taken]] for line in describe(run))


def test_a_precision_of_the_launcher_that_the_trainer_has_not_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match=r"accelerate's mixed_precision is fp8; the trainer has no, fp16, bf16"):
        Run(tiny_config(tiny_folder(tmp_path), tmp_path / "a.safetensors"))


def test_other_precisions_and_devices_are_left_alone(native):
    for asked, device in (("no", "cpu"), ("fp16", "cpu"), ("bf16", "cuda"), ("fp16", "cuda")):
        assert cpu.precision_here(asked, torch.device(device)) == asked


def test_autocast_and_its_name_agree(native):
    with cpu.fast_autocast():
        assert str((torch.ones(2, 2) @ torch.ones(2, 2)).dtype) == f"torch.{cpu.fast_precision()}"

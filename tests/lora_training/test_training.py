"""The trainer on the shipped model: a few real steps, resumed, written, loaded again."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from write_dataset import write_dataset

from lora_training.backbones import load_backbone
from lora_training.config import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)
from lora_training.data.captioned_images import find_images, load_image
from lora_training.loop import run
from lora_training.objectives import ConsistencyObjective, pseudo_huber
from lora_training.randomness import generator_of
from lora_training.teacher import ddim_step
from lora_training.train import parse
from pcm_scheduler import load_pcm_lora, read_settings
from pcm_scheduler.phases import PhaseGrid

from model import MODEL_DIR, load_pipeline

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_dataset(folder, 8)
    return folder


def config_for(pictures, output, steps=4, **kwargs):
    return TrainConfig(
        model=ModelConfig(path=str(MODEL_DIR)),
        data=DataConfig(folder=str(pictures), resolution=128, cache=str(pictures / "cache")),
        lora=LoraConfig(rank=4, alpha=2.0),
        objective=ObjectiveConfig(guidance_scale=3.0),
        optimizer=OptimizerConfig(learning_rate=1e-3, batch_size=2, steps=steps, schedule="cosine"),
        sampling=SamplingConfig(guidance_scale=1.5),
        output=str(output),
        **kwargs,
    )


def test_a_run_writes_a_file_that_loads_and_changes_the_picture(pictures, tmp_path):
    output = run(config_for(pictures, tmp_path / "adapter.safetensors"))
    settings = read_settings(output)
    assert settings.phase_edges == PhaseGrid.even(4).edges
    assert (settings.training_guidance_scale, settings.guidance_scale, settings.eta) == (3.0, 1.5, 0.0)
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    load_pcm_lora(pipe, output)
    adapted = pipe("a red star", latents=noise, num_inference_steps=4, output_type="pt").images
    pipe.disable_lora()
    plain = pipe("a red star", latents=noise, num_inference_steps=4, output_type="pt").images
    assert (adapted - plain).abs().max() > 1e-3


def test_an_interrupted_run_ends_with_the_same_weights(pictures, tmp_path, monkeypatch):
    whole = run(config_for(pictures, tmp_path / "whole.safetensors", steps=6))

    calls = 0
    original = ConsistencyObjective.__call__

    def interrupted(self, *args):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return original(self, *args)

    config = config_for(pictures, tmp_path / "resumed.safetensors", steps=6, checkpoint_every=3)
    monkeypatch.setattr(ConsistencyObjective, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert not Path(config.output).exists()
    assert Path(config.output).with_suffix(".checkpoint.safetensors").exists()
    with pytest.raises(ValueError, match="other settings"):
        run(dataclasses.replace(config, objective=ObjectiveConfig(guidance_scale=7.0)))
    monkeypatch.setattr(ConsistencyObjective, "__call__", original)
    resumed = run(config)
    for key, tensor in load_file(whole).items():
        torch.testing.assert_close(load_file(resumed)[key], tensor, rtol=1e-3, atol=1e-5)


def test_seed_process_and_step_each_change_the_noise():
    names = [(seed, process, step) for seed in (0, 1, 2**31, 2**40) for process in (0, 1, 7) for step in (0, 1, 10**6)]
    draws = {tuple(torch.randn(4, generator=generator_of(*name)).tolist()) for name in names}
    assert len(draws) == len(names)
    torch.testing.assert_close(torch.randn(4, generator=generator_of(3, 1)), torch.randn(4, generator=generator_of(3, 1)))


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(ModelConfig(path=str(MODEL_DIR)))


def batch_for(backbone, count=3):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, 4, 16, 16, generator=generator)
    return latents, backbone.encode_prompts(["a red star"] * count), backbone.encode_prompts([""])


def test_the_teacher_is_the_same_network_bit_for_bit():
    backbone = load_backbone(ModelConfig(path=str(MODEL_DIR)))
    latents, embeds, _ = batch_for(backbone)
    t = torch.tensor([500] * 3)
    with torch.no_grad():
        before = backbone.predict(latents, t, embeds)
        parameters = backbone.add_adapter(LoraConfig(rank=2), seed=0)
        for p in parameters:
            p.add_(0.05)
        student = backbone.predict(latents, t, embeds)
        with backbone.teacher():
            assert torch.equal(backbone.predict(latents, t, embeds), before)
        assert torch.equal(backbone.predict(latents, t, embeds), student)
    assert not torch.equal(student, before)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_teachers_step_is_diffusers_ddim_with_guidance(backbone, guidance_scale):
    from diffusers import DDIMScheduler

    latents, embeds, empty = batch_for(backbone)
    ddim = DDIMScheduler.from_config(load_pipeline().scheduler.config)
    ddim.set_timesteps(50)
    n = 37
    t = torch.tensor([739] * 3)
    levels = tuple(float(v) for v in (backbone.alphas[739], backbone.sigmas[739], backbone.alphas[719], backbone.sigmas[719]))
    got = ddim_step(backbone, latents, t, embeds, empty.expand(3, -1, -1), guidance_scale, levels)
    with torch.no_grad():
        guided, unguided = (backbone.predict(latents, t, e) for e in (embeds, empty.expand(3, -1, -1)))
    expected = ddim.step(unguided + guidance_scale * (guided - unguided), n * 20 - 1, latents).prev_sample
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_jump_is_the_identity_at_the_edge_and_the_loss_vanishes_one_point_above_for_the_teacher(backbone):
    """An untrained student is the teacher: unguided, one point above an edge, student and target agree exactly."""
    latents, embeds, empty = batch_for(backbone)
    grid = PhaseGrid.even(50)  # every point is an edge
    objective = ConsistencyObjective(backbone, grid, guidance_scale=1.0, huber_c=1e-3)
    n = torch.tensor([0, 12, 50])
    assert torch.equal(objective.jump_to_edge(latents, n, n, embeds), latents)
    backbone_with_adapter = load_backbone(ModelConfig(path=str(MODEL_DIR)))
    backbone_with_adapter.add_adapter(LoraConfig(rank=2), seed=0)  # initialised to no effect
    objective = ConsistencyObjective(backbone_with_adapter, grid, guidance_scale=1.0, huber_c=1e-3)
    loss = objective(latents, embeds, empty, torch.Generator().manual_seed(0))
    assert loss.item() < 1e-6
    coarse = ConsistencyObjective(backbone_with_adapter, PhaseGrid.even(1), guidance_scale=5.0, huber_c=1e-3)
    assert coarse(latents, embeds, empty, torch.Generator().manual_seed(0)).item() > 1e-4


def test_pseudo_huber_is_a_square_below_c_and_an_absolute_value_above():
    assert pseudo_huber(torch.tensor([1e-4]), 1e-1).item() == pytest.approx(1e-8 / 2e-1, rel=0.01)
    assert pseudo_huber(torch.tensor([10.0]), 1e-3).item() == pytest.approx(10.0 - 1e-3, rel=1e-4)


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "PNG"])
def test_pictures_of_every_kind_and_shape_are_read(tmp_path, extension):
    from PIL import Image

    Image.new("RGBA", (200, 90), (255, 0, 0, 255)).convert("RGB").save(tmp_path / f"a.{extension}")
    (tmp_path / "a.txt").write_text("a red picture\n")
    found = find_images(tmp_path)
    assert [i.caption for i in found] == ["a red picture"]
    image = load_image(found[0].path, 64)
    assert image.shape == (3, 64, 64)
    assert image[0].mean() > 0.9


def test_bad_data_is_named_not_waited_for(tmp_path, pictures):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no pictures"):
        find_images(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"1 of 1.*broken\.png"):
        find_images(tmp_path)
    (tmp_path / "broken.txt").write_text("words")
    config = dataclasses.replace(config_for(pictures, tmp_path / "x.safetensors"))
    config.data = DataConfig(folder=str(tmp_path), resolution=128)
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        run(config)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lora.rnk", "8"], "lora.rnk"),
        (["--lora.rank", "many"], "lora.rank"),
        (["--objective.name", "magic"], "pcm"),
        (["--output", "adapter.bin"], "safetensors"),
        (["--objective.name", "lcm"], "one phase"),
        (["--objective.num_solver_steps", "48"], "50"),
        (["--objective.guidance_scale", "0.5"], "at least 1"),
        (["--optimizer.steps", "0"], "positive"),
    ],
)
def test_the_command_line_refuses_by_name(arguments, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code not in (0, None)
    assert says in f"{stopped.value.code} {capsys.readouterr().err}"


def test_accelerate_launches_the_script_with_the_shipped_configuration(pictures, tmp_path):
    output = tmp_path / "adapter.safetensors"
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu",
        "--num_processes", "1", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "lora_training/train.py",
        "--config", "examples/shapes/configs/pcm_4phase.yaml", "--model.path", str(MODEL_DIR),
        "--data.folder", str(pictures), "--data.cache", str(tmp_path),
        "--optimizer.steps", "2", "--optimizer.batch_size", "2", "--lora.rank", "2", "--output", str(output),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"wrote {output}" in done.stdout
    assert "loss=" in done.stderr
    assert read_settings(output).grid.num_phases == 4

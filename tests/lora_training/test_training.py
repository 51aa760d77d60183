"""The trainer on the shipped model: a few real steps, resumed, written, loaded again."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
import yaml
from accelerate import Accelerator
from diffusers import AnimateDiffPipeline, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig as PeftLoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file, save_model
from training_runs import ROOT, batch_for, config_for, launch, losses_of, stop_at, tiny_config, tiny_folder
from write_dataset import write_dataset

from lora_training.backbones import load_backbone
from lora_training.backbones.animatediff import AnimateDiff
from lora_training.backbones.conditioning import expanded
from lora_training.backbones.full_size import ADAPTED_MODULES, full_size_unet
from lora_training.backbones.sd15 import StableDiffusion15
from lora_training.checkpoint import load_checkpoint, save_checkpoint
from lora_training.config import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)
from lora_training.cpu import use_plain_attention
from lora_training.distances import build_distance, pseudo_huber
from lora_training.dry_run import dry_run
from lora_training.loop import Interrupted, Run, run
from lora_training.objectives import ConsistencyObjective, total
from lora_training.optimizers import build_optimizer
from lora_training.randomness import generator_of
from lora_training.sharding import shard_mesh
from lora_training.students import TARGET, Adapter, WholeUNet, adapted_modules
from lora_training.teacher import SOLVERS, Levels, draw_guidance, guided_prediction
from lora_training.train import parse
from lora_training.validation import draw_sheet
from pcm_scheduler import load_pcm_lora, load_pcm_unet, read_settings
from pcm_scheduler.lora_file import kohya_state_dict
from pcm_scheduler.phases import PhaseGrid

from model import MODEL_DIR, load_pipeline

TRAIN = "lora_training/train.py"
UNET_FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_dataset(folder, 8)
    return folder


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


@pytest.mark.parametrize(
    ("objective", "optimizer", "streaming"),
    [
        (ObjectiveConfig(), "adamw", False),
        (ObjectiveConfig(target_ema=0.9, progressive_phases=(8, 4)), "adamw", True),
        (ObjectiveConfig(), "prodigy", False),
    ],
)
def test_a_run_that_is_stopped_and_resumed_is_the_same_bit_for_bit(
    pictures, tmp_path, monkeypatch, objective, optimizer, streaming
):
    losses = losses_of(monkeypatch)
    whole = config_for(pictures, tmp_path / "whole.safetensors", steps=20)
    whole = dataclasses.replace(whole, objective=objective, lora=LoraConfig(rank=4, dropout=0.1))
    whole.validation = ValidationConfig(every=8, prompts=("a red star",), steps=(1,), guidance_scales=(1.0,))
    if optimizer == "prodigy":
        pytest.importorskip("prodigyopt")
        whole.optimizer = dataclasses.replace(whole.optimizer, name="prodigy", learning_rate=1.0)
    whole.data.streaming = streaming
    run(whole)
    straight = losses[:]
    losses.clear()

    config = dataclasses.replace(whole, output=str(tmp_path / "resumed.safetensors"))
    with monkeypatch.context() as patch:
        stop_at(patch, 9 + 4)  # the loss is also computed four times by a validation
        with pytest.raises(Interrupted, match="after step 10"):
            run(config)
    assert not Path(config.output).exists()
    other = dataclasses.replace(config, objective=dataclasses.replace(objective, guidance_scale=7.0))
    with pytest.raises(ValueError, match="other settings"):
        run(other)
    run(config)
    assert losses == straight
    for key, tensor in load_file(whole.output).items():
        assert torch.equal(load_file(config.output)[key], tensor), key
    assert not list(tmp_path.rglob("step-*.safetensors")), "checkpoints of a finished run"
    assert yaml.safe_load((tmp_path / "resumed.run" / "config.yaml").read_text())["lora"]["dropout"] == 0.1


def test_bad_steps_are_skipped_and_too_many_in_a_row_stop_the_run(pictures, tmp_path, monkeypatch):
    original, bad = ConsistencyObjective.losses, {1, 3}
    calls = iter(range(10**6))

    def sometimes_nan(self, *args):
        factor = float("nan") if next(calls) in bad else 1
        return {name: loss * factor for name, loss in original(self, *args).items()}

    monkeypatch.setattr(ConsistencyObjective, "losses", sometimes_nan)
    written = run(config_for(pictures, tmp_path / "some.safetensors", max_bad_steps=2))
    assert all(tensor.isfinite().all() for tensor in load_file(written).values())
    first = next(calls) + 1
    bad |= set(range(first + 1, first + 20))
    with pytest.raises(RuntimeError, match=r"3 steps in a row.*learning_rate.*step-00000001"):
        run(config_for(pictures, tmp_path / "all.safetensors", max_bad_steps=3, checkpoint_every=1))


def test_only_so_many_checkpoints_are_kept_and_a_broken_one_is_named(pictures, tmp_path, monkeypatch):
    config = config_for(pictures, tmp_path / "a.safetensors", steps=9, checkpoint_every=1, checkpoints_kept=2)
    stop_at(monkeypatch, 4)
    with pytest.raises(Interrupted):
        run(config)
    kept = sorted((tmp_path / "a.run" / "checkpoints").iterdir())
    assert [p.name for p in kept] == ["step-00000004.safetensors", "step-00000005.safetensors"]
    kept[-1].write_bytes(kept[-1].read_bytes()[:1000])
    with pytest.raises(ValueError, match="step-00000005"):
        run(config)


def test_gradients_accumulate_over_fresh_batches(pictures, tmp_path):
    config = config_for(pictures, tmp_path / "a.safetensors")
    config.optimizer = dataclasses.replace(config.optimizer, gradient_accumulation=2)
    accumulated = Run(config)
    accumulated.step(0)
    single = Run(dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, gradient_accumulation=1)))
    expected = []
    for micro in range(2):
        generator = generator_of(0, 0, 0, micro)
        batch = single.data.draw(2, generator, torch.device("cpu"))
        total(single.objectives[0].losses(*batch, single.data.empty, generator)).backward()
        expected = [p.grad for p in single.parameters.values()]
    norm = torch.cat([g.flatten() for g in expected]).norm() / 2
    for ours, summed in zip(accumulated.parameters.values(), expected, strict=True):
        torch.testing.assert_close(ours.grad, summed / 2 / norm.clamp(min=1), rtol=1e-3, atol=1e-6)


def test_a_run_goes_on_from_another_runs_adapter(pictures, tmp_path):
    first = run(config_for(pictures, tmp_path / "first.safetensors"))
    stored = {key: tensor.flatten(1).float() for key, tensor in load_file(first).items() if tensor.ndim}
    config = config_for(pictures, tmp_path / "second.safetensors")
    config.lora = LoraConfig(rank=4, alpha=8.0, init_adapter=str(first))
    started = Run(config).student
    ours = kohya_state_dict(started.state(), started.alphas())
    changes = 0
    for key in stored:
        if key.endswith("lora_down.weight") and ours[key].ndim == 2:
            up = key.replace("lora_down", "lora_up")
            theirs = 2.0 / 4 * stored[up] @ stored[key]
            torch.testing.assert_close(8.0 / 4 * ours[up] @ ours[key], theirs, rtol=1e-3, atol=1e-6)
            changes += bool(theirs.any())
    assert changes > 10
    config.lora = LoraConfig(rank=8, init_adapter=str(first))
    with pytest.raises(ValueError, match=r"lora\.rank"):
        Run(config)
    config.lora = LoraConfig(rank=4, targets="attention", init_adapter=str(first))
    with pytest.raises(ValueError, match="has modules that this adapter has not"):
        Run(config)


def test_seed_process_and_step_each_change_the_noise():
    names = [(seed, process, step) for seed in (0, 1, 2**31, 2**40) for process in (0, 1, 7) for step in (0, 1, 10**6)]
    draws = {tuple(torch.randn(4, generator=generator_of(*name)).tolist()) for name in names}
    assert len(draws) == len(names)
    torch.testing.assert_close(torch.randn(4, generator=generator_of(3, 1)), torch.randn(4, generator=generator_of(3, 1)))


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(ModelConfig(path=str(MODEL_DIR)))


def test_the_teacher_is_the_same_network_bit_for_bit():
    backbone = load_backbone(ModelConfig(path=str(MODEL_DIR)))
    latents, embeds, _ = batch_for(backbone)
    t = torch.tensor([500] * 3)
    with torch.no_grad():
        before = backbone.predict(latents, t, embeds)
        parameters = Adapter(backbone, LoraConfig(rank=2), seed=0).parameters
        for p in parameters.values():
            p.add_(0.05)
        student = backbone.predict(latents, t, embeds)
        with backbone.teacher():
            assert torch.equal(backbone.predict(latents, t, embeds), before)
        assert torch.equal(backbone.predict(latents, t, embeds), student)
    assert not torch.equal(student, before)


def test_a_role_changes_what_layers_do_as_pefts_own_switches_do_and_nothing_else():
    backbone = load_backbone(ModelConfig(path=str(MODEL_DIR)))
    unet = backbone.unet
    latents, embeds, _ = batch_for(backbone)
    adapter = Adapter(backbone, LoraConfig(rank=2), seed=0, averaged=True)

    def predicted():
        with torch.no_grad():
            return backbone.predict(latents, torch.tensor([500] * 3), embeds)

    def trained():
        return {name for name, p in unet.named_parameters() if p.requires_grad}

    for number, parameters in enumerate((adapter.parameters, adapter.target_parameters)):
        for p in parameters.values():
            p.data += 0.03 * (1 + number)
    before, flags = predicted(), trained()
    with backbone.teacher():
        teacher = predicted()
        assert trained() == flags
    with backbone.target():
        target = predicted()
        assert trained() == flags
    assert torch.equal(predicted(), before)
    assert trained() == flags
    unet.disable_adapters()
    assert torch.equal(predicted(), teacher)
    unet.enable_adapters()
    unet.set_adapter(TARGET)
    assert torch.equal(predicted(), target)
    assert not torch.equal(target, before)


def levels_of(backbone, grid):
    stops = torch.tensor(grid.timesteps)
    return Levels(stops, backbone.alphas[stops].float(), backbone.sigmas[stops].float())


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_teachers_step_is_diffusers_ddim_with_guidance(backbone, guidance_scale):
    latents, told, empty = batch_for(backbone)
    scheduler = DDIMScheduler.from_config(load_pipeline().scheduler.config)
    scheduler.set_timesteps(50)
    n, levels = 37, levels_of(backbone, PhaseGrid.even(1))
    teacher = guided_prediction(backbone, levels, told, expanded(empty, 3), torch.full((3,), guidance_scale))
    got = SOLVERS["ddim"](teacher, levels, latents, torch.tensor([n] * 3), torch.tensor([n - 1] * 3))
    t = torch.tensor([n * 20 - 1] * 3)
    with torch.no_grad():
        guided, unguided = (backbone.predict(latents, t, c) for c in (told, expanded(empty, 3)))
    expected = scheduler.step(unguided + guidance_scale * (guided - unguided), n * 20 - 1, latents).prev_sample
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_guidance_may_differ_between_the_samples_of_a_batch(backbone):
    latents, told, empty = batch_for(backbone)
    levels, n = levels_of(backbone, PhaseGrid.even(1)), torch.tensor([20, 30, 40])

    def predicted(scales):
        return guided_prediction(backbone, levels, told, expanded(empty, 3), torch.tensor(scales))(latents, n)

    mixed = predicted([1.0, 3.0, 7.0])
    for i, scale in enumerate((1.0, 3.0, 7.0)):
        torch.testing.assert_close(mixed[i], predicted([scale] * 3)[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_solvers_converge_at_their_order_on_an_ode_with_a_known_solution(name, order):
    """Gaussian data N(mu, s^2): x_t's PF-ODE is solved by keeping (x - alpha mu) / sqrt(alpha^2 s^2 + sigma^2)."""
    alphas_cumprod = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod.double()
    mu, spread = 0.7, 0.4

    def error(points):
        stops = torch.linspace(200, 800, points + 1).round().long()
        levels = Levels(stops, alphas_cumprod[stops].sqrt(), (1 - alphas_cumprod[stops]).sqrt())
        width = (levels.alphas**2 * spread**2 + levels.sigmas**2).sqrt()

        def teacher(x, n):
            alpha, sigma = levels(n)
            return mu + alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * (x - alpha * mu)

        # one step from the true path at every point: what training asks of a solver
        n = torch.arange(1, points)  # the top has no point above, where dpmpp_2m is ddim
        on_path = lambda k: (levels.alphas[k] * mu + 1.3 * width[k]).view(-1, 1, 1, 1)  # noqa: E731
        got = SOLVERS[name](teacher, levels, on_path(n), n, n - 1)
        return (got - on_path(n - 1)).abs().max().item()

    # a step's own error falls by 2^(order + 1) when the steps are halved
    assert error(10) / error(20) > 0.8 * 2 ** (order + 1)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("least", [0.0, 2.0**-24], ids=["zero", "clipped"])
def test_solvers_step_down_from_a_point_without_signal(name, least):
    """As above, from the top of a schedule with zero terminal SNR, or of one that clips it; of second order in alpha below."""
    alphas_cumprod = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True
    ).alphas_cumprod
    alphas_cumprod[-1] = least
    stops = torch.tensor(PhaseGrid.even(1).timesteps)
    levels, mu, spread = Levels(stops, alphas_cumprod[stops].sqrt(), (1 - alphas_cumprod[stops]).sqrt()), 0.7, 0.4

    def width(n):
        alpha, sigma = levels(n)
        return (alpha**2 * spread**2 + sigma**2).sqrt()

    def teacher(x, n):
        alpha, _ = levels(n)
        return mu + alpha * spread**2 / width(n) ** 2 * (x - alpha * mu)

    n = torch.tensor([50])
    on_path = lambda n: levels(n)[0] * mu + 1.3 * width(n)  # noqa: E731
    got = SOLVERS[name](teacher, levels, on_path(n), n, n - 1)
    torch.testing.assert_close(got, on_path(n - 1), rtol=0, atol=levels.alphas[49].item() ** 2)


def test_the_jump_is_the_identity_at_the_edge_and_the_loss_vanishes_one_point_above_for_the_teacher(backbone):
    """An untrained student is the teacher: unguided, one point above an edge, student and target agree exactly."""
    latents, told, empty = batch_for(backbone)
    grid = PhaseGrid.even(50)  # every point is an edge
    unguided = ObjectiveConfig(num_phases=50, guidance_scale=1.0)
    objective = ConsistencyObjective(backbone, grid, unguided)
    n = torch.tensor([0, 12, 50])
    assert torch.equal(objective.jump_to(latents, n, n, told), latents)
    with_adapter = load_backbone(ModelConfig(path=str(MODEL_DIR)))
    Adapter(with_adapter, LoraConfig(rank=2), seed=0)  # initialised to no effect
    # a solver that would skip edges stops at them
    for config in (unguided, dataclasses.replace(unguided, solver_skip=7)):
        assert loss_of(ConsistencyObjective(with_adapter, grid, config), latents, told, empty) < 1e-6
    coarse = ConsistencyObjective(with_adapter, PhaseGrid.even(1), ObjectiveConfig(num_phases=1, guidance_scale=5.0))
    assert loss_of(coarse, latents, told, empty) > 1e-4


def loss_of(objective, latents, told, empty):
    return total(objective.losses(latents, told, empty, torch.Generator().manual_seed(0))).item()


def test_guidance_is_drawn_from_its_range(backbone):
    objective = ConsistencyObjective(backbone, PhaseGrid.even(4), ObjectiveConfig(guidance_scale=(2.0, 6.0)))
    drawn = draw_guidance(objective.config, 1000, torch.Generator().manual_seed(0))
    assert 2 <= drawn.min() < 2.1
    assert 5.9 < drawn.max() <= 6


def test_the_averaged_target_lags_behind_the_student():
    backbone = load_backbone(ModelConfig(path=str(MODEL_DIR)))
    latents, told, _ = batch_for(backbone)
    t = torch.tensor([500] * 3)
    student_adapter = Adapter(backbone, LoraConfig(rank=2), seed=0, averaged=True)
    parameters = student_adapter.parameters
    with torch.no_grad():
        teacher = backbone.predict(latents, t, told)
        for p in parameters.values():
            p.add_(0.05)
        student = backbone.predict(latents, t, told)
        with backbone.target():
            assert torch.equal(backbone.predict(latents, t, told), teacher)
        student_adapter.update_target(0.0)
        with backbone.target():
            torch.testing.assert_close(backbone.predict(latents, t, told), student)
    assert all(p.requires_grad for p in parameters.values())
    assert len(student_adapter.state()) == len(parameters)


def test_lpips_sees_pictures_and_reaches_the_latents(backbone, tmp_path):
    """Its own network with random weights, from a file: zero for equal points, with a gradient for others."""
    lpips = pytest.importorskip("lpips")
    path = tmp_path / "lpips.safetensors"
    save_model(lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False), path)
    measure = build_distance(ObjectiveConfig(distance="lpips", lpips_weights=str(path)), backbone)
    one = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    other, alpha = (one + 0.1).requires_grad_(), torch.full((1, 1, 1, 1), 0.9)
    assert measure(one, one, alpha) == 0
    distance = measure(other, one, alpha)
    distance.backward()
    assert distance != 0  # with random weights it has either sign
    assert other.grad.abs().max() > 0
    unet = str(MODEL_DIR / "unet" / UNET_FILE)
    for weights, error, says in (("", FileNotFoundError, "lpips_weights"), (unet, ValueError, "not the state of")):
        with pytest.raises(error, match=says):
            build_distance(ObjectiveConfig(distance="lpips", lpips_weights=weights), backbone)


def test_dora_trains_and_its_file_loads_exactly(pictures, tmp_path):
    config = config_for(pictures, tmp_path / "dora.safetensors", steps=2)
    config.lora.dora = True
    trained = Run(config)
    output = trained.train()
    unet = trained.backbone.unet.eval()
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 40, 160)
    pipe = load_pipeline()
    load_pcm_lora(pipe, output)
    with torch.no_grad():
        torch.testing.assert_close(pipe.unet(*inputs).sample, unet(*inputs).sample, atol=2e-3, rtol=0)  # a file in fp16
    again = config_for(pictures, tmp_path / "again.safetensors", steps=1)
    again.lora = dataclasses.replace(config.lora, init_adapter=str(output))
    assert run(again).is_file()


def test_a_checkpoint_keeps_the_scale_of_fp16_losses(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))  # it is made at its first use
    save_checkpoint(tmp_path / "c.safetensors", {"p": parameter}, optimizer, 1, scaler=scaler)
    other = torch.amp.GradScaler("cpu")
    assert load_checkpoint(tmp_path / "c.safetensors", {"p": parameter}, optimizer, scaler=other) == 1
    assert other.get_scale() == 64.0


def test_a_pushed_adapter_takes_its_card_and_nothing_else_along(pictures, tmp_path, monkeypatch):
    sent = []

    class Hub:
        def create_repo(self, repo, **how):
            assert how["private"]
            return f"hub/{repo}"

        def upload_file(self, path_or_fileobj, **how):
            sent.append(Path(path_or_fileobj).name)

        def upload_folder(self, folder_path, allow_patterns, **how):
            names = [str(p.relative_to(folder_path)) for p in folder_path.rglob("*")]
            sent.extend(filter_repo_objects(names, allow_patterns=allow_patterns))

    monkeypatch.setattr("lora_training.hub.HfApi", Hub)
    monkeypatch.setattr("lora_training.hub.get_token", lambda: "hf_token")
    run(config_for(pictures, tmp_path / "a.safetensors", steps=1, push_to_hub="me/mine"))
    assert sorted(sent) == ["README.md", "a.safetensors", "samples/step-00000001.png"]


def test_an_upload_that_fails_says_that_the_adapter_is_finished(pictures, tmp_path, monkeypatch):
    class Hub:
        def create_repo(self, repo, **how):
            raise OSError("no route to host")

    monkeypatch.setattr("lora_training.hub.HfApi", Hub)
    monkeypatch.setattr("lora_training.hub.get_token", lambda: "hf_token")
    output = tmp_path / "a.safetensors"
    with pytest.raises(RuntimeError, match=r"is finished, and only its upload failed: no route(.|\n)*hf upload me/mine"):
        run(config_for(pictures, output, steps=1, push_to_hub="me/mine"))
    assert output.is_file()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"push_to_hub": "a/b/c"}, "push_to_hub"),
        ({"push_to_hub": "me/mine"}, "hf auth login"),
        ({"optimizer.name": "prodigy", "optimizer.learning_rate": 1.0}, "optimizer.name"),
        ({"lora.init_adapter": "nowhere.safetensors"}, "lora.init_adapter: there is no file"),
        ({"lora.targets": ("to_qq",)}, "lora.targets"),
        ({"objective.distance": "lpips"}, "objective.lpips_weights"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_pictures_are_encoded(pictures, tmp_path, monkeypatch, settings, says):
    monkeypatch.setattr("lora_training.hub.get_token", lambda: None)
    monkeypatch.setattr("lora_training.optimizers.find_spec", lambda name: None if name == "prodigyopt" else name)
    config = config_for(pictures, tmp_path / "a.safetensors", steps=1)
    for name, value in settings.items():
        group, _, last = name.rpartition(".")
        setattr(getattr(config, group) if group else config, last, value)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        run(config)
    assert not list(tmp_path.rglob("shard-*"))


def test_an_optimiser_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("lora_training.optimizers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        build_optimizer(OptimizerConfig(name="adamw8bit"), [torch.nn.Parameter(torch.zeros(1))])


def test_a_whole_unet_begins_from_what_was_loaded_and_not_from_its_teachers_rounding():
    backbone = load_backbone(ModelConfig(path=str(MODEL_DIR)))
    loaded = {name: p.detach().clone() for name, p in backbone.unet.named_parameters()}
    student = WholeUNet(backbone, averaged=True, teacher_dtype=torch.bfloat16)
    for parameters in (student.parameters, student.target_parameters):
        assert all(torch.equal(p, loaded[name]) for name, p in parameters.items())
    with backbone.teacher():
        assert all(torch.equal(p, loaded[name].bfloat16()) for name, p in backbone.unet.named_parameters())


def test_adapters_are_in_single_precision_over_a_half_precision_network():
    backbone = load_backbone(ModelConfig(path=str(MODEL_DIR)))
    backbone.unet.to(torch.bfloat16)
    adapter = Adapter(backbone, LoraConfig(rank=2), seed=0, averaged=True)
    parameters = adapter.parameters
    assert {p.dtype for p in (*parameters.values(), *adapter.target_parameters.values())} == {torch.float32}
    adapter.update_target(decay=0.5)
    told = {"prompt_embeds": torch.zeros(2, 40, 160)}
    with torch.autocast("cpu", torch.bfloat16):
        backbone.predict(torch.zeros(2, 4, 16, 16), torch.tensor([999, 1]), told).square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters.values())


def test_pseudo_huber_is_a_square_below_c_and_an_absolute_value_above():
    assert pseudo_huber(torch.tensor([1e-4]), 1e-1).item() == pytest.approx(1e-8 / 2e-1, rel=0.01)
    assert pseudo_huber(torch.tensor([10.0]), 1e-3).item() == pytest.approx(10.0 - 1e-3, rel=1e-4)


def test_bad_data_is_named_left_out_or_stops_the_run(tmp_path, capsys):
    folder = tmp_path / "pictures"
    write_dataset(folder, 3)
    (folder / "broken.png").write_bytes(b"nothing")
    config = config_for(folder, tmp_path / "x.safetensors", steps=1)
    with pytest.raises(ValueError, match=r"(?s)1 of 4.*broken\.png has no caption.*max_bad_share"):
        run(config)
    (folder / "broken.txt").write_text("words")
    with pytest.raises(ValueError, match=r"(?s)1 of 4.*broken\.png cannot be read.*max_bad_share"):
        run(config)
    config.data.max_bad_share = 0.5
    assert run(config).is_file()
    assert "broken.png" in capsys.readouterr().err


def test_validation_shows_pictures_and_figures_while_the_run_goes_on(pictures, tmp_path):
    config = config_for(pictures, tmp_path / "a.safetensors")
    config.validation = ValidationConfig(
        every=2, prompts=("a red star", "a blue ring"), steps=(1, 2), guidance_scales=(1.0, 3.0)
    )
    run(config)
    folder = tmp_path / "a.run"
    sheets = sorted((folder / "samples").iterdir())
    assert [p.name for p in sheets] == ["step-00000002.png", "step-00000004.png"]
    assert Image.open(sheets[0]).size == (120 + 2 * 132, 4 * 132)
    rows = (folder / "validation.csv").read_text().splitlines()
    assert rows[0] == "step,validation_loss,consistency"
    assert len(rows) == 3
    assert 0 < float(rows[2].split(",")[1]) < 1
    card = (folder / "README.md").read_text()
    assert 'load_pcm_lora(pipe, "a.safetensors")' in card
    assert "0, 239, 499, 739, 999" in card


def test_tensorboard_sees_the_loss(pictures, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(config_for(pictures, tmp_path / "a.safetensors", log_with="tensorboard"))
    events = EventAccumulator(str(next((tmp_path / "a.run").rglob("events.out.*")).parent)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [0, 1, 2, 3]
    known = {"lr", "loss/consistency", "grad_norm", "validation_loss", "consistency"}
    assert known <= set(events.Tags()["scalars"])
    told = yaml.safe_load(next((tmp_path / "a.run").rglob("hparams.yml")).read_text(encoding="utf-8"))
    assert (told["lora.rank"], told["optimizer.learning_rate"]) == (4, 1e-3)


def test_what_the_critic_says_is_logged_beside_the_objective(tmp_path, monkeypatch):
    """The sum of both hides what either does: the critic's is about 2, and the objective's a hundredth of that."""
    seen = []
    monkeypatch.setattr(Accelerator, "log", lambda self, figures, step: seen.append(figures))
    critic = {"adversarial.weight": 0.1, "adversarial.cadence": "alternate", "adversarial.heads": 1, "adversarial.width": 8}
    run(tiny_config(tiny_folder(tmp_path), tmp_path / "a.safetensors", **critic))
    for step, figures in enumerate(seen[:6]):
        own = "loss/adversarial" if step % 2 else "loss/critic"
        parts = {name for name in figures if name.startswith("loss/")}
        assert parts == {"loss/consistency", own}
        assert figures["loss"] == pytest.approx(sum(figures[name] for name in parts))
        assert figures["grad_norm"] > 0


def test_validation_leaves_the_run_as_it_was(tmp_path):
    """The same weights with and without looking, and the same figures at every look."""
    folder, dropout = tiny_folder(tmp_path), {"lora.dropout": 0.5}
    quiet = load_file(run(tiny_config(folder, tmp_path / "quiet.safetensors", **dropout)))
    watched = load_file(run(tiny_config(folder, tmp_path / "watched.safetensors", **dropout, **{"validation.every": 1})))
    for key, tensor in watched.items():
        assert torch.equal(tensor, quiet[key]), key
    trained = Run(tiny_config(folder, tmp_path / "again.safetensors", **dropout))
    trained.step(0)
    trained.validate(1)
    trained.validate(2)
    _, first, second = (tmp_path / "again.run" / "validation.csv").read_text().splitlines()
    assert first.split(",")[1:] == second.split(",")[1:]


def test_validation_samples_as_the_model_is_said_to_predict(tmp_path):
    """The same pictures from a model that does not say that it predicts v and one that does."""
    pipe = tiny_models.image_pipeline()
    pipe.save_pretrained(tmp_path / "silent")
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    pipe.save_pretrained(tmp_path / "outspoken")
    asked = PhaseGrid.even(2), ValidationConfig(steps=(2,), guidance_scales=(1.0,)), ["a cat"], (4, 8, 8), 0.0, 1
    silent, outspoken = (
        draw_sheet(load_backbone(ModelConfig(path=str(tmp_path / name), prediction_type=prediction_type)), *asked)
        for name, prediction_type in (("silent", "v_prediction"), ("outspoken", None))
    )
    assert torch.equal(silent.latents, outspoken.latents)


@pytest.mark.parametrize("video", [False, True], ids=["pictures", "clips"])
def test_validation_draws_no_more_at_once_than_it_is_told_and_the_same(video, monkeypatch):
    """Also where noise is drawn on the way."""
    if video:
        scheduler = DDIMScheduler(**tiny_models.BETAS, clip_sample=False, steps_offset=1)
        pipe = AnimateDiffPipeline(**tiny_models.motion_parts(), scheduler=scheduler)
        family, shape = AnimateDiff, (4, 2, 8, 8)
    else:
        pipe, family, shape = tiny_models.image_pipeline(), StableDiffusion15, (4, 8, 8)
    backbone, sizes, original = family(pipe), [], family.sample_latents
    monkeypatch.setattr(
        family, "sample_latents", lambda self, noise, **call: sizes.append(len(noise)) or original(self, noise, **call)
    )
    config = ValidationConfig(steps=(2,), guidance_scales=(3.0,))
    together, apart = (
        draw_sheet(backbone, PhaseGrid.even(2), config, ["a cat", "a dog", "an owl"], shape, 1.0, at_once).latents
        for at_once in (3, 2)
    )
    assert sizes == [3, 2, 1]
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-3 * together.abs().max().item())


def test_validation_takes_a_network_in_half_precision(tmp_path, monkeypatch):
    """As a GPU's: on the CPU a run leaves the frozen weights in float32."""
    trained = Run(tiny_config(tiny_folder(tmp_path), tmp_path / "a.safetensors"))
    trained.backbone.unet.to(torch.bfloat16)
    monkeypatch.setattr(trained.accelerator, "autocast", lambda: torch.autocast("cpu", torch.bfloat16))
    trained.validate(1)
    _, row = (tmp_path / "a.run" / "validation.csv").read_text().splitlines()
    assert float(row.split(",")[1]) > 0


def test_words_are_encoded_by_the_text_encoder_with_what_is_merged_into_it(tmp_path):
    """Beside a cache of the model alone, which must not be taken for it."""
    folder, lora = tiny_folder(tmp_path), tmp_path / "style.safetensors"
    drawn = torch.Generator().manual_seed(0)
    attention = ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", 64), (
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 32,
    )  # fmt: skip
    shapes = {f"{name}.lora_{k}.weight": shape for name, w in attention for k, shape in (("A", (2, w)), ("B", (w, 2)))}
    save_file({name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()}, lora)
    plain, styled = (
        Run(tiny_config(folder, tmp_path / "a.safetensors", **settings)).data.buckets[16, 16].rows(range(8))
        for settings in ({}, {"model.teacher_loras": f"[{lora}]"})
    )
    assert torch.equal(plain["latent_means"], styled["latent_means"])
    assert not torch.equal(plain["conditioning/prompt_embeds"], styled["conditioning/prompt_embeds"])


def test_one_picture_is_enough(tmp_path):
    write_dataset(tmp_path / "one", 1)
    assert run(config_for(tmp_path / "one", tmp_path / "x.safetensors", steps=1)).is_file()


def test_sdxl_trains_and_its_file_loads_exactly(tmp_path):
    """Two text encoders, pooled embeddings, micro-conditioning; the student after loading is the student before saving."""
    tiny_models.sdxl_pipeline().save_pretrained(tmp_path / "model")
    write_dataset(tmp_path / "data", 4)
    config = config_for(tmp_path / "data", tmp_path / "adapter.safetensors", steps=2)
    config.model = ModelConfig(path=str(tmp_path / "model"), family="sdxl")
    config.data.resolution = 32
    trained = Run(config)
    rows = trained.data.buckets[32, 32].rows(range(4))
    torch.testing.assert_close(rows["conditioning/time_ids"], torch.tensor([[128.0, 128, 0, 0, 32, 32]] * 4))
    assert not trained.data.empty["pooled_prompt_embeds"].any(), "SDXL's pipeline uses zeros for an empty prompt"
    output = trained.train()
    assert read_settings(output).base_model == "sdxl"

    latents, told = trained.data.draw(2, torch.Generator().manual_seed(0), torch.device("cpu"))
    t = torch.tensor([500, 999])
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "model")
    load_pcm_lora(pipe, output)
    with torch.no_grad():
        ours = trained.backbone.predict(latents, t, told)
        added = {"text_embeds": told["pooled_prompt_embeds"], "time_ids": told["time_ids"]}
        theirs = pipe.unet(latents, t, told["prompt_embeds"], added_cond_kwargs=added).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)  # stored in fp16


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_a_model_of_which_only_fp16_files_were_downloaded_is_read(tmp_path, variant):
    pipe = tiny_models.image_pipeline()
    pipe.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    read = load_backbone(ModelConfig(path=str(tmp_path), variant=variant))
    for name, p in read.unet.named_parameters():
        assert torch.equal(p, pipe.unet.get_parameter(name).float()), name


def test_a_model_of_another_family_is_refused(tmp_path):
    tiny_models.sdxl_pipeline().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sdxl"):
        load_backbone(ModelConfig(path=str(tmp_path), family="sd15"))
    with pytest.raises(ValueError, match="does not exist"):
        load_backbone(ModelConfig(path="nowhere.safetensors"))


@pytest.mark.parametrize(("family", "millions"), [("sd15", 67), ("sdxl", 197), ("animatediff", 101)])
def test_adapters_of_full_sized_networks_have_the_published_sizes(family, millions):
    """The true configurations without their weights: which modules are adapted, and how large the published files are."""
    with torch.device("meta"):
        unet = full_size_unet(family)
        adapter = PeftLoraConfig(r=64, lora_alpha=64, target_modules=adapted_modules(unet, LoraConfig()))
        unet.add_adapter(adapter, adapter_name="student")
    state = get_peft_model_state_dict(unet, adapter_name="student")
    modules = ADAPTED_MODULES[family]
    assert len(state) == 2 * modules
    assert round(sum(tensor.numel() for tensor in state.values()) / 1e6) == millions
    names = {key.removesuffix(".weight").rpartition(".")[0] for key in state}
    assert len(kohya_state_dict(state, dict.fromkeys(names, 64.0))) == 3 * modules


def test_a_dry_run_says_what_would_happen_and_writes_nothing(pictures, tmp_path, capsys):
    dry_run(Run(config_for(pictures, tmp_path / "adapter.safetensors", steps=1000)))
    said = capsys.readouterr().out
    for words in ("8 captioned", "128 x 128", "0, 239, 499, 739, 999", "999, 739, 499, 239", "1000 steps of 2", "one step"):
        assert words in said, said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lora.rnk", "8"], "Did you mean lora.rank"),
        (["--optimizer.learnign_rate", "8"], "Did you mean optimizer.learning_rate"),
        (["--lora.rank", "many"], "lora.rank"),
        (["--objective.name", "magic"], "pcm"),
        (["--output", "adapter.bin"], "safetensors"),
        (["--objective.name", "lcm"], "one phase"),
        (["--objective.num_solver_steps", "48"], "50"),
        (["--objective.guidance_scale", "0.5"], "at least 1"),
        (["--objective.guidance_scale", "[6.0,2.0]"], "at least 1"),
        (["--objective.progressive_phases", "[8,2]"], "must end at"),
        (["--objective.phase_edges", "[999,499]"], "of 2 phases"),
        (["--objective.phase_edges", "[999,740,499,239]"], "nearest are"),
        (["--objective.phase_edges", "[999,739,499,239]", "--objective.progressive_phases", "[8,4]"], "leave one out"),
        (["--lora.dropout", "2"], "between 0 and 1"),
        (["--lora.targets", "everything"], "attention"),
        (["--optimizer.steps", "0"], "positive"),
        (["--sampling.num_inference_steps", "0"], "between 1 and objective.num_solver_steps=50; got 0"),
        (["--sampling.num_inference_steps", "51"], "between 1 and objective.num_solver_steps=50; got 51"),
        (["--sampling.guidance_scale", "-1"], "between 0 and 1e+06; got -1"),
        (["--objective.guidance_scale", "2e6"], "at most 1e+06"),
    ],
)
def test_the_command_line_refuses_by_name(arguments, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code not in (0, None)
    assert says in f"{stopped.value.code} {capsys.readouterr().err}"


def test_a_misspelt_key_in_the_file_is_named_with_the_right_one(tmp_path, capsys):
    (tmp_path / "my.yaml").write_text("objective:\n  num_phase: 8\n")
    with pytest.raises(SystemExit):
        parse(["--config", str(tmp_path / "my.yaml")])
    assert "Did you mean objective.num_phases" in capsys.readouterr().err


def shapes_arguments(pictures, output, **settings):
    given = {
        "config": "examples/configs/shapes_pcm4.yaml", "model.path": MODEL_DIR, "data.path": pictures,
        "data.cache": pictures / "cache", "optimizer.steps": 2, "optimizer.batch_size": 2, "lora.rank": 2,
        "mixed_precision": "no", "validation.steps": "[1]", "validation.guidance_scales": "[1.0]", "output": output,
        "objective.trajectories_kept": 2,
    } | settings  # fmt: skip
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def test_accelerate_launches_the_script_with_the_shipped_configuration(pictures, tmp_path):
    output = tmp_path / "adapter.safetensors"
    done = launch(TRAIN, *shapes_arguments(pictures, output))
    assert f"wrote {output}" in done.stdout
    assert "loss=" in done.stderr
    assert read_settings(output).grid.num_phases == 4


WITHOUT_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="of machines without a GPU")


@pytest.mark.parametrize("use_cpu", ["true", pytest.param("false", marks=WITHOUT_GPU)])
def test_two_processes_train_one_adapter_on_different_samples(pictures, tmp_path, use_cpu):
    two, one = tmp_path / "two.safetensors", tmp_path / "one.safetensors"
    two_processes = "examples/accelerate/two_processes_cpu.yaml"
    arguments = shapes_arguments(pictures, two)
    done = launch(TRAIN, *arguments, config_file=two_processes, num_processes=2, ACCELERATE_USE_CPU=use_cpu)
    assert done.stdout.count("wrote") == 1
    run(parse(shapes_arguments(pictures, one)))
    pairs = [(tensor, load_file(one)[key]) for key, tensor in load_file(two).items()]
    assert any(not torch.equal(a, b) for a, b in pairs), "the second process added nothing"
    assert all(a.isfinite().all() for a, _ in pairs)


def test_fsdp_is_refused_where_torch_has_none(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setattr(torch.cpu, "Stream", object)
    with pytest.raises(ValueError, match=r"no FSDP on a CPU\. Take a newer torch, a GPU, or examples/accelerate"):
        shard_mesh(SimpleNamespace(num_processes=2, device=torch.device("cpu")))


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch has no FSDP on a CPU")
@pytest.mark.parametrize("trainable", ["lora", "unet"])
def test_fsdp_goes_on_from_a_checkpoint_as_processes_with_whole_networks_do(pictures, tmp_path, trainable):
    """Where weights are kept changes no number: same checkpoint, two more steps, same file."""
    overrides = {
        "trainable": trainable, "objective.target_ema": 0.5, "optimizer.steps": 4, "optimizer.warmup_steps": 0,
        "optimizer.learning_rate": 1e-3, "checkpoint_every": 3,
    }  # fmt: skip
    begun = Run(parse(shapes_arguments(pictures, tmp_path / "begun.safetensors", **overrides)))
    start = {name: p.detach().clone() for name, p in begun.parameters.items()}
    for step in range(2):
        begun.step(step)
    state = (begun.parameters, begun.optimizer.optimizer, 2, begun.student.target_parameters)
    begun.checkpoints.save(*state)
    files = {}
    for name in ("two_processes_cpu", "fsdp"):
        files[name] = tmp_path / f"{name}.safetensors"
        shutil.copytree(begun.checkpoints.folder, files[name].with_suffix(".run") / "checkpoints")
        arguments = shapes_arguments(pictures, files[name], **overrides)
        done = launch(TRAIN, *arguments, config_file=f"examples/accelerate/{name}.yaml", num_processes=2)
        assert ("split between 2 processes" in done.stdout) == (name == "fsdp")
        assert done.stdout.count("wrote") == 1
    whole, split = (load_file(path) for path in files.values())
    assert whole.keys() == split.keys()
    if trainable == "lora":  # of an adapter, the half that starts at zero
        moved = {key: tensor.float() for key, tensor in whole.items() if key.endswith("lora_up.weight")}
    else:
        moved = {key: tensor.float() - start[key] for key, tensor in whole.items()}
    apart = torch.cat([(split[key].float() - whole[key].float()).flatten() for key in moved]).norm()
    assert apart < 0.05 * torch.cat([tensor.flatten() for tensor in moved.values()]).norm()


def test_the_whole_unet_is_trained_beside_its_teacher_and_its_file_loads(pictures, tmp_path):
    config = config_for(pictures, tmp_path / "unet.safetensors", trainable="unet")
    config.optimizer.learning_rate = 1e-4
    trained = Run(config)
    frozen = load_backbone(ModelConfig(path=str(MODEL_DIR)))
    use_plain_attention(frozen.unet)  # as a run on the CPU does
    output = trained.train()
    latents, told, _ = batch_for(frozen)
    t = torch.tensor([500] * 3)
    with torch.no_grad(), trained.backbone.teacher():
        assert torch.equal(trained.backbone.predict(latents, t, told), frozen.predict(latents, t, told))
    with torch.no_grad():
        student = trained.backbone.predict(latents, t, told)
    assert not torch.allclose(student, frozen.predict(latents, t, told), atol=1e-3)

    settings = read_settings(output)
    assert settings.grid.num_phases == 4
    pipe = load_pipeline()
    load_pcm_unet(pipe, output)
    assert pipe.scheduler.config.phase_edges == list(settings.phase_edges)
    with torch.no_grad():
        loaded = pipe.unet(latents, t, told["prompt_embeds"]).sample
    torch.testing.assert_close(loaded, student, atol=2e-2, rtol=0)  # a file in fp16
    assert "load_pcm_unet" in (tmp_path / "unet.run" / "README.md").read_text()
    with pytest.raises(ValueError, match="load_pcm_lora"):
        load_pcm_unet(pipe, MODEL_DIR.parent / "adapters" / "pcm_4phase.safetensors")
    offloaded = load_pipeline()
    offloaded.unet.to("meta")  # where sequential offloading keeps it
    with pytest.raises(ValueError, match="before enable_sequential_cpu_offload"):
        load_pcm_unet(offloaded, output)
    with pytest.raises(ValueError, match="LoRA"):
        load_pcm_lora(pipe, output)


def test_a_whole_unet_resumes_bit_for_bit_with_its_running_average(pictures, tmp_path):
    def config(name):
        made = config_for(pictures, tmp_path / f"{name}.safetensors", steps=4, trainable="unet", checkpoint_every=2)
        made.objective.target_ema = 0.9
        return made

    straight = load_file(run(config("straight")))
    halves = Run(config("halves"))
    for step in range(2):
        halves.step(step)
    halves.checkpoints.save(halves.parameters, halves.optimizer.optimizer, 2, halves.student.target_parameters)
    resumed = load_file(run(config("halves")))
    assert all(torch.equal(resumed[key], tensor) for key, tensor in straight.items())


def stopped_in_the_middle(how, pictures, tmp_path):
    """A long run by this command, asked to stop once it trains; its command's exit status."""
    output = tmp_path / "adapter.safetensors"
    command = [sys.executable, *how, str(TRAIN), *shapes_arguments(pictures, output, **{"optimizer.steps": 10000})]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = ""
    while "loss=" not in log:
        log += process.stderr.read(1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)  # until all that write there have ended
    assert "run the same command to go on" in said
    assert list((tmp_path / "adapter.run" / "checkpoints").glob("step-*.safetensors"))
    return process.returncode


def test_sigterm_saves_and_exits_with_0(pictures, tmp_path):
    assert stopped_in_the_middle([], pictures, tmp_path) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="a process is told of its parent's end on Linux alone")
def test_a_run_ends_well_when_its_launcher_is_asked_to(pictures, tmp_path):
    """accelerate's launcher of one process hands no signal on; the run would go on beside the one that is started next."""
    how = ["--cpu", "--num_machines", "1", "--num_processes", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    stopped_in_the_middle(["-m", "accelerate.commands.accelerate_cli", "launch", *how], pictures, tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("checkpoints_kept", -1, "checkpoints_kept must be 0 or more"),
        ("validation.steps", "[]", "name at least one of each"),
        ("validation.guidance_scales", "[]", "name at least one of each"),
        ("validation.seed", -1, "validation.seed must be 0 or more"),
        ("optimizer.warmup_steps", -5, "optimizer.warmup_steps must be 0 or more"),
        ("objective.huber_c", -1, "objective.huber_c must be positive"),
        ("optimizer.name", "prodigy", "set that to 1; got 5e-06"),
        ("objective.target_ema", 1, "objective.target_ema must be less than 1"),
        ("lora.dropout", 1, "lora.dropout must be less than 1"),
        ("seed", 2**32, "seed must be from 0 to"),
    ],
)
def test_settings_that_would_fail_or_do_nothing_late_are_refused_at_once(name, value, says):
    with pytest.raises(SystemExit, match=re.escape(says)):
        parse([f"--{name}", str(value)])


def test_a_run_that_would_write_among_its_own_pictures_is_refused(tmp_path, monkeypatch):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    monkeypatch.chdir(pictures)
    for output, folder in ((pictures / "a.safetensors", pictures), ("new/a.safetensors", "."), ("a.safetensors", tmp_path)):
        with pytest.raises(ValueError, match=r"output .*a\.safetensors lies within data\.path .*Write it beside that folder"):
            TrainConfig(model=ModelConfig(path="m", family="sd15"), data=DataConfig(path=str(folder)), output=str(output))
    for output in (tmp_path / "a.safetensors", "../pictures-lora.safetensors"):
        TrainConfig(model=ModelConfig(path="m", family="sd15"), data=DataConfig(path=str(pictures)), output=str(output))


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_configuration_is_accepted(path):
    config = parse(["--config", str(path)])
    assert config.grids(1000)[-1].num_phases == config.objective.num_phases


def test_compiled_blocks_have_room_for_all_their_variants(pictures, tmp_path, monkeypatch):
    """Three widths, each as teacher, student and target: torch by itself stops compiling after eight."""
    pipe = tiny_models.image_pipeline()
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3}
    widths = {"block_out_channels": (16, 32, 48), "attention_head_dim": 2, "sample_size": 8}
    pipe.register_modules(unet=UNet2DConditionModel(**{**tiny_models.BLOCKS, **blocks, **widths}))
    pipe.save_pretrained(tmp_path / "model")
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled(self, backend="eager", **options))
    config = config_for(pictures, tmp_path / "a.safetensors", compile=True)
    config.model, config.data.cache = ModelConfig(path=str(tmp_path / "model")), str(tmp_path / "cache")
    run = Run(config)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run.step(0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 9


def test_what_cannot_be_compiled_is_refused_before_pictures_are_encoded(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_training.loop.shard_mesh", lambda _: object())
    config = config_for(pictures, tmp_path / "a.safetensors", compile=True)
    config.data.cache = str(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"compile: .*FSDP"):
        Run(config)
    assert not (tmp_path / "cache").exists()

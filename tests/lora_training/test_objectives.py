"""What tells the objectives apart, and the critic beside them, on the shipped model."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_model
from training_runs import batch_for, config_for, losses_of, stop_at
from write_dataset import write_dataset

from lora_training.backbones import load_backbone
from lora_training.backbones.conditioning import expanded
from lora_training.config import AdversarialConfig, LoraConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from lora_training.critic_features import cropped, draw_corners, draw_level, implied_x0, probed, renoised
from lora_training.discriminator import AdversarialLoss, hinge
from lora_training.dry_run import describe
from lora_training.loop import Interrupted, Run, run
from lora_training.objectives import (
    KINDS,
    ConsistencyObjective,
    discretization,
    sampling_eta,
    target_decay,
    to_any_point,
    total,
)
from lora_training.phase_edges import teacher_curvature
from lora_training.students import Adapter, WholeUNet
from lora_training.teacher import guided_prediction
from pcm_scheduler.curvature import edges_by_curvature
from pcm_scheduler.lora_file import read_settings
from pcm_scheduler.noise_schedule import predict_x0_and_epsilon
from pcm_scheduler.phases import PhaseGrid
from pcm_scheduler.sampling import jump

from model import MODEL_DIR

FORM_MAPS = f"{Path(__file__).parent.parent.parent / 'examples' / 'shapes' / 'agreement.py'}:form_maps"
IN_PIXELS = AdversarialConfig(weight=0.5, space="pixel", network="factory", factory=FORM_MAPS, crop=6, heads=1, width=8)


def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def backbone():
    """A student that is still the teacher."""
    loaded = load_backbone(ModelConfig(path=str(MODEL_DIR)))
    Adapter(loaded, LoraConfig(rank=2), seed=0)
    return loaded


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_dataset(folder, 8)
    return folder


def test_direct_meets_the_teachers_own_solution(backbone):
    """Each sample's target is what DDIM on the solver's grid, one sample alone, comes to at its edge."""
    latents, told, empty = batch_for(backbone)
    config = ObjectiveConfig(name="direct", num_phases=5, num_solver_steps=10, guidance_scale=3.0)
    objective = ConsistencyObjective(backbone, PhaseGrid.even(5, 10), config)
    landing = objective.land(latents, told, empty, generator())
    draws = generator()
    n = torch.randint(1, 11, (len(latents),), generator=draws)
    noise = torch.randn(latents.shape, generator=draws)
    teacher = guided_prediction(
        backbone, objective.levels, told, expanded(empty, len(latents)), torch.full((len(latents),), 3.0)
    )
    assert torch.equal(landing.stop, objective.grid.target(n))
    for i in range(len(latents)):
        alpha, sigma = objective.levels(n)
        sample = alpha * latents + sigma * noise
        for point in range(int(n[i]), int(landing.stop[i]), -1):
            here, below = torch.full_like(n, point), torch.full_like(n, point - 1)
            sample = jump(sample, teacher(sample, here), *objective.levels(here), *objective.levels(below))
        torch.testing.assert_close(landing.target[i], sample[i], rtol=0, atol=2e-5)


def test_consistency_training_descends_along_the_same_noise(backbone):
    """Where every point is an edge, the target is the identity there: x_0 with the noise it began with, and no teacher."""
    latents, told, empty = batch_for(backbone)
    config = ObjectiveConfig(name="ct", num_phases=50, guidance_scale=1.0)
    objective = ConsistencyObjective(backbone, PhaseGrid.even(50), config)
    landing = objective.land(latents, told, empty, generator(), progress=1.0)
    draws = generator()
    n = torch.randint(1, 51, (len(latents),), generator=draws)
    alpha, sigma = objective.levels(n - 1)
    expected = alpha * latents + sigma * torch.randn(latents.shape, generator=draws)
    assert torch.equal(landing.target, expected)


def test_the_schedules_of_consistency_training():
    """N(k) from s_0 to N without falling; mu(k) towards 1, from mu_0 where N(k) = s_0 (arXiv 2303.01469, Appendix C)."""
    config = ObjectiveConfig(name="ct", num_phases=1, guidance_scale=1.0, target_ema=0.9)
    counts = [discretization(config, k / 100) for k in range(101)]
    assert (counts[0], counts[-1]) == (2, 50)
    assert counts == sorted(counts)
    assert target_decay(config, 0.0) == pytest.approx(0.9)
    assert target_decay(config, 1.0) == pytest.approx(math.exp(2 * math.log(0.9) / 50))
    assert target_decay(dataclasses.replace(config, name="pcm"), 0.5) == 0.9
    assert target_decay(dataclasses.replace(config, target_ema=0.0), 0.5) == 0.0


def test_a_trajectory_stops_anywhere_on_the_way(backbone):
    latents, told, empty = batch_for(backbone)
    objective = ConsistencyObjective(backbone, PhaseGrid.even(2), ObjectiveConfig(name="ctm", num_phases=2, guidance_scale=1.0))
    begun = objective.land(latents, told, empty, generator())
    assert begun.landed.shape == begun.target.shape == latents.shape
    edge, below = torch.zeros(4000, dtype=torch.long), torch.full((4000,), 9)
    stops = to_any_point(edge, below, generator())
    counts = torch.bincount(stops, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 300  # of 400 expected; the deviation is 19


def test_adapters_of_one_phase_are_sampled_as_their_papers_do():
    etas = {name: sampling_eta(ObjectiveConfig(name=name, num_phases=1, guidance_scale=1.0)) for name in KINDS}
    assert etas == {"pcm": 0.0, "lcm": 1.0, "ctm": 0.0, "direct": 1.0, "ct": 1.0}
    assert sampling_eta(ObjectiveConfig(name="direct", num_phases=4)) == 0.0


@pytest.mark.parametrize("name", ["ctm", "direct", "ct"])
def test_every_objective_trains_and_writes(pictures, tmp_path, name):
    config = config_for(pictures, tmp_path / "a.safetensors", steps=2)
    guidance = 1.0 if name == "ct" else 3.0
    config.objective = ObjectiveConfig(name=name, num_phases=1, num_solver_steps=10, guidance_scale=guidance, target_ema=0.5)
    written = load_file(run(config))
    assert all(tensor.isfinite().all() for tensor in written.values())


def test_edges_may_be_anywhere_and_the_teachers_bend_proposes_some(pictures, tmp_path):
    """Shares of a bend that sums to the whole; what is proposed trains, and the file says so."""
    config = config_for(pictures, tmp_path / "a.safetensors", steps=1)
    config.objective = ObjectiveConfig(num_phases=3, num_solver_steps=25, guidance_scale=3.0)
    trainer = Run(config)
    curvature = teacher_curvature(trainer, samples=2)
    assert len(curvature) == 250
    assert (curvature >= 0).all()
    of_sample = teacher_curvature(trainer, samples=2, of="sample")
    below = list(PhaseGrid.even(1, 250).timesteps)[:-1]
    far = (trainer.backbone.sigmas / trainer.backbone.alphas)[below].double().cpu()
    torch.testing.assert_close(of_sample, curvature * far, rtol=1e-3, atol=1e-5)
    edges = edges_by_curvature(curvature, 3, 25).edges
    config.objective = dataclasses.replace(config.objective, phase_edges=edges[1:])
    assert read_settings(run(config)).phase_edges == edges


# ---------------------------------------------------------------------------------------------------- the critic


def test_noise_is_added_as_the_forward_process_adds_it(backbone):
    """From x_s of a known picture the variance at r is that of x_r drawn at once."""
    objective = ConsistencyObjective(backbone, PhaseGrid.even(4), ObjectiveConfig())
    stop, level = torch.tensor([12]), torch.tensor([20])
    (alpha, sigma), (next_alpha, next_sigma) = objective.levels(stop), objective.levels(level)
    x0, first, second = torch.full((1, 1, 200, 200), 3.0), *torch.randn(2, 1, 1, 200, 200, generator=generator())
    moved = renoised(alpha * x0 + sigma * first, objective, stop, level, second)
    assert moved.mean().item() == pytest.approx(3 * next_alpha.item(), abs=0.03)  # 5 deviations of the mean of 40000
    assert moved.std().item() == pytest.approx(next_sigma.item(), rel=0.02)
    assert torch.equal(renoised(x0, objective, stop, stop, second), x0)


def test_the_critic_looks_within_the_phase(backbone):
    objective = ConsistencyObjective(backbone, PhaseGrid.even(4), ObjectiveConfig())
    stop = torch.tensor([0, 12, 25, 37, 20]).repeat(500)
    level = draw_level(stop, objective, generator())
    top = torch.tensor([12, 25, 37, 50, 25]).repeat(500)
    assert (level >= stop).all()
    assert (level <= top).all()
    assert (level == top).any()


def test_a_critic_that_knows_nothing_loses_2():
    assert hinge(torch.zeros(3, 5), torch.zeros(3, 5)).item() == 2


@pytest.mark.parametrize("student", ["lora", "unet"])
def test_the_students_gradient_is_that_of_the_critics_judgement(student):
    """Beside a pass in which all flows back at once, through a teacher of its own."""
    backbone, judge = (load_backbone(ModelConfig(path=str(MODEL_DIR))) for _ in range(2))
    trained = Adapter(backbone, LoraConfig(rank=2), seed=0) if student == "lora" else WholeUNet(backbone)
    for p in trained.parameters.values():
        p.data += 0.01 * torch.randn(p.shape, generator=generator())
    latents, told, empty = batch_for(backbone)
    objective = ConsistencyObjective(backbone, PhaseGrid.even(4), ObjectiveConfig(guidance_scale=1.0))
    adversarial = AdversarialLoss(backbone, AdversarialConfig(weight=0.5, heads=1, width=8), seed=0, resolution=128)
    landing = objective.land(latents, told, empty, generator())
    draws = generator()
    total(adversarial(landing, objective, told, draws)).backward()
    ours = {name: p.grad.clone() for name, p in trained.parameters.items() if p.grad is not None}
    assert all(p.grad is not None for p in adversarial.parameters.values())

    for p in trained.parameters.values():
        p.grad = None
    draws = generator()
    landing = objective.land(latents, told, empty, generator())
    level = draw_level(landing.stop, objective, draws)
    noise = torch.randn(latents.shape, generator=draws)
    shown = renoised(landing.landed, objective, landing.stop, level, noise)
    adversarial.features.backbone = judge  # the same weights, and no adapter
    (-0.5 * adversarial.critic(adversarial.features.read(shown, objective.levels.timesteps[level], told)).mean()).backward()
    for name, gradient in ours.items():
        expected = trained.parameters[name].grad
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_a_landings_picture_is_the_students_own_prediction(backbone):
    """In every phase; and a target at the same point has the same picture, though it came from elsewhere."""
    latents, told, empty = batch_for(backbone, count=8)
    objective = ConsistencyObjective(backbone, PhaseGrid.even(4), ObjectiveConfig(guidance_scale=1.0))
    with torch.no_grad():
        landing = objective.land(latents, told, empty, generator())
        output = backbone.predict(landing.sample, objective.levels.timesteps[landing.n], told)
    predicted, _ = predict_x0_and_epsilon(output, landing.sample, *objective.levels(landing.n), backbone.prediction_type)
    assert len(landing.stop.unique()) == 4
    torch.testing.assert_close(implied_x0(landing.landed, landing, objective), predicted, rtol=0, atol=1e-3)
    for settings in ({"network": "pyramid", "factory": ""}, {}):
        seen = AdversarialLoss(backbone, dataclasses.replace(IN_PIXELS, **settings), seed=0, resolution=128).features
        met = dataclasses.replace(landing, target=landing.landed)
        for features in seen(met.landed, met, objective, told, generator()):
            ours, theirs = features.chunk(2)
            assert torch.equal(ours, theirs)
        apart = seen(landing.landed, landing, objective, told, generator())
        assert not any(torch.equal(*features.chunk(2)) for features in apart)


def test_squares_are_cut_everywhere_and_hold_what_was_there():
    latents = torch.arange(300 * 4 * 5 * 9.0).view(300, 4, 5, 9)
    corners = draw_corners(latents.shape, 3, generator())
    assert {top for top, _ in corners} == {0, 1, 2}
    assert {left for _, left in corners} == set(range(7))
    cut = cropped(latents, 3, corners)
    for i, (top, left) in enumerate(corners):
        assert torch.equal(cut[i], latents[i, :, top : top + 3, left : left + 3])
    assert cropped(latents, 7, draw_corners(latents.shape, 7, generator())).shape == (300, 4, 5, 7)
    assert torch.equal(cropped(latents, 0, draw_corners(latents.shape, 0, generator())), latents)


@pytest.mark.parametrize("settings", [{}, {"network": "pyramid", "factory": "", "crop": 0}], ids=["factory", "pyramid"])
def test_the_students_gradient_through_pictures(settings):
    """Beside a pass in which all flows back at once; nothing else than the student and the critic is moved by it."""
    backbone = load_backbone(ModelConfig(path=str(MODEL_DIR)))
    frozen = [*backbone.vae.parameters(), *backbone.unet.parameters()]
    trained = Adapter(backbone, LoraConfig(rank=2, targets=("to_q", "conv1")), seed=0)
    for p in trained.parameters.values():
        p.data += 0.01 * torch.randn(p.shape, generator=generator())
    latents, told, empty = batch_for(backbone, count=2)
    objective = ConsistencyObjective(backbone, PhaseGrid.even(4), ObjectiveConfig(guidance_scale=1.0))
    config = dataclasses.replace(IN_PIXELS, cadence="alternate", **settings)
    adversarial = AdversarialLoss(backbone, config, seed=0, resolution=128)
    adversarial.step = 1
    total(adversarial(objective.land(latents, told, empty, generator()), objective, told, generator())).backward()
    ours = {name: p.grad.clone() for name, p in trained.parameters.items()}
    assert all(p.grad is None for p in adversarial.parameters.values())  # it is told, and does not learn

    for p in trained.parameters.values():
        p.grad = None
    landing = objective.land(latents, told, empty, generator())
    corners = draw_corners(latents.shape, config.crop, generator())
    seen = cropped(implied_x0(landing.landed, landing, objective), config.crop, corners)
    pictures = backbone.vae.decode(seen / backbone.vae.config.scaling_factor).sample
    for p in adversarial.parameters.values():
        p.requires_grad_(False)
    (-0.5 * adversarial.critic(adversarial.features.network(pictures)).mean()).backward()
    for name, gradient in ours.items():
        expected = trained.parameters[name].grad
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert max(gradient.abs().max() for gradient in ours.values()) > 0

    for p in adversarial.parameters.values():
        p.requires_grad_(True)
    for p in trained.parameters.values():
        p.grad = None
    adversarial.step = 2  # the critic learns, and the student is not told
    loss = total(adversarial(objective.land(latents, told, empty, generator()), objective, told, generator()))
    loss.backward()
    assert loss.item() == pytest.approx(2, abs=1)
    assert all(p.grad is None for p in trained.parameters.values())
    assert all(p.grad is not None for p in adversarial.parameters.values())
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_a_critic_sees_by_vggs_maps(backbone, tmp_path):
    lpips = pytest.importorskip("lpips")
    path = tmp_path / "lpips.safetensors"
    save_model(lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False), path)
    config = dataclasses.replace(IN_PIXELS, network="vgg", factory="", path=str(path), crop=4)
    adversarial = AdversarialLoss(backbone, config, seed=0, resolution=128)
    assert adversarial.features.channels == [64, 128, 256, 512, 512]
    assert len(adversarial.features.frozen) == 2  # the VAE, VGG


@pytest.mark.parametrize(
    "adversarial",
    [
        AdversarialConfig(weight=0.1, learning_rate=1e-3, critic_every=2, heads=1, width=8),
        dataclasses.replace(IN_PIXELS, learning_rate=1e-3, cadence="alternate"),
    ],
    ids=["latent", "pixel"],
)
def test_a_run_with_a_critic_resumes_bit_for_bit_and_both_learn(adversarial, pictures, tmp_path, monkeypatch):
    losses = losses_of(monkeypatch)
    config = config_for(pictures, tmp_path / "whole.safetensors", steps=6)
    config.adversarial = adversarial
    run(config)
    straight = losses[:]
    losses.clear()
    resumed = dataclasses.replace(config, output=str(tmp_path / "resumed.safetensors"))
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Interrupted):
            run(resumed)
    run(resumed)
    assert losses == straight
    for key, tensor in load_file(config.output).items():
        assert torch.equal(load_file(resumed.output)[key], tensor), key

    whole = Run(dataclasses.replace(config, output=str(tmp_path / "b.safetensors")))
    before = {name: p.detach().clone() for name, p in whole.critic.parameters.items()}
    whole.step(1)  # not the critic's turn
    assert all(torch.equal(p, before[name]) for name, p in whole.critic.parameters.items())
    whole.step(2)
    moved = [not torch.equal(p, before[name]) for name, p in whole.critic.parameters.items()]
    assert sum(moved) > 0.9 * len(moved)
    counts = [sum(p.numel() for p in part.parameters.values()) / 1e6 for part in (whole.student, whole.critic)]
    said = {line.split()[0]: line for line in describe(whole)}
    assert f"{counts[0]:.2f} M parameters" in said["trained"]
    assert f"in {adversarial.space}s" in said["critic"]
    assert f"{counts[1]:.2f} M parameters" in said["critic"]
    assert ("GiB of VAE" in said["memory"]) == (adversarial.space == "pixel")


def test_what_a_critic_does_not_go_with_is_refused(pictures, tmp_path):
    config = config_for(pictures, tmp_path / "a.safetensors")
    config.adversarial = AdversarialConfig(weight=0.1)
    config.optimizer = OptimizerConfig(name="prodigy", learning_rate=1.0)
    pytest.importorskip("prodigyopt")
    with pytest.raises(ValueError, match="critic wants its own"):
        Run(config)
    with pytest.raises(ValueError, match="multiple of 8"):
        dataclasses.replace(config, adversarial=AdversarialConfig(width=12))
    with pytest.raises(ValueError, match="no teacher to guide"):
        dataclasses.replace(config, objective=ObjectiveConfig(name="ct", guidance_scale=5.0))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"crop": 8}, "adversarial.space to pixel"),
        ({"space": "pixel", "network": "factory"}, "go together"),
        ({"space": "pixel", "factory": FORM_MAPS}, "go together"),
        ({"space": "pixel", "path": "vgg.safetensors"}, "no weights to read"),
        ({"space": "pixel", "crop": -1}, "number of latents"),
        ({"cadence": "alternate", "critic_every": 2}, "critic_every at 1"),
    ],
)
def test_settings_of_a_critic_that_contradict_each_other_are_refused(settings, says, pictures, tmp_path):
    with pytest.raises(ValueError, match=says):
        config_for(pictures, tmp_path / "a.safetensors", adversarial=AdversarialConfig(weight=0.1, **settings))


def test_a_network_that_cannot_judge_is_refused_before_pictures_are_encoded(pictures, tmp_path):
    config = config_for(pictures, tmp_path / "a.safetensors")
    config.data.cache = str(tmp_path / "cache")
    config.adversarial = AdversarialConfig(weight=0.1, space="pixel", network="vgg", path="nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match=r"adversarial.path.*'nowhere.safetensors'.*Nothing is downloaded"):
        Run(config)
    assert not list(tmp_path.iterdir())
    blind = torch.no_grad()(torch.clone)
    refused = (
        (lambda pictures: pictures.mean(dim=(2, 3)), r"gives \(1, 3\)"),
        (lambda pictures: [None], "gives NoneType"),
        (lambda pictures: [], "gives none"),
        (torch.nn.Conv2d(3, 8, 64), "32 x 32 pixels it fails"),
        (blind, "stops them"),
    )
    for network, says in refused:
        with pytest.raises(ValueError, match=says):
            probed(network, 32, torch.device("cpu"))

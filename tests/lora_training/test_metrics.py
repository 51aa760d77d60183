"""Metrics against closed forms and reference libraries; networks are tiny, with random weights, written by the test."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_model
from scipy.linalg import sqrtm
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from lora_training.distances import load_lpips
from lora_training.evaluation.distribution import Moments, frechet_distance, kernel_distance, precision_recall
from lora_training.evaluation.response import guidance_response, negative_prompt_response, saturation
from lora_training.evaluation.similarity import consistency, diversity, perceptual_distance
from lora_training.evaluation.trajectory import END, ode_errors, student_states, teacher_states
from lora_training.randomness import generator_of
from lora_training.teacher import Levels
from pcm_scheduler.noise_schedule import alphas_and_sigmas, make_alphas_cumprod, make_betas
from pcm_scheduler.phases import PhaseGrid


def draws(*shape, stream=0):
    return torch.randn(*shape, generator=generator_of(stream), dtype=torch.float64)


class Flattened(nn.Module):
    """Pictures as their own features, for torchmetrics."""

    def __init__(self, width):
        super().__init__()
        self.num_features = width

    def forward(self, pictures):
        return pictures.flatten(1)


# ---------------------------------------------------------------------------------------------- distributions


def moments(mean, covariance, count=100):
    return Moments(count, torch.tensor(mean).double(), torch.tensor(covariance).double() * (count - 1))


def test_frechet_distance_of_known_gaussians():
    first = moments([0.0, 0.0], [[1.0, 0.0], [0.0, 4.0]])
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(first, moments([3.0, 4.0], [[1.0, 0.0], [0.0, 4.0]])) == pytest.approx(25)
    # of diagonal covariances: the squared differences of the deviations, (3 - 1)^2 + (5 - 2)^2
    assert frechet_distance(first, moments([0.0, 0.0], [[9.0, 0.0], [0.0, 25.0]])) == pytest.approx(13)


def test_frechet_distance_of_covariances_that_do_not_commute():
    a, b = draws(200, 6), draws(150, 6, stream=1) @ draws(6, 6, stream=2)
    first, second = Moments.of([a]), Moments.of([b])
    root = torch.from_numpy(sqrtm((first.covariance @ second.covariance).numpy()).real)
    expected = (first.mean - second.mean).square().sum() + (first.covariance + second.covariance - 2 * root).trace()
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_agrees_with_torchmetrics():
    a, b = draws(64, 3, 2, 2), 0.5 + 2 * draws(48, 3, 2, 2, stream=1)
    metric = FrechetInceptionDistance(feature=Flattened(12)).set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    ours = frechet_distance(Moments.of([a.flatten(1)]), Moments.of([b.flatten(1)]))
    assert ours == pytest.approx(metric.compute().item(), rel=1e-6)


def test_moments_do_not_depend_on_the_batches_nor_on_the_mean():
    features = draws(100, 5) + 1e6
    whole, parts = Moments.of([features]), Moments.of(features.split([1, 40, 59]))
    torch.testing.assert_close(parts.mean, features.mean(0))
    torch.testing.assert_close(parts.covariance, torch.cov(features.T), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(parts.covariance, whole.covariance, rtol=1e-7, atol=1e-9)
    assert parts.count == 100
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(Moments.of([features[:1]]), whole)
    with pytest.raises(ValueError, match="no batch"):
        Moments.of([])


def test_kernel_distance_agrees_with_torchmetrics():
    a, b = draws(50, 3, 2, 2), 0.3 + draws(50, 3, 2, 2, stream=1)
    metric = KernelInceptionDistance(feature=Flattened(12), subsets=1, subset_size=50)
    metric.update(a, real=True)
    metric.update(b, real=False)
    ours = kernel_distance(a.flatten(1), b.flatten(1), subsets=1, subset_size=50)
    assert ours.mean == pytest.approx(metric.compute()[0].item(), rel=1e-5)
    assert ours.deviation == 0


def test_kernel_distance_is_unbiased_about_zero():
    a, b = draws(4000, 8), draws(4000, 8, stream=1)
    same = kernel_distance(a, b, subsets=40, subset_size=200)
    assert abs(same.mean) < 3 * same.deviation / 40**0.5  # three standard errors
    assert same == kernel_distance(a, b, subsets=40, subset_size=200)
    assert kernel_distance(a, b + 1, subsets=5, subset_size=200).mean > 1
    with pytest.raises(ValueError, match=r"between 2 and 4000.*got 5000"):
        kernel_distance(a, b, subset_size=5000)


def test_precision_and_recall_in_constructed_cases():
    real = torch.arange(10.0)[:, None]
    assert precision_recall(real, real, neighbours=1) == (1, 1)
    assert precision_recall(real, real + 100, neighbours=1) == (0, 0)
    # half of the pictures look like real ones, and cover the first five of the ten
    half = torch.cat([torch.arange(5.0), 1000 + 100 * torch.arange(5.0)])[:, None]
    assert precision_recall(real, half, neighbours=1) == (0.5, 0.6)  # 5 is one from 4, as 4's neighbour is
    # all in one place: they are all like real ones, but with radii of 0.01 they reach only the one they are at
    collapsed = 3 + 0.01 * torch.arange(10.0)[:, None]
    assert precision_recall(real, collapsed, neighbours=1) == (1, 0.1)
    with pytest.raises(ValueError, match=r"between 1 and 9.*got 10"):
        precision_recall(real, half, neighbours=10)


def test_precision_and_recall_agree_with_the_definition():
    real, generated, k = draws(40, 3), draws(30, 3, stream=1) * 1.5, 3

    def within(points, members):
        radii = [sorted((m - other).norm().item() for other in members)[k] for m in members]
        return sum(any((p - m).norm() <= r for m, r in zip(members, radii, strict=True)) for p in points) / len(points)

    assert precision_recall(real, generated, k) == pytest.approx((within(generated, real), within(real, generated)))


# ---------------------------------------------------------------------------------------------- similarity


def mean_colour(pictures):
    return pictures.mean((2, 3))


def plain(*colours):
    return torch.tensor(colours)[:, :, None, None].expand(-1, 3, 4, 4)


def test_consistency_is_the_cosine_of_pairs():
    red, green = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)
    first, second = [plain(red, red), plain(green)], [plain(red, green), plain(green)]
    assert consistency(mean_colour, first, first) == pytest.approx(1)
    assert consistency(mean_colour, first, second) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="shorter"):
        consistency(mean_colour, first, second[:1])


def test_diversity_is_within_a_prompt():
    red, green = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)
    assert diversity(mean_colour, [plain(red, red), plain(green, green)]) == pytest.approx(0)
    assert diversity(mean_colour, [plain(red, red, green), plain(red, green)]) == pytest.approx((2 / 3 + 1) / 2)
    with pytest.raises(ValueError, match="at least 2"):
        diversity(mean_colour, [plain(red)])


def test_lpips_from_a_file(tmp_path):
    lpips = pytest.importorskip("lpips")
    path = tmp_path / "lpips.safetensors"
    reference = lpips.LPIPS(net="squeeze", pretrained=False, pnet_rand=True, verbose=False)
    save_model(reference, path)
    network = load_lpips(str(path), "similarity.lpips_weights", net="squeeze")
    first, second = (draws(3, 3, 64, 64, stream=i).float().clamp(-1, 1) for i in range(2))
    assert perceptual_distance(network, [first], [first]) == 0
    with torch.no_grad():
        expected = reference(first, second).mean().item()
    assert perceptual_distance(network, first.split(2), second.split(2)) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(FileNotFoundError, match=r"similarity.lpips_weights.*'nowhere.safetensors'.*Nothing is downloaded"):
        load_lpips("nowhere.safetensors", "similarity.lpips_weights")


# ---------------------------------------------------------------------------------------------- trajectories

ALPHAS, SIGMAS = alphas_and_sigmas(make_alphas_cumprod(make_betas("scaled_linear", 0.00085, 0.012, 1000)))
MEAN = 0.7


def levels_of(grid):
    timesteps = torch.tensor(grid.timesteps)
    return Levels(timesteps, ALPHAS[timesteps], SIGMAS[timesteps])


def gaussian_teacher(levels, spread):
    """E[x_0 | x_n] for data from N(MEAN, spread^2)."""

    def predict(sample, n):
        alpha, sigma = levels(n)
        return MEAN + alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * (sample - alpha * MEAN)

    return predict


def ideal_student(grid, spread):
    """The x_0 whose jump lands on that Gaussian's ODE at the edge below; in the last phase at its end."""
    levels = levels_of(grid)

    def predict(sample, n):
        alpha, sigma = levels(n)
        next_alpha, next_sigma = levels(grid.target(n))
        ratio, end = sigma / alpha, torch.where((grid.target(n) > 0).view(-1, 1, 1, 1), next_sigma / next_alpha, 0)
        z = sample / alpha
        # along the ODE (x / alpha - MEAN) / sqrt(spread^2 + (sigma / alpha)^2) stays what it is
        landed = MEAN + (z - MEAN) * ((spread**2 + end**2) / (spread**2 + ratio**2)).sqrt()
        return z - ratio * (z - landed) / (ratio - end)

    return predict


def errors(student, steps, spread, teacher_steps=100, solver="heun"):
    grid = PhaseGrid.even(4)
    fine = PhaseGrid.from_timesteps(grid.edges[1:], teacher_steps)
    noise = draws(5, 2, 2, 2)
    teacher = teacher_states(gaussian_teacher(levels_of(fine), spread), levels_of(fine), noise, fine, solver)
    return ode_errors(student_states(student, levels_of(grid), noise, grid, steps), teacher)


@pytest.mark.parametrize("steps", [1, 3, 4, 7, 16])
def test_ode_error_of_a_point_is_zero(steps):
    """All data at one point: eps is constant along the ODE, so that every solver is exact, teacher's and student's."""
    grid = PhaseGrid.even(4)
    found = errors(gaussian_teacher(levels_of(grid), spread=0), steps, spread=0)
    assert {t for t in found if t != END} == {grid.timesteps[n] for n in grid.stops(steps)[1:] if n in grid.edge_indices}
    for error in found.values():
        assert error.shape == (5,)
        assert error.max() < 1e-12


def test_ode_error_of_the_teacher_on_its_own_points_is_exactly_zero():
    grid = PhaseGrid.even(4)
    found = errors(gaussian_teacher(levels_of(grid), spread=0.5), steps=50, spread=0.5, teacher_steps=50, solver="ddim")
    assert all((found[edge] == 0).all() for edge in grid.edges[1:-1])


def test_ode_error_of_the_ideal_student_is_the_solvers_own():
    """Second order: four times less for twice the points; at the end the last jump, from tau_0, is the same for all."""
    grid = PhaseGrid.even(4)
    coarse, fine = (errors(ideal_student(grid, 0.5), 4, 0.5, teacher_steps) for teacher_steps in (250, 500))
    for edge in grid.edges[1:-1]:
        assert fine[edge].max() < 1e-4
        assert coarse[edge].mean() / fine[edge].mean() == pytest.approx(4, rel=0.1)
    assert fine[END].max() < 2e-3


def test_ode_error_of_few_steps_falls_with_their_number():
    teacher = gaussian_teacher(levels_of(PhaseGrid.even(4)), 0.5)
    ends = [errors(teacher, steps, 0.5)[END].mean() for steps in (1, 4, 16)]
    assert ends[0] > 2 * ends[1] > 4 * ends[2] > 0


def test_ode_error_wants_the_students_edges():
    with pytest.raises(ValueError, match=r"no state at the student's edges \[239\]"):
        ode_errors({239: draws(1, 2), END: draws(1, 2)}, {END: draws(1, 2)})


# ---------------------------------------------------------------------------------------------- response


def test_saturation_is_that_of_hue_saturation_value():
    pictures = plain((1.0, -1.0, -1.0), (0.3, 0.3, 0.3), (-1.0, -1.0, -1.0), (1.0, 0.0, 0.0))
    torch.testing.assert_close(saturation(pictures), torch.tensor([1.0, 0.0, 0.0, 0.5]))
    half = torch.cat([pictures[:1], pictures[1:2]], dim=3)
    torch.testing.assert_close(saturation(half), torch.tensor([0.5]))


def test_guidance_response():
    """A generator that draws g / 10 of the colour, and a scorer that sees how many letters the prompt has."""

    def generate(prompts, negative_prompts, guidance_scale):
        assert list(negative_prompts) == [""] * len(prompts)
        return plain(*[(1.0, 1 - guidance_scale / 5, 1 - guidance_scale / 5)] * len(prompts))

    def scorer(pictures, texts):
        return torch.tensor([float(len(text)) for text in texts]) - pictures[:, 1, 0, 0]

    found = guidance_response(generate, scorer, [["ab", "abcd"], ["abc"]], (1, 5, 10))
    assert [row.guidance_scale for row in found] == [1, 5, 10]
    assert [row.saturation for row in found] == pytest.approx([0.1, 0.5, 1.0])
    assert [row.alignment for row in found] == pytest.approx([3 - 0.8, 3.0, 3 + 1.0])


def test_negative_prompt_response():
    """Red is drawn where it is asked for and not denied; every denial of "stubborn" fails."""

    def generate(prompts, negative_prompts, guidance_scale):
        kept = ["red" in p and (n != "red" or "stubborn" in p) for p, n in zip(prompts, negative_prompts, strict=True)]
        return plain(*[(1.0, -1.0, -1.0) if red else (-1.0, -1.0, 1.0) for red in kept])

    def scorer(pictures, texts):
        assert set(texts) == {"red"}
        return (pictures[:, 0, 0, 0] > 0).float()

    batches = [[("a red star", "red"), ("a blue star", "red")], [("a red ring", "red"), ("a stubborn red ring", "red")]]
    assert negative_prompt_response(generate, scorer, batches, guidance_scale=5.0) == (0.75, 0.25)
    with pytest.raises(ValueError, match="above 1"):
        negative_prompt_response(generate, scorer, batches, guidance_scale=1.0)

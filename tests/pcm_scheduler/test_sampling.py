"""The loop against an analytic teacher, in both coordinates; no network, no tolerance for luck."""

from __future__ import annotations

import gaussian_mixture as gmm
import pytest
import torch

from pcm_scheduler.noise_schedule import (
    PREDICTION_TYPES,
    alphas_and_sigmas,
    make_alphas_cumprod,
    make_betas,
    make_output,
    predict_x0_and_epsilon,
)
from pcm_scheduler.phases import PhaseGrid
from pcm_scheduler.sampling import jump, sample_phased

ALPHAS, SIGMAS = alphas_and_sigmas(make_alphas_cumprod(make_betas("scaled_linear", 0.00085, 0.012, 1000)))


def levels(grid: PhaseGrid, steps: int, coordinates: str, final: tuple[float, float] = (1.0, 0.0)):
    stops = list(grid.sampling_timesteps(steps))
    alphas, sigmas = [*ALPHAS[stops].tolist(), final[0]], [*SIGMAS[stops].tolist(), final[1]]
    if coordinates == "variance exploding":
        return [1.0] * len(alphas), [s / a for a, s in zip(alphas, sigmas, strict=True)]
    return alphas, sigmas


def ideal_denoiser(grid, steps, alphas, sigmas, prediction_type):
    """The ideal phase map as a network of the given type: it knows the edge below each stop, nothing of the next stop."""
    targets = grid.timestep(grid.target(torch.tensor(grid.stops(steps)))).tolist()
    edges = [0.0 if t == 0 else (SIGMAS[t] / ALPHAS[t]).item() for t in targets]  # phase 0 is solved to the end

    def denoiser(x, i):
        a, s = alphas[i], sigmas[i]
        eps = gmm.ideal_phase_epsilon(x / a, s / a, edges[i])
        output = make_output((x - s * eps) / a, eps, a, s, prediction_type)
        return predict_x0_and_epsilon(output, x, a, s, prediction_type)[0]

    return denoiser


def trajectory_error(grid, steps, coordinates, prediction_type="epsilon"):
    """Largest distance, over all stops and the end, from the ODE through the same starting points (in x_0's units)."""
    alphas, sigmas = levels(grid, steps, coordinates)
    x = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x * (sigmas[0] ** 2 + alphas[0] ** 2) ** 0.5
    visited = []
    end = sample_phased(
        ideal_denoiser(grid, steps, alphas, sigmas, prediction_type), x, alphas, sigmas,
        callback=lambda i, sample, x0: visited.append(sample),
    )  # fmt: skip
    truth, error = x / alphas[0], 0.0
    for i, state in enumerate([*visited, end][1:]):
        truth = gmm.solve(truth, sigmas[i] / alphas[i], sigmas[i + 1] / alphas[i + 1])
        error = max(error, (state / alphas[i + 1] - truth).abs().max().item())
    return error


@pytest.mark.parametrize("coordinates", ["variance preserving", "variance exploding"])
@pytest.mark.parametrize("phases", [1, 2, 4, 5, 8, 10])
def test_as_many_steps_as_phases_land_on_the_ode(phases, coordinates):
    assert trajectory_error(PhaseGrid.even(phases), phases, coordinates) < 1e-5


@pytest.mark.parametrize("coordinates", ["variance preserving", "variance exploding"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_prediction_type_lands_on_the_ode(prediction_type, coordinates):
    assert trajectory_error(PhaseGrid.even(4), 4, coordinates, prediction_type) < 1e-5


def test_stops_inside_a_phase_are_first_order(record_property, capsys):
    """K > M is not exact; the error is shown, and it must fall as the phases get shorter."""
    errors = {m: trajectory_error(PhaseGrid.even(m), 2 * m, "variance preserving") for m in (1, 2, 5, 10, 25)}
    for m, error in errors.items():
        record_property(f"error of {2 * m} steps on {m} phases", error)
    with capsys.disabled():
        print("\nerror of K = 2M steps: " + ", ".join(f"M={m}: {error:.1e}" for m, error in errors.items()))
    assert errors[1] > 1e-3, "if this were exact, the rule about edges would not matter"
    assert errors[25] < errors[5] / 3 < errors[1] / 3


def test_both_coordinates_make_the_same_picture_with_noise_too():
    grid = PhaseGrid.even(4)
    ends = []
    for coordinates in ("variance preserving", "variance exploding"):
        alphas, sigmas = levels(grid, 6, coordinates)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(8, 2, dtype=torch.float64, generator=generator)
        x = x if coordinates == "variance preserving" else x / ALPHAS[999]
        ends.append(
            sample_phased(
                ideal_denoiser(grid, 6, alphas, sigmas, "epsilon"), x, alphas, sigmas, eta=0.5,
                noise_sampler=lambda *_, g=generator: torch.randn(8, 2, dtype=torch.float64, generator=g),
            )
        )  # fmt: skip
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


def test_eta_one_forgets_eps_and_keeps_the_variance():
    x0, x = torch.zeros(1000, 10), torch.randn(1000, 10)
    noise = torch.randn(1000, 10, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(jump(x, x0, 0.6, 0.8, 0.8, 0.6, eta=1.0, noise=noise), 0.6 * noise)
    with pytest.raises(ValueError, match="pass it as noise"):
        jump(x, x0, 0.6, 0.8, 0.8, 0.6, eta=1.0)
    with pytest.raises(ValueError, match="eta must be"):
        jump(x, x0, 0.6, 0.8, 0.8, 0.6, eta=1.5, noise=noise)
    half = jump(0.8 * torch.randn(1000, 10), x0, 0.6, 0.8, 0.8, 0.6, eta=0.5, noise=noise)
    # 10,000 draws: the standard error of a standard deviation is 0.6 / sqrt(2 * 10000) = 0.004
    assert half.std().item() == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"alphas": [1.0, 1.0], "sigmas": [1.0, 2.0]}, "decrease"),
        ({"alphas": [1.0], "sigmas": [1.0, 0.0]}, "equally many"),
        ({"alphas": [1.0, 1.0], "sigmas": [1.0, 0.0], "eta": 1.5}, "eta must be"),
        ({"alphas": [1.0, 1.0], "sigmas": [1.0, 0.0], "eta": 0.5}, "noise_sampler"),
    ],
)
def test_bad_input_is_refused_before_the_network_runs(kwargs, says):
    def never(x, i):
        raise AssertionError("the network ran")

    with pytest.raises(ValueError, match=says):
        sample_phased(never, torch.zeros(1, 1), **kwargs)

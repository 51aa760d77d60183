"""Phases solved exactly: beside the closed form of Gaussian data, on the shipped model, and what is refused."""

from __future__ import annotations

import pytest
import torch

from lora_training.evaluation.exact import exact_jumps, line_through
from lora_training.evaluation.methods import Gallery, MethodConfig
from pcm_scheduler import PCMScheduler
from pcm_scheduler.noise_schedule import make_output

from model import load_pipeline

SIZE, PROMPTS = (128, 128), ["a red star", "a blue ring on the left"]


class Gaussian:
    """The perfect network of data N(mu, s^2), where mu is what the text says; its ODE has a closed form."""

    def __init__(self, scheduler: PCMScheduler, s: float):
        self.scheduler, self.s, self.runs = scheduler, s, 0

    def deviation(self, timestep) -> tuple[float, float, float]:
        alpha = self.scheduler.alphas_cumprod[int(timestep)].double().sqrt().item()
        sigma = (1 - alpha**2) ** 0.5
        return alpha, sigma, (alpha**2 * self.s**2 + sigma**2) ** 0.5

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        self.runs += 1
        alpha, sigma, deviation = self.deviation(timestep)
        eps = sigma * (sample - alpha * encoder_hidden_states) / deviation**2
        return (make_output((sample - sigma * eps) / alpha, eps, alpha, sigma, self.scheduler.config.prediction_type),)

    def flow(self, sample, timestep, later, text):
        """x at a later timestep, None for the end: (x - alpha mu) / deviation stays as it is."""
        alpha, _, deviation = self.deviation(timestep)
        to_alpha, _, to_deviation = (1.0, 0.0, self.s) if later is None else self.deviation(later)
        return to_alpha * text + to_deviation * (sample - alpha * text) / deviation


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_jump_is_the_flow_to_the_edge_and_guidance_acts_there(kind):
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = PCMScheduler(num_phases=4, num_solver_steps=500, prediction_type=kind, **betas)
    unet, guidance = Gaussian(scheduler, s=0.5), 3.0
    told, untold = torch.tensor([1.0, -0.5]), torch.tensor([0.1, 0.1])
    x = expected = torch.randn(2, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(4)
    with exact_jumps(unet, scheduler):
        for t, later in zip(scheduler.timesteps, [*scheduler.timesteps[1:], None], strict=True):
            both = unet.forward(torch.stack([x, x]), t, torch.stack([untold, told]), return_dict=False)[0]
            output = both[0] + guidance * (both[1] - both[0])
            x = scheduler.step(output, t, x).prev_sample
            u, c = (unet.flow(expected, t, later, text) for text in (untold, told))
            expected = u + guidance * (c - u)
            # 125 first-order steps a phase; x's elements are about 1, and guidance makes the error three times that
            torch.testing.assert_close(x, expected.float(), rtol=0, atol=0.03)
    assert unet.runs == 500
    assert "forward" not in vars(unet), "the network is not its own again"


def test_a_point_within_a_phase_leads_to_the_same_edge():
    scheduler = PCMScheduler(num_phases=2, num_solver_steps=50)
    unet, told = Gaussian(scheduler, 0.5), torch.tensor([0.7])
    x = torch.randn(1, generator=torch.Generator().manual_seed(1))
    scheduler.set_timesteps(8)
    with exact_jumps(unet, scheduler):
        whole = scheduler.step(unet.forward(x, 999, told)[0], 999, x)
        half_way, at = whole.prev_sample, scheduler.timesteps[1]
        assert int(at) > scheduler.grid.edges[1]
        before, after = unet.runs, unet.forward(half_way, at, told)
    assert before == 25
    assert unet.runs - before == scheduler.grid.timesteps.index(int(at)) - 25
    assert torch.isfinite(after.sample).all()


def test_samples_on_a_line_are_those_of_its_ends():
    x0, eps = torch.tensor([0.3, -1.0]), torch.tensor([1.2, 0.4])
    found = line_through(0.6 * x0 + 0.8 * eps, 0.6, 0.8, 0.9 * x0 + 0.1 * eps, 0.9, 0.1)
    torch.testing.assert_close(torch.stack(found), torch.stack([x0, eps]))


def test_on_the_shipped_model_phases_without_guidance_are_one_path():
    """The same ten steps, cut into one phase and into five; with guidance they part."""
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    methods = [MethodConfig(f"{m}", scheduler="exact", num_phases=m, num_solver_steps=10) for m in (1, 5)]
    gallery = Gallery(pipe, [*methods, MethodConfig("plain", scheduler="ddim")])
    forward = pipe.unet.forward
    draw = {g: [gallery.draw(str(m), m, PROMPTS, (0, 1), SIZE, guidance_scale=g) for m in (1, 5)] for g in (1.0, 3.0)}
    torch.testing.assert_close(*draw[1.0], rtol=0, atol=1e-3)
    assert (draw[3.0][0] - draw[3.0][1]).abs().mean() > 1e-3
    assert pipe.unet.forward == forward
    # DDIM ends a little above sigma 0
    plain = gallery.draw("plain", 10, PROMPTS, (0, 1), SIZE)
    assert (plain - draw[1.0][0]).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"num_phases": 0}, "exact has num_phases, from 1 on, and no adapter"),
        ({"num_phases": -2}, "num_phases"),
        ({"num_phases": 4, "timesteps": (999,), "steps": (1,)}, "for the scheduler pcm"),
    ],
)
def test_settings_that_say_nothing_of_phases_are_refused(told, says):
    with pytest.raises(ValueError, match=says):
        MethodConfig("exact", scheduler="exact", **told)


def test_phases_that_the_grid_does_not_have_are_refused():
    with pytest.raises(ValueError, match="Method exact: num_phases=60 cannot be cut from num_solver_steps=50"):
        Gallery(load_pipeline(), [MethodConfig("exact", scheduler="exact", num_phases=60)])
    scheduler = PCMScheduler(num_phases=4)
    with exact_jumps(unet := Gaussian(scheduler, 0.5), scheduler), pytest.raises(ValueError, match="one point of the grid"):
        unet.forward(torch.zeros(1), 998, torch.zeros(1))

"""PCMScheduler as a diffusers scheduler: numbers, configuration, saving, errors."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings

import gaussian_mixture as gmm
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from pcm_scheduler import PCMScheduler
from pcm_scheduler.noise_schedule import make_output

SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def run(scheduler, x, network=lambda x, t: torch.tanh(x) * 0.7, **kwargs):
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, **kwargs).prev_sample
    return x


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
@pytest.mark.parametrize("phases", [1, 2, 4, 5, 8, 10])
def test_an_ideal_phased_network_lands_on_the_ode(phases, prediction_type):
    scheduler = PCMScheduler(num_phases=phases, prediction_type=prediction_type)
    scheduler.set_timesteps(phases)
    alphas, sigmas = scheduler.alphas_cumprod.double().sqrt(), (1 - scheduler.alphas_cumprod.double()).sqrt()
    starts = scheduler.timesteps.tolist()
    x = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = x / alphas[starts[0]]
    for t, edge in zip(starts, [*starts[1:], None], strict=True):
        a, s = alphas[t], sigmas[t]
        edge_alpha, edge_sigma = (1.0, 0.0) if edge is None else (alphas[edge], sigmas[edge])
        eps = gmm.ideal_phase_epsilon(x / a, (s / a).item(), float(edge_sigma / edge_alpha))
        output = make_output((x - s * eps) / a, eps, a, s, prediction_type)
        x = scheduler.step(output, t, x).prev_sample
        truth = gmm.solve(truth, (s / a).item(), float(edge_sigma / edge_alpha))
        torch.testing.assert_close(x / edge_alpha, truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4, 5])
def test_equals_ddim_where_both_visit_the_same_timesteps(steps):
    """40 solver steps and 4 phases: DDIM's trailing spacing is exact there (1, 2, 4), and 5 is given explicitly."""
    pcm = PCMScheduler(num_phases=4, num_solver_steps=40, final_sigmas_type="sigma_min")
    ddim = DDIMScheduler(**SD_BETAS, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False)
    pcm.set_timesteps(steps) if steps < 5 else pcm.set_timesteps(timesteps=[999, 799, 599, 399, 199])
    ddim.set_timesteps(steps)
    assert pcm.timesteps.tolist() == ddim.timesteps.tolist()
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run(pcm, x), run(ddim, x), rtol=1e-4, atol=1e-4)


def test_eta_one_is_multistep_consistency_sampling():
    """x_s = alpha_s x_0 + sigma_s z at every step but the last, which returns x_0: LCM's sampler, without its skip."""
    scheduler = PCMScheduler(num_phases=1)
    scheduler.set_timesteps(3)
    x, network = torch.randn(2, 4, 8, 8), lambda x, t: 0.3 * x
    generator, same = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    expected, stops = x, scheduler.timesteps.tolist()
    alphas, sigmas = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
    for t, s in zip(stops, [*stops[1:], None], strict=True):
        x0 = (expected - sigmas[t] * network(expected, t)) / alphas[t]
        expected = x0 if s is None else alphas[s] * x0 + sigmas[s] * torch.randn(x.shape, generator=same)
    torch.testing.assert_close(run(scheduler, x, network, eta=1.0, generator=generator), expected, rtol=1e-4, atol=1e-4)


def test_a_list_of_generators_has_one_per_image():
    def sample(generator, batch):
        scheduler = PCMScheduler(num_phases=1)
        scheduler.set_timesteps(4)
        return run(scheduler, torch.ones(batch, 4, 8, 8), eta=0.5, generator=generator)

    both = sample([torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)], 2)
    torch.testing.assert_close(both[1:], sample(torch.Generator().manual_seed(8), 1))
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_and_close(dtype):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = PCMScheduler()
    scheduler.set_timesteps(4)
    full = run(scheduler, x.to(dtype).float())
    scheduler.set_timesteps(4)
    half = run(scheduler, x.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.05 * full.abs().max().item())


def test_the_sample_is_not_written_to():
    scheduler = PCMScheduler()
    scheduler.set_timesteps(4)
    x, output = torch.randn(2, 1, 4, 8, 8)
    before = x.clone(), output.clone()
    scheduler.step(output, 999, x)
    assert torch.equal(x, before[0])
    assert torch.equal(output, before[1])


def test_final_sigma_zero_returns_x0_and_sigma_min_the_last_trained_edge():
    x, output = torch.randn(2, 1, 4, 8, 8)
    for kind, close in (("zero", True), ("sigma_min", False)):
        scheduler = PCMScheduler(final_sigmas_type=kind)
        scheduler.set_timesteps(1)
        result = scheduler.step(output, 999, x)
        assert torch.equal(result.prev_sample, result.pred_original_sample) == close
    sigma_0 = (1 - scheduler.alphas_cumprod[0]).sqrt()
    torch.testing.assert_close(
        result.prev_sample, scheduler.alphas_cumprod[0].sqrt() * result.pred_original_sample + sigma_0 * output
    )


def test_add_noise_and_velocity_equal_diffusers_for_images_and_clips():
    ours, theirs = PCMScheduler(), DDPMScheduler(**SD_BETAS)
    t = torch.tensor([10, 999])
    for shape in ((2, 4, 8, 8), (2, 4, 3, 8, 8)):
        x, noise = torch.randn(2, *shape)
        torch.testing.assert_close(ours.add_noise(x, noise, t), theirs.add_noise(x, noise, t))
        torch.testing.assert_close(ours.get_velocity(x, noise, t), theirs.get_velocity(x, noise, t))
    assert ours.add_noise(x.half(), noise.half(), t[:1]).dtype == torch.float16


def test_image_to_image_begins_in_the_middle_with_and_without_begin_index():
    x, output = torch.randn(2, 1, 4, 8, 8)
    results = []
    for begin in (2, None):
        scheduler = PCMScheduler()
        scheduler.set_timesteps(4)
        if begin is not None:
            scheduler.set_begin_index(begin)
        results.append(scheduler.step(output, scheduler.timesteps[2], x).prev_sample)
        assert scheduler.step_index == 3
    assert torch.equal(*results)


def test_strength_keeps_all_steps_below_it():
    scheduler = PCMScheduler()
    scheduler.set_timesteps(4, strength=0.6)
    assert scheduler.timesteps.tolist() == [599, 539, 499, 239]


def test_configured_timesteps_are_used_for_as_many_steps_as_they_are():
    chosen = [999, 739, 659, 499, 239, 59]
    scheduler = PCMScheduler(timesteps=chosen)
    scheduler.set_timesteps(6)
    assert scheduler.timesteps.tolist() == chosen
    configured = run(scheduler, torch.ones(1, 4, 8, 8))
    scheduler.set_timesteps(timesteps=chosen)
    assert torch.equal(run(scheduler, torch.ones(1, 4, 8, 8)), configured)
    for steps in (1, 4, 5, 8, 50):
        scheduler.set_timesteps(steps)
        assert tuple(scheduler.timesteps.tolist()) == scheduler.grid.sampling_timesteps(steps)
    scheduler.set_timesteps(6, strength=0.6)
    assert tuple(scheduler.timesteps.tolist()) == scheduler.grid.sampling_timesteps(6, 0.6)
    scheduler.set_timesteps(timesteps=[999, 859, 739, 619, 499, 239])
    assert scheduler.timesteps.tolist() == [999, 859, 739, 619, 499, 239]
    with pytest.raises(ValueError, match="1 to 50"):
        scheduler.set_timesteps(0)


def test_image_to_image_begins_among_configured_timesteps():
    """As stock pipelines do it: the first steps are dropped, `set_begin_index` says how many."""
    scheduler = PCMScheduler(timesteps=[999, 739, 659, 499, 239, 59])
    scheduler.set_timesteps(6)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler.set_begin_index(3)
    begun = x
    for t in scheduler.timesteps[3:]:
        begun = scheduler.step(0.3 * begun, t, begun).prev_sample
    assert scheduler.step_index == 6
    scheduler.set_timesteps(timesteps=[499, 239, 59])
    torch.testing.assert_close(begun, run(scheduler, x, lambda x, t: 0.3 * x))


# ------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    "cls",
    [
        DDIMScheduler,
        DDPMScheduler,
        PNDMScheduler,
        EulerDiscreteScheduler,
        DPMSolverMultistepScheduler,
        LCMScheduler,
        TCDScheduler,
    ],
)
@pytest.mark.parametrize("kwargs", [{"beta_schedule": "linear"}, {}, SD_BETAS | {"prediction_type": "v_prediction"}])
@pytest.mark.parametrize("via", ["memory", "disk"])
def test_config_interchange_keeps_the_noise_schedule_both_ways(cls, kwargs, via, tmp_path):
    source = cls(**kwargs)
    if via == "disk":
        source.save_pretrained(tmp_path)
        pcm = PCMScheduler.from_pretrained(tmp_path, num_phases=8)
    else:
        pcm = PCMScheduler.from_config(source.config, num_phases=8)
    assert torch.equal(pcm.alphas_cumprod, source.alphas_cumprod)
    assert pcm.config.prediction_type == source.config.prediction_type
    back = cls.from_config(pcm.config)
    assert torch.equal(back.alphas_cumprod, source.alphas_cumprod)
    assert back.config.prediction_type == source.config.prediction_type
    assert PCMScheduler.from_config(back.config).config.num_phases == 8


@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, TCDScheduler])
def test_zero_snr_rescaling_travels(cls):
    pcm = PCMScheduler.from_config(cls(**SD_BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction").config)
    assert pcm.config.rescale_betas_zero_snr
    assert pcm.alphas_cumprod[-1] == 0
    assert cls.from_config(pcm.config).config.rescale_betas_zero_snr


def test_coming_from_the_karras_family_is_silent(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)  # or caplog sees nothing
    config = DPMSolverMultistepScheduler.from_config(EulerDiscreteScheduler(**SD_BETAS).config).config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PCMScheduler.from_config(config)
    assert "not expected" not in caplog.text
    monkeypatch.setattr(PCMScheduler, "_compatibles", [])
    PCMScheduler.from_config(config)
    assert "not expected" in caplog.text, "the test would not notice"


def test_config_equality_as_diffusers_own_suite_asks(tmp_path):
    scheduler = PCMScheduler()
    scheduler.save_pretrained(tmp_path)
    told = {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
    assert len(told) < len(scheduler.config)
    assert told == PCMScheduler.from_pretrained(tmp_path).config
    for cls in (DDIMScheduler, EulerDiscreteScheduler):
        back = PCMScheduler.from_config(cls.from_config(scheduler.config).config).config
        assert {k: v for k, v in back.items() if k in scheduler.config} == dict(scheduler.config)


def test_new_phases_replace_explicit_edges():
    explicit = PCMScheduler(phase_edges=[999, 499, 99])
    assert explicit.grid.num_phases == 3
    assert PCMScheduler.from_config(explicit.config).grid == explicit.grid
    assert PCMScheduler.from_config(explicit.config, num_phases=8).grid.num_phases == 8


def test_save_and_load(tmp_path):
    scheduler = PCMScheduler(beta_schedule="linear", phase_edges=[999, 499], final_sigmas_type="sigma_min")
    scheduler.save_pretrained(tmp_path)
    again = PCMScheduler.from_pretrained(tmp_path)
    assert again.grid == scheduler.grid
    assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["phase_edges"] == [999, 499]


@pytest.mark.parametrize(
    "given",
    [
        {"num_phases": np.int64(8), "num_solver_steps": np.int32(40), "num_train_timesteps": torch.tensor(1000)},
        {"phase_edges": list(np.array([999, 499]))},
        {"phase_edges": np.array([999, 499]), "timesteps": torch.tensor([999, 499, 239])},
        {"trained_betas": torch.linspace(1e-4, 0.02, 1000)},
        {"trained_betas": np.linspace(1e-4, 0.02, 1000, dtype=np.float32), "rescale_betas_zero_snr": np.False_},
        {"beta_start": np.float32(1e-4), "timesteps": range(999, 0, -100)},
    ],
)
def test_numbers_of_numpy_and_torch_are_saved_and_printed_as_pythons_own(given, tmp_path):
    scheduler = PCMScheduler(**given)
    scheduler.save_pretrained(tmp_path)
    assert next(iter(given)) in repr(scheduler)
    again = PCMScheduler.from_pretrained(tmp_path)
    told = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    assert again.config == told
    assert again.grid == scheduler.grid == PCMScheduler.from_config(scheduler.config).grid
    assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize("via", ["memory", "disk", "DDIM"])
def test_configured_timesteps_travel(via, tmp_path):
    source = PCMScheduler(timesteps=(999, 739, 499, 239, 59))
    if via == "disk":
        source.save_pretrained(tmp_path)
        again = PCMScheduler.from_pretrained(tmp_path)
        assert json.loads((tmp_path / "scheduler_config.json").read_text())["timesteps"] == [999, 739, 499, 239, 59]
    else:
        config = DDIMScheduler.from_config(source.config).config if via == "DDIM" else source.config
        again = PCMScheduler.from_config(config)
    again.set_timesteps(5)
    assert again.timesteps.tolist() == [999, 739, 499, 239, 59]
    assert PCMScheduler.from_config(again.config, timesteps=None).config.timesteps is None


@pytest.mark.parametrize("new", [{"num_phases": 8}, {"phase_edges": [999, 499]}, {"num_solver_steps": 40}])
@pytest.mark.parametrize("via", ["memory", "disk"])
def test_another_grid_drops_configured_timesteps(new, via, tmp_path):
    source = PCMScheduler(timesteps=[999, 739, 499, 239, 59])
    source.save_pretrained(tmp_path)

    def again(**kwargs):
        return (
            PCMScheduler.from_pretrained(tmp_path, **kwargs)
            if via == "disk"
            else PCMScheduler.from_config(source.config, **kwargs)
        )

    assert again(**new).config.timesteps is None
    assert again(**new, timesteps=[999, 499, 199]).config.timesteps == [999, 499, 199]
    assert again(final_sigmas_type="sigma_min").config.timesteps is not None


@pytest.mark.parametrize(
    "given", [[999.0, 499.0], torch.tensor([999, 499]), np.array([999, 499])], ids=["floats", "torch", "numpy"]
)
def test_configured_timesteps_may_be_of_any_type_of_number(given):
    scheduler = PCMScheduler(timesteps=given)
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [999, 499]


@pytest.mark.parametrize(
    "source",
    [FlowMatchEulerDiscreteScheduler(), FlowMatchHeunDiscreteScheduler(), UniPCMultistepScheduler(use_flow_sigmas=True)],
)
def test_schedulers_for_flow_matching_are_not_imitated(source):
    with pytest.raises(ValueError, match="flow matching"):
        PCMScheduler.from_config(source.config)


def test_schedulers_of_edm_are_not_imitated():
    with pytest.raises(ValueError, match="EDM"):
        PCMScheduler.from_config(EDMDPMSolverMultistepScheduler(prediction_type="epsilon").config)


def test_new_betas_replace_trained_ones():
    source = DDIMScheduler(trained_betas=np.linspace(0.01, 0.02, 1000).tolist())
    assert torch.equal(PCMScheduler.from_config(source.config).betas, source.betas)
    new = {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.01}
    assert torch.equal(PCMScheduler.from_config(source.config, **new).betas, DDIMScheduler(**new).betas)


def test_two_trained_betas_with_a_thousand_timesteps_construct():
    """diffusers' own test suite does this."""
    scheduler = PCMScheduler(trained_betas=[0.1, 0.2])
    assert scheduler.betas.tolist() == pytest.approx([0.1, 0.2])
    with pytest.raises(ValueError, match="2 betas"):
        scheduler.set_timesteps(4)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"prediction_type": "eps"}, "v_prediction"),
        ({"beta_schedule": "cosine"}, "scaled_linear"),
        ({"final_sigmas_type": "one"}, "sigma_min"),
        ({"num_phases": 0}, "num_phases=0"),
        ({"num_phases": 60}, "num_phases=60"),
        ({"num_solver_steps": 48}, "50"),
        ({"phase_edges": [999, 750]}, "739 or 759"),
        ({"timesteps": [999, 745, 249]}, r"\[745, 249\].*nearest to 745 is 739"),
        ({"timesteps": [999, 0]}, r"\[0\].*nearest to 0 is 19"),
        ({"timesteps": []}, "integers"),
        ({"timesteps": [1019, 999]}, "999 to 0"),
        ({"timesteps": [739, 999]}, "decrease"),
        ({"trained_betas": [0.1, float("nan")]}, "number 1 of 2"),
        ({"beta_start": float("nan")}, "beta_start must be a finite number"),
    ],
)
def test_the_constructor_refuses(kwargs, says):
    with pytest.raises(ValueError, match=says):
        PCMScheduler(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({}, "either"),
        ({"num_inference_steps": 4, "timesteps": [999]}, "either"),
        ({"num_inference_steps": 0}, "1 to 50"),
        ({"num_inference_steps": 51}, "1 to 50"),
        ({"num_inference_steps": 4, "strength": 1.5}, "strength"),
        ({"timesteps": []}, "integers"),
        ({"timesteps": [1000, 5]}, "999 to 0"),
        ({"timesteps": [999.5, 5]}, "integers"),
        ({"timesteps": [499, 499]}, "decrease"),
        ({"timesteps": [239, 499]}, "decrease"),
        ({"timesteps": [499, 239], "strength": 0.5}, "one of the two"),
    ],
)
def test_set_timesteps_refuses(kwargs, says):
    with pytest.raises(ValueError, match=says):
        PCMScheduler().set_timesteps(**kwargs)


def test_epsilon_at_alpha_zero_is_refused_and_v_prediction_works():
    with pytest.raises(ValueError, match="alpha is 0"):
        PCMScheduler(rescale_betas_zero_snr=True).set_timesteps(4)
    scheduler = PCMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    scheduler.set_timesteps(4)
    assert run(scheduler, torch.randn(1, 4, 8, 8)).isfinite().all()


def test_explicit_timesteps_off_the_grid_warn_and_work():
    scheduler = PCMScheduler()
    with pytest.warns(UserWarning, match=r"\[749, 249\]"):
        scheduler.set_timesteps(timesteps=[999, 749, 499, 249])
    assert run(scheduler, torch.randn(1, 4, 8, 8)).isfinite().all()


def test_step_says_what_is_missing():
    x = torch.zeros(1, 4, 8, 8)
    scheduler = PCMScheduler()
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="not one of the stops"):
        scheduler.step(x, 777, x)
    with pytest.raises(ValueError, match="eta"):
        scheduler.step(x, 999, x, eta=1.5)
    scheduler.set_timesteps(1)
    scheduler.step(x, 999, x)
    with pytest.raises(ValueError, match="steps are done"):
        scheduler.step(x, 999, x)


def test_eta_with_phases_is_said_once():
    x = torch.zeros(1, 4, 8, 8)
    scheduler = PCMScheduler(num_phases=4)
    scheduler.set_timesteps(4)
    with pytest.warns(UserWarning, match="last"):
        scheduler.step(x, 999, x, eta=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step(x, 739, x, eta=0.3)


# ------------------------------------------------------------------------------------------ imports and tracing


def test_import_needs_neither_diffusers_nor_the_network():
    code = (
        "import sys; sys.modules['diffusers'] = None; import pcm_scheduler; pcm_scheduler.PhaseGrid.even(4); "
        "import pcm_scheduler.editing, pcm_scheduler.operators, pcm_scheduler.lora_file; "
        "import pcm_scheduler.curvature, pcm_scheduler.time_search; print('fine')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "fine\n"


def test_step_traces_without_graph_breaks():
    scheduler = PCMScheduler()
    x = torch.randn(1, 4, 8, 8)
    scheduler.set_timesteps(16)
    expected = run(scheduler, x)
    scheduler.set_timesteps(16)
    scheduler.set_begin_index(0)
    torch._dynamo.reset()
    compiled = torch.compile(scheduler.step, fullgraph=True, backend="eager")
    for t in scheduler.timesteps:
        x = compiled(torch.tanh(x) * 0.7, t, x, return_dict=False)[0]
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"beta_start": -1.0}, "beta_start must be a finite number from 0"),
        ({"beta_end": float("nan")}, "beta_end must be a finite number from 0"),
        ({"beta_schedule": ["linear"]}, "Unknown beta_schedule"),
        ({"trained_betas": []}, "at least one number"),
        ({"trained_betas": [[0.1]]}, "at least one number"),
        ({"trained_betas": "many"}, "list of numbers"),
        ({"trained_betas": [10**400]}, "list of numbers"),
        ({"timesteps": 3}, "timesteps must be integers from 999 to 0; got 3"),
        ({"timesteps": [float("nan")]}, "timesteps must be integers"),
        ({"timesteps": ["a"]}, "timesteps must be integers"),
        ({"num_train_timesteps": 10**12}, "at most 1000000"),  # before a table of so many is made
        ({"num_phases": 4.0}, "num_phases must be a whole number"),
        ({"final_sigmas_type": {}}, "Unknown final_sigmas_type"),
    ],
)
def test_values_of_a_configuration_that_are_none_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        PCMScheduler(**options)

"""Phased consistency for clips: tiny random motion modules in a tiny random image model."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

from lora_training.config import (
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
    ValidationConfig,
)
from lora_training.data.latent_cache import Bucket, Example, TrainingData, empty_conditioning
from lora_training.loop import Run
from pcm_scheduler import load_pcm_lora
from pcm_scheduler.lora_file import AdapterSettings
from pcm_scheduler.lora_layouts import is_motion
from pcm_scheduler.noise_schedule import make_alphas_cumprod, make_betas
from pcm_scheduler.phases import PhaseGrid

FRAMES, SIDE = 8, 8
SETTINGS = AdapterSettings(
    "animatediff", PhaseGrid.even(4).edges, 50, beta_schedule="linear", beta_start=0.00085, beta_end=0.012
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("animatediff")
    tiny_models.image_pipeline().save_pretrained(folder / "model")
    tiny_models.motion_adapter().save_pretrained(folder / "motion")
    return folder


def model_config(folders, **settings):
    named = {"path": str(folders / "model"), "family": "animatediff", "motion_adapter": str(folders / "motion")}
    return ModelConfig(**(named | {"beta_schedule": "linear"} | settings))


@pytest.fixture(autouse=True)
def clips(monkeypatch):
    """Runs draw from four random clips in place of data on disk."""

    def four(run):
        drawn = torch.Generator().manual_seed(0)
        captions = ("a cat", "a dog", "a red star", "rain")
        means = torch.randn(4, 1, 4, FRAMES, SIDE, SIDE, generator=drawn)
        told = run.backbone.encode_prompts(captions)["prompt_embeds"]
        tensors = {"latent_means": means, "latent_stds": means.abs() / 10, "conditioning/prompt_embeds": told}
        example = Example({name: tensor.half() for name, tensor in tensors.items()})
        side = SIDE * run.backbone.latent_scale
        return TrainingData({(side, side): Bucket((example,))}, empty_conditioning(run.backbone), captions)

    monkeypatch.setattr(Run, "_load_data", four)


def config_for(folders, output, steps=2, model=None, **settings):
    return TrainConfig(
        model=model or model_config(folders),
        objective=ObjectiveConfig(guidance_scale=3.0),
        optimizer=OptimizerConfig(learning_rate=1e-3, batch_size=2, steps=steps),
        sampling=SamplingConfig(guidance_scale=1.5),
        validation=ValidationConfig(steps=(1, 2), guidance_scales=(1.0,), prompts=("a cat",)),
        output=str(output),
        **({"lora": LoraConfig(rank=4, alpha=2.0)} | settings),
    )


def pipeline(folders, **scheduler):
    pipe = AnimateDiffPipeline.from_pretrained(
        folders / "model", motion_adapter=MotionAdapter.from_pretrained(folders / "motion")
    )
    pipe.scheduler = DDIMScheduler(**(tiny_models.BETAS | {"clip_sample": False, "steps_offset": 1} | scheduler))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(pipe_or_backbone, count=2):
    """x_t, t, and text as wide as this model's, one row a clip."""
    drawn = torch.Generator().manual_seed(3)
    sample = torch.randn(count, 4, FRAMES, SIDE, SIDE, generator=drawn)
    return sample, torch.tensor([999, 20][:count]), torch.randn(count, 7, 32, generator=drawn)


def predicted(unet, sample, timestep, embeds):
    with torch.no_grad():
        return unet(sample, timestep, embeds.repeat_interleave(FRAMES, dim=0)).sample


@pytest.mark.parametrize("parts", ["all", "spatial", "motion"])
def test_every_placement_trains_and_its_file_is_sampled_as_it_says(folders, tmp_path, parts):
    config = config_for(folders, tmp_path / "video.safetensors", lora=LoraConfig(rank=4, alpha=2.0, parts=parts))
    trained = Run(config)
    assert {is_motion(name) for name in trained.student.alphas()} == {
        "all": {True, False},
        "spatial": {False},
        "motion": {True},
    }[parts]
    output = trained.train()
    written = {path.name for path in tmp_path.glob("*.safetensors")}
    expected = {"all": {"video", "video_motion", "video_spatial"}, "motion": {"video", "video_motion"}, "spatial": {"video"}}
    assert written == {f"{name}.safetensors" for name in expected[parts]}

    pipe = pipeline(folders)
    settings = load_pcm_lora(pipe, output)
    assert (settings.base_model, settings.beta_schedule, settings.beta_end) == ("animatediff", "linear", 0.012)
    linear = make_alphas_cumprod(make_betas("linear", 0.00085, 0.012, 1000))
    assert torch.equal(pipe.scheduler.alphas_cumprod, linear)
    told = inputs(pipe)
    student = predicted(trained.backbone.unet.eval(), *told)
    torch.testing.assert_close(predicted(pipe.unet, *told), student, atol=2e-3, rtol=0)  # files are fp16
    noise = torch.randn(1, 4, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    for steps in (1, 2, 4, 8):
        frames = pipe("a cat", latents=noise, num_frames=FRAMES, height=16, width=16, guidance_scale=1.0,
                      num_inference_steps=steps, output_type="pt").frames  # fmt: skip
        assert frames.shape == (1, FRAMES, 3, 16, 16)
        assert frames.isfinite().all()

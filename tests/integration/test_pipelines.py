"""PCMScheduler inside diffusers' own pipelines, unchanged: the shipped model, and tiny random ones of other families."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoPipelineForImage2Image,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image

from pcm_scheduler import PCMScheduler

from model import load_pipeline


@pytest.fixture
def pipe():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = PCMScheduler.from_config(pipe.scheduler.config, num_phases=4)
    return pipe


def noise(count=1, size=16):
    return torch.randn(count, 4, size, size, generator=torch.Generator().manual_seed(0))


def call(pipe, **kwargs):
    return pipe(**{"prompt": "a red star", "output_type": "pt", "num_inference_steps": 4, **kwargs}).images


def test_text_to_image_equals_a_plain_loop_over_the_network(pipe):
    """The pipeline adds nothing: the same UNet calls through the pure loop give the same latents."""
    from pcm_scheduler.noise_schedule import alphas_and_sigmas, predict_x0_and_epsilon
    from pcm_scheduler.sampling import sample_phased

    got = call(pipe, latents=noise(), guidance_scale=1.0, output_type="latent")
    embeds, _ = pipe.encode_prompt("a red star", "cpu", 1, False)
    alphas, sigmas = alphas_and_sigmas(pipe.scheduler.alphas_cumprod)
    stops = [999, 739, 499, 239]

    @torch.no_grad()
    def denoiser(x, i):
        output = pipe.unet(x, stops[i], embeds).sample
        return predict_x0_and_epsilon(output, x, alphas[stops[i]].item(), sigmas[stops[i]].item(), "epsilon")[0]

    expected = sample_phased(denoiser, noise(), [*alphas[stops].tolist(), 1.0], [*sigmas[stops].tolist(), 0.0])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3, 4, 7])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_steps_guidance_and_batches(pipe, steps, guidance_scale):
    prompts = ["a red star", "a blue ring on the left"]
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    both = call(
        pipe,
        prompt=prompts,
        negative_prompt=["", "red"],
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=generators,
    )
    alone = call(
        pipe, prompt=prompts[1], negative_prompt="red", num_inference_steps=steps,
        guidance_scale=guidance_scale, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert both.shape == (2, 3, 128, 128)
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-3)


def test_guidance_rescale_timesteps_eta_and_callbacks(pipe):
    seen = []

    def callback(pipe, i, t, kwargs):
        seen.append((i, int(t), tuple(kwargs["latents"].shape)))
        return kwargs

    images = call(
        pipe, num_inference_steps=None, timesteps=[999, 499], eta=0.2, guidance_scale=3.0, guidance_rescale=0.7,
        generator=torch.Generator().manual_seed(0), callback_on_step_end=callback,
    )  # fmt: skip
    assert images.isfinite().all()
    assert [s[:2] for s in seen] == [(0, 999), (1, 499)]


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 0.006), (torch.float16, 0.0005)])
def test_half_precision(pipe, dtype, rounding):
    """The network's own rounding moves a picture by about that much. One in five hangs in the balance and moves more, hence
    the median; more guidance than 2 multiplies it, and twice as much is another processor's."""
    told = {"prompt": ["a red star"] * 5, "guidance_scale": 2.0}
    full = call(pipe, latents=noise(5), **told)
    half = call(pipe.to(dtype), latents=noise(5).to(dtype), **told)
    assert (half.float() - full).abs().mean((1, 2, 3)).median() < 2 * rounding


@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
def test_image_to_image_starts_at_a_stop(pipe, strength):
    edit = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    edit.set_progress_bar_config(disable=True)
    visited = []
    call(
        edit, image=Image.new("RGB", (128, 128), "teal"), strength=strength, num_inference_steps=10, guidance_scale=1.0,
        callback_on_step_end=lambda p, i, t, kw: visited.append(int(t)) or kw,
    )  # fmt: skip
    stops = list(pipe.scheduler.grid.sampling_timesteps(10))
    assert visited == stops[10 - int(10 * strength) :]


def test_image_to_image_starts_at_a_configured_stop(pipe):
    chosen = [999, 739, 659, 499, 239, 59]
    pipe.scheduler = PCMScheduler.from_config(pipe.scheduler.config, timesteps=chosen)
    edit, visited = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False), []
    edit.set_progress_bar_config(disable=True)
    call(
        edit, image=Image.new("RGB", (128, 128), "teal"), strength=0.5, num_inference_steps=6, guidance_scale=1.0,
        callback_on_step_end=lambda p, i, t, kw: visited.append(int(t)) or kw,
    )  # fmt: skip
    assert visited == chosen[3:]


def test_image_to_image_with_little_strength_keeps_the_picture(pipe):
    """No noise may be left in the result, LCMScheduler's known fault."""
    original = call(pipe, prompt="a large red star in the center on a plain sky background", latents=noise())
    edit = AutoPipelineForImage2Image.from_pipe(pipe)
    edited = call(
        edit, prompt="a large red star in the center on a plain sky background", image=original, strength=0.1,
        num_inference_steps=10, guidance_scale=1.0, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert (edited - original).abs().mean() < 0.06


def test_inpaint_changes_only_the_mask_in_latents(pipe):
    paint = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    paint.set_progress_bar_config(disable=True)
    mask = Image.fromarray(np.pad(np.full((128, 64), 255, np.uint8), ((0, 0), (64, 0))))
    image = Image.new("RGB", (128, 128), (150, 205, 240))
    latents = call(
        paint,
        image=image,
        mask_image=mask,
        strength=1.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )
    pixels = pipe.image_processor.preprocess(image)
    known = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    left = (latents - known)[..., :7].abs().mean()
    assert left < 0.1, "the kept half drifted"
    assert (latents - known)[..., 9:].abs().mean() > left


def test_controlnet(pipe):
    controlnet = ControlNetModel.from_unet(pipe.unet)
    control = StableDiffusionControlNetPipeline(**pipe.components, controlnet=controlnet, requires_safety_checker=False)
    control.set_progress_bar_config(disable=True)
    with_control = call(control, image=Image.new("RGB", (128, 128)), latents=noise(), guidance_scale=2.0)
    torch.testing.assert_close(with_control, call(pipe, latents=noise(), guidance_scale=2.0), rtol=1e-3, atol=1e-3)


def test_sdxl_text_and_image_to_image():
    pipe = tiny_models.sdxl_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = PCMScheduler.from_config(pipe.scheduler.config, num_phases=4, num_solver_steps=40)
    image = call(pipe, prompt=["a cat", "a dog"], num_inference_steps=5, guidance_scale=3.0, negative_prompt=["x", "y"])
    assert image.shape == (2, 3, 32, 32)
    assert pipe.scheduler.timesteps.tolist() == [999, 874, 749, 499, 249]
    refiner = StableDiffusionXLImg2ImgPipeline(**pipe.components, add_watermarker=False)
    refiner.set_progress_bar_config(disable=True)
    assert call(refiner, prompt="a cat", image=image[:1], strength=0.5, num_inference_steps=4).isfinite().all()
    base = call(pipe, prompt="a cat", num_inference_steps=8, denoising_end=0.5, output_type="latent")
    assert base.isfinite().all()


def test_animatediff_with_linear_betas():
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1)
    pipe = AnimateDiffPipeline(**tiny_models.motion_parts(), scheduler=PCMScheduler.from_config(scheduler.config, num_phases=2))
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(
        "a cat", num_frames=4, height=16, width=16, num_inference_steps=3, guidance_scale=2.0, output_type="pt"
    ).frames
    assert frames.shape == (1, 4, 3, 16, 16)
    assert torch.equal(pipe.scheduler.alphas_cumprod, scheduler.alphas_cumprod)


def test_ip_adapter(pipe):
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    width = pipe.unet.config.cross_attention_dim
    projection = ImageProjection(image_embed_dim=8, cross_attention_dim=width, num_image_text_embeds=2)
    pipe.unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    processors = {}
    for name, processor in pipe.unet.attn_processors.items():
        if name.endswith("attn1.processor"):
            processors[name] = processor
        else:
            hidden = pipe.unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
            processors[name] = IPAdapterAttnProcessor2_0(hidden, width, num_tokens=(2,))
    pipe.unet.set_attn_processor(processors)
    assert call(pipe, ip_adapter_image_embeds=[torch.randn(2, 1, 8)], guidance_scale=2.0).isfinite().all()


def test_a_saved_pipeline_loads_after_one_import(pipe, tmp_path):
    """diffusers imports no outside class that a folder names, unless the program has imported it already."""
    pipe.save_pretrained(tmp_path)
    load = (
        f"from diffusers import DiffusionPipeline; s = DiffusionPipeline.from_pretrained({str(tmp_path)!r}).scheduler; "
        "print(type(s).__name__, s.grid.num_phases)"
    )
    documented = subprocess.run(
        [sys.executable, "-c", f"from pcm_scheduler import PCMScheduler; {load}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert documented.stdout.strip() == "PCMScheduler 4"


def test_what_ships_is_within_its_size_half_precision_and_without_paths():
    from safetensors import safe_open

    from model import HERE

    folder = HERE / "model"  # what is in the checkout, not a stand-in
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 15e6
    assert {p.suffix for p in files} <= {".safetensors", ".json"}
    for path in files:
        if path.suffix == ".json":
            assert '"_name_or_path": "/' not in path.read_text(encoding="utf-8")
            continue
        with safe_open(path, "pt") as file:
            assert {file.get_slice(k).get_dtype() for k in file.keys()} <= {"F16", "I64"}  # noqa: SIM118

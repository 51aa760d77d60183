"""PCMScheduler and video adapters inside diffusers' AnimateDiff pipelines, unchanged: tiny random networks."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from diffusers import (
    AnimateDiffControlNetPipeline,
    AnimateDiffPAGPipeline,
    AnimateDiffPipeline,
    AnimateDiffSDXLPipeline,
    AnimateDiffSparseControlNetPipeline,
    AnimateDiffVideoToVideoControlNetPipeline,
    AnimateDiffVideoToVideoPipeline,
    ControlNetModel,
    DDIMScheduler,
    PIAPipeline,
    SparseControlNetModel,
)
from PIL import Image

from pcm_scheduler import PCMScheduler, load_pcm_lora
from pcm_scheduler.lora_file import AdapterSettings, write_video_adapter
from pcm_scheduler.noise_schedule import alphas_and_sigmas, make_alphas_cumprod, make_betas, predict_x0_and_epsilon
from pcm_scheduler.phases import PhaseGrid
from pcm_scheduler.sampling import sample_phased

FRAMES, SIDE = 8, 8  # of the latents
GRID = PhaseGrid.even(4)
STOPS = list(GRID.sampling_timesteps(4))
SETTINGS = AdapterSettings("animatediff", GRID.edges, 50, beta_schedule="linear", beta_start=0.00085, beta_end=0.012)
# A random network's x_0 at t = 999 is some dozens of standard deviations large: rounding shows in the fifth decimal.
CLOSE = {"rtol": 1e-4, "atol": 1e-3}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_to_video(**shape):
    parts = tiny_models.motion_parts(**shape)
    return quiet(AnimateDiffPipeline(**parts, scheduler=PCMScheduler(beta_schedule="linear")))


@pytest.fixture
def pipe():
    return text_to_video()


@pytest.fixture
def edit(pipe):
    return quiet(AnimateDiffVideoToVideoPipeline(**parts_of(pipe)))


def parts_of(pipe):
    """What every AnimateDiff pipeline is made of."""
    names = ("vae", "text_encoder", "tokenizer", "unet", "motion_adapter", "scheduler")
    return {name: pipe.components[name] for name in names}


def noise(frames=FRAMES):
    return torch.randn(1, 4, frames, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def clip():
    return [Image.new("RGB", (16, 16), (20 * i, 90, 160)) for i in range(FRAMES)]


def call(pipe, **kwargs):
    """Latents of "a cat", and the timesteps at which the network was asked for them."""
    visited = []
    settings = {
        "prompt": "a cat", "height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent",
        "callback_on_step_end": lambda pipe, i, t, kept: visited.append(int(t)) or kept,
    }  # fmt: skip
    if not isinstance(pipe, (AnimateDiffVideoToVideoPipeline, AnimateDiffVideoToVideoControlNetPipeline)):
        settings["num_frames"] = FRAMES
    return pipe(**(settings | kwargs)).frames, visited


@torch.no_grad()
def plain_loop(pipe, latents, stops, guidance_scale=1.0):
    """The same network by our own loop, without diffusers' pipeline or our scheduler."""
    positive, negative = pipe.encode_prompt("a cat", "cpu", 1, True)
    alphas, sigmas = alphas_and_sigmas(make_alphas_cumprod(make_betas("linear", 0.00085, 0.012, 1000)))

    def asked(x, t, embeds):
        return pipe.unet(x, t, embeds.repeat_interleave(x.shape[2], dim=0)).sample

    def denoiser(x, i):
        output = asked(x, stops[i], positive)
        if guidance_scale > 1:
            unguided = asked(x, stops[i], negative)
            output = unguided + guidance_scale * (output - unguided)
        return predict_x0_and_epsilon(output, x, alphas[stops[i]].item(), sigmas[stops[i]].item(), "epsilon")[0]

    return sample_phased(denoiser, latents, [*alphas[stops].tolist(), 1.0], [*sigmas[stops].tolist(), 0.0])


# text to video


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_text_to_video_equals_a_plain_loop_over_the_network(pipe, steps, guidance_scale):
    stops = list(GRID.sampling_timesteps(steps))
    got, visited = call(pipe, latents=noise(), num_inference_steps=steps, guidance_scale=guidance_scale)
    assert visited == stops
    torch.testing.assert_close(got, plain_loop(pipe, noise(), stops, guidance_scale), **CLOSE)


def test_configured_timesteps_serve_pipelines_that_take_none(pipe):
    chosen = [999, 659, 239]
    pipe.scheduler = PCMScheduler.from_config(pipe.scheduler.config, timesteps=chosen)
    got, visited = call(pipe, latents=noise(), num_inference_steps=3)
    assert visited == chosen
    torch.testing.assert_close(got, plain_loop(pipe, noise(), chosen), **CLOSE)


def test_sdxls_motion_modules_on_40_solver_steps():
    of_sdxl = {name: part for name, part in tiny_models.sdxl_pipeline().components.items()
               if name in AnimateDiffSDXLPipeline.__init__.__code__.co_varnames and part is not None}  # fmt: skip
    of_sdxl["motion_adapter"] = tiny_models.motion_adapter(use_motion_mid_block=False)
    of_sdxl["scheduler"] = PCMScheduler(beta_schedule="linear", num_solver_steps=40)
    frames, visited = call(quiet(AnimateDiffSDXLPipeline(**of_sdxl)), guidance_scale=2.0)
    assert visited == [999, 749, 499, 249]
    assert frames.isfinite().all()


# video to video


@pytest.mark.parametrize(("steps", "strength"), [(4, 0.5), (4, 0.8), (8, 0.5), (10, 0.3), (3, 1.0)])
def test_video_to_video_takes_the_last_stops_of_its_steps(edit, steps, strength):
    stops = list(GRID.sampling_timesteps(steps))[steps - int(steps * strength) :]
    drawn = torch.Generator().manual_seed(1)
    got, visited = call(edit, video=clip(), num_inference_steps=steps, strength=strength, generator=drawn)
    assert visited == stops
    assert edit.num_timesteps == len(stops)

    drawn.manual_seed(1)
    pixels = edit.video_processor.preprocess_video(clip(), 16, 16)[0].transpose(0, 1)
    with torch.no_grad():
        known = edit.vae.encode(pixels).latent_dist.sample(drawn)[None] * edit.vae.config.scaling_factor
    alphas, sigmas = alphas_and_sigmas(edit.scheduler.alphas_cumprod)
    start = alphas[stops[0]] * known + sigmas[stops[0]] * torch.randn(known.shape, generator=drawn)
    torch.testing.assert_close(got, plain_loop(edit, start.transpose(1, 2).float(), stops), **CLOSE)


@pytest.mark.parametrize(("steps", "strength", "of"), [(4, 0.8, 5), (4, 0.5, 8), (2, 0.5, 4), (3, 0.7, 4)])
def test_enforced_steps_are_the_last_of_a_longer_schedule(edit, steps, strength, of):
    _, visited = call(edit, video=clip(), num_inference_steps=steps, strength=strength, enforce_inference_steps=True)
    assert visited == list(GRID.sampling_timesteps(of))[-steps:]


def test_video_to_video_takes_timesteps_too(edit):
    _, visited = call(edit, video=clip(), num_inference_steps=None, timesteps=[739, 239], strength=1.0)
    assert visited == [739, 239]


@pytest.mark.parametrize(("steps", "strength"), [(1, 0.8), (2, 0.4), (4, 0.0)])
def test_too_little_strength_for_a_step_is_refused(edit, steps, strength):
    with pytest.raises(ValueError, match="more steps or more strength"):
        call(edit, video=clip(), num_inference_steps=steps, strength=strength)


def test_more_enforced_steps_than_the_grid_has_are_refused(edit):
    with pytest.raises(ValueError, match="80 is outside the grid: 50 solver steps"):
        call(edit, video=clip(), strength=0.05, enforce_inference_steps=True)


# what pictures steer


def control_net():
    return ControlNetModel.from_unet(tiny_models.image_unet(), conditioning_embedding_out_channels=(16, 32))


def sparse_control_net():
    torch.manual_seed(3)
    net = SparseControlNetModel(
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"), block_out_channels=(32, 64), layers_per_block=1,
        cross_attention_dim=32, norm_num_groups=8, num_attention_heads=2, motion_num_attention_heads=4,
    ).eval()  # fmt: skip
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.1)  # they begin at zero
    return net


def test_sparse_control_from_one_picture(pipe):
    control = quiet(AnimateDiffSparseControlNetPipeline(**parts_of(pipe), controlnet=sparse_control_net()))
    first = {"conditioning_frames": [Image.new("RGB", (16, 16), "teal")], "controlnet_frame_indices": [0]}
    plain, _ = call(pipe, latents=noise(), guidance_scale=2.0)
    off, visited = call(control, latents=noise(), guidance_scale=2.0, controlnet_conditioning_scale=0.0, **first)
    assert visited == STOPS
    torch.testing.assert_close(off, plain, **CLOSE)
    steered, _ = call(control, latents=noise(), guidance_scale=2.0, **first)
    assert (steered - plain).abs().max() > 0.1


def test_control_nets_of_every_frame(pipe, edit):
    control = quiet(AnimateDiffControlNetPipeline(**parts_of(pipe), controlnet=control_net()))
    untrained, visited = call(control, latents=noise(), conditioning_frames=clip())  # adds nothing yet
    assert visited == STOPS
    torch.testing.assert_close(untrained, call(pipe, latents=noise())[0], **CLOSE)
    both = quiet(AnimateDiffVideoToVideoControlNetPipeline(**parts_of(pipe), controlnet=control_net()))
    settings = {"video": clip(), "strength": 0.5}
    untrained, visited = call(both, conditioning_frames=clip(), generator=torch.Generator().manual_seed(0), **settings)
    assert visited == [499, 239]
    torch.testing.assert_close(untrained, call(edit, generator=torch.Generator().manual_seed(0), **settings)[0], **CLOSE)


def ip_adapter(unet, width=8):
    """A file's tensors for the cross attention of the image model's layers; motion modules have none."""
    drawn = torch.Generator().manual_seed(4)
    text = unet.config.cross_attention_dim
    projection = {"proj.weight": torch.randn(4 * text, width, generator=drawn), "proj.bias": torch.zeros(4 * text),
                  "norm.weight": torch.ones(text), "norm.bias": torch.zeros(text)}  # fmt: skip
    of_pictures = [name for name in unet.attn_processors if "attn2" in name and "motion_modules" not in name]
    layers = {}
    for number, name in enumerate(of_pictures):
        channels = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        for part in "kv":
            layers[f"{2 * number + 1}.to_{part}_ip.weight"] = torch.randn(channels, text, generator=drawn) / 5
    return {"image_proj": projection, "ip_adapter": layers}


def test_ip_adapter_beside_a_video_adapter(pipe, files):
    load_pcm_lora(pipe, files[0])
    plain, _ = call(pipe, latents=noise(), guidance_scale=2.0)
    given = {"guidance_scale": 2.0, "ip_adapter_image_embeds": [torch.randn(2, 1, 8, generator=torch.Generator())]}
    pipe.load_ip_adapter(ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.0)
    off, visited = call(pipe, latents=noise(), **given)
    assert visited == STOPS
    torch.testing.assert_close(off, plain, **CLOSE)
    pipe.set_ip_adapter_scale(1.0)
    steered, _ = call(pipe, latents=noise(), **given)
    assert (steered - plain).abs().max() > 0.1

    other = text_to_video()
    other.load_ip_adapter(ip_adapter(other.unet), subfolder="", weight_name="", image_encoder_folder=None)
    load_pcm_lora(other, files[0])
    torch.testing.assert_close(call(other, latents=noise(), **given)[0], steered, **CLOSE)


def test_perturbed_attention_guidance(pipe):
    perturbed = quiet(AnimateDiffPAGPipeline(**parts_of(pipe), pag_applied_layers="mid_block.attentions"))
    off, visited = call(perturbed, latents=noise(), pag_scale=0.0)
    assert visited == STOPS
    torch.testing.assert_close(off, call(pipe, latents=noise())[0], **CLOSE)
    assert call(perturbed, latents=noise(), pag_scale=2.0)[0].isfinite().all()


def test_pia_keeps_to_the_stops():
    """Its UNet takes nine channels: nothing here trains an adapter for it."""
    parts = tiny_models.motion_parts(conv_in_channels=9)
    pia = quiet(PIAPipeline(**parts, scheduler=PCMScheduler(beta_schedule="linear")))
    frames, visited = call(pia, image=Image.new("RGB", (16, 16), "teal"), guidance_scale=2.0)
    assert visited == STOPS
    assert frames.isfinite().all()


# the files that a video run writes


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Whole, motion and spatial, of random weights."""
    path = tmp_path_factory.mktemp("video") / "pcm_video.safetensors"
    return write_video_adapter(path, tiny_models.random_lora(text_to_video().unet), SETTINGS, "random")


def test_whole_and_parts_draw_the_same_clip_on_the_betas_of_their_header(pipe, files):
    whole, motion, spatial = files
    plain, _ = call(pipe, latents=noise())
    pipe.scheduler = DDIMScheduler(**tiny_models.BETAS, clip_sample=False, steps_offset=1)
    assert load_pcm_lora(pipe, whole).beta_schedule == "linear"
    assert torch.equal(pipe.scheduler.betas, make_betas("linear", 0.00085, 0.012, 1000))
    adapted, visited = call(pipe, latents=noise())
    assert visited == STOPS
    assert (adapted - plain).abs().max() > 0.1
    torch.testing.assert_close(adapted, plain_loop(pipe, noise(), STOPS), **CLOSE)

    pipe.unload_lora_weights()
    for part in (motion, spatial):
        pipe.scheduler = DDIMScheduler(**tiny_models.BETAS, clip_sample=False, steps_offset=1)
        load_pcm_lora(pipe, part, adapter_name=part.stem)
        assert torch.equal(pipe.scheduler.betas, make_betas("linear", 0.00085, 0.012, 1000))
    pipe.set_adapters([motion.stem, spatial.stem])
    torch.testing.assert_close(call(pipe, latents=noise())[0], adapted, **CLOSE)


def test_a_pipeline_of_pictures_refuses_motion_modules_and_names_the_part_for_it(files, tmp_path):
    whole, motion, spatial = files
    pictures = tiny_models.image_pipeline()
    for file, says in ((whole, "into an AnimateDiffPipeline; its part for pictures is pcm_video_spatial"), (motion, "Animate")):
        with pytest.raises(ValueError, match=says):
            load_pcm_lora(pictures, file)
    assert pictures.get_list_adapters() == {}
    assert isinstance(pictures.scheduler, DDIMScheduler)
    load_pcm_lora(pictures, spatial)
    assert pictures.scheduler.config.beta_schedule == "linear"
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(whole.read_bytes())
    with pytest.raises(ValueError, match=r"into an AnimateDiffPipeline\.$"):
        load_pcm_lora(pictures, alone)


def test_motion_modules_of_another_motion_adapter_are_refused(files):
    """v2's middle block would be left out in silence."""
    without_middle = text_to_video(use_motion_mid_block=False)
    for file in files[:2]:
        with pytest.raises(ValueError, match=r"such as mid_block\.motion_modules.*another motion adapter"):
            load_pcm_lora(without_middle, file)
    assert without_middle.get_list_adapters() == {}


# longer clips


@pytest.mark.parametrize("scheme", ["flat", "pyramid"])
def test_free_noise_of_one_window_is_the_plain_pipeline(pipe, scheme):
    plain, _ = call(pipe, latents=noise())
    pipe.enable_free_noise(context_length=FRAMES, context_stride=4, weighting_scheme=scheme)
    torch.testing.assert_close(call(pipe, latents=noise())[0], plain, **CLOSE)


@pytest.mark.parametrize("frames", [26, 32])
def test_free_noise_draws_longer_clips_at_the_same_stops(pipe, frames):
    pipe.enable_free_noise(context_length=FRAMES, context_stride=4)
    drawn = torch.Generator().manual_seed(0)
    begun = pipe.prepare_latents(1, 4, frames, 16, 16, torch.float32, "cpu", drawn)
    # each window's noise is the first one's in another order
    own = {frame.numpy().tobytes() for frame in begun[0, :, :FRAMES].unbind(1)}
    assert len(own) == FRAMES
    for first in range(FRAMES, frames - 3, 4):
        assert {frame.numpy().tobytes() for frame in begun[0, :, first : first + 4].unbind(1)} < own
    got, visited = call(pipe, num_frames=frames, generator=drawn.manual_seed(0))
    assert got.shape == (1, 4, frames, SIDE, SIDE)
    assert visited == STOPS
    torch.testing.assert_close(got, plain_loop(pipe, begun, STOPS), **CLOSE)


def test_a_video_adapter_under_free_noise_acts_as_one_merged_before(pipe, files):
    """Enabled first: diffusers (0.42) cannot put LoRA layers into the blocks it makes."""
    long = {"num_frames": 16, "num_inference_steps": 2}
    pipe.enable_free_noise(context_length=FRAMES, context_stride=4)
    load_pcm_lora(pipe, files[0])
    adapted, _ = call(pipe, **long, generator=torch.Generator().manual_seed(0))
    merged = text_to_video()
    load_pcm_lora(merged, files[0])
    merged.fuse_lora()
    merged.unload_lora_weights()
    merged.enable_free_noise(context_length=FRAMES, context_stride=4)
    torch.testing.assert_close(call(merged, **long, generator=torch.Generator().manual_seed(0))[0], adapted, **CLOSE)

    pipe.enable_free_noise_split_inference()
    torch.testing.assert_close(call(pipe, **long, generator=torch.Generator().manual_seed(0))[0], adapted, **CLOSE)
    with pytest.raises(ValueError, match="before enable_free_noise_split_inference"):
        load_pcm_lora(pipe, files[0], adapter_name="later")


def test_free_noise_in_video_to_video_and_with_words_that_change(edit):
    edit.enable_free_noise(context_length=4, context_stride=2)
    got, visited = call(edit, video=clip(), strength=0.5, prompt={0: "a cat", 4: "a dog"}, guidance_scale=2.0)
    assert visited == [499, 239]
    assert got.isfinite().all()


def test_free_init_samples_all_steps_in_every_round(pipe):
    plain, _ = call(pipe, latents=noise())
    pipe.enable_free_init(num_iters=1)
    torch.testing.assert_close(call(pipe, latents=noise())[0], plain, **CLOSE)
    pipe.enable_free_init(num_iters=3)
    rounds, visited = call(pipe, latents=noise(), generator=torch.Generator().manual_seed(0))
    assert visited == STOPS * 3
    assert rounds.isfinite().all()
    pipe.enable_free_init(num_iters=2, use_fast_sampling=True)
    assert call(pipe, latents=noise())[1] == [999, 499, *STOPS]

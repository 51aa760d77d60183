"""PCMEditPipeline on the shapes models: what was measured is true of the saved file, in every form of input and output."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, AutoPipelineForInpainting, DDIMScheduler
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image

from pcm_scheduler import PCMEditPipeline, PCMScheduler, load_pcm_lora
from pcm_scheduler.operators import BlockMean, KeepRegion, Luminance, Together
from pcm_scheduler.pipelines.pictures import to_pictures

from model import HERE, XL_MODEL_DIR, load_pipeline
from scenes import TEST_SEED, caption, render, sample_scene

ADAPTER, XL_ADAPTER = (HERE / "adapters" / f"{name}pcm_4phase.safetensors" for name in ("", "xl_"))
GREY = 1 / 127.5  # a grey level, in units of [-1, 1]


def scene_picture(index=0):
    pixels = ((render([sample_scene(TEST_SEED, index)])[0] + 1) * 127.5).round().clamp(0, 255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def words(index=0):
    return caption(sample_scene(TEST_SEED, index), np.random.default_rng(0))


@pytest.fixture(scope="module")
def edit():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return PCMEditPipeline.from_pipe(pipe, load_pcm_lora(pipe, ADAPTER))


@pytest.fixture(scope="module")
def edit_xl():
    pipe = load_pipeline(XL_MODEL_DIR)
    pipe.set_progress_bar_config(disable=True)
    return PCMEditPipeline.from_pipe(pipe, load_pcm_lora(pipe, XL_ADAPTER))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def half_mask(picture):
    mask = Image.new("L", picture.size, 0)
    mask.paste(255, (picture.width // 2, 0, *picture.size))
    return mask


@pytest.mark.parametrize("name", ["edit", "edit_xl"])
@pytest.mark.parametrize("steps", [2, 4])
def test_every_exact_task_keeps_what_it_measured_in_eight_bits(name, steps, request):
    edit, picture = request.getfixturevalue(name), scene_picture()
    options = {"prompt": words(), "num_inference_steps": steps, "generator": seeded()}
    mask = half_mask(picture)
    [painted] = edit.inpaint(picture, mask, **options).images
    kept = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(painted)[kept], np.asarray(picture)[kept])
    assert not np.array_equal(np.asarray(painted), np.asarray(picture))

    [wide] = edit.outpaint(picture, left=16, bottom=8, **options).images
    assert wide.size == (144, 136)
    assert np.array_equal(np.asarray(wide)[:128, 16:], np.asarray(picture))

    grey = picture.convert("L")
    [coloured] = edit.colorize(grey, **options).images
    luminance = Luminance()
    error = luminance.residual(to_pictures(coloured), luminance.measure(to_pictures(grey)))
    assert error.item() <= GREY
    assert np.asarray(coloured).std(axis=2).max() > 10  # it has colours

    small = to_pictures(picture.resize((32, 32), Image.Resampling.BOX))
    [large] = edit.super_resolve(small / 2 + 0.5, factor=4, **options).images
    assert large.size == (128, 128)
    assert BlockMean(4).residual(to_pictures(large), small).item() <= GREY


@pytest.mark.parametrize("size", [(121, 133), (128, 96)])
def test_pictures_of_any_size(edit, size):
    picture = scene_picture().resize((size[1], size[0]))
    [painted] = edit.inpaint(picture, half_mask(picture), num_inference_steps=2, generator=seeded()).images
    assert painted.size == picture.size
    kept = np.asarray(half_mask(picture)) == 0
    assert np.array_equal(np.asarray(painted)[kept], np.asarray(picture)[kept])


def test_soft_masks_blend_in_the_free_region_only(edit):
    picture = scene_picture()
    ramp = np.tile(np.clip((np.arange(128) - 48) * 8, 0, 255).astype(np.uint8), (128, 1))  # black to 48, white from 80
    options = {"prompt": words(3), "num_inference_steps": 2}
    soft = np.asarray(edit.inpaint(picture, Image.fromarray(ramp), generator=seeded(), **options).images[0]).astype(float)
    given = np.asarray(picture).astype(float)
    assert np.array_equal(soft[:, :49], given[:, :49])
    moved = np.abs(soft - given).mean(axis=(0, 2))
    assert moved[49:56].mean() < moved[80:].mean()


def test_big_pictures_go_through_a_tiled_vae(edit):
    picture = scene_picture().resize((320, 192))
    edit.pipe.vae.enable_tiling()
    try:
        [painted] = edit.inpaint(picture, half_mask(picture), num_inference_steps=1, generator=seeded()).images
    finally:
        edit.pipe.vae.disable_tiling()
    kept = np.asarray(half_mask(picture)) == 0
    assert np.array_equal(np.asarray(painted)[kept], np.asarray(picture)[kept])


def test_the_hidden_half_is_drawn_as_the_prompt_says(edit):
    """Red there in the original, blue in the prompt."""
    prompt = "a large blue square on the right on a plain gray background"
    picture = Image.new("RGB", (128, 128), (135, 135, 140))
    [painted] = edit.inpaint(picture, half_mask(picture), prompt=prompt, generator=seeded()).images
    red, _, blue = np.asarray(painted)[48:80, 80:112].reshape(-1, 3).mean(axis=0)
    assert blue > 150
    assert blue > red + 60


def test_seeds_batches_and_forms_of_input_agree(edit):
    pictures, mask = [scene_picture(0), scene_picture(1)], half_mask(scene_picture())
    options = {"prompt": [words(0), words(1)], "num_inference_steps": 2}
    together = edit.inpaint(pictures, mask, generator=[seeded(1), seeded(2)], output_type="pt", **options).images
    for i, (picture, prompt) in enumerate(zip(pictures, options["prompt"], strict=True)):
        alone = edit.inpaint(picture, mask, prompt=prompt, num_inference_steps=2, generator=seeded(i + 1), output_type="pt")
        torch.testing.assert_close(together[i], alone.images[0], atol=2e-3, rtol=0)
    arrays = np.stack([np.asarray(picture) for picture in pictures])
    as_numpy = edit.inpaint(arrays, np.asarray(mask), generator=[seeded(1), seeded(2)], output_type="np", **options).images
    np.testing.assert_allclose(as_numpy, together.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    as_floats = torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255
    again = edit.inpaint(as_floats, mask, generator=[seeded(1), seeded(2)], output_type="pt", **options).images
    torch.testing.assert_close(again, together)
    several = edit.inpaint(pictures[0], mask, prompt=["a red star", "a blue ring", "a black heart"], num_inference_steps=1)
    assert len(several.images) == len(several.residual) == 3


def test_negative_prompts_and_guidance_change_the_picture(edit):
    picture, mask = scene_picture(), half_mask(scene_picture())
    options = {"prompt": "a red star", "num_inference_steps": 2, "output_type": "pt"}
    plain = edit.inpaint(picture, mask, generator=seeded(), **options).images
    guided = edit.inpaint(picture, mask, generator=seeded(), guidance_scale=3.0, **options).images
    negative = edit.inpaint(picture, mask, generator=seeded(), guidance_scale=3.0, negative_prompt="a star", **options).images
    assert (plain - guided).abs().max() > 0.05
    assert (negative - guided).abs().max() > 0.05


def test_callbacks_see_every_step_and_may_replace_the_latents(edit):
    seen = []

    def note(pipeline, step, timestep, state):
        seen.append((step, timestep, state["latents"].shape))
        return {"latents": torch.zeros_like(state["latents"])}

    options = {"num_inference_steps": 4, "generator": seeded(), "output_type": "pt"}
    changed = edit.inpaint(scene_picture(), half_mask(scene_picture()), callback_on_step_end=note, **options).images
    assert [(step, timestep) for step, timestep, _ in seen] == [(0, 799), (1, 739), (2, 499)]
    options["generator"] = seeded()
    assert not torch.equal(changed, edit.inpaint(scene_picture(), half_mask(scene_picture()), **options).images)


def test_an_inverted_picture_comes_back_nearly_as_the_vae_alone_gives_it(edit):
    """Up with the unguided teacher, down with its own grid: PSNR beside the VAE's own round trip; then with the adapter."""
    picture = scene_picture()
    truth = to_pictures(picture)

    def psnr(other):
        return -10 * ((other - truth) / 2).square().mean().log10().item()

    codec = edit.model.codec((128, 128))
    vae = psnr(codec.decode(codec.encode(truth)))
    noise = edit.invert(picture, prompt=words())
    with edit.model.teacher():
        adapted, edit.pipe.scheduler = edit.pipe.scheduler, PCMScheduler.from_config(edit.pipe.scheduler.config, num_phases=50)
        fine = edit.sample(noise, (128, 128), prompt=words(), num_inference_steps=50, guidance_scale=1.0, output_type="pt")
        edit.pipe.scheduler = adapted
    few = edit.sample(noise, (128, 128), prompt=words(), num_inference_steps=4, output_type="pt")
    back, four = psnr(fine.images * 2 - 1), psnr(few.images * 2 - 1)
    print(f"PSNR: VAE alone {vae:.2f} dB, inverted and back {back:.2f} dB, with the adapter in 4 steps {four:.2f} dB")
    assert back > 20
    assert four > 12  # the adapter holds the teacher's guidance, which the inversion leaves out


def test_the_adapter_is_after_an_inversion_as_it_was_before(edit):
    def predicted():
        with torch.no_grad():
            return edit.pipe.unet(torch.ones(1, 4, 16, 16), 500, torch.ones(1, 40, 160)).sample

    adapted = predicted()
    with edit.model.teacher():
        bare = predicted()
        edit.invert(scene_picture())
        assert torch.equal(predicted(), bare)
    assert torch.equal(predicted(), adapted)
    assert not torch.equal(adapted, bare)


def test_a_unet_without_an_adapter_is_no_teacher_of_its_own():
    """One that was trained whole, or has an adapter in its weights, would be run backwards through its own jumps."""
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    settings = load_pcm_lora(pipe, ADAPTER)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    with pytest.warns(UserWarning, match="no adapter to switch off"):
        PCMEditPipeline(pipe, settings).invert(scene_picture())


@pytest.mark.parametrize("steps", [1, 4])
def test_sampling_from_noise_is_what_the_pipeline_itself_draws(edit, steps):
    """Nothing is measured, so nothing goes through pixels before the end."""
    noise, options = edit.noise(2, (128, 128), seeded()), {"num_inference_steps": steps, "output_type": "pt"}
    ours = edit.sample(noise, (128, 128), prompt=[words(0), words(1)], guidance_scale=1.5, **options).images
    theirs = edit.pipe([words(0), words(1)], latents=noise, guidance_scale=1.5, height=128, width=128, **options).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("negative", ["", "blurry"])
def test_guidance_of_sdxl_is_away_from_what_the_pipeline_itself_guides_away_from(edit_xl, negative):
    """Which is zeros where no negative prompt is given, and not the embedding of no words."""
    noise, options = (
        edit_xl.noise(1, (128, 128), seeded()),
        {"guidance_scale": 3.0, "num_inference_steps": 2, "output_type": "pt"},
    )
    ours = edit_xl.sample(noise, (128, 128), prompt=words(), negative_prompt=negative, **options).images
    theirs = edit_xl.pipe(words(), latents=noise, negative_prompt=negative or None, height=128, width=128, **options).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_sixteen_bits_of_grey_are_read_as_such_and_what_states_no_range_is_refused():
    ramp = np.linspace(0, 65535, 64 * 64).round().reshape(64, 64)
    sixteen = to_pictures(Image.fromarray(ramp.astype(np.uint16)))
    eight = to_pictures(Image.fromarray((ramp / 257).round().astype(np.uint8)))
    assert torch.equal(sixteen, eight)
    for kind in (np.int32, np.float32):
        with pytest.raises(ValueError, match="does not say what white is"):
            to_pictures(Image.fromarray(ramp.astype(kind)))


def test_interpolation_ends_at_its_ends_and_variation_stays_near(edit):
    options = {"prompt": "a medium red star in the center", "num_inference_steps": 4, "output_type": "pt"}
    way = edit.interpolate(3, 4, count=4, size=(128, 128), **options).images
    for seed, end in ((3, way[0]), (4, way[-1])):
        alone = edit.sample(edit.noise(1, (128, 128), seeded(seed)), (128, 128), **options).images[0]
        torch.testing.assert_close(end, alone, atol=2e-3, rtol=0)
    picture = scene_picture()
    near = edit.vary(picture, amount=0.1, count=2, generator=seeded(), **options).images
    far = edit.vary(picture, amount=1.0, count=2, generator=seeded(), **options).images
    again = edit.vary(picture, amount=0.0, count=1, generator=seeded(), **options).images
    assert (near - again).abs().mean() < (far - again).abs().mean()


def test_interpolation_takes_seeds_and_pictures_in_any_order_and_a_prompt_for_each_result(edit):
    picture, options = scene_picture(), {"num_inference_steps": 1, "output_type": "pt"}
    there = edit.interpolate(np.int64(3), picture, count=2, prompt=words(), **options).images
    back = edit.interpolate(picture, 3, count=2, size=(128, 128), prompt=words(), **options).images
    torch.testing.assert_close(there, back.flip(0), atol=1e-4, rtol=0)
    told = edit.interpolate(picture, picture, count=3, prompt=["a red star", "a blue star", "a red ring"], **options).images
    assert len({image.sum().item() for image in told}) == 3
    for ends, size in (((picture, picture.resize((64, 64))), None), ((3, picture), (64, 64))):
        with pytest.raises(ValueError, match=r"one size .*\(64, 64\), \(128, 128\)"):
            edit.interpolate(*ends, size=size)
    with pytest.raises(ValueError, match="say the size"):
        edit.interpolate(3, 4)


def test_one_picture_in_several_words(edit):
    picture, prompts = scene_picture(), ["a red star", "a blue ring"]
    options = {"num_inference_steps": 1, "output_type": "pt", "prompt": prompts}
    assert len(edit.rewrite(picture, **options).images) == 2
    assert len(edit.vary(picture, count=2, **options).images) == 2


def test_a_tiny_autoencoder_serves_too():
    """As people have it in pipelines to save memory; its encoder gives latents and no distribution."""
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    settings = load_pcm_lora(pipe, ADAPTER)
    pipe.vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    picture = scene_picture()
    result = PCMEditPipeline(pipe, settings).inpaint(picture, half_mask(picture), num_inference_steps=1).images[0]
    kept = (0, 0, picture.width // 2, picture.height)
    assert np.array_equal(np.asarray(result.crop(kept)), np.asarray(picture.crop(kept)))


def test_a_fused_adapter_is_fused_again_after_the_teacher():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    edit = PCMEditPipeline(pipe, load_pcm_lora(pipe, ADAPTER))
    pipe.fuse_lora()
    layers = [module for module in pipe.unet.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer.get_base_layer().weight.clone() for layer in layers]
    edit.invert(scene_picture())
    assert all(layer.merged for layer in layers)
    for layer, weight in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.get_base_layer().weight, weight, rtol=0, atol=1e-5)


def test_there_is_no_teacher_beneath_a_fused_adapter_whose_weights_are_elsewhere():
    """Under sequential offloading they are on the meta device between calls, where nothing can be taken out of them."""
    pipe = load_pipeline()
    edit = PCMEditPipeline(pipe, load_pcm_lora(pipe, ADAPTER))
    pipe.fuse_lora()
    pipe.unet.to("meta")
    with pytest.raises(ValueError, match="offloaded"), edit.model.teacher():
        pass


def test_denoising_takes_noise_out(edit):
    truth = to_pictures(scene_picture())
    noisy = (truth + 30 / 127.5 * torch.randn(truth.shape, generator=seeded())).clamp(-1, 1) / 2 + 0.5
    before = (noisy * 2 - 1 - truth).square().mean()
    for level in (30.0, None):
        [found] = edit.denoise(noisy, level, prompt=words(), generator=seeded(), output_type="pt").images
        after = (found * 2 - 1 - truth).square().mean()
        assert after < 0.5 * before


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_zero_terminal_snr_is_refused_only_where_an_epsilon_prediction_starts_at_it(prediction_type):
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    settings = load_pcm_lora(pipe, ADAPTER)
    betas = {"rescale_betas_zero_snr": True, "prediction_type": prediction_type}
    pipe.scheduler = PCMScheduler.from_config(pipe.scheduler.config, **betas)
    edit, picture = PCMEditPipeline(pipe, settings), scene_picture()
    options = {"generator": seeded(), "num_inference_steps": 2, "output_type": "pt"}
    assert edit.denoise(picture, 30.0, **options).images.isfinite().all()
    assert edit.colorize(picture, **options).images.isfinite().all()
    noise = edit.noise(1, (128, 128), seeded())
    if prediction_type == "epsilon":
        with pytest.raises(ValueError, match=r"zero terminal SNR.*strength < 1"):
            edit.sample(noise, (128, 128), **options)
    else:
        # wherever it starts, the pipeline itself draws the same
        ours = edit.sample(noise, (128, 128), guidance_scale=1.0, **options).images
        options = {"latents": noise, "num_inference_steps": 2, "output_type": "pt", "guidance_scale": 1.0}
        torch.testing.assert_close(ours, pipe("", height=128, width=128, **options).images, rtol=0, atol=1e-4)
        assert edit.invert(picture).isfinite().all()


def test_strokes_keep_more_of_the_sketch_at_low_strength(edit):
    sketch = Image.new("RGB", (128, 128), (150, 205, 240))
    sketch.paste((222, 38, 38), (44, 44, 84, 84))
    options = {"prompt": "a large red heart in the center on a plain sky background", "output_type": "pt"}
    target = to_pictures(sketch)[0] / 2 + 0.5
    kept = [
        (edit.stroke(sketch, strength, generator=seeded(), **options).images[0] - target).abs().mean().item()
        for strength in (0.2, 0.9)
    ]
    assert kept[0] < kept[1]


def test_several_measurements_hold_at_once(edit):
    """Colourise a picture and put a coloured stamp into it."""
    picture = to_pictures(scene_picture())
    stamp = torch.zeros(1, 1, 128, 128, dtype=torch.bool)
    stamp[..., :32, :32] = True
    operator = Together(KeepRegion(stamp), BlockMean(16))
    y = operator.measure(picture)
    result = edit(operator, y, (128, 128), num_inference_steps=2, generator=seeded(), output_type="pt")
    assert operator.residual(result.images * 2 - 1, y).item() < 0.5 * GREY
    assert result.residual[0] < 0.5


@pytest.mark.parametrize("numbers", [(1, 2), (2, 1)])
def test_one_of_several_measurements_may_be_of_one_picture_for_all(edit, numbers):
    picture, operator = to_pictures([scene_picture()] * 2), Together(Luminance(), BlockMean(16))
    y = tuple(part[:number] for part, number in zip(operator.measure(picture), numbers, strict=True))
    drawn = edit(operator, y, (128, 128), num_inference_steps=1, output_type="pt").images
    assert len(drawn) == 2
    assert operator.residual(drawn * 2 - 1, operator.measure(picture)).max() < 0.5 * GREY
    with pytest.raises(ValueError, match="2 pictures do not fit 3"):
        edit(operator, (y[0].expand(2, -1, -1, -1), y[1][:1].expand(3, -1, -1, -1)), (128, 128))


@pytest.mark.parametrize("count", [2, 3])
def test_a_list_of_generators_has_one_for_all_pictures_or_one_for_each(edit, count):
    pictures = [scene_picture()] * (4 if count == 2 else 2)
    generators = [seeded() for _ in range(count)]
    for draw in (
        lambda **given: edit.inpaint(pictures, half_mask(scene_picture()), **given),
        lambda **given: edit.vary(pictures[0], count=len(pictures), **given),
        lambda **given: edit.noise(len(pictures), (128, 128), **given),
    ):
        with pytest.raises(ValueError, match=f"{count} generators do not fit {len(pictures)} pictures"):
            draw(generator=generators)
    assert len(edit.noise(len(pictures), (128, 128), generators[:1])) == len(pictures)


@pytest.mark.parametrize(
    ("task", "arguments", "says"),
    [
        ("inpaint", (Image.new("L", (64, 128)),), "one size"),
        ("inpaint", (Image.new("L", (128, 128)),), "mask"),
        ("inpaint", (Image.new("L", (128, 128), 255),), "mask"),
        ("super_resolve", (1,), "factor"),
        ("super_resolve", (2, "lanczos"), "mean or antialias"),
        ("outpaint", (), "at least one"),
        ("outpaint", (-8,), "0 or more"),
        ("denoise", (300.0,), "255"),
        ("denoise", (0.0,), "255"),
        ("denoise", (-1.0,), "255"),
        ("stroke", (1.5,), "strength"),
        ("vary", (2.0,), "amount"),
        ("interpolate", (scene_picture(), 1), "at least 2"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(edit, task, arguments, says):
    with pytest.raises(ValueError, match=says):
        getattr(edit, task)(scene_picture(), *arguments)


def test_pictures_and_options_that_cannot_work_are_refused(edit):
    mask = half_mask(scene_picture())
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        edit.inpaint(to_pictures(scene_picture()) * 3, mask)
    with pytest.raises(ValueError, match="4 channels"):
        edit.inpaint(torch.rand(4, 128, 128), mask)
    with pytest.raises(ValueError, match="one size"):
        edit.inpaint([scene_picture(), scene_picture().resize((64, 64))], mask)
    with pytest.raises(ValueError, match="do not fit"):
        edit.inpaint([scene_picture()] * 2, mask, prompt=["a", "b", "c"])
    with pytest.raises(ValueError, match="to invert"):
        edit.invert(scene_picture(), prompt=["a", "b"])
    with pytest.raises(ValueError, match="are drawn"):
        edit.inpaint(scene_picture(), mask, noise=torch.randn(2, 4, 16, 16))
    with pytest.raises(ValueError, match="output_type"):
        edit.inpaint(scene_picture(), mask, output_type="jpeg")
    with pytest.raises(ValueError, match="num_inference_steps"):
        edit.inpaint(scene_picture(), mask, num_inference_steps=51)
    with pytest.raises(ValueError, match="eta"):
        edit.inpaint(scene_picture(), mask, eta=2.0)
    pipe = load_pipeline()
    assert isinstance(pipe.scheduler, DDIMScheduler)
    with pytest.raises(ValueError, match="load_pcm_lora"):
        PCMEditPipeline.from_pipe(pipe)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"num_inference_steps": 51}, ValueError, "num_inference_steps"),
        ({"output_type": "jpeg"}, ValueError, "output_type"),
        ({"eta": 2.0}, ValueError, "eta"),
        ({"negative_prompt": ["a", "b", "c"]}, ValueError, "do not fit 3"),
        ({"steps": 4}, TypeError, "steps"),
    ],
)
def test_what_goes_through_the_noise_is_refused_before_the_teacher_runs(edit, monkeypatch, options, error, says):
    """Which takes as many steps as the solver has, once for every picture."""
    monkeypatch.setattr(edit, "_invert", lambda *_: pytest.fail("the teacher ran"))
    picture = scene_picture()
    for draw in (
        lambda: edit.rewrite([picture] * 2, "a red star", **options),
        lambda: edit.interpolate(picture, 3, count=2, **options),
        lambda: edit.vary(picture, count=2, **options),
    ):
        with pytest.raises(error, match=says):
            draw()


def test_ends_and_prompts_of_other_numbers_are_refused_before_the_teacher_runs(edit, monkeypatch):
    monkeypatch.setattr(edit, "_invert", lambda *_: pytest.fail("the teacher ran"))
    picture = scene_picture()
    with pytest.raises(ValueError, match="2 prompts do not fit 3"):
        edit.rewrite([picture] * 3, ["a", "b"])
    with pytest.raises(ValueError, match="3 prompts do not fit 5"):
        edit.interpolate(picture, picture, count=5, prompt=["a", "b", "c"])
    with pytest.raises(ValueError, match="ends are of 2 and 3 pictures"):
        edit.interpolate([picture] * 2, [picture] * 3)
    with pytest.raises(ValueError, match="3 prompts do not fit 4"):
        edit.vary(picture, count=4, prompt=["a", "b", "c"])


def test_diffusers_own_inpainting_pipeline_works_with_the_scheduler(edit):
    """For people who stay there: the pasted region is exact with its overlay."""
    pipe = AutoPipelineForInpainting.from_pipe(edit.pipe)
    pipe.set_progress_bar_config(disable=True)
    picture, mask = scene_picture(), half_mask(scene_picture())
    painted = pipe(
        words(), image=picture, mask_image=mask, height=128, width=128, strength=1.0, num_inference_steps=4, guidance_scale=1.0,
        generator=seeded(),
    ).images[0]  # fmt: skip
    pasted = pipe.image_processor.apply_overlay(mask, picture, painted)
    kept = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(pasted)[kept], np.asarray(picture)[kept])

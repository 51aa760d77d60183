"""Phased consistency for clips: tiny random motion modules in a tiny random image model."""

from __future__ import annotations

import dataclasses

import pytest
import tiny_models
import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter
from safetensors.torch import load_file, save_file, save_model
from training_runs import losses_of, stop_at

from lora_training.backbones import load_backbone
from lora_training.backbones.animatediff import load_motion_adapter
from lora_training.config import (
    AdversarialConfig,
    ClipConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
    ValidationConfig,
)
from lora_training.critic_features import cropped, draw_corners, implied_x0, pyramid
from lora_training.data.latent_cache import Bucket, Example, TrainingData, empty_conditioning
from lora_training.discriminator import AdversarialLoss, Critic
from lora_training.distances import build_distance
from lora_training.dry_run import describe
from lora_training.frames import batch_as_frames, draw_noise, frames_as_batch
from lora_training.loop import Interrupted, Run
from lora_training.objectives import ConsistencyObjective, total
from lora_training.students import Adapter
from pcm_scheduler import PCMScheduler, export_clip, load_pcm_lora, load_pcm_unet, read_settings
from pcm_scheduler.lora_file import AdapterSettings, adapter_tensors, read_lora, write_video_adapter
from pcm_scheduler.lora_layouts import is_motion, stacked
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


WITH_MOTION = ModelConfig(family="animatediff", motion_adapter="m")
CLIPS = DataConfig(clips=ClipConfig())
read_from_disk = Run._load_data


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


def config_for(folders, output, steps=2, model=None, data=None, **settings):
    return TrainConfig(
        model=model or model_config(folders),
        data=data or CLIPS,
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


def with_adapter(folders, seed=0, image_adapter="", **lora):
    """A backbone with an adapter of random weights that fp16 holds exactly, halved too."""
    backbone = load_backbone(model_config(folders))
    adapter = Adapter(backbone, LoraConfig(**({"rank": 4, "alpha": 2.0} | lora)), seed, image_adapter=image_adapter)
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters.values():
            p.copy_((torch.randn(p.shape, generator=drawn) * 100).round() / 1024)
    return backbone, adapter


def tensors_of(adapter):
    return adapter_tensors(adapter.state(), adapter.alphas())


def test_what_is_written_is_what_was_trained_bit_for_bit_in_every_file(folders, tmp_path):
    backbone, adapter = with_adapter(folders)
    whole, motion, spatial = write_video_adapter(tmp_path / "a.safetensors", tensors_of(adapter), SETTINGS, "A")
    assert (motion.name, spatial.name) == ("a_motion.safetensors", "a_spatial.safetensors")
    told = inputs(backbone)
    student = predicted(backbone.unet, *told)
    with backbone.teacher():
        teacher = predicted(backbone.unet, *told)
    assert (student - teacher).abs().max() > 1e-2

    pipe = pipeline(folders)
    assert torch.equal(predicted(pipe.unet, *told), teacher)
    pipe.load_lora_weights(str(tmp_path), weight_name=whole.name)  # diffusers on its own
    assert torch.equal(predicted(pipe.unet, *told), student)
    pipe.unload_lora_weights()
    load_pcm_lora(pipe, whole)
    assert torch.equal(predicted(pipe.unet, *told), student)
    pipe.unload_lora_weights()
    for part in (motion, spatial):
        assert read_settings(part) == SETTINGS
        load_pcm_lora(pipe, part, adapter_name=part.stem)
    pipe.set_adapters([motion.stem, spatial.stem])
    assert torch.equal(predicted(pipe.unet, *told), student)


def in_animatediffs_layout(adapter):
    """A diffusers motion adapter's tensors under AnimateDiff's own names, positions beside them."""
    tensors = {}
    for name, tensor in adapter.state_dict().items():
        block, rest = name.split(".motion_modules.")
        number, rest = rest.split(".", 1)
        if rest.endswith("pos_embed.pe"):
            continue
        for ours, theirs in (("attn1", "attention_blocks.0"), ("attn2", "attention_blocks.1"), ("norm1", "norms.0"),
                             ("norm2", "norms.1"), ("norm3", "ff_norm")):  # fmt: skip
            rest = rest.replace(f".{ours}.", f".{theirs}.")
        tensors[f"{block}.motion_modules.{number}.temporal_transformer.{rest}"] = tensor.contiguous()
    for name in [name for name in tensors if name.endswith("to_q.weight")]:
        positions = torch.zeros(1, adapter.config.motion_max_seq_length, tensors[name].shape[1])
        tensors[name.replace("to_q.weight", "pos_encoder.pe")] = positions
    return tensors


def test_the_motion_file_has_the_names_that_animatediff_evolved_turns_into_a_motion_modules(folders, tmp_path):
    _, adapter = with_adapter(folders, parts="motion")
    _, path = write_video_adapter(tmp_path / "a.safetensors", tensors_of(adapter), SETTINGS, "A")
    stored = load_file(path)
    first = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor.to_q_lora"
    assert {f"{first}.down.weight", f"{first}.up.weight"} <= stored.keys()
    assert all(tensor.ndim == 2 for tensor in stored.values())
    module = in_animatediffs_layout(MotionAdapter.from_pretrained(folders / "motion"))
    down = {key for key in stored if ".down." in key}
    assert stored.keys() == down | {key.replace(".down.", ".up.") for key in down}
    named = {key.replace("processor.", "").replace("_lora", "").replace("down.", "") for key in down}
    named = {key if "to_out.0." in key else key.replace("to_out.", "to_out.0.") for key in named}
    assert named <= module.keys()
    assert len(named) == len(down) == len(adapter.alphas())
    key = "mid_block.motion_modules.0.transformer_blocks.0.attn2.to_out.0"
    inner = read_lora(path).modules[key.replace(".", "_")]
    ours = adapter.state()[f"{key}.lora_B.weight"] @ adapter.state()[f"{key}.lora_A.weight"] * (2.0 / 4)
    torch.testing.assert_close(inner["up"].float() @ inner["down"].float(), ours)


@pytest.mark.parametrize("middle", [False, True], ids=["v3", "v2"])
def test_motion_modules_in_animatediffs_own_layout_are_diffusers(folders, tmp_path, middle):
    own = {"motion_norm_num_groups": 32, "motion_num_attention_heads": 8, "use_motion_mid_block": middle}
    adapter = tiny_models.motion_adapter(**own, motion_max_seq_length=24)
    path = tmp_path / "mm.safetensors"
    save_file(in_animatediffs_layout(adapter), path)
    loaded = load_motion_adapter(str(path))
    assert loaded.config.use_motion_mid_block == middle
    assert loaded.config.motion_max_seq_length == 24
    assert loaded.state_dict().keys() == adapter.state_dict().keys()
    assert all(torch.equal(tensor, adapter.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    backbone = load_backbone(model_config(folders, motion_adapter=str(path)))
    with pytest.raises(ValueError, match="24 positions"):
        backbone.check_sample((4, 25, SIDE, SIDE))


def test_what_is_no_motion_adapter_of_this_model_is_refused(folders, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    tiny_models.motion_adapter(motion_layers_per_block=2).save_pretrained(tmp_path / "deeper")
    cases = {
        "nowhere.safetensors": "does not exist",
        str(tmp_path / "other.safetensors"): "AnimateDiff's own layout",
        str(tmp_path): "no config.json",
        str(tmp_path / "deeper"): "does not fit",
    }
    for path, says in cases.items():
        with pytest.raises(ValueError, match=says):
            load_backbone(model_config(folders, motion_adapter=path))
    tiny_models.sdxl_pipeline().save_pretrained(tmp_path / "sdxl")
    with pytest.raises(ValueError, match="this UNet is of sdxl"):
        load_backbone(model_config(folders, path=str(tmp_path / "sdxl")))
    with pytest.raises(ValueError, match="holds pictures"):
        load_backbone(model_config(folders)).check_sample((4, SIDE, SIDE))


@pytest.fixture(scope="module")
def image_adapter(folders):
    """A PCM LoRA of the image model, as the image trainer writes it."""
    _, adapter = with_adapter(folders, seed=5, rank=2, alpha=1.0, parts="spatial")
    path = folders / "image.safetensors"
    settings = dataclasses.replace(SETTINGS, base_model="sd15", beta_schedule=None, beta_start=None, beta_end=None)
    assert write_video_adapter(path, tensors_of(adapter), settings, "image") == (path,)
    return path


@pytest.mark.parametrize("parts", ["motion", "all"])
def test_the_student_is_the_teacher_with_a_frozen_image_adapter_and_its_own(folders, tmp_path, image_adapter, parts):
    backbone, adapter = with_adapter(folders, image_adapter=image_adapter, parts=parts)
    told = inputs(backbone)
    student = predicted(backbone.unet, *told)
    pipe = pipeline(folders)
    with backbone.teacher():
        assert torch.equal(predicted(backbone.unet, *told), predicted(pipe.unet, *told))
    assert torch.equal(predicted(backbone.unet, *told), student)
    trainable = {name for name, p in backbone.unet.named_parameters() if p.requires_grad}
    assert trainable == set(adapter.parameters)

    output = write_video_adapter(tmp_path / "a.safetensors", stacked(adapter.image, tensors_of(adapter)), SETTINGS, "A")[0]
    load_pcm_lora(pipe, output)
    torch.testing.assert_close(predicted(pipe.unet, *told), student, atol=1e-4, rtol=0)  # fp16 and other orders of adding
    load_pcm_lora(pipe, image_adapter)
    with torch.no_grad():
        for p in adapter.parameters.values():
            p.zero_()
    assert torch.equal(predicted(pipe.unet, *told), predicted(backbone.unet, *told))


def test_a_video_adapter_goes_on_from_an_image_adapter_or_from_its_own_kind(folders, tmp_path, image_adapter):
    _, random = with_adapter(folders, rank=2, alpha=1.0)
    motion = {name: tensor for name, tensor in random.state().items() if is_motion(name)}
    random.load(str(image_adapter))
    stored = read_lora(image_adapter)
    for name, tensor in random.state().items():
        module = name.rpartition(".lora_")[0].replace(".", "_")
        expected = motion[name] if is_motion(name) else stored.modules[module]["down" if "lora_A" in name else "up"].float()
        assert torch.equal(tensor, expected), name
    whole = write_video_adapter(tmp_path / "a.safetensors", tensors_of(random), SETTINGS, "A")[0]
    _, again = with_adapter(folders, seed=9, rank=2, alpha=1.0)
    again.load(str(whole))
    assert all(torch.equal(tensor, random.state()[name]) for name, tensor in again.state().items())
    _, elsewhere = with_adapter(folders, rank=2, parts="motion")
    with pytest.raises(ValueError, match="modules that this adapter has not"):
        elsewhere.load(str(image_adapter))


def test_a_stopped_run_over_an_image_adapter_goes_on_bit_for_bit(folders, tmp_path, monkeypatch, image_adapter):
    def config(name):
        made = config_for(
            folders,
            tmp_path / f"{name}.safetensors",
            steps=4,
            model=model_config(folders, image_adapter=str(image_adapter)),
            lora=LoraConfig(rank=4, parts="motion", dropout=0.1),
            adversarial=AdversarialConfig(weight=0.1, heads=1, temporal_heads=1, width=8, learning_rate=1e-3),
            gradient_checkpointing=True,
        )
        made.objective = dataclasses.replace(made.objective, target_ema=0.9, shared_noise=0.3)
        return made

    losses = losses_of(monkeypatch)
    straight = Run(config("straight")).train()
    expected = losses[:]
    losses.clear()
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(Interrupted, match="after step 2"):
            Run(config("resumed")).train()
    resumed = Run(config("resumed"))
    dry = "\n".join(describe(resumed))
    assert "step-00000002" in dry
    assert "8 frames of 16 x 16" in dry
    assert "1 head(s) and 1 along frames" in dry
    output = resumed.train()
    assert losses == expected
    for part in ("", "_motion", "_spatial"):
        files = [load_file(path.with_name(f"{path.stem}{part}.safetensors")) for path in (straight, output)]
        assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())
    image = read_lora(image_adapter).modules
    kept = read_lora(output.with_name("resumed_spatial.safetensors")).modules
    assert all(torch.equal(kept[name][part], tensor) for name, parts in image.items() for part, tensor in parts.items())
    card = (tmp_path / "resumed.run" / "README.md").read_text()
    assert "AnimateDiffPipeline" in card
    assert "linear betas" in card


def test_clips_begin_on_the_teachers_trajectories_from_noise_that_frames_share(folders, tmp_path):
    config = config_for(folders, tmp_path / "a.safetensors")
    config.objective = ObjectiveConfig(
        name="direct", starts="teacher", num_solver_steps=8, shared_noise=1.0, guidance_scale=3.0, trajectories_kept=2
    )
    training = Run(config)
    training.train()
    begun, told = training.trajectories.draw(3, torch.Generator().manual_seed(0), torch.device("cpu"))
    noise, end = begun.at(torch.full((3,), 8)), begun.at(torch.zeros(3, dtype=torch.long))
    assert noise.shape == end.shape == (3, 4, FRAMES, SIDE, SIDE)
    assert len(told["prompt_embeds"]) == 3
    assert torch.equal(noise, noise[:, :, :1].expand_as(noise))
    assert not torch.equal(end, end[:, :, :1].expand_as(end)), "motion modules tell frames apart"


def test_checkpointing_covers_motion_modules_and_changes_no_gradient(folders):
    gradients, calls = [], []
    for checkpointing in (False, True):
        backbone, adapter = with_adapter(folders, parts="motion")
        if checkpointing:
            backbone.enable_gradient_checkpointing()
        inner = backbone.unet.down_blocks[0].motion_modules[0].transformer_blocks[0].ff
        seen = []
        inner.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        sample, timestep, embeds = inputs(backbone, count=1)
        backbone.predict(sample, timestep, {"prompt_embeds": embeds}).square().mean().backward()
        gradients.append([p.grad for p in adapter.parameters.values()])
        calls.append(len(seen))
    assert calls == [1, 2]
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_shared_noise_has_unit_variance_and_frames_that_correlate_as_told():
    shape, drawn = (64, 4, 6, 8, 8), torch.Generator().manual_seed(0)
    noise = draw_noise(shape, 0.3, drawn)
    torch.testing.assert_close(noise.var(), torch.tensor(1.0), atol=0.02, rtol=0)
    frames = noise.transpose(1, 2).flatten(2).transpose(0, 1).flatten(1)
    correlation = torch.corrcoef(frames)
    off = correlation[~torch.eye(6, dtype=torch.bool)]
    torch.testing.assert_close(off, torch.full_like(off, 0.3), atol=0.03, rtol=0)
    everywhere = draw_noise(shape, 1.0, drawn)
    assert torch.equal(everywhere, everywhere[:, :, :1].expand(shape))
    plain = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    assert torch.equal(draw_noise(shape, 0.0, torch.Generator().manual_seed(7)), plain)


@pytest.mark.parametrize("halvings", [0, 1])
def test_heads_judge_frames_one_by_one_and_temporal_heads_their_order(halvings):
    torch.manual_seed(0)
    features = [torch.randn(3, 16, 5, 4, 4), torch.randn(3, 8, 5, 2, 2)]
    mixed = [feature[:, :, [3, 0, 4, 1, 2]] for feature in features]
    critic = Critic([16, 8], heads=2, width=8, halvings=halvings, temporal_heads=1)
    with torch.no_grad():
        ours, theirs = critic(features), critic(mixed)
    assert ours.shape == (3, 6)
    torch.testing.assert_close(ours[:, :4], theirs[:, :4])
    assert (ours[:, 4:] - theirs[:, 4:]).abs().min() > 1e-4
    with torch.no_grad():
        alone = torch.stack([critic([f[:, :, i : i + 1] for f in features])[:, :4] for i in range(5)]).mean(0)
    torch.testing.assert_close(ours[:, :4], alone)


def test_the_students_gradient_through_decoded_clips(folders):
    """Beside a pass, frame by frame, in which all flows back at once."""
    backbone, adapter = with_adapter(folders, parts="motion")
    latents, _, embeds = inputs(backbone)
    told, empty = {"prompt_embeds": embeds}, {"prompt_embeds": embeds[:1]}
    objective = ConsistencyObjective(backbone, PhaseGrid.even(4), ObjectiveConfig(guidance_scale=1.0))
    config = AdversarialConfig(weight=0.5, space="pixel", crop=6, heads=1, temporal_heads=1, width=8)
    adversarial = AdversarialLoss(backbone, config, seed=0, resolution=16)

    def drawn():
        return torch.Generator().manual_seed(0)

    total(adversarial(objective.land(latents, told, empty, drawn()), objective, told, drawn())).backward()
    ours = {name: p.grad.clone() for name, p in adapter.parameters.items()}
    assert all(p.grad is not None for p in adversarial.parameters.values())
    for p in (*adapter.parameters.values(), *adversarial.parameters.values()):
        p.grad = None
    landing = objective.land(latents, told, empty, drawn())
    corners = draw_corners(latents.shape, 6, drawn())
    x0 = implied_x0(landing.landed, landing, objective) / backbone.vae.config.scaling_factor
    frames = [backbone.vae.decode(cropped(x0[:, :, i], 6, corners)).sample for i in range(FRAMES)]
    maps = [torch.stack(several, dim=2) for several in zip(*map(pyramid, frames), strict=True)]
    (-0.5 * adversarial.critic(maps).mean()).backward()
    for name, gradient in ours.items():
        expected = adapter.parameters[name].grad
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert max(gradient.abs().max() for gradient in ours.values()) > 0


def test_lpips_of_clips_is_that_of_their_frames(folders, tmp_path):
    lpips = pytest.importorskip("lpips")
    path = tmp_path / "lpips.safetensors"
    save_model(lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False), path)
    backbone = load_backbone(model_config(folders))
    measure = build_distance(ObjectiveConfig(distance="lpips", lpips_weights=str(path)), backbone)
    one, alpha = inputs(backbone, count=1)[0], torch.full((1, 1, 1, 1, 1), 0.9)
    other = one + 0.1
    frames = [measure(other[:, :, i], one[:, :, i], alpha[:, :, 0]) for i in range(FRAMES)]
    assert frames[0] != 0
    torch.testing.assert_close(measure(other, one, alpha), torch.stack(frames).mean())


def test_clips_go_through_the_vae_in_parts(folders):
    backbone = load_backbone(model_config(folders))
    clips = torch.rand(2, 3, FRAMES, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = backbone.encode_clips(clips, frames_at_once=3)
    assert mean.shape == std.shape == (2, 4, FRAMES, SIDE, SIDE)
    torch.testing.assert_close(mean[1, :, 5], backbone.encode_images(clips[1:, :, 5])[0][0])
    latents = mean.clone().requires_grad_()
    decoded = backbone.decode_latents(latents, at_once=5)
    assert decoded.shape == clips.shape
    torch.testing.assert_close(decoded, backbone.decode_latents(mean))
    torch.testing.assert_close(decoded[:, :, 5], backbone.decode_latents(mean[:, :, 5]))
    decoded[:, :, 5].sum().backward()
    assert latents.grad.abs().sum(dim=(0, 1, 3, 4)).nonzero().flatten().tolist() == [5]
    assert torch.equal(batch_as_frames(frames_as_batch(clips), 2), clips)


def test_a_header_speaks_of_betas_only_where_they_were_chosen(folders):
    silent = dataclasses.replace(SETTINGS, beta_schedule=None, beta_start=None, beta_end=None)
    assert not [key for key in silent.to_header() if "beta" in key]
    assert "beta_schedule" not in silent.scheduler_config
    assert AdapterSettings.from_header(silent.to_header() | {"pcm.invented_later": "1"}) == silent
    assert AdapterSettings.from_header(SETTINGS.to_header()) == SETTINGS
    image = ModelConfig(path=str(folders / "model"))
    assert load_backbone(image).betas == {}
    chosen = load_backbone(dataclasses.replace(image, beta_schedule="linear"))
    assert chosen.betas["beta_schedule"] == "linear"
    assert torch.equal(chosen.alphas.square().float(), make_alphas_cumprod(make_betas("linear", 0.00085, 0.012, 1000)))
    own = load_backbone(model_config(folders, beta_schedule=None))
    assert own.betas["beta_schedule"] == "scaled_linear"
    trained = DDIMScheduler(trained_betas=[0.01] * 1000, clip_sample=False, steps_offset=1)
    told = PCMScheduler.from_config(trained.config, **SETTINGS.scheduler_config)
    assert torch.equal(told.betas, make_betas("linear", 0.00085, 0.012, 1000))


def test_every_weight_of_a_video_unet_is_trained_too(folders, tmp_path):
    config = config_for(folders, tmp_path / "unet.safetensors", steps=1, trainable="unet")
    trained = Run(config)
    told = inputs(trained.backbone)
    output = trained.train()
    pipe = pipeline(folders)
    plain = predicted(pipe.unet, *told)
    assert load_pcm_unet(pipe, output).beta_schedule == "linear"
    student = predicted(trained.backbone.unet.eval(), *told)
    assert (student - plain).abs().max() > 1e-2
    torch.testing.assert_close(predicted(pipe.unet, *told), student, atol=2e-2, rtol=0)  # a file in fp16


def test_a_folder_of_clips_trains(folders, tmp_path, monkeypatch):
    """The way that users go: files of clips with their words, encoded, cached, trained on."""
    monkeypatch.setattr(Run, "_load_data", read_from_disk)
    for i in range(2):
        frames = (torch.arange(FRAMES).view(-1, 1, 1, 1) * 20 + 40 * i).expand(FRAMES, 3, 64, 64).byte()
        export_clip(frames, tmp_path / "clips" / f"{i}.gif", fps=8)
        (tmp_path / "clips" / f"{i}.txt").write_text(f"brighter {i}")
    data = DataConfig(str(tmp_path / "clips"), resolution=64, clips=ClipConfig(frames=FRAMES), encode_batch_size=4)
    run = Run(config_for(folders, tmp_path / "a.safetensors", data=data))
    assert run.latent_shape[1] == FRAMES
    assert run.train().is_file()
    longer = dataclasses.replace(data, clips=ClipConfig(frames=FRAMES + 1))
    with pytest.raises(ValueError, match=str(FRAMES)):
        Run(config_for(folders, tmp_path / "b.safetensors", data=longer))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": ModelConfig(family="animatediff"), "data": CLIPS}, "model.motion_adapter"),
        ({"model": WITH_MOTION}, "animatediff learns from clips"),
        ({"data": CLIPS}, "sd15 learns from pictures"),
        ({"model": ModelConfig(image_adapter="x.safetensors")}, "image_adapter is for model.family animatediff"),
        ({"objective": ObjectiveConfig(shared_noise=0.5)}, "shared_noise is for"),
        ({"lora": LoraConfig(parts="motion")}, r"lora\.parts is for"),
        ({"model": WITH_MOTION, "data": CLIPS, "lora": LoraConfig(dora=True)}, "magnitudes"),
        ({"model": WITH_MOTION, "data": CLIPS, "objective": ObjectiveConfig(shared_noise=2)}, "between 0 and 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        TrainConfig(**settings)

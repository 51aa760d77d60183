"""What the domain adapter is trained on, and that the one that ships knows frames better than the image model does."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import torch
from domain_adapter import DOMAIN_FILE, load_domain_adapter, single_frames
from motion_words import add_words, load_words, tokens
from safetensors import safe_open
from video_model import load_video_pipeline

import moving
from denoising import denoising_loss, noised
from model import load_pipeline
from moving import KINDS, TURNING, sample_clip
from scenes import MOTION_TEST_SEED, render


def test_half_of_the_frames_are_of_objects_that_turn_and_half_of_both_have_two():
    found = single_frames(400)
    assert {clip.motion.kind for clip, _ in found} == set(KINDS)
    sorts = Counter((clip.motion.kind in TURNING, len(clip.scene.objects)) for clip, _ in found)
    assert sorts == dict.fromkeys(product((False, True), (1, 2)), 100)
    assert {frame for _, frame in found} == set(range(moving.NUM_FRAMES))


def test_the_shipped_adapter_is_small_and_of_half_precision():
    assert DOMAIN_FILE.stat().st_size < 7e6
    with safe_open(DOMAIN_FILE, framework="pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118


@torch.no_grad()
def test_frames_of_turning_objects_are_denoised_better_with_it():
    pipe = load_pipeline()
    add_words(pipe.tokenizer, pipe.text_encoder, load_words())
    clips = [clip for i in range(400) if (clip := sample_clip(MOTION_TEST_SEED, i)).motion.kind in TURNING][:48]
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    frames = render([moving.frames(clip)[5 * i % moving.NUM_FRAMES] for i, clip in enumerate(clips)])
    latents = pipe.vae.encode(frames).latent_dist.mean * pipe.vae.config.scaling_factor
    given = noised(latents, pipe.scheduler, generator)
    ids = tokens(pipe.tokenizer, [moving.caption(clip, rng) for clip in clips])
    embeds = pipe.text_encoder(ids).last_hidden_state

    def error() -> float:
        return denoising_loss(pipe.unet(given.sample, given.timesteps, embeds).sample, given).item()

    names, before = set(pipe.unet.state_dict()), error()
    load_domain_adapter(pipe)
    assert set(pipe.unet.state_dict()) == names  # merged: nothing of an adapter is left
    assert error() < 0.9 * before


@torch.no_grad()
def test_clips_of_turning_objects_are_denoised_better_than_their_frames():
    """What ships for clips, adapter and modules together, beside the image model on each frame alone. The modules know what the
    words of motion make of a frame, and the other frames: with less than three tenths gained something of it is lost.
    """
    pipe, image = load_video_pipeline(), load_pipeline()
    clips = [clip for i in range(200) if (clip := sample_clip(MOTION_TEST_SEED, i)).motion.kind in TURNING][:24]
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    frames = moving.render(clips).flatten(0, 1)
    latents = pipe.vae.encode(frames).latent_dist.mean * pipe.vae.config.scaling_factor
    latents = latents.unflatten(0, (len(clips), -1)).transpose(1, 2)  # (N, 4, F, 16, 16)
    given = noised(latents, pipe.scheduler, generator)
    embeds = pipe.text_encoder(tokens(pipe.tokenizer, [moving.caption(clip, rng) for clip in clips])).last_hidden_state
    embeds = embeds.repeat_interleave(moving.NUM_FRAMES, 0)
    together = pipe.unet(given.sample, given.timesteps, embeds).sample
    alone = image.unet(
        given.sample.transpose(1, 2).flatten(0, 1), given.timesteps.repeat_interleave(moving.NUM_FRAMES), embeds
    ).sample
    alone = alone.unflatten(0, (len(clips), -1)).transpose(1, 2)
    assert denoising_loss(together, given) < 0.7 * denoising_loss(alone, given)

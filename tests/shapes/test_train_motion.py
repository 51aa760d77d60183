"""What motion modules are asked in training, and the two halves that the UNet is cut into for it."""

from __future__ import annotations

import torch
from diffusers import UNetMotionModel
from frame_features import STATE, FrameFeatures, StandIns, motion_modules_of
from train_motion import FramePositions, Said, layout, lower, random_frames

from model import MAX_TOKENS, TEXT_WIDTH, build_motion_adapter, load_pipeline
from moving import NUM_FRAMES


@torch.no_grad()
def test_the_two_halves_show_what_the_whole_unet_shows():
    pictures = load_pipeline().unet
    unet = UNetMotionModel.from_unet2d(pictures, build_motion_adapter())
    generator = torch.Generator().manual_seed(0)
    moving = motion_modules_of(unet)
    for module in moving:
        module.proj_out.weight.copy_(0.1 * torch.randn(module.proj_out.weight.shape, generator=generator))
    features, positions = FrameFeatures(pictures, moving), FramePositions(unet)
    positions.frames = random_frames(4, generator)
    sample, embeds = (torch.randn(shape, generator=generator) for shape in ((2, 4, 4, 16, 16), (2, MAX_TOKENS, TEXT_WIDTH)))
    timesteps = torch.tensor([999, 400])
    unet(sample, timesteps, embeds.repeat_interleave(4, 0))
    whole = dict(features.masks.seen)
    features.masks.seen.clear()
    layout(unet, lower(pictures, sample, timesteps, embeds))
    assert list(whole) == [0, 1, 2, 3]
    assert list(features.masks.seen) == [0, 1]  # the last block is left out
    for number, seen in features.masks.seen.items():
        torch.testing.assert_close(seen, whole[number], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_modules_that_add_what_stand_ins_would_have_said_all_there_is():
    modules = motion_modules_of(UNetMotionModel.from_unet2d(load_pipeline().unet, build_motion_adapter()))
    stand_ins = StandIns(load_pipeline().unet)
    states = torch.randn(2, 4, STATE, generator=torch.Generator().manual_seed(0))
    said = Said(modules, stand_ins, states)

    def error(of_module):
        """`of_module`: (N, F, C) that a module adds at all of its 6 places, from its stand-in's weights."""
        for module, linear in zip(modules, stand_ins.maps, strict=True):
            added = of_module(linear.weight)[:, None].expand(-1, 6, -1, -1).flatten(0, 1)  # (N h w, F, C)
            for hook in module.proj_out._forward_hooks.values():
                hook(module.proj_out, (), added)
        return said(states)

    def beside(weight):
        """At right angles to all that a stand-in says."""
        span = torch.linalg.qr(weight)[0]
        other = torch.randn(2, 4, len(weight), generator=torch.Generator().manual_seed(1))
        return states @ weight.T + other - other @ span @ span.T

    torch.testing.assert_close(error(lambda weight: torch.zeros(2, 4, len(weight))).mean(), torch.tensor(1.0))
    assert error(lambda weight: states @ weight.T).max() < 1e-8
    assert error(beside).max() < 1e-8
    torch.testing.assert_close(error(lambda weight: 0.5 * states @ weight.T).mean(), torch.tensor(0.25))


def test_random_frames_are_one_of_each_part():
    for count in (1, 4, NUM_FRAMES):
        parts = random_frames(count, torch.Generator().manual_seed(1)) * count // NUM_FRAMES
        assert parts.tolist() == list(range(count))

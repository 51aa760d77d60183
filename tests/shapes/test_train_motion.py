"""What motion modules are asked in training, and the two halves that the UNet is cut into for it."""

from __future__ import annotations

import torch
from diffusers import UNetMotionModel
from frame_features import COARSE, STATE, FrameFeatures, StandIns, motion_modules_of
from train_motion import FramePositions, Said, random_frames
from unet_halves import layout, lower

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
    everywhere, nowhere, left = (torch.zeros(2, 4, COARSE, COARSE) for _ in range(3))
    everywhere += 1
    left[..., : COARSE // 2] = 1

    def error(of_module, places=everywhere, of_places=None):
        """`of_module`: (N, F, C) that a module adds at its 16 places, or at some of them, from its stand-in's weights."""
        for module, linear in zip(modules, stand_ins.maps, strict=True):
            added = of_module(linear.weight)[:, None].repeat(1, 16, 1, 1)  # (N, h w, F, C)
            if of_places is not None:
                added = added * of_places.view(1, 16, 1, 1)
            added = added.flatten(0, 1)
            for hook in module.proj_out._forward_hooks.values():
                hook(module.proj_out, (), added)
        return said(states, places)

    def beside(weight):
        """At right angles to all that a stand-in says."""
        span = torch.linalg.qr(weight)[0]
        other = torch.randn(2, 4, len(weight), generator=torch.Generator().manual_seed(1))
        return states @ weight.T + other - other @ span @ span.T

    torch.testing.assert_close(error(lambda weight: torch.zeros(2, 4, len(weight))).mean(), torch.tensor(1.0))
    assert error(lambda weight: states @ weight.T).max() < 1e-8
    assert error(beside).max() < 1e-8
    torch.testing.assert_close(error(lambda weight: 0.5 * states @ weight.T).mean(), torch.tensor(0.25))
    # of the object's own places alone is there anything to say, and elsewhere it must not be said
    own = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(4)
    assert error(lambda weight: states @ weight.T, left, own).max() < 1e-8
    torch.testing.assert_close(error(lambda weight: states @ weight.T, left).mean(), torch.tensor(0.5))
    torch.testing.assert_close(error(lambda weight: states @ weight.T, nowhere).mean(), torch.tensor(1.0))


def test_random_frames_are_one_of_each_part():
    for count in (1, 4, NUM_FRAMES):
        parts = random_frames(count, torch.Generator().manual_seed(1)) * count // NUM_FRAMES
        assert parts.tolist() == list(range(count))

"""What motion modules are asked in training, and the two halves that the UNet is cut into for it."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import UNetMotionModel
from train_motion import UNITS, FramePositions, Heads, covered, layout, lower, moved, place_loss, random_frames

from model import MAX_TOKENS, TEXT_WIDTH, build_motion_adapter, load_pipeline
from moving import KINDS, NUM_FRAMES, sample_clip
from scenes import COLOURS, MOTION_TEST_SEED

CLIPS = [sample_clip(MOTION_TEST_SEED, i) for i in range(40)]


@torch.no_grad()
def test_the_two_halves_show_what_the_whole_unet_shows():
    pictures = load_pipeline().unet
    unet = UNetMotionModel.from_unet2d(pictures, build_motion_adapter())
    generator = torch.Generator().manual_seed(0)
    moving = [*unet.mid_block.motion_modules, *(module for block in unet.up_blocks for module in block.motion_modules)]
    for module in moving:
        module.proj_out.weight.copy_(0.1 * torch.randn(module.proj_out.weight.shape, generator=generator))
    heads, positions = Heads(moving[:5], 2), FramePositions(unet)
    positions.frames = random_frames(4, generator)
    sample, embeds = (torch.randn(shape, generator=generator) for shape in ((2, 4, 4, 16, 16), (2, MAX_TOKENS, TEXT_WIDTH)))
    timesteps = torch.tensor([999, 400])
    unet(sample, timesteps, embeds.repeat_interleave(4, 0))
    whole = heads()
    heads.seen.clear()
    layout(unet, lower(pictures, sample, timesteps, embeds))
    for read, expected in zip(heads(), whole, strict=True):
        torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-4)


def test_what_has_moved_since_the_middle_is_what_the_clip_says():
    amounts = moved(CLIPS) * torch.tensor(UNITS)
    assert {clip.motion.kind for clip in CLIPS} == set(KINDS)
    for clip, of_clip in zip(CLIPS, amounts, strict=True):
        x, y, angle, size = (of_clip[-1] - of_clip[0]).tolist()
        amount = clip.motion.amount
        by_kind = {"left": (-amount, 0, 0, 0), "right": (amount, 0, 0, 0), "up": (0, -amount, 0, 0), "down": (0, amount, 0, 0)}
        by_kind |= {"clockwise": (0, 0, amount, 0), "counterclockwise": (0, 0, -amount, 0), "still": (0, 0, 0, 0)}
        by_kind |= {kind: (0, 0, 0, sense * math.log(amount or 1)) for kind, sense in (("growing", 1), ("shrinking", -1))}
        if clip.motion.kind in by_kind:
            assert (x, y, angle, size) == pytest.approx(by_kind[clip.motion.kind], abs=1e-4)
        else:
            assert of_clip[:, 1].std() > 5
            assert of_clip[:, [0, 2, 3]].abs().max() == 0


def test_what_is_covered_has_the_colours_of_the_objects_and_follows_them():
    by_colour = covered(CLIPS).float()
    for clip, of_clip in zip(CLIPS, by_colour, strict=True):
        there = {name for name, area in zip(COLOURS, of_clip.sum((0, 2, 3)), strict=True) if area > 0}
        assert there == {obj.colour for obj in clip.scene.objects}
    maps = by_colour.sum(2)
    columns = torch.arange(16) + 0.5
    for clip, of_clip in zip(CLIPS, maps, strict=True):
        if clip.motion.kind in ("left", "right") and len(clip.scene.objects) == 1:
            x = (of_clip.sum(1) @ columns / of_clip.sum((1, 2)))[[0, -1]]
            way = 8 * (x[1] - x[0]).item()  # pixels
            assert abs(way) == pytest.approx(clip.motion.amount, rel=0.1)
            assert (way > 0) == (clip.motion.kind == "right")


def test_frames_of_which_nothing_is_said_ask_nothing():
    module = torch.nn.Module()
    module.proj_out = torch.nn.Linear(8, 8)
    heads = Heads([module], 1)
    heads.seen[0] = torch.randn(6, 8, 4, 4)
    said = torch.tensor([1.0, 1, 1, 0, 0, 0])
    maps = torch.rand(6, 1, 16, 16)
    other = torch.cat([maps[:3], 1 - maps[3:]])
    assert place_loss(heads, maps, said) == place_loss(heads, other, said) > 0
    assert place_loss(heads, maps, 1 - said) != place_loss(heads, other, 1 - said)


def test_random_frames_are_one_of_each_part():
    for count in (1, 4, NUM_FRAMES):
        parts = random_frames(count, torch.Generator().manual_seed(1)) * count // NUM_FRAMES
        assert parts.tolist() == list(range(count))

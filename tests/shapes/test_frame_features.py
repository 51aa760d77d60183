"""What a frame's state and masks are, and that stand-ins tell an image UNet what motion modules would."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import UNetMotionModel
from frame_features import (
    STATE,
    UNITS,
    FrameFeatures,
    MaskHeads,
    StandIns,
    before_motion,
    colour_masks,
    frame_states,
    motion_modules_of,
)

import moving
from model import MAX_TOKENS, TEXT_WIDTH, build_motion_adapter, load_pipeline
from moving import KINDS, TURNING, sample_clip
from scenes import COLOURS, MOTION_TEST_SEED

CLIPS = [sample_clip(MOTION_TEST_SEED, i) for i in range(40)]


def test_the_state_since_the_middle_is_what_the_clip_says():
    states = frame_states(CLIPS)
    assert {clip.motion.kind for clip in CLIPS} == set(KINDS)
    for clip, of_clip in zip(CLIPS, states, strict=True):
        assert of_clip[[7, 8]].sum(0)[:3].tolist() == pytest.approx([0, 0, 0], abs=0.5)  # the middle is between these two
        kind, amount = clip.motion.kind, clip.motion.amount
        x, y, size = (torch.tensor(UNITS) * (of_clip[-1] - of_clip[0])[:3]).tolist()
        by_kind = {"left": (-amount, 0, 0), "right": (amount, 0, 0), "up": (0, -amount, 0), "down": (0, amount, 0)}
        by_kind |= {"growing": (0, 0, math.log(amount or 1)), "shrinking": (0, 0, -math.log(amount or 1))}
        if kind != "bouncing":
            assert (x, y, size) == pytest.approx(by_kind.get(kind, (0, 0, 0)), abs=1e-4)
        else:
            assert of_clip[:, 1].std() > 0.25
        if kind in TURNING:
            turn = torch.atan2(of_clip[-1, 3], of_clip[-1, 4] + 1).item()
            half = amount / 2 if kind == "clockwise" else -amount / 2
            assert turn == pytest.approx(math.remainder(half, 2 * math.pi), abs=1e-4)
        else:
            assert of_clip[:, 3:].abs().max() == 0


def test_masks_have_the_colours_of_the_objects_and_follow_them():
    columns = torch.arange(32) + 0.5
    for clip in CLIPS:
        masks = colour_masks(moving.frames(clip)).float() / 255
        there = {name for name, area in zip(COLOURS, masks.sum((0, 2, 3)), strict=True) if area > 0}
        assert there == {obj.colour for obj in clip.scene.objects}
        if clip.motion.kind in ("left", "right"):
            of_object = masks[:, list(COLOURS).index(clip.scene.objects[clip.moving].colour)]
            x = (of_object.sum(1) @ columns / of_object.sum((1, 2)))[[0, -1]]
            way = 4 * (x[1] - x[0]).item()  # pixels
            assert abs(way) == pytest.approx(clip.motion.amount, rel=0.1)
            assert (way > 0) == (clip.motion.kind == "right")


@torch.no_grad()
def test_pictures_are_told_what_motion_modules_would_add():
    """Behind motion modules that add nothing, stand-ins do to a UNet of clips what they do to that of pictures."""
    pictures = load_pipeline().unet
    clips = UNetMotionModel.from_unet2d(pictures, build_motion_adapter())
    generator = torch.Generator().manual_seed(0)
    sample, embeds = (torch.randn(shape, generator=generator) for shape in ((3, 4, 16, 16), (3, MAX_TOKENS, TEXT_WIDTH)))
    states, masks = torch.randn(3, STATE, generator=generator), torch.randint(0, 256, (3, len(COLOURS), 32, 32)).byte()
    plain = pictures(sample, 500, embeds).sample
    of_pictures = FrameFeatures(pictures, before_motion(pictures))
    of_clips = FrameFeatures(pictures, motion_modules_of(clips))
    of_clips.load_state_dict(of_pictures.state_dict())

    def drawn(states):
        of_pictures.stand_ins.states = of_clips.stand_ins.states = states
        framed = clips(sample.transpose(0, 1)[None], 500, embeds).sample[0].transpose(0, 1)
        return pictures(sample, 500, embeds).sample, framed

    torch.testing.assert_close(drawn(None)[0], plain, rtol=0, atol=0)
    torch.testing.assert_close(drawn(torch.zeros(3, STATE))[0], plain, rtol=0, atol=0)
    picture, framed = drawn(states)
    assert (picture - plain).abs().max() > 0.1
    torch.testing.assert_close(framed, picture, rtol=1e-4, atol=1e-4)
    said = torch.ones(3)
    assert of_clips.masks.loss(masks, said).item() == pytest.approx(of_pictures.masks.loss(masks, said).item(), rel=1e-4)


def test_masks_of_frames_of_which_nothing_is_said_ask_nothing():
    heads = MaskHeads(load_pipeline().unet)
    features = torch.randn(6, 112, 8, 8)
    masks = torch.randint(0, 256, (6, len(COLOURS), 32, 32)).byte()
    other = torch.cat([masks[:3], 255 - masks[3:]])
    said = torch.tensor([1.0, 1, 1, 0, 0, 0])

    def loss(masks, said):
        heads.seen[0] = features
        return heads.loss(masks, said).item()

    assert loss(masks, said) == loss(other, said) > 0
    assert loss(masks, 1 - said) != loss(other, 1 - said)


def test_stand_ins_add_the_same_everywhere():
    stand_ins = StandIns(load_pipeline().unet)
    layer = torch.nn.Identity()
    stand_ins.stand_behind([layer, *(torch.nn.Identity() for _ in stand_ins.maps[1:])])
    stand_ins.states = torch.eye(STATE)
    added = layer(torch.zeros(STATE, 112, 2, 3))
    for i in range(STATE):
        torch.testing.assert_close(added[i], stand_ins.maps[0].weight[:, i, None, None].expand(112, 2, 3))

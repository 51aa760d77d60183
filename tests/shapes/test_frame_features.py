"""What a frame's state and masks are, and that stand-ins tell an image UNet what motion modules would."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import UNetMotionModel
from frame_features import (
    COARSE,
    STATE,
    UNITS,
    FrameFeatures,
    MaskHeads,
    ObjectReader,
    StandIns,
    before_motion,
    colour_masks,
    motion_modules_of,
    own_places,
    states_of,
)

import moving
from model import MAX_TOKENS, TEXT_WIDTH, build_motion_adapter, load_pipeline
from moving import KINDS, TURNING, circle_around, sample_clip
from scenes import COLOURS, IMAGE_SIZE, MOTION_TEST_SEED

CLIPS = [sample_clip(MOTION_TEST_SEED, i) for i in range(40)]


def test_the_state_since_the_middle_is_what_the_clip_says():
    assert {clip.motion.kind for clip in CLIPS} == set(KINDS)
    for clip in CLIPS:
        of_clip = torch.tensor(states_of(clip, moving.frames(clip)))
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


def test_places_belong_to_the_nearer_object():
    pairs = [clip for clip in CLIPS if len(clip.scene.objects) == 2]
    assert pairs
    for clip in CLIPS:
        if len(clip.scene.objects) == 1:
            assert own_places(clip.scene, clip.moving).all()
    for clip in pairs:
        mine, other = own_places(clip.scene, 0), own_places(clip.scene, 1)
        assert torch.equal(mine, ~other)
        for places, obj in zip((mine, other), clip.scene.objects, strict=True):
            x, y, _ = circle_around(obj)
            assert places[int(y * COARSE / IMAGE_SIZE), int(x * COARSE / IMAGE_SIZE)]


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
    places = torch.rand(3, COARSE, COARSE, generator=generator) < 0.5
    plain = pictures(sample, 500, embeds).sample
    of_pictures = FrameFeatures(pictures, before_motion(pictures))
    of_clips = FrameFeatures(pictures, motion_modules_of(clips))
    of_clips.load_state_dict(of_pictures.state_dict())

    def drawn(states):
        for features in (of_pictures, of_clips):
            features.stand_ins.say_nothing() if states is None else features.stand_ins.tell(states, places)
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


def test_stand_ins_add_the_same_at_all_own_places_and_nothing_elsewhere():
    stand_ins = StandIns(load_pipeline().unet)
    layer = torch.nn.Identity()
    stand_ins.stand_behind([layer, *(torch.nn.Identity() for _ in stand_ins.maps[1:])])
    places = torch.zeros(STATE, COARSE, COARSE, dtype=torch.bool)
    places[:, :, : COARSE // 2] = True
    stand_ins.tell(torch.eye(STATE), places)
    added = layer(torch.zeros(STATE, 112, 4, 4))
    assert (added[..., 2:] == 0).all()
    for i in range(STATE):
        torch.testing.assert_close(added[i, ..., :2], stand_ins.maps[0].weight[:, i, None, None].expand(112, 4, 2))


def test_objects_are_read_at_their_own_places():
    """Two frames: an object that bounces, above one that stays and below one."""
    reader = ObjectReader(load_pipeline().unet)
    moving_ones = torch.zeros(2, 32, 32)
    moving_ones[0, :16] = moving_ones[1, 16:] = 1.0
    staying = 1 - moving_ones
    kinds = torch.tensor([list(KINDS).index("bouncing")] * 2)
    for head in reader.heads:  # the first channel says that it moves, the second that it stays
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        head.weight.data[kinds[0], 0] = head.weight.data[reader.STAYS, 1] = 20.0

    def answered(moves):
        for number, side in ((0, 8), (1, 4)):
            features = torch.zeros(2, 112, side, side)
            features[:, 0] = torch.nn.functional.adaptive_avg_pool2d(moves[:, None], side)[:, 0]
            features[:, 1] = 1 - features[:, 0]
            reader.seen[number] = features
        return [value.item() for value in reader(kinds, moving_ones, staying)]

    assert answered(moving_ones) == pytest.approx([0, 1, 1], abs=1e-6)
    assert answered(staying) == pytest.approx([20, 0, 0.0], abs=1e-6)
    assert answered(torch.ones(2, 32, 32)) == pytest.approx([10, 0.5, 1], abs=1e-6)

"""What the image UNet's features say of a frame, where motion modules will stand.

A motion module adds to the UNet's features what frame and words of motion mean together. What it should add is a question of
its own, and easier to answer for pictures. While the domain adapter is trained, `StandIns` take the modules' places in the
image UNet and add a vector, at the object's own places, that is linear in what has become of it since the middle of its clip;
`MaskHeads` read from the features what objects of each colour cover. So the UNet learns to draw what it is told, and motion
modules are then asked for the same vectors and the same masks.

Words do not say everything: "turning fast" is any angle of a range. If no more than that is told, the UNet learns to trust what
it sees in a noisy frame beside it, and objects of drawn clips hardly turn. So it is told the angle itself, and trusts that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from torch import nn
from torch.nn import functional as F

from moving import KINDS, Clip, circle_around
from scenes import COLOURS, IMAGE_SIZE, Object, Scene, object_masks

UNITS = (20.0, 20.0, 0.35)  # of the way to the right and down in pixels, and of the logarithm of size: about 1 at a clip's end
WAVES = 6  # a star that is turned is a sum of patterns that come and go with five times the angle
STATE = len(UNITS) + 2 * WAVES
START = 0.7  # deviation of what stand-ins are made of: with it they add about half of what features are
FINE, COARSE = 32, 16  # masks and places along a side; a latent has as many as the latter


# ---------------------------------------------------------------------------------------------- what is true of a frame


def frame_state(now: Object, middle: Object) -> tuple[float, ...]:
    """The object's way to the right and down, its growth, and its turn as sines and cosines of the angle and its multiples.

    All are 0 where nothing has changed.
    """
    way = (now.offset[0] - middle.offset[0], now.offset[1] - middle.offset[1], math.log(now.scale / middle.scale))
    turn = now.angle - middle.angle
    waves = (wave for k in range(1, WAVES + 1) for wave in (math.sin(k * turn), math.cos(k * turn) - 1))
    return (*(amount / unit for amount, unit in zip(way, UNITS, strict=True)), *waves)


def states_of(clip: Clip, scenes: Sequence[Scene]) -> list[tuple[float, ...]]:
    """Of the object that moves, in some frames of a clip, since the middle of it."""
    middle = clip.scene.objects[clip.moving]
    return [frame_state(scene.objects[clip.moving], middle) for scene in scenes]


def own_places(scene: Scene, moving: int) -> torch.Tensor:
    """Whether places are nearer to the object that moves than to the other: bool (COARSE, COARSE)."""
    if len(scene.objects) == 1:
        return torch.ones(COARSE, COARSE, dtype=torch.bool)
    y, x = (np.mgrid[:COARSE, :COARSE] + 0.5) * (IMAGE_SIZE / COARSE)
    circles = [circle_around(obj) for obj in scene.objects]
    ways = np.stack([np.hypot(x - cx, y - cy) - radius for cx, cy, radius in circles])
    return torch.from_numpy(ways.argmin(0) == moving)


def colour_masks(scenes: Sequence[Scene]) -> torch.Tensor:
    """How much objects of each colour cover, of 255: uint8 (N, `COLOURS`, FINE, FINE)."""
    masks = torch.zeros(len(scenes), len(COLOURS), FINE, FINE, dtype=torch.uint8)
    for mask, scene in zip(masks, scenes, strict=True):
        for obj in scene.objects:  # of different colours
            mask[list(COLOURS).index(obj.colour)] = (255 * object_masks([replace(scene, objects=(obj,))], FINE)[0, 0]).round()
    return masks


# ---------------------------------------------------------------------------------------------- what features are told and say


def before_motion(unet: UNet2DConditionModel) -> list[nn.Module]:
    """What motion modules will stand behind, in the order of `motion_modules_of`."""
    up = [layer for block in unet.up_blocks for layer in getattr(block, "attentions", block.resnets)]
    return [unet.mid_block.attentions[-1], *up]


def motion_modules_of(unet: UNetMotionModel) -> list[nn.Module]:
    """In the middle and on the way up."""
    return [*unet.mid_block.motion_modules, *(module for block in unet.up_blocks for module in block.motion_modules)]


def _width(layer: nn.Module) -> int:
    return getattr(layer, "out_channels", None) or layer.proj_out.out_channels


def _features(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def shares_of_places(places: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """What share of each place of features is an object's own.

    Args:
        places: (N, COARSE, COARSE), of `own_places`.
        size: h and w of the features.

    Returns:
        (N, h, w) in [0, 1].
    """
    return F.adaptive_avg_pool2d(places.float(), tuple(size))


class StandIns(nn.Module):
    """Linear maps from a frame's state to what is added to the features, one for each motion module of middle and way up.

    Args:
        unet: of pictures; its widths are asked for.
    """

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(STATE, _width(layer), bias=False) for layer in before_motion(unet))
        for linear in self.maps:
            nn.init.normal_(linear.weight, std=START)
        self._told: tuple[torch.Tensor, torch.Tensor] | None = None

    def tell(self, states: torch.Tensor, places: torch.Tensor) -> None:
        """Say from now on what has become of objects, (N, STATE), at their own places, (N, COARSE, COARSE)."""
        self._told = states, places

    def say_nothing(self) -> None:
        """From now on."""
        self._told = None

    def stand_behind(self, layers: Sequence[nn.Module]) -> None:
        """Add to what these layers give from now on, which are those `before_motion`."""
        for layer, linear in zip(layers, self.maps, strict=True):
            layer.register_forward_hook(partial(self._add, linear))

    def _add(self, linear: nn.Linear, _layer: nn.Module, _given: object, output: torch.Tensor | tuple[torch.Tensor, ...]):
        if self._told is None:
            return output
        features, (states, places) = _features(output), self._told
        shares = shares_of_places(places, features.shape[2:])
        told = features + (linear(states)[:, :, None, None] * shares[:, None]).to(features)
        return told if isinstance(output, torch.Tensor) else (told, *output[1:])


class MaskHeads(nn.Module):
    """A linear layer reads masks from normalised features behind each layer of the last two blocks of the way up.

    Args:
        unet: of pictures; its widths are asked for.
    """

    FINER = (4, 2)  # rows and columns that are read from a place, by block

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        widths = [_width(layer) for layer in before_motion(unet)[-4:]]
        self.finer = [finer for finer in self.FINER for _ in range(2)]
        self.heads = nn.ModuleList(nn.Conv2d(w, len(COLOURS) * f**2, 1) for w, f in zip(widths, self.finer, strict=True))
        self.seen: dict[int, torch.Tensor] = {}

    def read_behind(self, layers: Sequence[nn.Module]) -> None:
        """Read what these layers give from now on: the last four of those `before_motion`, or of motion modules."""
        for number, layer in enumerate(layers):
            layer.register_forward_hook(partial(self._see, number))

    def _see(self, number: int, _layer: nn.Module, _given: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        self.seen[number] = _features(output)

    def loss(self, masks: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of a pixel, over those layers that were called since it was asked for last.

        Args:
            masks: of `colour_masks`, (N, `COLOURS`, FINE, FINE).
            said: (N,), the weight of each.
        """
        losses = []
        for number, features in self.seen.items():
            read = self.heads[number](F.group_norm(features.float(), 1))
            scores = F.pixel_shuffle(read, self.finer[number])
            losses.append(F.binary_cross_entropy_with_logits(scores, masks.float() / 255, reduction="none").sum(1).mean((1, 2)))
        self.seen.clear()
        return (torch.stack(losses).mean(0) * said).mean()


class ObjectReader(nn.Module):
    """A linear layer names at every place, on the way down and in the middle, what the object there does, or that it stays.

    Of two objects the caption says which one moves. Unless it is asked for, features at an object's places do not say it.

    Args:
        unet: of pictures, whose features are read, of its last forward.
    """

    STAYS = len(KINDS)

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        layers = [unet.down_blocks[1].attentions[-1], unet.mid_block.attentions[-1]]
        self.heads = nn.ModuleList(nn.Conv2d(_width(layer), len(KINDS) + 1, 1) for layer in layers)
        self.seen: dict[int, torch.Tensor] = {}
        for number, layer in enumerate(layers):
            layer.register_forward_hook(partial(self._see, number))

    def _see(self, number: int, _layer: nn.Module, _given: object, output: tuple[torch.Tensor, ...]) -> None:
        self.seen[number] = output[0]

    def forward(
        self, kinds: torch.Tensor, moving: torch.Tensor, staying: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean over what objects cover, of places of both layers.

        Args:
            kinds: of motion, (N,).
            moving: how much of it the object covers that moves, (N, FINE, FINE) in [0, 1].
            staying: how much the other one does; 0 where there is none.

        Returns:
            The cross entropy; the shares of places that say rightly whether their object moves, and that name its motion.
        """
        losses, who, kind = [], [], []
        for number, features in self.seen.items():
            scores = self.heads[number](features.float())
            parts = F.adaptive_avg_pool2d(torch.stack([moving, staying], 1), scores.shape[2:]).to(scores)  # (N, 2, h, w)
            chances = scores.log_softmax(1)
            named = chances.gather(1, kinds.view(-1, 1, 1, 1).expand(-1, 1, *scores.shape[2:]))[:, 0]
            losses.append(-(parts[:, 0] * named + parts[:, 1] * chances[:, self.STAYS]).sum() / parts.sum())
            moves = chances[:, : self.STAYS].logsumexp(1) > chances[:, self.STAYS]
            right = torch.stack([moves, ~moves], 1)
            who.append((parts * right).sum() / parts.sum())
            right = scores[:, : self.STAYS].argmax(1) == kinds.view(-1, 1, 1)
            kind.append((parts[:, 0] * right).sum() / parts[:, 0].sum())
        return torch.stack(losses).mean(), torch.stack(who).mean(), torch.stack(kind).mean()


class FrameFeatures(nn.Module):
    """Both of them, at the same layers: what is told is part of what is read.

    Args:
        unet: of pictures; its widths are asked for.
        layers: those `before_motion` in it, or the motion modules of a UNet of clips.
    """

    def __init__(self, unet: UNet2DConditionModel, layers: Sequence[nn.Module]):
        super().__init__()
        self.stand_ins, self.masks = StandIns(unet), MaskHeads(unet)
        self.stand_ins.stand_behind(layers)
        self.masks.read_behind(layers[-len(self.masks.heads) :])

"""Moving scenes: a scene, what one of its objects does for 16 frames, the words that say so, and the pixels.

A `Clip` is the ground truth, as a `Scene` is of a picture. `sample_clip(seed, index)` draws one at random access, `caption`
words it, `render` paints a batch of them. The scene is what is seen half-way through: an object that moves left is on its
place then, and one that grows has its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch

import scenes
from scenes import IMAGE_SIZE, PLACES, POLYGONS, SIZES, Object, Scene, draw_scene

NUM_FRAMES = 16
SPEEDS = ("slowly", "fast")
BOUNCE_HEIGHT = 30.0  # pixels at 128 px
TWO_OBJECTS = 0.25  # share of the clips
ROUND_SHAPES = ("circle", "ring")  # nobody sees them turn
MARGIN = 1.0  # pixels that no object comes nearer to the picture's edge, or to another


@dataclass(frozen=True)
class Kind:
    """A kind of motion. `amounts` are the least and the most of it in a clip, at each of `SPEEDS`; none for being still."""

    unit: str
    amounts: tuple[tuple[float, float], ...]
    words: tuple[str, ...]


_PIXELS = ((26.0, 34.0), (50.0, 60.0))  # at 128 px; a latent is 8
_RADIANS = ((math.pi / 2, math.radians(120)), (math.radians(200), math.radians(270)))
_RATIOS = ((1.55, 1.75), (2.2, 2.6))
_BOUNCES = ((0.95, 1.05), (1.9, 2.1))
KINDS = {
    "left": Kind("pixels", _PIXELS, ("moving leftward", "going leftward")),
    "right": Kind("pixels", _PIXELS, ("moving rightward", "going rightward")),
    "up": Kind("pixels", _PIXELS, ("moving upward", "going upward")),
    "down": Kind("pixels", _PIXELS, ("moving downward", "going downward")),
    "clockwise": Kind("radians", _RADIANS, ("turning clockwise", "rotating clockwise")),
    "counterclockwise": Kind("radians", _RADIANS, ("turning counterclockwise", "rotating counterclockwise")),
    "growing": Kind("ratio of sizes", _RATIOS, ("growing",)),
    "shrinking": Kind("ratio of sizes", _RATIOS, ("shrinking",)),
    "bouncing": Kind("bounces", _BOUNCES, ("bouncing",)),
    "still": Kind("", (), ("standing still", "resting")),
}
TURNING = ("clockwise", "counterclockwise")
RESIZING = ("growing", "shrinking")
_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True)
class Motion:
    """What an object does during a clip.

    Attributes:
        kind: of `KINDS`.
        speed: of `SPEEDS`; "" for being still.
        amount: over the whole clip, in the kind's unit; 0 for being still.
    """

    kind: str
    speed: str = ""
    amount: float = 0.0


@dataclass(frozen=True)
class Clip:
    """A scene half-way through, and the motion of its object number `moving`; the other one stays."""

    scene: Scene
    motion: Motion
    moving: int = 0


def moved(obj: Object, motion: Motion, time: float) -> Object:
    """The object at a time from 0 to 1; at 0.5 it is as it was given.

    A bounce is a fall under gravity thrown back by the ground: the height is 4 p (1 - p) for p from 0 to 1, again and again.
    """
    since = time - 0.5  # from -0.5 to 0.5
    x, y = obj.offset
    if motion.kind in _DIRECTIONS:
        dx, dy = _DIRECTIONS[motion.kind]
        return replace(obj, offset=(x + dx * motion.amount * since, y + dy * motion.amount * since))
    if motion.kind in TURNING:
        sense = 1 if motion.kind == "clockwise" else -1  # y points down
        return replace(obj, angle=obj.angle + sense * motion.amount * since)
    if motion.kind in RESIZING:
        sense = 1 if motion.kind == "growing" else -1
        return replace(obj, scale=obj.scale * motion.amount ** (sense * since))
    if motion.kind == "bouncing":
        p = (motion.amount * since + _HALF_WAY_UP) % 1.0
        return replace(obj, offset=(x, y + BOUNCE_HEIGHT * (0.5 - 4 * p * (1 - p))))
    return obj


_HALF_WAY_UP = (1 - math.sqrt(0.5)) / 2  # 4 p (1 - p) = 1/2, on the way up


def frames(clip: Clip, count: int = NUM_FRAMES) -> list[Scene]:
    """The scenes of a clip at `count` times, evenly from its beginning to its end."""
    return [
        replace(
            clip.scene,
            objects=tuple(
                moved(obj, clip.motion, i / (count - 1)) if number == clip.moving else obj
                for number, obj in enumerate(clip.scene.objects)
            ),
        )
        for i in range(count)
    ]


def circle_around(obj: Object) -> tuple[float, float, float]:
    """Centre and radius, in pixels at 128 px, of a circle that holds the object at every angle."""
    corners = POLYGONS.get(obj.shape)
    unit = 1.0 if corners is None else float(np.linalg.norm(corners, axis=1).max())
    (x, y), (dx, dy) = PLACES[obj.place], obj.offset
    return x + dx, y + dy, unit * SIZES[obj.size] * obj.scale


def fits(scene: Scene) -> bool:
    """Whether every object is wholly inside the picture and clear of the other."""
    circles = [circle_around(obj) for obj in scene.objects]
    inside = all(min(x, y) - radius >= MARGIN and max(x, y) + radius <= IMAGE_SIZE - MARGIN for x, y, radius in circles)
    return inside and all(math.dist(a[:2], b[:2]) >= a[2] + b[2] + MARGIN for a, b in combinations(circles, 2))


def sample_clip(seed: int, index: int, held_out: bool = False) -> Clip:
    """Draw clip number `index` of the stream `seed`. All kinds of motion are equally likely, and all speeds.

    Two objects are of different colours. Shapes that nobody sees turn do not turn.

    Args:
        seed: the stream; training and evaluation use different ones.
        index: which clip; any order, any subset.
        held_out: False never draws a held-out (shape, colour) pair; True makes the first object one, the one that moves.
    """
    rng = np.random.default_rng((seed, index))
    kind = list(KINDS)[rng.integers(len(KINDS))]
    motion = Motion(kind)
    if KINDS[kind].amounts:
        speed = int(rng.integers(len(SPEEDS)))
        motion = Motion(kind, SPEEDS[speed], float(rng.uniform(*KINDS[kind].amounts[speed])))
    two = rng.random() < TWO_OBJECTS
    while True:  # until a scene comes that has room for the motion
        scene = draw_scene(rng, held_out)
        if two != (len(scene.objects) == 2) or len({obj.colour for obj in scene.objects}) < len(scene.objects):
            continue
        if kind in TURNING and scene.objects[0].shape in ROUND_SHAPES:
            continue
        clip = Clip(scene, motion)
        if all(map(fits, frames(clip))):
            return clip


# ---------------------------------------------------------------------------------------------- words


def caption(clip: Clip, rng: np.random.Generator | None = None, omit: float = 0.0) -> str:
    """Word a clip: the scene as `scenes.caption` does, with the motion after the words of the object that makes it.

    Args:
        clip: what to describe.
        rng: chooses among the wordings and the order of two objects; None gives the plainest wording.
        omit: probability with which each of size, place, background and speed is left unsaid (independently).
    """
    words = KINDS[clip.motion.kind].words
    does = words[rng.integers(len(words))] if rng is not None else words[0]
    if clip.motion.speed and (rng is None or rng.random() >= omit):
        does += f" {clip.motion.speed}"
    doing = [does if number == clip.moving else "" for number in range(len(clip.scene.objects))]
    return scenes.caption(clip.scene, rng, omit, doing)


# ---------------------------------------------------------------------------------------------- pixels


def render(clips: Sequence[Clip], num_frames: int = NUM_FRAMES, size: int = IMAGE_SIZE) -> torch.Tensor:
    """Paint clips.

    Args:
        clips: N clips.
        num_frames: F, evenly from the beginning to the end.
        size: height and width in pixels; the drawing scales with it.

    Returns:
        float32 in [-1, 1], shape (N, F, 3, size, size).
    """
    pictures = scenes.render([scene for clip in clips for scene in frames(clip, num_frames)], size)
    return pictures.unflatten(0, (len(clips), num_frames))

"""Procedural scenes: what is in the picture, the words that say so, and the pixels.

A `Scene` is the ground truth. `sample_scene(seed, index)` draws one at random access, `caption` words it,
`render` paints a batch of them antialiased with signed distances. Everything is a function of (seed, index).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

IMAGE_SIZE = 128

MOST_TILT = 0.22  # radians from upright
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "crescent")
COLOURS = {
    "red": (222, 38, 38),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 45),
    "green": (35, 155, 55),
    "blue": (35, 85, 225),
    "purple": (140, 45, 175),
    "white": (250, 250, 250),
    "black": (18, 18, 18),
}
SIZES = {"small": 12.0, "medium": 19.0, "large": 28.0}  # circumscribed radius in pixels at 128 px
PLACES = {
    "top left": (32, 32),
    "top": (64, 32),
    "top right": (96, 32),
    "left": (32, 64),
    "center": (64, 64),
    "right": (96, 64),
    "bottom left": (32, 96),
    "bottom": (64, 96),
    "bottom right": (96, 96),
}
OPPOSITE_PLACES = (
    ("left", "right"),
    ("top", "bottom"),
    ("top left", "bottom right"),
    ("top right", "bottom left"),
)
BACKGROUNDS = {
    "gray": (135, 135, 140),
    "pink": (250, 175, 195),
    "sky": (150, 205, 240),
    "mint": (165, 222, 185),
    "tan": (205, 172, 130),
    "navy": (58, 72, 130),
}
TEXTURES = ("plain", "striped", "checkered", "dotted")

# Streams of scenes: what learns from one is never judged by it.
TRAIN_SEED = 1  # autoencoder, denoiser, adapters
CLASSIFIER_SEED, CLASSIFIER_TEST_SEED = 2, 102
TEST_SEED, SEARCH_SEED = 103, 104  # what is measured, and what settings are chosen by
# moving scenes: motion adapters, what they are measured on, and what settings are chosen by
MOTION_TRAIN_SEED, MOTION_TEST_SEED, MOTION_SEARCH_SEED = 5, 105, 106

# One colour of every shape is never drawn in training: the held-out combinations.
HELD_OUT = frozenset((shape, tuple(COLOURS)[(3 * i + 1) % len(COLOURS)]) for i, shape in enumerate(SHAPES))


@dataclass(frozen=True)
class Object:
    """One drawn shape: four named attributes, and the jitter that makes every drawing different."""

    shape: str
    colour: str
    size: str
    place: str
    offset: tuple[float, float] = (0.0, 0.0)  # pixels at 128 px
    angle: float = 0.0  # radians
    scale: float = 1.0
    shade: float = 0.0  # added to the colour, in 0..255 units


@dataclass(frozen=True)
class Scene:
    """One or two objects on a background. `phase`, `period` and `slant` place the texture; `light` tilts the brightness."""

    objects: tuple[Object, ...]
    background: str
    texture: str
    phase: tuple[float, float] = (0.0, 0.0)
    period: float = 20.0
    slant: float = 0.6
    light: tuple[float, float] = (0.0, 0.0)


def sample_scene(seed: int, index: int, held_out: bool = False) -> Scene:
    """Draw scene number `index` of the stream `seed`.

    Args:
        seed: the stream; training and evaluation use different ones.
        index: which scene; any order, any subset.
        held_out: False never draws a held-out (shape, colour) pair; True makes the first object one.
    """
    return draw_scene(np.random.default_rng((seed, index)), held_out)


def draw_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """The next scene that a generator draws; see `sample_scene`."""
    places = OPPOSITE_PLACES[rng.integers(4)] if rng.random() < 0.5 else (list(PLACES)[rng.integers(len(PLACES))],)
    if len(places) == 2 and rng.random() < 0.5:
        places = places[::-1]
    pairs = [(s, c) for s in SHAPES for c in COLOURS if (s, c) not in HELD_OUT]
    objects: list[Object] = []
    for i, place in enumerate(places):
        drawn_from = sorted(HELD_OUT) if held_out and i == 0 else pairs
        shape, colour = drawn_from[rng.integers(len(drawn_from))]
        objects.append(
            Object(
                shape=shape,
                colour=colour,
                size=list(SIZES)[rng.integers(len(SIZES))],
                place=place,
                offset=(float(rng.uniform(-4, 4)), float(rng.uniform(-4, 4))),
                angle=float(rng.uniform(-MOST_TILT, MOST_TILT)),
                scale=float(rng.uniform(0.94, 1.06)),
                shade=float(rng.uniform(-12, 12)),
            )
        )
    return Scene(
        objects=tuple(objects),
        background=list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))],
        texture=TEXTURES[rng.integers(len(TEXTURES))],
        phase=(float(rng.uniform(0, 1)), float(rng.uniform(0, 1))),
        period=float(rng.uniform(18, 24)),
        slant=float(rng.uniform(0.45, 0.85)),
        light=(float(rng.uniform(-14, 14)), float(rng.uniform(-14, 14))),
    )


# ---------------------------------------------------------------------------------------------- words

SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium",), "large": ("large", "big")}
PLACE_WORDS = {
    name: (f"in the {name}", f"at the {name}", f"in the {name} corner")
    if " " in name
    else (f"on the {name}", f"on the {name} side")
    for name in PLACES
} | {
    "top": ("at the top", "on the top"),
    "bottom": ("at the bottom", "on the bottom"),
    "center": ("in the center", "in the middle"),
}
TEXTURE_WORDS = {
    "plain": ("on a {b} background", "on a plain {b} background"),
    "striped": ("on a striped {b} background", "on a {b} background with stripes"),
    "checkered": ("on a checkered {b} background", "on a {b} background with checks"),
    "dotted": ("on a dotted {b} background", "on a {b} background with dots"),
}
OPENINGS = ("", "", "", "a picture of ", "a drawing of ", "an image of ")


def caption(scene: Scene, rng: np.random.Generator | None = None, omit: float = 0.0, doing: Sequence[str] | None = None) -> str:
    """Word a scene.

    Args:
        scene: what to describe.
        rng: chooses among the wordings and the order of two objects; None gives the plainest wording.
        omit: probability with which each of size, place and background is left unsaid (independently).
        doing: of each object, words that follow its own, such as "moving left"; "" for none.
    """

    def choose(options: Sequence[str]) -> str:
        return options[rng.integers(len(options))] if rng is not None else options[0]

    def said() -> bool:
        return rng is None or rng.random() >= omit

    def words(obj: Object, with_size: bool, with_place: bool) -> str:
        size = choose(SIZE_WORDS[obj.size]) + " " if with_size else ""
        phrase = f"{size}{obj.colour} {obj.shape}"
        article = "an" if phrase[0] in "aeiou" else "a"
        return f"{article} {phrase}" + (f" {choose(PLACE_WORDS[obj.place])}" if with_place else "")

    with_size, with_place = said(), said()
    objects = list(zip(scene.objects, doing or [""] * len(scene.objects), strict=True))
    if rng is not None and rng.random() < 0.5:
        objects.reverse()
    text = choose(OPENINGS) + " and ".join(f"{words(obj, with_size, with_place)} {does}".rstrip() for obj, does in objects)
    if said():
        text += " " + choose(TEXTURE_WORDS[scene.texture]).format(b=scene.background)
    return text


def all_wordings() -> list[str]:
    """Every phrase of the grammar once: what the tokenizer's vocabulary is built from."""
    phrases = list(OPENINGS) + [p for options in PLACE_WORDS.values() for p in options]
    phrases += [w for options in SIZE_WORDS.values() for w in options] + list(SHAPES) + list(COLOURS)
    phrases += [t.format(b=b) for options in TEXTURE_WORDS.values() for t in options for b in BACKGROUNDS]
    return [*(p for p in phrases if p), "a red circle and an orange square"]


# ---------------------------------------------------------------------------------------------- pixels


def _regular_points(count: int, radii: Sequence[float], start: float = -math.pi / 2) -> np.ndarray:
    angles = start + 2 * math.pi * np.arange(count) / count
    radius = np.resize(np.asarray(radii, dtype=float), count)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _heart_points(count: int = 40) -> np.ndarray:
    t = 2 * math.pi * np.arange(count) / count
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    points = np.stack([x, y + 2.5], axis=1)
    return points / np.linalg.norm(points, axis=1).max()


_A = 0.33  # half width of the cross's arms
POLYGONS = {  # unit radius, y down
    "square": 0.84 * math.sqrt(2) * _regular_points(4, (0.84,), start=-math.pi / 4),
    "triangle": _regular_points(3, (1.0,)) + np.array([0.0, 0.12]),
    "star": _regular_points(10, (1.0, 0.42)),
    "heart": _heart_points(),
    "cross": 0.95 * np.array(
        [(-_A, -1), (_A, -1), (_A, -_A), (1, -_A), (1, _A), (_A, _A),
         (_A, 1), (-_A, 1), (-_A, _A), (-1, _A), (-1, -_A), (-_A, -_A)]
    ),
}  # fmt: skip


def _polygon_distance(points: torch.Tensor, vertices: torch.Tensor) -> torch.Tensor:
    """Signed distance, negative inside, of points (..., 2) to a closed polygon (V, 2); the sign by crossing number."""
    a, b = vertices, vertices.roll(-1, dims=0)
    nearest = torch.full(points.shape[:-1], math.inf)
    inside = torch.zeros(points.shape[:-1], dtype=torch.bool)
    for p, q in zip(a, b, strict=True):
        edge, rel = q - p, points - p
        t = ((rel * edge).sum(-1) / edge.dot(edge)).clamp(0, 1)
        nearest = torch.minimum(nearest, (rel - t[..., None] * edge).square().sum(-1))
        crosses = (p[1] <= points[..., 1]) != (q[1] <= points[..., 1])
        slope = (q[0] - p[0]) / (q[1] - p[1] if q[1] != p[1] else 1.0)
        inside ^= crosses & (points[..., 0] < p[0] + (points[..., 1] - p[1]) * slope)
    return torch.where(inside, -1.0, 1.0) * nearest.sqrt()


def shape_distance(shape: str, points: torch.Tensor) -> torch.Tensor:
    """Signed distance of points (..., 2), in units of the shape's radius, y down; negative inside."""
    if shape == "circle":
        return points.norm(dim=-1) - 0.92
    if shape == "ring":
        return (points.norm(dim=-1) - 0.74).abs() - 0.22
    if shape == "crescent":
        bite = (points - points.new_tensor([0.42, -0.1])).norm(dim=-1) - 0.72
        return torch.maximum(points.norm(dim=-1) - 0.97, -bite)
    return _polygon_distance(points, torch.tensor(POLYGONS[shape], dtype=points.dtype))


def _pattern(scenes: Sequence[Scene], xy: torch.Tensor) -> torch.Tensor:
    """Background texture in [-1, 1], antialiased: (N, H, W)."""
    out = torch.zeros(len(scenes), *xy.shape[:2])
    for i, scene in enumerate(scenes):
        if scene.texture == "plain":
            continue
        u, v = xy[..., 0] / scene.period + scene.phase[0], xy[..., 1] / scene.period + scene.phase[1]
        sharp = scene.period / 4  # a ramp of about one pixel
        if scene.texture == "striped":
            wave = torch.sin(2 * math.pi * (u * math.sin(scene.slant) + v * math.cos(scene.slant)))
        elif scene.texture == "checkered":
            wave = torch.sin(math.pi * u) * torch.sin(math.pi * v) * 2
        else:
            du, dv = u - u.round(), v - v.round()
            wave = 4 * (0.3 - (du**2 + dv**2).sqrt())
        out[i] = (wave * sharp).clamp(-1, 1)
    return out


def _pixel_grid(size: int) -> torch.Tensor:
    """Pixel centres (size, size, 2) as (x, y) in pixels at 128 px."""
    grid = (torch.arange(size, dtype=torch.float32) + 0.5) * (IMAGE_SIZE / size)
    return torch.stack(torch.meshgrid(grid, grid, indexing="xy"), dim=-1)


def _cover(obj: Object, xy: torch.Tensor) -> tuple[slice, slice, torch.Tensor, torch.Tensor]:
    """The window (rows, columns) that an object touches, its coverage there in [0, 1], and the height in it, -1 top to 1."""
    size = xy.shape[0]
    radius = SIZES[obj.size] * obj.scale
    centre = torch.tensor(PLACES[obj.place], dtype=torch.float32) + torch.tensor(obj.offset)
    reach = radius * 1.1 + 2
    x0, y0 = ((centre - reach) * size / IMAGE_SIZE).int().clamp(0, size).tolist()
    x1, y1 = (((centre + reach) * size / IMAGE_SIZE).int() + 1).clamp(0, size).tolist()
    cos, sin = math.cos(obj.angle), math.sin(obj.angle)
    local = (xy[y0:y1, x0:x1] - centre) @ torch.tensor([[cos, -sin], [sin, cos]]) / radius
    distance = shape_distance(obj.shape, local) * radius * (size / IMAGE_SIZE)
    return slice(y0, y1), slice(x0, x1), (0.5 - distance).clamp(0, 1), local[..., 1]  # a ramp of one output pixel


def render(scenes: Sequence[Scene], size: int = IMAGE_SIZE) -> torch.Tensor:
    """Paint scenes.

    Args:
        scenes: N scenes.
        size: height and width in pixels; the drawing scales with it.

    Returns:
        float32 images in [-1, 1], shape (N, 3, size, size).
    """
    xy = _pixel_grid(size)
    base = torch.tensor([BACKGROUNDS[s.background] for s in scenes], dtype=torch.float32)
    light = torch.tensor([s.light for s in scenes]) / IMAGE_SIZE
    shade = torch.einsum("hwc,nc->nhw", xy - IMAGE_SIZE / 2, light) + 22 * _pattern(scenes, xy)
    images = base[:, :, None, None] + shade[:, None]
    for image, scene in zip(images, scenes, strict=True):
        for obj in scene.objects:
            rows, columns, coverage, height = _cover(obj, xy)
            colour = torch.tensor(COLOURS[obj.colour], dtype=torch.float32)[:, None, None]
            patch = image[:, rows, columns]
            patch.lerp_((colour + obj.shade - 14 * height).clamp(0, 255), coverage.expand_as(patch))  # lit from above
    return images.clamp(0, 255) / 127.5 - 1


def object_masks(scenes: Sequence[Scene], size: int = IMAGE_SIZE) -> torch.Tensor:
    """Where the objects are: float32 coverage in [0, 1], shape (N, 1, size, size)."""
    xy = _pixel_grid(size)
    masks = torch.zeros(len(scenes), 1, size, size)
    for mask, scene in zip(masks, scenes, strict=True):
        for obj in scene.objects:
            rows, columns, coverage, _ = _cover(obj, xy)
            mask[0, rows, columns] = torch.maximum(mask[0, rows, columns], coverage)
    return masks


# ---------------------------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class Labels:
    """Ground truth of N scenes as integers. Each of the nine places is a slot; an empty slot is -1 in all three fields."""

    shape: torch.Tensor  # (N, 9), index into SHAPES or -1
    colour: torch.Tensor  # (N, 9), index into COLOURS or -1
    size: torch.Tensor  # (N, 9), index into SIZES or -1
    background: torch.Tensor  # (N,)
    texture: torch.Tensor  # (N,)


def labels(scenes: Sequence[Scene]) -> Labels:
    """The names of N scenes as indices."""
    slots = torch.full((3, len(scenes), len(PLACES)), -1, dtype=torch.long)
    for i, scene in enumerate(scenes):
        for obj in scene.objects:
            names = (SHAPES.index(obj.shape), list(COLOURS).index(obj.colour), list(SIZES).index(obj.size))
            slots[:, i, list(PLACES).index(obj.place)] = torch.tensor(names)
    background = torch.tensor([list(BACKGROUNDS).index(s.background) for s in scenes])
    return Labels(*slots, background, torch.tensor([TEXTURES.index(s.texture) for s in scenes]))

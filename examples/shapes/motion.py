"""Which motion a clip shows: the object is found by its colour and followed, and its path, size and turn are measured.

Nothing is trained. A pixel belongs to the object if it is nearer to the object's colour than to the background's, both in
any brightness that the drawing's light and texture allow, so blur, small shifts of colour and texture do no harm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from moving import BOUNCE_HEIGHT, KINDS, SPEEDS
from scenes import BACKGROUNDS, COLOURS, IMAGE_SIZE

OBJECT_RANGE, BACKGROUND_RANGE = 28.0, 40.0  # what light, shade and texture add to a colour at most, in 0..255 units
FAR = 25.0  # from every brightness of the background, in 0..255 units: surely not background
LEAST_AREA = 12  # pixels at 128 px: less is no object
LEAST_SHARE = 0.5  # of the least amount in `KINDS`: less is no motion
LEAST_FORM = 0.02  # share of an outline's energy that is not round: a square has 0.04 after a VAE, a small ring 0.012
MOST_SLANT = 0.7  # the way across, as a share of the way along: more is no direction
_LAGS, _HARMONICS, _MOST_TURN = (1, 2, 3, 5), 12, math.radians(30)  # frames; waves around an outline; a frame


@dataclass(frozen=True)
class Measured:
    """What the object of one clip does, from its first frame to its last.

    Attributes:
        kind: of `moving.KINDS`; None where there is no object to follow in some frames, or it goes at a slant.
        speed: of `moving.SPEEDS`; "" where the kind is "still" or None.
        displacement: to the right and down, in pixels at 128 px.
        turn: clockwise, in radians; 0 for what has no angle.
        ratio: the size at the end, in units of that at the beginning.
        swing: how far it goes up and down without getting anywhere, in pixels at 128 px.
        bounces: how many, in that.
    """

    kind: str | None
    speed: str = ""
    displacement: tuple[float, float] = (math.nan, math.nan)
    turn: float = math.nan
    ratio: float = math.nan
    swing: float = math.nan
    bounces: float = math.nan


def measure_motion(clips: torch.Tensor, colours: Sequence[str | None] | None = None) -> list[Measured]:
    """Measure what moves.

    Args:
        clips: (N, F, 3, H, W) in [-1, 1], F at least 8.
        colours: of the object to follow, of `scenes.COLOURS`, for each clip; None for the colour that most of the
            foreground has. A colour that is hardly there counts as None: what is drawn in the wrong colour may move rightly.

    Raises:
        ValueError: clips of another shape, too few frames, as many colours as there are not clips, or an unknown colour.
    """
    if clips.ndim != 5 or clips.shape[2] != 3 or clips.shape[1] < 8:
        raise ValueError(f"Clips are (N, F, 3, H, W) of at least 8 frames; got {tuple(clips.shape)}.")
    named = [None] * len(clips) if colours is None else list(colours)
    if len(named) != len(clips):
        raise ValueError(f"Every clip has its own colour or None; got {len(clips)} clips and {len(named)} colours.")
    unknown = sorted({colour for colour in named if colour is not None} - COLOURS.keys())
    if unknown:
        raise ValueError(f"Unknown colours: {', '.join(unknown)}. Known are {', '.join(COLOURS)}.")
    return [_measure(clip.float().cpu(), colour) for clip, colour in zip(clips, named, strict=True)]


def _measure(clip: torch.Tensor, colour: str | None) -> Measured:
    cover = object_cover(clip, colour)
    if cover is None:
        return Measured(None)
    scale = IMAGE_SIZE / clip.shape[-1]
    rows, columns = (torch.arange(n, dtype=torch.float32) + 0.5 for n in cover.shape[1:])
    area = cover.sum((1, 2))
    x = (cover.sum(1) @ columns / area).numpy() * scale
    y = (cover.sum(2) @ rows / area).numpy() * scale
    turn = _turn(cover, torch.from_numpy(np.stack([x, y], 1)) / scale, area)
    ratio = math.exp(_trend(0.5 * area.log().numpy()))
    swing, bounces = _bounce(y)
    displacement = (_net(x), _net(y))
    kind = _kind(displacement, turn, ratio, swing)
    amounts = {"pixels": max(map(abs, displacement)), "radians": abs(turn), "bounces": bounces}
    amounts |= {"ratio of sizes": max(ratio, 1 / ratio), "": 0.0}
    speed = _speed(kind, amounts[KINDS[kind].unit]) if kind else ""
    return Measured(kind, speed, displacement, turn, ratio, swing, bounces)


def _kind(displacement: tuple[float, float], turn: float, ratio: float, swing: float) -> str | None:
    """The motion there is most of, each in units of the least that is drawn."""
    least = {kind: table.amounts[0][0] for kind, table in KINDS.items() if table.amounts}
    (dx, dy), growth = displacement, math.log(ratio)
    along, across = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    direction = ("left" if dx < 0 else "right") if abs(dx) >= abs(dy) else ("up" if dy < 0 else "down")
    shares = {
        direction: along / least[direction],
        "clockwise" if turn > 0 else "counterclockwise": abs(turn) / least["clockwise"],
        "growing" if growth > 0 else "shrinking": abs(growth) / math.log(least["growing"]),
        "bouncing": swing / BOUNCE_HEIGHT,
    }
    kind = max(shares, key=lambda name: shares[name])
    if shares[kind] < LEAST_SHARE:
        return "still"
    return None if kind == direction and across > MOST_SLANT * along else kind


def _speed(kind: str, amount: float) -> str:
    """The speed whose amounts are nearer; half-way between them in ratio."""
    if not KINDS[kind].amounts:
        return ""
    (_, most_slow), (least_fast, _) = KINDS[kind].amounts
    return SPEEDS[amount > math.sqrt(most_slow * least_fast)]


# ---------------------------------------------------------------------------------------------- where it is


def _distance(pixels: torch.Tensor, colours: torch.Tensor, reach: float) -> torch.Tensor:
    """From pixels (..., 3) to the nearest of colour + s (1, 1, 1) with |s| <= reach, for colours (K, 3), in 0..255: (..., K).

    With brightness b, the mean, and hue h, what is left of it: sqrt(|h - h_c|^2 + 3 max(|b - b_c| - reach, 0)^2).
    """
    brightness, own = pixels.mean(-1, keepdim=True), colours.mean(-1)
    hue, own_hue = pixels - brightness, colours - own[:, None]
    hues = hue.square().sum(-1, keepdim=True) + own_hue.square().sum(-1) - 2 * hue @ own_hue.T
    return (hues.clamp(min=0) + 3 * ((brightness - own).abs() - reach).clamp(min=0).square()).sqrt()


def object_cover(clip: torch.Tensor, colour: str | None) -> torch.Tensor | None:
    """How much of each pixel the object covers, in every frame.

    Args:
        clip: (F, 3, H, W) in [-1, 1].
        colour: see `measure_motion`.

    Returns:
        (F, H, W) in [0, 1], one connected blob a frame; None if there is none in more than an eighth of the frames. Frames
        without an object, as few, have that of the frame before.
    """
    pixels = ((clip.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1)
    # most of a picture is background, and every fourth pixel of a row and a column tells which
    grounds = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)
    sparse = _distance(pixels[:, ::4, ::4], grounds, BACKGROUND_RANGE).flatten(0, 2)
    ground = grounds[sparse.median(0).values.argmin()]
    from_ground = _distance(pixels, ground[None], BACKGROUND_RANGE)[..., 0]
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    from_colours, nearest = _distance(pixels, palette, OBJECT_RANGE).min(-1)
    nearest[(from_ground < FAR) | (from_colours > from_ground)] = -1  # background, or an edge
    counts = torch.stack([(nearest == i).sum((1, 2)) for i in range(len(palette))]).float()  # (colours, F)
    which = list(COLOURS).index(colour) if colour is not None else -1
    if which < 0 or counts[which].median() < LEAST_AREA:
        which = int(counts.median(1).values.argmax())
    core = nearest == which
    if counts[which].median() < LEAST_AREA:
        return None
    drawn = pixels[core].median(0, keepdim=True).values  # the colour as it is here
    from_object = _distance(pixels, drawn, OBJECT_RANGE)[..., 0]
    likeness = from_ground / (from_ground + from_object + 1e-6)
    cover = ((likeness - 0.25) * 2).clamp(0, 1)
    covers: list[torch.Tensor | None] = []
    for frame, its_core in zip(cover.numpy(), core.numpy(), strict=True):
        blob = _compact_blob(frame > 0.5, its_core)
        near = None if blob is None else ndimage.binary_dilation(blob, iterations=2)
        covers.append(None if near is None else torch.from_numpy(frame * near))
    found = [c for c in covers if c is not None]
    if len(found) < len(covers) * 7 / 8:
        return None
    last, filled = found[0], []
    for c in covers:
        last = c if c is not None else last
        filled.append(last)
    return torch.stack(filled)


def _compact_blob(mask: np.ndarray, core: np.ndarray) -> np.ndarray | None:
    """The connected part of a mask (H, W) with most pixels in `core`, less if they are strewn: decoders draw seams at edges.

    Compactness is A^2 / (2 pi I), of the area and its moment about its centre: 1 for a disc, 0.5 for a ring.
    """
    blobs, _ = ndimage.label(mask)
    sizes = np.bincount(blobs[core], minlength=1)
    sizes[0] = 0

    def score(number: int) -> float:
        points = np.argwhere(blobs == number)
        return float(sizes[number] * len(points) / (2 * math.pi * points.var(0).sum()))

    large = np.flatnonzero(sizes >= LEAST_AREA)
    return blobs == max(large, key=score) if len(large) else None


# ---------------------------------------------------------------------------------------------- what it does


def _net(values: np.ndarray) -> float:
    """From the first to the last of F values: medians of three at either end, their distance stretched to the whole."""
    return float(np.median(values[-3:]) - np.median(values[:3])) * (len(values) - 1) / (len(values) - 3)


def _trend(values: np.ndarray) -> float:
    """The same along a line through all (Theil and Sen): the median slope between any two a quarter apart or more."""
    first, second = np.triu_indices(len(values), k=len(values) // 4)
    return float(np.median((values[second] - values[first]) / (second - first))) * (len(values) - 1)


def _bounce(y: np.ndarray) -> tuple[float, float]:
    """How far it swings up and down beyond what its net way needs, and how often: the parabolas that fit best."""
    turns = _zigzag(y, least=BOUNCE_HEIGHT / 6)
    steps = np.abs(np.diff(turns))
    swing = float(steps.sum() - abs(turns[-1] - turns[0])) / 2
    time = np.linspace(0, 1, len(y))
    rate, phase = (grid.ravel() for grid in np.meshgrid(np.arange(0.6, 3.01, 0.05), np.arange(0, 1, 1 / 24), indexing="ij"))
    p = (rate[:, None] * time + phase[:, None]) % 1
    height = 4 * p * (1 - p)
    height -= height.mean(1, keepdims=True)
    fit = -(height @ (y - y.mean())) / np.linalg.norm(height, axis=1)  # y points down
    bounces = float(rate[fit.argmax()])
    return min(swing, float(np.ptp(y))), bounces


def _zigzag(values: np.ndarray, least: float) -> np.ndarray:
    """The first value, those where the direction turns, and the last; a way back shorter than `least` is no turn."""
    turns, extreme, sense = [values[0]], values[0], 0
    for value in values[1:]:
        if sense == 0:
            if abs(value - turns[0]) >= least:
                extreme, sense = value, (1 if value > turns[0] else -1)
        elif (value - extreme) * sense > 0:
            extreme = value
        elif (extreme - value) * sense >= least:
            turns.append(extreme)
            extreme, sense = value, -sense
    return np.array([*turns, extreme])


def _turn(cover: torch.Tensor, centres: torch.Tensor, area: torch.Tensor) -> float:
    """The turn (radians, clockwise) from first to last frame at the steady speed that fits the outlines best; 0 if round.

    Outlines are unrolled around their centres in polar coordinates, in units of their size. With F_t their Fourier series
    along the angle, the speed w maximises sum_lag sum_t Re <F_t exp(-i k w lag), F_(t + lag)> over k >= 1. Lag 1 tells a
    quarter turn of a square from none, the longer ones make it exact.

    Args:
        cover: (F, H, W).
        centres: (F, 2), x and y in pixels.
        area: (F,), in pixels.
    """
    count, height, width = cover.shape
    angle = torch.arange(128) * (2 * math.pi / 128)
    radius = torch.linspace(0.2, 1.9, 12)[:, None, None] * torch.stack([angle.cos(), angle.sin()], -1)  # (12, 128, 2)
    points = centres[:, None, None] + radius * (area / math.pi).sqrt()[:, None, None, None]
    grid = points * 2 / torch.tensor([width, height]) - 1
    unrolled = F.grid_sample(cover[:, None], grid, align_corners=False)[:, 0]  # (F, 12, 128)
    unrolled = unrolled * torch.linspace(0.2, 1.9, 12)[:, None].sqrt()  # as area counts
    series = torch.fft.rfft(unrolled)[..., : _HARMONICS + 1]
    form = series[..., 1:]
    if form.abs().square().sum() < LEAST_FORM * series.abs().square().sum():
        return 0.0
    speeds = torch.linspace(-_MOST_TURN, _MOST_TURN, 601)
    waves = torch.arange(1, _HARMONICS + 1)
    score = torch.zeros(len(speeds))
    for lag in _LAGS:
        product = (form[:-lag].conj() * form[lag:]).sum((0, 1)) / (count - lag)  # (waves,)
        score += (torch.exp(1j * speeds[:, None] * waves * lag) * product).real.sum(1)
    return float(speeds[score.argmax()]) * (count - 1)

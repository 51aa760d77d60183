"""Linear measurements of a picture, and the nearest picture in range that has a given measurement.

A picture x is (N, 3, H, W) in [-1, 1]; a measurement is y = A x. Editing keeps y exact: the kept region of an inpainting,
the luminance of a photograph to colourise, the means of a small picture's blocks. A correction to A z = y alone leaves
the range, and clamping it afterwards, as saving does, breaks the measurement; so `project` meets both at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Generic, TypeVar

import torch
from torch.nn import functional as F

Y = TypeVar("Y", torch.Tensor, tuple[torch.Tensor, ...])
"""A measurement: one tensor, or a tuple of them for `Together`."""

LUMINANCE = (0.299, 0.587, 0.114)
"""The weights of red, green and blue in the luminance (ITU-R BT.601)."""

GREY_LEVEL = 2 / 255
"""One step of an 8-bit picture, in units of [-1, 1]."""

TOLERANCE = 1e-4
"""Largest |A z - y| at which the iterative projections stop: 1/79 of a grey level."""

MAX_ITERATIONS = 400
"""Iterations after which the iterative projections stop, whatever the residual."""

_PATIENCE = 100
"""Iterations without a fall of the residual by 1% after which they stop: no picture has the measurement."""


def nearest_on_hyperplane(x: torch.Tensor, a: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The z in [-1, 1]^k nearest to x with a.z = y, for each row of x.

    z = clip(x + lambda a), where g(lambda) = a.clip(x + lambda a) is increasing and linear between 2k breakpoints: the
    segment that contains y is found by sorting them, and lambda from the coordinates that are strictly inside the range.
    Differentiable in x and y, with the set of those coordinates held constant.

    Args:
        x: shape (..., k), float32 or float64; may lie outside the range.
        a: shape (k,), positive.
        y: shape (...). Outside [-sum a, sum a], which no z reaches, the result is the nearer corner.

    Returns:
        z, shape (..., k).

    Raises:
        ValueError: a is not positive or the shapes do not match.
    """
    if a.shape != x.shape[-1:] or y.shape != x.shape[:-1]:
        raise ValueError(
            f"x (..., k), a (k,) and y (...) do not match: the shapes are {tuple(x.shape)}, {tuple(a.shape)}, {tuple(y.shape)}."
        )
    if not bool((a > 0).all()):
        raise ValueError(f"The weights a must be positive; the smallest is {a.min().item():g}.")
    total = a.sum()
    y = y.clamp(-total, total)
    with torch.no_grad():
        leaves_bottom, reaches_top = (-1 - x) / a, (1 - x) / a
        breakpoints, order = torch.cat([leaves_bottom, reaches_top], -1).sort(-1)
        slopes = torch.cat([a * a, -a * a])[order].cumsum(-1)
        rises = slopes[..., :-1] * breakpoints.diff(dim=-1)
        values = torch.cat([(-total).expand_as(y)[..., None], rises.cumsum(-1) - total], -1)
        segment = torch.searchsorted(values, y[..., None].contiguous(), right=True).clamp(1, values.shape[-1] - 1) - 1
        start, width = breakpoints.gather(-1, segment), breakpoints.diff(dim=-1).gather(-1, segment)
        rise = (y[..., None] - values.gather(-1, segment)) / slopes.gather(-1, segment).clamp(min=torch.finfo(x.dtype).tiny)
        multiplier = start + torch.minimum(rise.clamp(min=0), width)
        moved = x + multiplier * a
        # Rounding may put a coordinate on the range's edge that should be just inside it.
        free = moved.abs() < 1 + 4 * torch.finfo(x.dtype).eps * (1 + x.abs())
        bound = moved.sign()
        slope = (free * a * a).sum(-1, keepdim=True)
        slope = torch.where(slope > 0, slope, 1)  # no free coordinate: z is a corner, whatever the multiplier
    exact = (y[..., None] - (torch.where(free, x, bound) * a).sum(-1, keepdim=True)) / slope
    z = torch.where(free, x + exact * a, bound)
    with torch.no_grad():  # what rounding left, which is visible where x is far outside the range
        left = (y[..., None] - (z.clamp(-1, 1) * a).sum(-1, keepdim=True)) / slope
    z = (z + free * (left * a)).clamp(-1, 1)
    return torch.where((y.abs() >= total)[..., None], y.sign()[..., None], z)  # a corner exactly, not up to rounding


def _product(*matrices: torch.Tensor) -> torch.Tensor:
    """From the left to the right, in their own precision: within autocast it would be half, where small weights are 0."""
    with torch.autocast(matrices[0].device.type, enabled=False):
        return reduce(torch.matmul, matrices)


def _distance(inside: torch.Tensor, limit: int) -> torch.Tensor:
    """Euclidean distance in pixels to the nearest True, (N, 1, H, W) float32, exact up to `limit` and capped there."""
    height, width = inside.shape[-2:]
    columns = torch.arange(width, device=inside.device)
    before = torch.where(inside, columns, -limit).cummax(-1).values
    after = torch.where(inside, columns, width + limit).flip(-1).cummin(-1).values.flip(-1)
    squared = torch.minimum(columns - before, after - columns).clamp(max=limit).square().float()
    reach = min(limit, height - 1)
    padded = F.pad(squared, (0, 0, reach, reach), value=float(limit * limit))
    nearest = squared
    for shift in range(-reach, reach + 1):
        nearest = torch.minimum(nearest, padded[..., reach + shift : reach + shift + height, :] + float(shift * shift))
    return nearest.sqrt().clamp(max=limit)


def _continued(difference: torch.Tensor, inside: torch.Tensor, ramp: float) -> torch.Tensor:
    """A difference known inside a mask, continued smoothly outside it, where it fades to 0 within 3 ramps.

    Outside it is the mean of the known differences with Gaussian weights of sigma = ramp, times a fade that is 1 at the
    edge. Shapes (N, C, H, W) and (1|N, 1, H, W).
    """

    def gaussian(size: int) -> torch.Tensor:
        position = torch.arange(size, device=difference.device, dtype=difference.dtype) / ramp
        return torch.exp(-0.5 * (position[:, None] - position[None, :]).square())

    rows, columns = gaussian(difference.shape[-2]), gaussian(difference.shape[-1])
    weight = _product(rows, inside.to(difference.dtype), columns)
    mean = _product(rows, torch.where(inside, difference, 0), columns) / weight.clamp(min=1e-30)
    reach = 3 * ramp
    distance = _distance(inside, math.ceil(reach)).to(difference.dtype).clamp(max=reach)
    fade = 0.5 + 0.5 * torch.cos(math.pi / reach * distance)
    return torch.where(inside, difference, fade * mean)


def _checked_mask(mask: torch.Tensor, meaning: str) -> torch.Tensor:
    """The mask as bool; ValueError unless it is (1|N, 1, H, W) of bool or of zeros and ones, with a True in every picture."""
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError(
            f"A mask must have the shape (N, 1, H, W); got {tuple(mask.shape)}. "
            f"One of shape (H, W) gets it with mask[None, None]."
        )
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"A mask must be bool or hold only 0 and 1; got {mask.dtype} from {mask.min().item():g} to {mask.max().item():g}. "
            f"Choose a threshold, e.g. mask > {mask.max().item() / 2:g}."
        )
    mask = mask.bool()
    empty = (~mask.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"The mask of picture {empty[0]} is empty: True marks the pixels that are {meaning}. "
            f"Invert it if it marks the others; to leave all free use Free()."
        )
    return mask


def _check_ramp(ramp: float) -> None:
    if not 0 < ramp < math.inf:
        raise ValueError(f"ramp must be a positive number of pixels; got {ramp}.")


class Operator(ABC, Generic[Y]):
    """A linear measurement y = A x of pictures x (N, 3, H, W) in [-1, 1].

    Pictures and measurements are floating-point; half and bfloat16 are computed in float32 and returned in the first
    argument's dtype. A measurement of one picture (N = 1) serves a batch of them. Wrong shapes raise ValueError.
    """

    hint = "Take the measurement of a picture in [-1, 1] with measure()."

    # What an operator defines, in float32 or float64 and with shapes that match.

    @abstractmethod
    def _picture_shape(self, y: Y) -> tuple[int, int, int, int]:
        """The shape of the pictures with such a measurement; ValueError if there are none."""

    @abstractmethod
    def _matched(self, x: torch.Tensor, y: Y) -> Y:
        """y in x's dtype, on its device and with its N; ValueError if it is no measurement of such a picture."""

    @abstractmethod
    def _measure(self, x: torch.Tensor) -> Y: ...

    @abstractmethod
    def _adjoint(self, y: Y) -> torch.Tensor: ...

    @abstractmethod
    def _project(self, x: torch.Tensor, y: Y) -> torch.Tensor: ...

    @abstractmethod
    def _proximal(self, x: torch.Tensor, y: Y, weight: float) -> torch.Tensor:
        """The minimiser without the range."""

    @abstractmethod
    def _approach(self, x: torch.Tensor, y: Y) -> torch.Tensor: ...

    @abstractmethod
    def _widened(self, y: Y) -> Y:
        """y in the dtype it is computed in."""

    @abstractmethod
    def _residual(self, x: torch.Tensor, y: Y) -> torch.Tensor: ...

    # What callers use.

    @abstractmethod
    def measure(self, x: torch.Tensor) -> Y:
        """y = A x."""

    def adjoint(self, y: Y) -> torch.Tensor:
        """A^T y, shape (N, 3, H, W); in the measurement's dtype."""
        self._picture_shape(y)
        first = y if isinstance(y, torch.Tensor) else y[0]
        return self._adjoint(self._widened(y)).to(first.dtype)

    def project(self, x: torch.Tensor, y: Y) -> torch.Tensor:
        """The nearest picture z to x with A z = y and every value in [-1, 1].

        If there is none (see `check`), z is in the range and A z is as near to y as the method comes.
        """
        wide = _working(x)
        return self._project(wide, self._matched(wide, y)).to(x.dtype)

    def proximal(self, x: torch.Tensor, y: Y, weight: float) -> torch.Tensor:
        """argmin over z of |z - x|^2 + weight |A z - y|^2, clamped to [-1, 1]: for measurements with noise.

        Args:
            x: shape (N, 3, H, W).
            y: the measurement.
            weight: at least 0 and finite; 0 ignores y. For noise of variance s^2 in y and v in x, it is v / s^2.

        Raises:
            ValueError: weight out of range.
        """
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight must be finite and at least 0; got {weight}. For an exact measurement use project().")
        wide = _working(x)
        matched = self._matched(wide, y)
        z = wide if weight == 0 else self._proximal(wide, matched, weight)
        return z.clamp(-1, 1).to(x.dtype)

    def residual(self, x: torch.Tensor, y: Y) -> torch.Tensor:
        """Per picture the largest |A x - y|, shape (N,), float32 or float64, in units of [-1, 1]."""
        wide = _working(x)
        return self._residual(wide, self._matched(wide, y))

    def approach(self, x: torch.Tensor, y: Y) -> torch.Tensor:
        """x moved towards A z = y so smoothly that no seam or block shows; `project` then makes it exact."""
        wide = _working(x)
        return self._approach(wide, self._matched(wide, y)).to(x.dtype)

    def check(self, y: Y, tolerance: float = GREY_LEVEL / 2) -> None:
        """Raise ValueError unless a picture in [-1, 1] has this measurement.

        Args:
            y: the measurement.
            tolerance: the largest residual that passes; half a grey level, which rounding to 8 bits hides, unless told.
        """
        shape = self._picture_shape(y)
        wide = self._widened(y)
        parts = (wide,) if isinstance(wide, torch.Tensor) else wide
        if not all(bool(part.isfinite().all()) for part in parts):
            raise ValueError("The measurement contains NaN or infinity.")
        blank = parts[0].new_zeros(shape)
        residual = self.residual(self.project(blank, wide), wide)
        worst = int(residual.argmax()) if len(residual) else 0
        if len(residual) and residual[worst] > tolerance:
            missed = residual[worst].item()
            raise ValueError(
                f"No picture in [-1, 1] has this measurement: the nearest found misses it by {missed:.3g} "
                f"({missed / GREY_LEVEL:.1f} grey levels) in picture {worst}. {self.hint}"
            )


def _working(x: torch.Tensor) -> torch.Tensor:
    """A picture in the dtype it is computed in; ValueError if it is none."""
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"A picture must have the shape (N, 3, H, W); got {tuple(x.shape)}.")
    return _wide(x)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        raise ValueError(
            f"Pictures and measurements are floating-point, in [-1, 1]; got {tensor.dtype}: divide by 127.5, subtract 1."
        )
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _Single(Operator[torch.Tensor]):
    """An operator whose measurement is one tensor."""

    @abstractmethod
    def _shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """The measurement's shape for pictures of this shape; ValueError if they cannot be measured."""

    @abstractmethod
    def _solve_gram(self, y: torch.Tensor, ridge: float) -> torch.Tensor:
        """(A A^T + ridge)^-1 y."""

    def _misfit(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y - A x."""
        return y - self._measure(x)

    def _matched(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        expected = self._shape(x.shape)
        if tuple(y.shape) not in (expected, (1, *expected[1:])):
            raise ValueError(
                f"{type(self).__name__}: the measurement of pictures of shape {tuple(x.shape)} has the shape {expected}; "
                f"got {tuple(y.shape)}."
            )
        return _wide(y).to(x).expand(expected)

    def measure(self, x: torch.Tensor) -> torch.Tensor:
        """y = A x."""
        wide = _working(x)
        self._shape(x.shape)
        return self._measure(wide).to(x.dtype)

    def _widened(self, y: torch.Tensor) -> torch.Tensor:
        return _wide(y)

    def _residual(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        misfit = self._misfit(x, y).abs().flatten(1)
        return misfit.amax(1) if misfit.shape[1] else misfit.new_zeros(len(misfit))

    def _proximal(self, x: torch.Tensor, y: torch.Tensor, weight: float) -> torch.Tensor:
        return x + self._adjoint(self._solve_gram(self._misfit(x, y), 1 / weight))


class Free(_Single):
    """Measures nothing: y has the shape (N, 0). For strokes, where only the start of sampling is given.

    Its adjoint has the shape (N, 3, 1, 1), which broadcasts: the picture's size is not in the measurement.
    """

    def _shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        return (x_shape[0], 0)

    def _picture_shape(self, y: torch.Tensor) -> tuple[int, int, int, int]:
        if y.ndim != 2 or y.shape[1] != 0:
            raise ValueError(f"Free measures nothing: its measurement has the shape (N, 0); got {tuple(y.shape)}.")
        return (y.shape[0], 3, 1, 1)

    def _measure(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(x.shape[0], 0)

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return y.new_zeros(y.shape[0], 3, 1, 1)

    def _solve_gram(self, y: torch.Tensor, ridge: float) -> torch.Tensor:
        return y

    def _project(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.clamp(-1, 1)

    def _approach(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x


class Everything(_Single):
    """Measures every pixel: y = x. For pictures with noise, whose `proximal` step weighs them against the model's."""

    def _shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(x_shape)

    def _picture_shape(self, y: torch.Tensor) -> tuple[int, int, int, int]:
        n, channels, height, width = _working(y).shape
        return (n, channels, height, width)

    def _measure(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return y

    def _solve_gram(self, y: torch.Tensor, ridge: float) -> torch.Tensor:
        return y / (1 + ridge)

    def _project(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y.clamp(-1, 1)

    def _approach(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y


class _Masked(_Single):
    """An operator that measures the pixels of a mask. What a measurement holds outside the mask is ignored."""

    _mask: torch.Tensor

    def _inside(self, x: torch.Tensor) -> torch.Tensor:
        if self._mask.device != x.device:
            self._mask = self._mask.to(x.device)
        return self._mask

    def _check_size(self, shape: Sequence[int]) -> None:
        if tuple(shape[-2:]) != tuple(self._mask.shape[-2:]):
            size, mask_size = (f"{s[-2]} x {s[-1]}" for s in (shape, self._mask.shape))
            raise ValueError(f"The mask is {mask_size} and the picture {size} (height x width): resize one to the other.")
        if self._mask.shape[0] not in (1, shape[0]):
            pictures = f"{shape[0]} picture{'s' * (shape[0] != 1)}"
            raise ValueError(f"There are {self._mask.shape[0]} masks for {pictures}: pass one, or one for each.")

    def _channels_shape(self, y: torch.Tensor, channels: int) -> tuple[int, int, int, int]:
        if y.ndim != 4 or y.shape[1] != channels:
            raise ValueError(f"{type(self).__name__}: a measurement has the shape (N, {channels}, H, W); got {tuple(y.shape)}.")
        return (y.shape[0], 3, y.shape[2], y.shape[3])


class KeepRegion(_Masked):
    """Keeps the pixels of a mask: A x = x inside it, 0 elsewhere. For inpainting and outpainting.

    `project` copies y exactly. `approach` continues the difference y - x from the edge of the kept region into the free
    one, where it fades: a decoder that shifts the colours a little then makes no seam.

    Args:
        mask: shape (1 or N, 1, H, W), bool or 0/1; True is kept. Of several pictures some may be kept whole.
        ramp: how far `approach` reaches, in pixels: sigma of its smoothing; it ends at 3 ramps.
        blend: for soft masks, shape (1 or N, 1, H, W), in [0, 1]: how much of x a free pixel shows after `approach`; the rest
            is y's, which must then hold the whole picture. None: all of it.

    Raises:
        ValueError: a mask of another shape or with other values, or that keeps nothing of a picture; masks that leave nothing
            free in any; ramp <= 0.
    """

    hint = "The kept pixels must be in [-1, 1]: scale or clamp the picture."

    def __init__(self, mask: torch.Tensor, ramp: float = 8.0, blend: torch.Tensor | None = None) -> None:
        _check_ramp(ramp)
        self._mask = _checked_mask(mask, "kept")
        if blend is not None and blend.shape[-2:] != self._mask.shape[-2:]:
            raise ValueError(f"blend is {tuple(blend.shape)} and the mask {tuple(self._mask.shape)}: give them one size.")
        self.blend = blend
        if bool(self._mask.all()):
            which = "The mask keeps every pixel" if len(self._mask) == 1 else f"All {len(self._mask)} masks keep every pixel"
            raise ValueError(f"{which}, so nothing is left to edit: set some to False.")
        self.ramp = ramp

    @property
    def mask(self) -> torch.Tensor:
        """The mask, bool, shape (1 or N, 1, H, W)."""
        return self._mask

    def _shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        self._check_size(x_shape)
        return tuple(x_shape)

    def _picture_shape(self, y: torch.Tensor) -> tuple[int, int, int, int]:
        shape = self._channels_shape(y, 3)
        self._check_size(shape)
        return shape

    def _measure(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(self._inside(x), x, 0)

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return torch.where(self._inside(y), y, 0)

    def _misfit(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.where(self._inside(x), y - x, 0)

    def _solve_gram(self, y: torch.Tensor, ridge: float) -> torch.Tensor:
        return y / (1 + ridge)

    def _project(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.where(self._inside(x), y, x).clamp(-1, 1)

    def _approach(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        inside = self._inside(x)
        moved = x + _continued(y - x, inside, self.ramp)
        if self.blend is not None:
            moved = torch.lerp(y, moved, self.blend.to(x))
        return torch.where(inside, y, moved)


class Luminance(_Masked):
    """The luminance 0.299 R + 0.587 G + 0.114 B of every pixel, or of a mask's: y is (N, 1, H, W). For colourising.

    With a mask the pixels outside are free (y is 0 there): colourises and inpaints at once. `approach` changes red, green
    and blue by the same amount, which keeps the colour; the nearest picture would change green most.

    Args:
        mask: shape (1 or N, 1, H, W), bool or 0/1; True is measured. None measures every pixel.
        ramp: how far `approach` reaches outside the mask, in pixels; see `KeepRegion`.

    Raises:
        ValueError: a mask of another shape or with other values, or that measures nothing; ramp <= 0.
    """

    hint = "A luminance must be in [-1, 1]: scale or clamp it."

    def __init__(self, mask: torch.Tensor | None = None, ramp: float = 8.0) -> None:
        _check_ramp(ramp)
        self.has_mask = mask is not None
        self._mask = torch.ones(1, 1, 1, 1, dtype=torch.bool) if mask is None else _checked_mask(mask, "measured")
        self.ramp = ramp

    @property
    def mask(self) -> torch.Tensor | None:
        """The mask, bool, shape (1 or N, 1, H, W); None if every pixel is measured."""
        return self._mask if self.has_mask else None

    def _weights(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tensor(LUMINANCE, dtype=x.dtype, device=x.device)

    def _shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        if self.has_mask:
            self._check_size(x_shape)
        return (x_shape[0], 1, *x_shape[2:])

    def _picture_shape(self, y: torch.Tensor) -> tuple[int, int, int, int]:
        shape = self._channels_shape(y, 1)
        if self.has_mask:
            self._check_size(shape)
        return shape

    def _measure(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(self._inside(x), (x * self._weights(x)[:, None, None]).sum(1, keepdim=True), 0)

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return torch.where(self._inside(y), y, 0) * self._weights(y)[:, None, None]

    def _misfit(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.where(self._inside(x), y - self._measure(x), 0)

    def _solve_gram(self, y: torch.Tensor, ridge: float) -> torch.Tensor:
        return y / (sum(a * a for a in LUMINANCE) + ridge)

    def _project(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = nearest_on_hyperplane(x.movedim(1, -1), self._weights(x), y[:, 0]).movedim(-1, 1)
        return torch.where(self._inside(x), z, x.clamp(-1, 1)) if self.has_mask else z.contiguous()

    def _approach(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        misfit = self._misfit(x, y)
        return x + (_continued(misfit, self._inside(x), self.ramp) if self.has_mask else misfit)


def _approach_smoothly(
    misfit: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, y: torch.Tensor, rounds: int = 4
) -> torch.Tensor:
    """Iterative back-projection: adds the misfit of a smaller picture, enlarged by bicubic interpolation, `rounds` times."""
    for _ in range(rounds):
        larger = F.interpolate(misfit(x, y), size=x.shape[-2:], mode="bicubic", align_corners=False)
        x = (x + larger).clamp(-1, 1)
    return x


class BlockMean(_Single):
    """The mean of every factor x factor block of a channel: y is (N, 3, H / factor, W / factor). For super-resolution.

    `approach` spreads the correction smoothly over the blocks, so that little of the last, blockwise one remains.

    Args:
        factor: the block's side in pixels, at least 1.

    Raises:
        ValueError: factor < 1; in use, a picture that the factor does not divide: names the nearest factors that do.
    """

    hint = "A mean must be in [-1, 1]: scale or clamp the small picture."

    def __init__(self, factor: int) -> None:
        if factor < 1:
            raise ValueError(f"factor must be at least 1; got {factor}.")
        self.factor = factor

    def _shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        height, width = x_shape[-2:]
        if height % self.factor or width % self.factor:
            common = math.gcd(height, width)
            possible = [d for d in range(1, common + 1) if common % d == 0]
            near = " or ".join(map(str, sorted(sorted(possible, key=lambda d: abs(d - self.factor))[:2])))
            raise ValueError(
                f"Blocks of {self.factor} do not divide a picture of {height} x {width}: the nearest factors that do "
                f"are {near}; for other ratios use Downsample."
            )
        return (x_shape[0], 3, height // self.factor, width // self.factor)

    def _picture_shape(self, y: torch.Tensor) -> tuple[int, int, int, int]:
        if y.ndim != 4 or y.shape[1] != 3:
            raise ValueError(f"BlockMean: a measurement has the shape (N, 3, H, W); got {tuple(y.shape)}.")
        return (y.shape[0], 3, y.shape[2] * self.factor, y.shape[3] * self.factor)

    def _blocks(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, 3, H / f, W / f, f f)."""
        n, channels, height, width = x.shape
        f = self.factor
        return x.reshape(n, channels, height // f, f, width // f, f).transpose(3, 4).flatten(4)

    def _measure(self, x: torch.Tensor) -> torch.Tensor:
        return self._blocks(x).mean(-1)

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return (y / self.factor**2).repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)

    def _solve_gram(self, y: torch.Tensor, ridge: float) -> torch.Tensor:
        return y / (1 / self.factor**2 + ridge)

    def _project(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        f = self.factor
        z = nearest_on_hyperplane(self._blocks(x), x.new_full((f * f,), 1 / f**2), y)
        return z.unflatten(-1, (f, f)).transpose(3, 4).reshape(x.shape)

    def _approach(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return _approach_smoothly(self._misfit, x, y)


def _resize_matrix(size: int, new_size: int, kernel: str) -> torch.Tensor:
    """(new_size, size) float64, rows of sum 1: a triangle or Keys' cubic (a = -1/2), widened by size / new_size."""
    scale = size / new_size
    centres = (torch.arange(new_size, dtype=torch.float64) + 0.5) * scale
    distance = (torch.arange(size, dtype=torch.float64) + 0.5 - centres[:, None]).abs() / scale
    if kernel == "triangle":
        weights = (1 - distance).clamp(min=0)
    else:
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
    return weights / weights.sum(1, keepdim=True)


class Downsample(_Single):
    """A smaller copy by an antialiased resize, as imaging libraries make it: y is (N, 3, *out_size). For super-resolution.

    Any ratio of at least 1 on either side, integer or not. `project` iterates; it is not differentiable.

    Args:
        in_size: (H, W) of the pictures.
        out_size: (H, W) of the measurement; at most in_size.
        kernel: "cubic" or "triangle" (bilinear).
        tolerance: the largest |A z - y| at which `project` stops.
        max_iterations: where it stops whatever the residual.

    Raises:
        ValueError: sizes or kernel out of range.
    """

    hint = "It is too light, too dark or too sharp: take it from a picture in [-1, 1], with the same kernel."

    def __init__(
        self,
        in_size: tuple[int, int],
        out_size: tuple[int, int],
        kernel: str = "cubic",
        tolerance: float = TOLERANCE,
        max_iterations: int = MAX_ITERATIONS,
    ) -> None:
        if kernel not in ("cubic", "triangle"):
            raise ValueError(f'kernel must be "cubic" or "triangle"; got "{kernel}".')
        if any(not 1 <= small <= large for small, large in zip(out_size, in_size, strict=True)):
            raise ValueError(f"out_size must be from 1 to in_size on both sides; got {out_size} of {in_size}.")
        self.in_size, self.out_size, self.kernel = tuple(in_size), tuple(out_size), kernel
        self.tolerance, self.max_iterations = tolerance, max_iterations
        # Per side R (out, in), and the eigenvectors (out, out) and eigenvalues (out,) of R R^T: A A^T is their product.
        self._matrices: list[torch.Tensor] = []
        for size, new_size in zip(in_size, out_size, strict=True):
            matrix = _resize_matrix(size, new_size, kernel)
            values, vectors = torch.linalg.eigh(matrix @ matrix.T)
            self._matrices += [matrix, vectors, values]
        self._cache: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}

    def _on(self, x: torch.Tensor) -> list[torch.Tensor]:
        key = (x.device, x.dtype)
        if key not in self._cache:
            self._cache[key] = [matrix.to(x.dtype).to(x.device) for matrix in self._matrices]
        return self._cache[key]

    def _shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        if tuple(x_shape[-2:]) != self.in_size:
            raise ValueError(f"This Downsample is for pictures of {self.in_size}; got {tuple(x_shape[-2:])} (height, width).")
        return (x_shape[0], 3, *self.out_size)

    def _picture_shape(self, y: torch.Tensor) -> tuple[int, int, int, int]:
        if tuple(y.shape[1:]) != (3, *self.out_size):
            raise ValueError(f"Downsample: the measurement has the shape {('N', 3, *self.out_size)}; got {tuple(y.shape)}.")
        return (y.shape[0], 3, self.in_size[0], self.in_size[1])

    def _measure(self, x: torch.Tensor) -> torch.Tensor:
        rows, _, _, columns, _, _ = self._on(x)
        return _product(rows, x, columns.T)

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        rows, _, _, columns, _, _ = self._on(y)
        return _product(rows.T, y, columns)

    def _solve_gram(self, y: torch.Tensor, ridge: float) -> torch.Tensor:
        _, row_vectors, row_values, _, column_vectors, column_values = self._on(y)
        spectrum = _product(row_vectors.T, y, column_vectors) / (row_values[:, None] * column_values[None, :] + ridge)
        return _product(row_vectors, spectrum, column_vectors.T)

    def _project(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return _nearest_by_dual(x, [y], [self], None, self.tolerance, self.max_iterations)[0]

    def _approach(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return _approach_smoothly(self._misfit, x, y)


@torch.no_grad()
def _nearest_by_dual(
    x: torch.Tensor,
    measurements: Sequence[torch.Tensor],
    operators: Sequence[_Single],
    fixed: tuple[torch.Tensor, torch.Tensor] | None,
    tolerance: float,
    max_iterations: int,
) -> tuple[torch.Tensor, int]:
    """The nearest z to x in [-1, 1] with A z = y for several operators, by accelerated ascent on the dual.

    z = clip(x + A^T nu), where nu maximises a concave function with the gradient y - A z. Each step adds the gradient times
    (A A^T)^-1 of every operator, over their number: then no step is too long. Every entry of nu has a momentum of its own
    (Nesterov's) that starts again when the entry turns: thousands of rows that hardly interact need no common step.

    Args:
        x: shape (N, 3, H, W), float32 or float64.
        measurements: one for each operator.
        operators: at least one.
        fixed: (mask (1|N, 1, H, W), values (N, 3, H, W)): pixels that have these values whatever the measurements.
        tolerance: stops when every |A z - y| is at most this.
        max_iterations: stops in any case; also when the residual no longer falls, as it does if no z exists.

    Returns:
        z of the smallest residual, and the number of iterations.
    """

    def picture(multipliers: Sequence[torch.Tensor]) -> torch.Tensor:
        z = x
        for op, nu in zip(operators, multipliers, strict=True):
            z = z + op._adjoint(nu)
        z = z.clamp(-1, 1)
        return z if fixed is None else torch.where(fixed[0], fixed[1], z)

    multipliers = [torch.zeros_like(y) for y in measurements]
    ahead, ages = multipliers, multipliers
    best, best_error = x, x.new_full((len(x),), math.inf)
    last_error, last_fall = best_error, 0
    for iteration in range(max_iterations + 1):
        z = picture(ahead)
        misfits = [op._misfit(z, y) for op, y in zip(operators, measurements, strict=True)]
        error = torch.stack([misfit.abs().flatten(1).amax(1) for misfit in misfits]).amax(0)
        best = torch.where((error < best_error)[:, None, None, None], z, best)
        best_error = torch.minimum(error, best_error)
        fallen = best_error < 0.99 * last_error
        if bool(fallen.any()):
            last_error, last_fall = torch.where(fallen, best_error, last_error), iteration
        if not bool((best_error > tolerance).any()) or iteration - last_fall > _PATIENCE:
            break
        new = [
            nu + op._solve_gram(misfit, 0.0) / len(operators) for op, nu, misfit in zip(operators, ahead, misfits, strict=True)
        ]
        moves = [nu - before for nu, before in zip(new, multipliers, strict=True)]
        ages = [torch.where(misfit * move < 0, 0, age + 1) for misfit, move, age in zip(misfits, moves, ages, strict=True)]
        ahead = [nu + age / (age + 3) * move for nu, age, move in zip(new, ages, moves, strict=True)]
        multipliers = new
    return best, iteration


class Together(Operator[tuple[torch.Tensor, ...]]):
    """All of several operators; y is the tuple of their measurements.

    `project` copies what a KeepRegion keeps exactly and iterates for the others; it is not differentiable. `approach` takes
    the operators in the order given.

    Args:
        operators: at least one; no Together among them.
        tolerance: the largest |A z - y| at which `project` stops.
        max_iterations: where it stops whatever the residual.

    Raises:
        ValueError: no operators, or a Together among them.
    """

    hint = (
        "Each of the measurements is possible, not all at once: take them from the same picture, or weigh them with proximal()."
    )

    def __init__(
        self, *operators: Operator[torch.Tensor], tolerance: float = TOLERANCE, max_iterations: int = MAX_ITERATIONS
    ) -> None:
        singles = [op for op in operators if isinstance(op, _Single)]
        if not operators or len(singles) != len(operators):
            raise ValueError("Together takes at least one operator, none of them a Together: list its operators instead.")
        self.operators: tuple[_Single, ...] = tuple(singles)
        self.tolerance, self.max_iterations = tolerance, max_iterations

    def _pairs(self, y: tuple[torch.Tensor, ...]) -> list[tuple[_Single, torch.Tensor]]:
        if isinstance(y, torch.Tensor) or len(y) != len(self.operators):
            names = ", ".join(type(op).__name__ for op in self.operators)
            raise ValueError(f"Together: the measurement is a tuple with one tensor for each of {names}.")
        return list(zip(self.operators, y, strict=True))

    def _picture_shape(self, y: tuple[torch.Tensor, ...]) -> tuple[int, int, int, int]:
        shapes = [(op._picture_shape(part), isinstance(op, Free)) for op, part in self._pairs(y)]
        sized = [shape for shape, free in shapes if not free] or [shape for shape, _ in shapes]
        if len({shape[-2:] for shape in sized}) > 1:
            raise ValueError(f"Together: these are measurements of pictures of different shapes: {sorted(set(sized))}.")
        return max(sized)  # the largest N: a measurement of one picture serves all

    def _matched(self, x: torch.Tensor, y: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(op._matched(x, part) for op, part in self._pairs(y))

    def _widened(self, y: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(_wide(part) for part in y)

    def _measure(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(op._measure(x) for op in self.operators)

    def measure(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """y = A x, a tuple."""
        return tuple(op.measure(x) for op in self.operators)

    def _adjoint(self, y: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.as_tensor(sum(op._adjoint(part) for op, part in self._pairs(y)))

    def _residual(self, x: torch.Tensor, y: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.stack([op._residual(x, part) for op, part in self._pairs(y)]).amax(0)

    @torch.no_grad()
    def _project(self, x: torch.Tensor, y: tuple[torch.Tensor, ...]) -> torch.Tensor:
        fixed: tuple[torch.Tensor, torch.Tensor] | None = None
        others: list[tuple[_Single, torch.Tensor]] = []
        for op, part in self._pairs(y):
            if isinstance(op, KeepRegion):
                inside, values = op._inside(x), part.clamp(-1, 1)
                fixed = (inside, values) if fixed is None else (inside | fixed[0], torch.where(inside, values, fixed[1]))
            elif not isinstance(op, Free):
                others.append((op, part))
        if not others or (len(others) == 1 and (fixed is None or isinstance(others[0][0], Luminance))):
            # At most one other operator, none of whose rows lies partly on fixed pixels: no iterations.
            z = others[0][0]._project(x, others[0][1]) if others else x.clamp(-1, 1)
            return z if fixed is None else torch.where(fixed[0], fixed[1], z)
        operators, measurements = [op for op, _ in others], [part for _, part in others]
        return _nearest_by_dual(x, measurements, operators, fixed, self.tolerance, self.max_iterations)[0]

    def _proximal(self, x: torch.Tensor, y: tuple[torch.Tensor, ...], weight: float) -> torch.Tensor:
        """Conjugate gradients on (1 + weight A^T A) (z - x) = weight A^T (y - A x)."""

        def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a * b).flatten(1).sum(1)[:, None, None, None]

        pairs = self._pairs(y)
        r = torch.as_tensor(sum(weight * op._adjoint(op._misfit(x, part)) for op, part in pairs)).expand_as(x)
        z, direction, power = x, r, dot(r, r)
        enough = 1e-12 * power
        for _ in range(self.max_iterations):
            if bool((power <= enough).all()):
                break
            image = direction + sum(weight * op._adjoint(op._measure(direction)) for op in self.operators)
            length = torch.where(power > enough, power / dot(direction, image).clamp(min=torch.finfo(x.dtype).tiny), 0)
            z, r = z + length * direction, r - length * image
            new_power = dot(r, r)
            direction = r + new_power / power.clamp(min=torch.finfo(x.dtype).tiny) * direction
            power = new_power
        return z

    def _approach(self, x: torch.Tensor, y: tuple[torch.Tensor, ...]) -> torch.Tensor:
        for op, part in self._pairs(y):
            x = op._approach(x, part)
        return x

    def check(self, y: tuple[torch.Tensor, ...], tolerance: float = GREY_LEVEL / 2) -> None:
        """Raise ValueError unless a picture in [-1, 1] has all these measurements; each is checked alone first."""
        for op, part in self._pairs(y):
            op.check(part, tolerance)
        super().check(y, tolerance)

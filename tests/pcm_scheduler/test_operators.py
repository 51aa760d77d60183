"""Measurements and the nearest pictures that have them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pcm_scheduler.operators import (
    GREY_LEVEL,
    LUMINANCE,
    TOLERANCE,
    BlockMean,
    Downsample,
    Everything,
    Free,
    KeepRegion,
    Luminance,
    Operator,
    Together,
    _distance,
    nearest_on_hyperplane,
)

HEIGHT, WIDTH = 24, 32


def a_mask(height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((rows - height / 2) ** 2 + (columns - width / 3) ** 2 < (height / 3) ** 2)[None, None]


def pictures(seed: int, n: int = 2, amplitude: float = 0.6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Coarse and fine detail, with some pixels at the bounds of the range."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(n, 3, HEIGHT, WIDTH, dtype=dtype)
    for scale in (1, 2, 8):
        noise = torch.randn(n, 3, HEIGHT // scale, WIDTH // scale, generator=generator, dtype=dtype)
        total += F.interpolate(noise, size=(HEIGHT, WIDTH), mode="bicubic")
    return (amplitude * total).clamp(-1, 1)


DISJOINT: dict[str, Operator[torch.Tensor]] = {
    "free": Free(),
    "everything": Everything(),
    "keep": KeepRegion(a_mask()),
    "luminance": Luminance(),
    "masked luminance": Luminance(a_mask()),
    "block mean 4": BlockMean(4),
    "block mean 8": BlockMean(8),
}
RESIZES: dict[str, Operator[torch.Tensor]] = {
    "cubic": Downsample((HEIGHT, WIDTH), (6, 8)),
    "triangle": Downsample((HEIGHT, WIDTH), (6, 8), "triangle"),
    "odd ratio": Downsample((HEIGHT, WIDTH), (9, 11)),
}
JOINT: dict[str, Operator[Any]] = {
    "keep + luminance": Together(KeepRegion(a_mask()), Luminance()),
    "keep + block mean": Together(KeepRegion(a_mask()), BlockMean(4)),
    "luminance + block mean": Together(Luminance(), BlockMean(4), Free()),
    "luminance + resize": Together(Luminance(), Downsample((HEIGHT, WIDTH), (6, 8))),
}
ALL: dict[str, Operator[Any]] = {**DISJOINT, **RESIZES, **JOINT}


def tensors(y: Any) -> tuple[torch.Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", DISJOINT)
def test_projection_is_exact_in_range_and_idempotent(name: str, dtype: torch.dtype, tolerance: float) -> None:
    op = DISJOINT[name]
    x, y = 1.5 * pictures(1, dtype=dtype), op.measure(pictures(2, dtype=dtype))
    z = op.project(x, y)
    assert z.dtype == dtype
    assert z.shape == x.shape
    assert z.abs().max() <= 1
    assert op.residual(z, y).max() <= tolerance
    torch.testing.assert_close(op.project(z, y), z, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", [*RESIZES, *JOINT])
def test_iterative_projection_holds_to_its_tolerance(name: str) -> None:
    op = ALL[name]
    truth = pictures(2, amplitude=0.4)
    x, y = truth + pictures(1, amplitude=0.3), op.measure(truth)
    z = op.project(x, y)
    assert z.abs().max() <= 1
    assert op.residual(z, y).max() <= TOLERANCE
    torch.testing.assert_close(op.project(z, y), z, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_projection_is_the_nearest_point(name: str) -> None:
    # p is the nearest point of a convex set to x if and only if (x - p).(z - p) <= 0 for every z in the set.
    op = ALL[name]
    truth = pictures(2, 1, 0.4, torch.float64)
    x, y = truth + pictures(1, 1, 0.3, torch.float64), op.measure(truth)
    p = op.project(x, y)
    for seed in range(4):
        z = op.project(pictures(10 + seed, 1, 0.5, torch.float64), y)
        slack = 1e-9 if name in DISJOINT else 2e-3 * (x - p).norm() * (z - p).norm()
        assert ((x - p) * (z - p)).sum() <= slack


def test_nearest_on_hyperplane_against_a_solver() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    generator = np.random.default_rng(0)
    for k in (2, 3, 5):
        x, a = generator.normal(size=k) * 1.5, generator.uniform(0.1, 1, k)
        y = float(a @ generator.uniform(-1, 1, k))
        found = optimize.minimize(
            lambda z, x=x: ((z - x) ** 2).sum(),
            np.zeros(k),
            bounds=[(-1, 1)] * k,
            constraints={"type": "eq", "fun": lambda z, a=a, y=y: a @ z - y},
            options={"ftol": 1e-14},
        )
        z = nearest_on_hyperplane(torch.tensor(x), torch.tensor(a), torch.tensor(y, dtype=torch.float64))
        np.testing.assert_allclose(z.numpy(), found.x, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 64, 4096])
def test_nearest_on_hyperplane_for_all_lengths_and_extremes(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    a = torch.rand(k, generator=generator) + 0.05
    a = a / a.sum()
    rows = 12
    x = torch.randn(rows, k, generator=generator) * torch.tensor([0.1, 1, 10]).repeat_interleave(4)[:, None]
    y = torch.tensor([-1, -0.999, 0, 0.5]).repeat(3)
    z = nearest_on_hyperplane(x, a, y)
    assert ((z * a).sum(1) - y).abs().max() <= 1e-6
    assert z.abs().max() <= 1
    assert torch.equal(nearest_on_hyperplane(x, a, torch.full((rows,), 1.5)), torch.ones_like(x))  # no z: the nearer corner


def test_nearest_on_hyperplane_far_outside_the_range_and_near_a_corner() -> None:
    # Here x + lambda a cancels and coordinates lie within rounding of the range's edge.
    generator = torch.Generator().manual_seed(0)
    a = torch.tensor(LUMINANCE)
    x = 5 * torch.randn(20_000, 3, generator=generator)
    y = 1 - 10 ** (-7 * torch.rand(20_000, generator=generator))
    z = nearest_on_hyperplane(x, a, y)
    assert ((z.double() * a.double()).sum(1) - y.double()).abs().max() <= 1e-6
    torch.testing.assert_close(z.double(), nearest_on_hyperplane(x.double(), a.double(), y.double()), atol=5e-6, rtol=0)


def test_nearest_on_hyperplane_with_equal_and_saturated_coordinates() -> None:
    a = torch.full((4,), 0.25)
    x = torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1], [1, 1, -1, -1], [5, 5, -5, -5], [0, 0, 0, 0]])
    for y in (-1.0, -0.5, 0.0, 0.5, 1.0):
        z = nearest_on_hyperplane(x, a, torch.full((5,), y))
        assert (z.mean(1) - y).abs().max() <= 1e-6
    torch.testing.assert_close(nearest_on_hyperplane(x, a, torch.zeros(5))[3], torch.tensor([1.0, 1, -1, -1]))


@pytest.mark.parametrize("name", ALL)
def test_adjoint(name: str) -> None:
    op = ALL[name]
    x = pictures(1, dtype=torch.float64)
    measured = op.measure(x)
    y = tuple(torch.randn(part.shape, dtype=part.dtype) for part in tensors(measured))
    left = sum((a * b).sum() for a, b in zip(tensors(measured), y, strict=True))
    right = (x * op.adjoint(y if isinstance(measured, tuple) else y[0])).sum()
    torch.testing.assert_close(torch.as_tensor(left), right)


@pytest.mark.parametrize("name", [n for n in ALL if n != "free"])
@pytest.mark.parametrize("weight", [0.0, 0.5, 100.0])
def test_proximal_is_the_minimiser(name: str, weight: float) -> None:
    op = ALL[name]
    x, target = 0.1 * pictures(1, dtype=torch.float64), op.measure(0.1 * pictures(2, dtype=torch.float64))
    z = op.proximal(x, target, weight).requires_grad_()
    assert z.abs().max() < 1  # the range is not met, so that the gradient of the objective must vanish
    misfit = sum(((a - b) ** 2).sum() for a, b in zip(tensors(op.measure(z)), tensors(target), strict=True))
    (gradient,) = torch.autograd.grad(((z - x) ** 2).sum() + weight * torch.as_tensor(misfit), z)
    assert gradient.abs().max() < 1e-5


def test_proximal_stays_in_range_and_rejects_weights() -> None:
    x = 2 * pictures(1)
    op = Luminance()
    assert op.proximal(x, op.measure(pictures(2)), 3.0).abs().max() <= 1
    assert torch.equal(op.proximal(x, op.measure(pictures(2)), 0), x.clamp(-1, 1))
    for weight in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="weight must be finite"):
            op.proximal(x, op.measure(x), weight)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", [-1.0, 1.0])
def test_black_and_white_pictures_are_reached(name: str, value: float) -> None:
    op = ALL[name]
    truth = torch.full((1, 3, HEIGHT, WIDTH), value)
    y = op.measure(truth)
    op.check(y)
    z = op.project(pictures(1, 1, 0.3), y)
    assert op.residual(z, y).max() <= (1e-6 if name in DISJOINT else 2e-3)


def test_black_and_white_blocks() -> None:
    y = torch.tensor([-1.0, 1.0]).repeat(1, 3, HEIGHT // 4, WIDTH // 8)
    z = BlockMean(4).project(pictures(1, 1), y)
    torch.testing.assert_close(z, y.repeat_interleave(4, 2).repeat_interleave(4, 3), atol=1e-5, rtol=0)


def test_measurements_survive_rounding_to_eight_bits() -> None:
    def saved(z: torch.Tensor) -> torch.Tensor:
        return (z * 127.5 + 127.5).round().to(torch.uint8)

    truth = saved(pictures(2)).double() / 127.5 - 1
    x = 1.5 * pictures(1)
    for op in (Luminance(), BlockMean(4)):
        y = op.measure(truth)
        again = op.measure(saved(op.project(x, y)).double() / 127.5 - 1)
        assert (again - y).abs().max() <= GREY_LEVEL
    kept = a_mask().expand(2, 3, -1, -1)
    for op in (KeepRegion(a_mask()), JOINT["keep + luminance"], JOINT["keep + block mean"]):
        z = op.project(x, op.measure(truth))
        assert torch.equal(saved(z)[kept], saved(truth)[kept])


def test_keep_region_copies_exactly() -> None:
    op, truth, x = KeepRegion(a_mask()), pictures(2), 1.5 * pictures(1)
    for y in (op.measure(truth), truth):  # what lies outside the mask is ignored
        z = op.project(x, y)
        assert torch.equal(z, torch.where(a_mask(), truth, x.clamp(-1, 1)))
        assert op.residual(z, y).max() == 0


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    op = ALL[name]
    x, y = pictures(1, amplitude=0.3).to(dtype), op.measure(pictures(2, amplitude=0.3))
    for result, wide in (
        (op.project(x, y), op.project(x.float(), y)),
        (op.approach(x, y), op.approach(x.float(), y)),
        (op.proximal(x, y, 2.0), op.proximal(x.float(), y, 2.0)),
    ):
        assert result.dtype == dtype
        assert torch.equal(result, wide.to(dtype))
    assert all(part.dtype == dtype for part in tensors(op.measure(x)))


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(3)
    a = torch.tensor(LUMINANCE, dtype=torch.float64)
    x = (1.2 * torch.randn(6, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    y = (torch.rand(6, generator=generator, dtype=torch.float64) - 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: nearest_on_hyperplane(x, a, y), (x, y))
    picture = (torch.randn(1, 3, 4, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    for op in (Luminance(), BlockMean(2), KeepRegion(a_mask(4, 4))):
        target = (0.3 * op.measure(picture.detach().clamp(-1, 1))).requires_grad_()
        assert torch.autograd.gradcheck(op.project, (picture, target))


def test_batches_and_one_measurement_for_all() -> None:
    masks = torch.cat([a_mask(), a_mask().flip(-1)])
    x, truth = pictures(1), pictures(2)
    for op, first in ((KeepRegion(masks), KeepRegion(masks[:1])), (Luminance(masks), Luminance(masks[:1]))):
        assert torch.equal(op.project(x, op.measure(truth))[:1], first.project(x[:1], first.measure(truth[:1])))
    y = BlockMean(4).measure(truth[:1])
    assert torch.equal(BlockMean(4).project(x, y), BlockMean(4).project(x, y.repeat(2, 1, 1, 1)))


@pytest.mark.parametrize(("kernel", "mode"), [("triangle", "bilinear"), ("cubic", "bicubic")])
@pytest.mark.parametrize("size", [(6, 8), (10, 13), (HEIGHT, WIDTH)])
def test_downsample_is_the_usual_antialiased_resize(kernel: str, mode: str, size: tuple[int, int]) -> None:
    x = pictures(1)
    expected = F.interpolate(x, size=size, mode=mode, antialias=True, align_corners=False)
    torch.testing.assert_close(Downsample((HEIGHT, WIDTH), size, kernel).measure(x), expected, atol=1e-5, rtol=0)


def seam(z: torch.Tensor, truth: torch.Tensor, mask: torch.Tensor) -> float:
    """The mean jump of z - truth between horizontal neighbours of which one is in the mask."""
    error = z - truth
    crosses = (mask[..., 1:] != mask[..., :-1]).expand_as(error[..., 1:])
    return (error[..., 1:] - error[..., :-1]).abs()[crosses].mean().item()


@pytest.mark.parametrize("kind", ["keep", "luminance"])
def test_approach_removes_the_seam_of_a_colour_shift(kind: str) -> None:
    truth, mask = pictures(2, 1, 0.2), a_mask()
    shifted = truth + 0.1 * torch.ones(1, 3, 1, 1)  # equal for all channels, which a luminance can see
    op = KeepRegion(mask, ramp=3) if kind == "keep" else Luminance(mask, ramp=3)
    y = op.measure(truth)
    at_once, smooth = op.project(shifted, y), op.project(op.approach(shifted, y), y)
    assert seam(at_once, truth, mask) > 0.05
    assert seam(smooth, truth, mask) < 0.1 * seam(at_once, truth, mask)
    assert op.residual(smooth, y).max() <= 1e-6


def test_approach_reaches_three_ramps_and_no_further() -> None:
    mask = torch.zeros(1, 1, 20, 40, dtype=torch.bool)
    mask[..., :10] = True
    op = KeepRegion(mask, ramp=4)
    change = op.approach(torch.zeros(1, 3, 20, 40), op.measure(torch.full((1, 3, 20, 40), 0.5)))[0, 0]
    assert torch.equal(change[:, :10], torch.full((20, 10), 0.5))
    assert (change[:, 10] - 0.5).abs().max() < 0.01
    assert (change.diff(dim=1) <= 1e-6).all()
    assert change[:, 22:].abs().max() < 1e-6  # the last kept column is 9; 3 ramps are 12 pixels


def test_distance_is_euclidean() -> None:
    inside = torch.rand(2, 1, 15, 17, generator=torch.Generator().manual_seed(0)) > 0.97
    ys, xs = torch.meshgrid(torch.arange(15), torch.arange(17), indexing="ij")
    for limit, n in itertools.product((5, 40), (0, 1)):
        points = inside[n, 0].nonzero()
        brute = torch.stack([((ys - py) ** 2 + (xs - px) ** 2).float().sqrt() for py, px in points.tolist()]).amin(0)
        torch.testing.assert_close(_distance(inside, limit)[n, 0], brute.clamp(max=limit))


def test_approach_of_luminance_keeps_the_colour() -> None:
    x, op = pictures(1, amplitude=0.2), Luminance()
    moved = op.approach(x, op.measure(x + 0.1))
    torch.testing.assert_close(moved, x + 0.1, atol=1e-6, rtol=0)


@pytest.mark.parametrize("op", [BlockMean(8), Downsample((HEIGHT, WIDTH), (3, 4))], ids=["block mean", "downsample"])
def test_approach_leaves_little_to_add_in_blocks(op: Operator[torch.Tensor]) -> None:
    truth = pictures(2, 1, 0.2)
    x, y = torch.zeros_like(truth), op.measure(truth)
    at_once = op.project(x, y)
    start = op.approach(x, y)
    assert (op.project(start, y) - start).norm() < 0.1 * (at_once - x).norm()


@pytest.mark.parametrize(
    ("op", "y", "message"),
    [
        (KeepRegion(a_mask()), torch.full((1, 3, HEIGHT, WIDTH), 1.2), "kept pixels must be in"),
        (Luminance(), torch.full((1, 1, HEIGHT, WIDTH), -1.1), "luminance must be in"),
        (BlockMean(4), torch.full((1, 3, 6, 8), 1.1), "mean must be in"),
        (Downsample((HEIGHT, WIDTH), (6, 8)), torch.full((1, 3, 6, 8), 1.1), "too light, too dark or too sharp"),
        (BlockMean(4), torch.full((1, 3, 6, 8), float("nan")), "NaN"),
    ],
)
def test_impossible_measurements_are_found(op: Operator[torch.Tensor], y: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op.check(y)
    if not y.isnan().any():
        assert op.project(torch.zeros(1, 3, HEIGHT, WIDTH), y).abs().max() <= 1


def test_check_says_by_how_much_and_in_which_picture() -> None:
    y = torch.zeros(2, 1, HEIGHT, WIDTH)
    y[1, 0, 3, 4] = 1.25
    with pytest.raises(ValueError, match=r"misses it by 0\.25 \(31\.9 grey levels\) in picture 1"):
        Luminance().check(y)
    Luminance().check(y, tolerance=0.3)
    y[1, 0, 3, 4] = 1.001  # rounding hides it
    Luminance().check(y)


@pytest.mark.parametrize("name", ALL)
def test_possible_measurements_pass(name: str) -> None:
    ALL[name].check(ALL[name].measure(pictures(2, amplitude=0.4)))


def test_conflicting_measurements_are_found() -> None:
    first, second = torch.full((1, 3, HEIGHT, WIDTH), 0.8), torch.full((1, 3, HEIGHT, WIDTH), -0.8)
    for others in (Luminance(), BlockMean(4), KeepRegion(a_mask())):
        op = Together(KeepRegion(a_mask()), others)
        with pytest.raises(ValueError, match=r"misses it by .* not all at once"):
            op.check((op.operators[0].measure(first), others.measure(second)))
    with pytest.raises(ValueError, match="luminance must be in"):  # impossible alone: says so
        Together(Luminance(), BlockMean(4)).check((2 * first[:, :1], BlockMean(4).measure(first)))


def test_one_impossible_picture_does_not_spoil_the_batch() -> None:
    op = Downsample((HEIGHT, WIDTH), (6, 8))
    truth = pictures(2, amplitude=0.3)
    y = op.measure(truth)
    y[0] += 1.5
    residual = op.residual(op.project(truth + 0.1, y), y)
    assert residual[0] > 0.3
    assert residual[1] <= TOLERANCE


def test_masks_that_cannot_be_used() -> None:
    whole = torch.ones(1, 1, 4, 4)
    for operator in (KeepRegion, Luminance):
        with pytest.raises(ValueError, match=r"mask\[None, None\]"):
            operator(whole[0, 0])
        with pytest.raises(ValueError, match="only 0 and 1"):
            operator(whole * 0.5)
        with pytest.raises(ValueError, match="mask of picture 0 is empty"):
            operator(whole * 0)
        with pytest.raises(ValueError, match="ramp must be"):
            operator(whole, ramp=0)
        partial = whole.clone()
        partial[0, 0, 0, 0] = 0
        with pytest.raises(ValueError, match="The mask is 4 x 4 and the picture 24 x 32"):
            operator(partial).measure(pictures(1))
        for count, words in ((1, "3 masks for 1 picture:"), (2, "3 masks for 2 pictures:")):
            with pytest.raises(ValueError, match=words):
                operator(partial.repeat(3, 1, 1, 1)).measure(torch.zeros(count, 3, 4, 4))
    with pytest.raises(ValueError, match="The mask keeps every pixel"):
        KeepRegion(whole)
    with pytest.raises(ValueError, match="All 2 masks keep every pixel"):
        KeepRegion(whole.repeat(2, 1, 1, 1))
    Luminance(whole)


def test_one_picture_of_several_may_be_kept_whole() -> None:
    """It comes back bit for bit, and the others as they would alone."""
    op = KeepRegion(torch.cat([torch.ones_like(a_mask()), a_mask()]))
    x, y = 1.5 * pictures(1), pictures(2)
    for step in ("project", "approach"):
        both = getattr(op, step)(x, y)
        assert torch.equal(both[0], y[0])
        torch.testing.assert_close(both[1:], getattr(KeepRegion(a_mask()), step)(x[1:], y[1:]), rtol=0, atol=1e-6)
    op.check(y)


def test_shapes_that_do_not_fit() -> None:
    x = pictures(1)
    with pytest.raises(ValueError, match="nearest factors that do are 4 or 8"):
        BlockMean(7).measure(x)
    with pytest.raises(ValueError, match="at least 1"):
        BlockMean(0)
    with pytest.raises(ValueError, match=r"\(2, 3, 6, 8\); got \(2, 3, 3, 4\)"):
        BlockMean(4).project(x, torch.zeros(2, 3, 3, 4))
    with pytest.raises(ValueError, match="Luminance"):
        Luminance().adjoint(x)
    with pytest.raises(ValueError, match="from 1 to in_size"):
        Downsample((8, 8), (9, 4))
    with pytest.raises(ValueError, match="kernel must be"):
        Downsample((8, 8), (4, 4), "box")
    with pytest.raises(ValueError, match=r"pictures of \(8, 8\)"):
        Downsample((8, 8), (4, 4)).measure(x)
    with pytest.raises(ValueError, match="divide by"):
        Free().measure(x.to(torch.uint8))
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        Free().measure(x[0])
    with pytest.raises(ValueError, match="measures nothing"):
        Free().check(x)


def test_together_needs_operators_and_their_measurements() -> None:
    with pytest.raises(ValueError, match="at least one operator"):
        Together()
    with pytest.raises(ValueError, match="none of them a Together"):
        Together(Together(Free()))  # type: ignore[arg-type]
    op = Together(KeepRegion(a_mask()), Luminance())
    with pytest.raises(ValueError, match="one tensor for each of KeepRegion, Luminance"):
        op.project(pictures(1), (pictures(1),))
    with pytest.raises(ValueError, match="different shapes"):
        op.check((pictures(1), torch.zeros(1, 1, 8, 8)))


def test_free_only_clamps() -> None:
    x = 2 * pictures(1)
    y = Free().measure(x)
    assert y.shape == (2, 0)
    assert torch.equal(Free().project(x, y), x.clamp(-1, 1))
    assert torch.equal(Free().residual(x, y), torch.zeros(2))
    both = Together(Free(), Free())
    both.check((y, y))
    assert torch.equal(both.project(x, (y, y)), x.clamp(-1, 1))


def test_a_blend_shows_so_much_of_the_new_picture() -> None:
    mask = a_mask()
    blend = torch.linspace(0, 1, WIDTH).expand(1, 1, HEIGHT, WIDTH)
    x, y = torch.zeros(1, 3, HEIGHT, WIDTH), torch.full((1, 3, HEIGHT, WIDTH), 0.5)
    hard, soft = (KeepRegion(mask, blend=b).approach(x, y) for b in (None, blend))
    free = ~mask.expand_as(x)
    torch.testing.assert_close(soft[free], torch.lerp(y, hard, blend)[free])
    assert torch.equal(soft[~free], y[~free])
    with pytest.raises(ValueError, match="one size"):
        KeepRegion(mask, blend=blend[..., :8])

"""Metrics of clips against what is known in closed form."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torchvision.models.optical_flow import raft_small

from lora_training.evaluation.distribution import Moments, kernel_distance
from lora_training.evaluation.metrics import METRICS
from lora_training.evaluation.run import distances
from lora_training.evaluation.video import (
    FlowConfig,
    flow_magnitude,
    frame_scores,
    load_flow,
    single_frames,
    temporal_consistency,
    video_frechet_distance,
)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def texture(height, width, seed=0):
    """A smooth picture (3, height, width) in [-1, 1], on a torus."""
    coarse = F.pad(drawn(1, 3, height // 8, width // 8, seed=seed), (2, 2, 2, 2), mode="circular")
    fine = F.interpolate(coarse, scale_factor=8, mode="bicubic")[0, :, 16:-16, 16:-16]
    return fine / fine.abs().max()


def moving(by, frames=4, side=96, seed=0):
    """A clip (F, 3, side, side) whose frames each lie (down, right) pixels farther than the one before."""
    picture = texture(side, side, seed)
    return torch.stack([picture.roll((by[0] * i, by[1] * i), (1, 2)) for i in range(frames)])


def colours(pictures):
    return F.adaptive_avg_pool2d(pictures, 2).flatten(1)


def test_a_known_translation_is_the_flow_in_pixels():
    flow = load_flow(FlowConfig())
    for by, length in (((0, 3), 3.0), ((-2, 0), 2.0), ((3, -4), 5.0)):
        clip = moving(by)
        found = flow(clip[:-1], clip[1:])
        assert found.shape == (3, 2, 96, 96)
        inner = found[..., 20:-20, 20:-20].mean((0, 2, 3))
        torch.testing.assert_close(inner, torch.tensor([by[1], by[0]], dtype=torch.float32), atol=0.1, rtol=0)
        assert flow_magnitude(flow, [clip[None]]) == pytest.approx(length, rel=0.15)  # at the borders something comes in
    two = torch.stack([moving((0, 3)), moving((0, 1))])
    apart = [flow_magnitude(flow, [clip[None]]) for clip in two]
    assert flow_magnitude(flow, [two]) == pytest.approx(sum(apart) / 2, rel=1e-6)
    assert flow_magnitude(flow, two.split(1)) == pytest.approx(sum(apart) / 2, rel=1e-6)


def test_a_clip_that_stands_still_is_consistent_and_does_not_flow():
    still = texture(96, 96).expand(2, 5, 3, 96, 96)
    assert temporal_consistency(colours, [still]) == pytest.approx(1, abs=1e-6)
    assert flow_magnitude(load_flow(FlowConfig()), [still]) == pytest.approx(0, abs=0.02)
    assert flow_magnitude(load_flow(FlowConfig()), [torch.zeros_like(still)]) == 0


def test_temporal_consistency_is_the_mean_cosine_of_neighbours():
    # features of 0, 60 and 90 degrees: neighbours are 60 and 30 apart
    angles = torch.tensor([0.0, 60.0, 90.0]).deg2rad()
    turning = torch.stack([angles.cos(), angles.sin(), torch.zeros(3)], 1)[None, :, :, None, None].expand(1, 3, 3, 4, 4)
    expected = (torch.tensor(60.0).deg2rad().cos() + torch.tensor(30.0).deg2rad().cos()).item() / 2
    means = lambda pictures: pictures.mean((2, 3))  # noqa: E731
    assert temporal_consistency(means, [turning]) == pytest.approx(expected, abs=1e-6)
    still = turning[:, :1].expand_as(turning)
    assert temporal_consistency(means, [torch.cat([turning, still])]) == pytest.approx((expected + 1) / 2, abs=1e-6)


def test_frechet_video_distance_of_gaussians():
    """|m_1 - m_2|^2 + sum (s_1 - s_2)^2 where the features are independent; here the moments are exactly those."""
    features = lambda clips: clips.mean((3, 4)).flatten(1)[:, :2].double()  # noqa: E731
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # variance 4/3 each, no covariance

    def clips(scale, shift):
        values = torch.zeros(4, 2, 3, 4, 4)
        values[:, 0, :2] = (corners * torch.tensor(scale) + torch.tensor(shift))[..., None, None]
        return values

    ours, theirs = clips((0.3, 0.1), (0.0, 0.1)), clips((0.1, 0.2), (0.4, -0.2))
    expected = 0.4**2 + 0.3**2 + 4 / 3 * (0.2**2 + 0.1**2)
    known = Moments.of([features(theirs)])
    assert video_frechet_distance(features, ours.split(3), known) == pytest.approx(expected, abs=1e-6)
    assert video_frechet_distance(features, [theirs], known) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="at least 2"):
        video_frechet_distance(features, [ours[:1]], known)


def test_frames_are_batches_of_a_clips_own_and_pictures_stay():
    clips, pictures = drawn(3, 5, 3, 4, 4), drawn(2, 3, 4, 4)
    found = list(single_frames([clips[:2], clips[2:]]))
    assert len(found) == 3
    assert torch.equal(torch.stack(found), clips)
    assert next(single_frames([pictures])) is pictures


def test_a_judge_of_frames_judges_a_clip_by_their_mean():
    asked = []

    def judge(pictures, texts):
        asked.append(texts)
        return pictures.mean((1, 2, 3))

    clips = drawn(2, 3, 3, 4, 4)
    torch.testing.assert_close(frame_scores(judge)(clips, ["a", "b"]), clips.mean((1, 2, 3, 4)))
    assert asked == [["a"] * 3, ["b"] * 3]
    with pytest.raises(ValueError, match="shorter"):
        frame_scores(judge)(clips, ["a"])


def test_clips_that_stand_still_have_the_figures_of_their_pictures():
    """Frames of one clip are no independent pictures: neighbours and kernels must not be found among them."""
    ours, known = drawn(40, 5), drawn(40, 5, seed=1) + 0.3
    pictures = distances(ours, known)
    still = distances(ours.repeat_interleave(6, 0), known.repeat_interleave(6, 0), frames=6)
    assert (still["precision"], still["recall"]) == (pictures["precision"], pictures["recall"])
    assert 0 < still["precision"] < 1
    # a covariance of 6 times as many is divided by another count
    assert still["frechet_distance"] == pytest.approx(pictures["frechet_distance"], rel=0.05)
    assert still["kernel_distance"] == pytest.approx(pictures["kernel_distance"], rel=1e-6)  # all clips are in every subset


def test_the_kernel_distance_of_clips_is_unbiased():
    def of_one_distribution(seed, frames):
        first, second = (drawn(400, 4, seed=2 * seed + i).repeat_interleave(8, 0) for i in range(2))
        return kernel_distance(first, second, subsets=20, subset_size=200, frames=frames).mean

    by_clips = torch.tensor([of_one_distribution(seed, 8) for seed in range(5)])
    by_frames = torch.tensor([of_one_distribution(seed, 1) for seed in range(5)])
    assert by_clips.mean().abs() < 0.02
    assert by_frames.mean() > 2 * by_clips.mean().abs()
    with pytest.raises(ValueError, match="between 2 and 5"):
        kernel_distance(drawn(40, 4), drawn(40, 4), subset_size=6, frames=8)


def test_raft_takes_a_state_of_its_own_and_clips_of_any_size(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "raft_small.safetensors"
    save_file(raft_small(weights=None).state_dict(), path)
    flow = load_flow(FlowConfig("raft_small", str(path)))
    clip = moving((0, 2), frames=2, side=40)[..., :36]
    found = flow(clip[:-1], clip[1:])
    assert found.shape == (1, 2, 40, 36)
    assert found.isfinite().all()
    assert flow_magnitude(flow, [clip[None]]) >= 0
    with pytest.raises(ValueError, match="not the state of torchvision's raft_large"):
        load_flow(FlowConfig("raft_large", str(path)))
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.safetensors.*Raft_Large_Weights"):
        load_flow(FlowConfig("raft_large", str(tmp_path / "nowhere.safetensors")))
    with pytest.raises(FileNotFoundError, match=r"clips\.flow\.path"):
        load_flow(FlowConfig("raft_small"))
    with pytest.raises(ValueError, match=r"must be a \.safetensors file"):
        load_flow(FlowConfig("raft_small", "raft.pth"))


def test_a_missing_opencv_is_named_with_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("lora_training.local_weights.find_spec", lambda name: None if name == "cv2" else find(name))
    with pytest.raises(ValueError, match="pip install opencv-python-headless"):
        load_flow(FlowConfig())


def test_figures_of_clips_have_headings_and_directions():
    wanted = {"video_frechet_distance": "smaller", "motion": "larger", "temporal_consistency": "larger", "flow": None}
    assert {name: METRICS[name].better for name in wanted} == wanted
    assert METRICS["flow"].unit == "pixels a frame"

"""Clips as files: every form that pipelines return frames in comes to the same pixels, and nothing half written stays."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from PIL import Image, ImageSequence

from pcm_scheduler import export_clip
from pcm_scheduler.pipelines import clips


def footage(count=6, height=32, width=48):
    """(F, 3, H, W) uint8: grey, and lighter from frame to frame."""
    levels = (torch.arange(count) * 40 + 10).to(torch.uint8)
    return levels[:, None, None, None].expand(count, 3, height, width).contiguous()


def of_gif(path):
    """Frames (F, H, W, 3), and milliseconds that each is shown."""
    with Image.open(path) as file:
        frames = [(np.asarray(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(file)]
    return np.stack([pixels for pixels, _ in frames]), [shown for _, shown in frames]


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
@pytest.mark.parametrize("batch", [False, True])
def test_what_pipelines_return_is_written_as_it_is(tmp_path, kind, batch):
    decoded = (footage().float() / 127.5 - 1).transpose(0, 1)[None]
    frames = VideoProcessor().postprocess_video(decoded, output_type=kind)
    path = export_clip(frames if batch else frames[0], tmp_path / "sub" / "a.gif", fps=8)
    pixels, shown = of_gif(path)
    assert np.array_equal(pixels, footage().permute(0, 2, 3, 1).numpy())
    assert sum(shown) == 750
    assert [p.name for p in path.parent.iterdir()] == ["a.gif"]


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_videos_have_the_size_rate_and_number_of_frames_asked_for(tmp_path, suffix):
    av = pytest.importorskip("av")
    path = export_clip(footage().half() / 255, tmp_path / f"a{suffix}", fps=12.5)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (48, 32, 12.5)
        levels = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(stream)]
    assert np.abs(np.stack(levels) - footage().permute(0, 2, 3, 1).numpy()).max() <= 3


def test_every_level_of_grey_survives():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    for given in (every, every.float() / 255, every.permute(0, 2, 3, 1).numpy()):
        assert torch.equal(clips.to_levels(given), every)


def test_a_bar_counts_frames_and_can_be_had_without(tmp_path, capsys):
    export_clip(footage(), tmp_path / "a.gif")
    assert "6/6" in capsys.readouterr().err
    export_clip(footage(), tmp_path / "a.gif", progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("frames", "name", "fps", "words"),
    [
        (footage(), "a.mpeg", 8, r"\.mp4, \.webm, \.gif, \.webp"),
        (footage().float(), "a.mp4", 8, r"uint8, or floats in \[0, 1\]"),
        (footage().half() / 127.5 - 1, "a.gif", 8, "x / 2 \\+ 0.5"),
        (footage()[:, :2], "a.gif", 8, "2 channels"),
        (footage(0), "a.gif", 8, "none"),
        ([], "a.gif", 8, "none"),
        (footage(2, 31), "a.mp4", 8, "even height and width; got 31 x 48"),
        (footage(), "a.mp4", 0, "fps"),
        (footage(), "a.gif", 0.0005, "at least 0.01"),
        (footage(), "a.webp", float("nan"), "fps must be a finite number"),
        (footage(), "a.gif", 60, "at most 50"),
        (torch.stack([footage()] * 2), "a.gif", 8, r"2 clips.*frames\[0\]"),
        ([[Image.new("RGB", (8, 8))]] * 3, "a.gif", 8, "3 clips"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 16))], "a.gif", 8, "one size"),
        ("a.mp4", "a.gif", 8, "frames must be"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, frames, name, fps, words):
    with pytest.raises(ValueError, match=words):
        export_clip(frames, tmp_path / "sub" / name, fps)
    assert not list(tmp_path.iterdir())


def test_mp4_is_written_by_what_encoder_there_is(tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    everything = clips._ENCODERS[".mp4"]
    monkeypatch.setitem(clips._ENCODERS, ".mp4", (("no_such_encoder", {}), everything[-1]))
    with av.open(str(export_clip(footage(), tmp_path / "a.mp4"))) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    monkeypatch.setitem(clips._ENCODERS, ".mp4", everything[:0])
    with pytest.raises(ValueError, match="no encoder"):
        export_clip(footage(), tmp_path / "b.mp4")


def test_without_pyav_videos_are_refused_and_gifs_are_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'phased-consistency\[video\]'.*\.gif or \.webp needs nothing"):
        export_clip(footage(), tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())
    assert export_clip(footage(), tmp_path / "a.webp").is_file()


def test_what_fails_half_way_leaves_nothing_and_keeps_the_old_file(tmp_path, monkeypatch):
    path = export_clip(footage(), tmp_path / "a.gif")
    before = path.read_bytes()
    opened = Image.fromarray
    shown = iter(range(3))
    monkeypatch.setattr(Image, "fromarray", lambda pixels: opened(pixels) if next(shown, None) is not None else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_clip(footage().flip(0), path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]
    assert path.read_bytes() == before

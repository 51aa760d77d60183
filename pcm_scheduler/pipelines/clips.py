"""Frames that a pipeline drew, to a file that players show."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..checks import finite_number
from .pictures import to_levels

if TYPE_CHECKING:
    from av.video.stream import VideoStream

# By suffix, the best that the build of FFmpeg has; written at a quality at which artefacts are not seen.
_ENCODERS: dict[str, tuple[tuple[str, dict[str, str]], ...]] = {
    ".mp4": (("libx264", {"crf": "16"}), ("libopenh264", {"b": "8M"}), ("mpeg4", {"qmin": "2", "qmax": "3"})),
    ".webm": (("libvpx-vp9", {"crf": "16", "b": "0"}), ("libvpx", {"crf": "6", "b": "8M"})),
}
_ANIMATIONS = {".gif": 10, ".webp": 1}  # milliseconds that their frame times are multiples of
SLOWEST = 0.01  # frames a second; a GIF's frame lasts 655 s at most

_Writer = Callable[[np.ndarray, Iterable[np.ndarray], Path], None]
"""(frames (F, H, W, 3) uint8, the same one by one with a bar, file)."""


def export_clip(frames: Any, path: str | os.PathLike, fps: float = 8.0, progress: bool = True) -> Path:
    """Write a clip to a temporary name and rename, so that nobody meets half a file; the folder is made if missing.

    MP4 (H.264 where the build of FFmpeg has it) and WebM through PyAV; GIF and animated WebP through Pillow, looping. A GIF has
    256 colours a frame, and counts hundredths of seconds: frame times are rounded so that the whole keeps its length. Pillow
    stores neighbouring frames that are equal as one that is shown longer.

    Args:
        frames: what a video pipeline returned, `pipe(...).frames[0]`, or `.frames` if it holds one clip: PIL pictures; numpy
            (F, H, W, 3); tensors (F, 3, H, W). uint8 or [0, 1]. H and W are even for MP4 and WebM.
        path: its suffix says which: `.mp4`, `.webm`, `.gif` or `.webp`.
        fps: frames a second, from 0.01 to 1000; at most 50 for a GIF.
        progress: show a bar, as pipelines do. (Pillow encodes a WebP after it has taken all frames.)

    Returns:
        the path.

    Raises:
        ValueError: another suffix, shape, range or rate, several clips, or no encoder in this build of FFmpeg.
        ImportError: PyAV is needed and not installed.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _ENCODERS and suffix not in _ANIMATIONS:
        raise ValueError(f"Clips are written as {', '.join([*_ENCODERS, *_ANIMATIONS])}; got {path.name}.")
    fastest = 50 if suffix == ".gif" else 1000
    fps = finite_number(fps, "fps")
    if not SLOWEST <= fps <= fastest:
        raise ValueError(f"fps must be at least {SLOWEST}, and at most {fastest} for {suffix}; got {fps:g}.")
    write = _video_writer(suffix, fps) if suffix in _ENCODERS else _animation_writer(suffix, fps)
    levels = to_levels(_one_clip(frames), "frames").permute(0, 2, 3, 1).contiguous().numpy()
    height, width = levels.shape[1:3]
    if suffix in _ENCODERS and (height % 2 or width % 2):
        raise ValueError(f"{suffix} takes frames of even height and width; got {height} x {width}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(levels, tqdm(levels, desc=path.name, unit="frame", disable=not progress), temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _one_clip(frames: Any) -> Any:
    """The frames themselves, out of the batch of one clip that a pipeline's `.frames` is."""
    if isinstance(frames, (np.ndarray, torch.Tensor)):
        batched = frames.ndim == 5
    else:
        first = frames[0] if isinstance(frames, Sequence) and not isinstance(frames, str) and len(frames) else None
        batched = (
            first.ndim == 4
            if isinstance(first, (np.ndarray, torch.Tensor))
            else isinstance(first, Sequence) and not isinstance(first, str)
        )
    if batched and len(frames) != 1:
        raise ValueError(f"frames holds {len(frames)} clips; write each to a file of its own: frames[0], frames[1], ...")
    return frames[0] if batched else frames


def _animation_writer(suffix: str, fps: float) -> _Writer:
    def write(frames: np.ndarray, shown: Iterable[np.ndarray], path: Path) -> None:
        unit = _ANIMATIONS[suffix]
        ends = [round(number * 1000 / fps / unit) * unit for number in range(len(frames) + 1)]
        durations = [after - before for before, after in pairwise(ends)]
        quality = {} if suffix == ".gif" else {"quality": 90}
        images = (Image.fromarray(frame) for frame in shown)
        next(images).save(path, format=suffix[1:], save_all=True, append_images=images, duration=durations, loop=0, **quality)

    return write


def _video_writer(suffix: str, fps: float) -> _Writer:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"Writing {suffix} needs PyAV: pip install 'phased-consistency[video]', or av alone. A .gif or .webp needs nothing."
        ) from error
    found = next(((name, options) for name, options in _ENCODERS[suffix] if name in av.codecs_available), None)
    if found is None:
        names = ", ".join(name for name, _ in _ENCODERS[suffix])
        raise ValueError(f"This build of PyAV has no encoder for {suffix}: none of {names}. Write a .gif or .webp instead.")
    codec, options = found
    head_first = {"movflags": "+faststart"} if suffix == ".mp4" else {}

    def write(frames: np.ndarray, shown: Iterable[np.ndarray], path: Path) -> None:
        with av.open(str(path), "w", format=suffix[1:], container_options=head_first) as container:
            rate = Fraction(fps).limit_denominator(1001)
            stream = cast("VideoStream", container.add_stream(codec, rate=rate, options=options))
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            for frame in shown:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))

    return write

"""From a clip's file to the pixels of its frames, and from frames to a file.

A clip is one file (`CLIP_SUFFIXES`: MP4, WebM, MOV, MKV, AVI through PyAV, animated GIF and WebP through Pillow), or one folder
of numbered pictures. What `data.path` may name when `data.clips` is set:

    clips/                      a folder, and what is below it
      walk.mp4   walk.txt         a file, its caption beside it
      dance.gif                   captioned by {"file_name": "dance.gif", "text": "..."} in clips/metadata.jsonl
      run.txt                     the caption of the folder run/; or {"file_name": "run", "text": "..."} in metadata.jsonl
      run/0001.png 0002.png ...   one clip: pictures in the order of the numbers that their names end in, which rise evenly
    shards/{000..099}.tar       webdataset: 0001.mp4 with 0001.txt, or 0001.json with `text` or `caption`
    data/*.parquet, a hub id    a column of `datasets.Video`, and one of captions

A folder that holds clip files is no clip itself: pictures in it are passed over, as the previews that they usually are.

`data.clips.stride` counts frames, however long each is shown; `data.clips.fps` goes by time and takes the frames on show at
even instants. The two differ where frame times are uneven, as they may be in a GIF (and in recordings of a screen): there `fps`
keeps the motion's pace and `stride` does not. GIF frames that ask for less than 20 ms are shown for 100 ms, as browsers do.

Frame numbers are exact in every format: a file's packets are read once for their times, without decoding, and then only what
lies between the wanted frames and the keyframes before them is decoded.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from itertools import accumulate, chain, groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from PIL import Image, UnidentifiedImageError

from ..config import ClipConfig, DataConfig
from .pictures import Picture, Size, framed, generator_of_name, opened, rgb, upright_rgb
from .sources import Record, frame_number, frames_in, needs

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

_TOLERANCE = 0.005  # seconds: GIF counts hundredths, Matroska thousandths
_MISSING_SHARE = 0.1  # of the duration that a whole file may lack after its last packet
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}

# By suffix, the best that the build of FFmpeg has; written at a quality at which artefacts are not seen.
_ENCODERS: dict[str, tuple[tuple[str, dict[str, str]], ...]] = {
    ".mp4": (("libx264", {"crf": "16"}), ("libopenh264", {"b": "8M"}), ("mpeg4", {"qmin": "2", "qmax": "3"})),
    ".webm": (("libvpx-vp9", {"crf": "16", "b": "0"}), ("libvpx", {"crf": "6", "b": "8M"})),
}
_ANIMATIONS = {".gif": 10, ".webp": 1}  # milliseconds that their frame times are multiples of


@dataclass(frozen=True)
class _Footage:
    """Frames that are had by number.

    Attributes:
        count: of frames.
        times: when each is first shown, in seconds after the first; None if that is not known.
        decode: frames of ascending numbers, upright and RGB.
    """

    count: int
    times: Sequence[float] | None
    decode: Callable[[Sequence[int]], Iterator[Image.Image]]

    def images(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """Of numbers that do not descend; each is decoded once."""
        wanted = Counter(numbers)
        for image, count in zip(self.decode(list(wanted)), wanted.values(), strict=True):
            yield from [image] * count


def clip_size(record: Record) -> Size:
    """(height, width) of the first frame, as it is looked at.

    Raises:
        ValueError: the file is not a clip, or is damaged.
    """
    with _footage(record) as footage:
        first = next(footage.images([0]))
        return first.height, first.width


def load_clip(record: Record, size: Size, config: DataConfig) -> Picture:
    """The frames that `config.clips` asks for, each turned upright, scaled to cover `size` and cropped at the same place.

    Raises:
        ValueError: the file is not a clip, is cut off or damaged, or has too few frames.
    """
    if config.clips is None:
        raise ValueError("data.clips is not set.")
    with _footage(record) as footage:
        numbers = window(footage.count, footage.times, config.clips, record.name)
        return framed(footage.images(numbers), record.name, size, config)


def window(count: int, times: Sequence[float] | None, clips: ClipConfig, name: str) -> list[int]:
    """The numbers of the frames that a clip is made of, from 0.

    By stride: b, b + stride, ..., of which all lie in the file. By fps: the frames on show at b, b + 1/fps, ..., none of these
    instants after the last frame's time. b is the least, the middle one or any of those that fit.

    Args:
        count: of frames in the file.
        times: of each, in seconds, ascending; None if they are not known.
        clips: frames, stride or fps, start, what is skipped.
        name: which a random start is drawn from, so that it is the same every time.

    Raises:
        ValueError: there are too few frames, or no times where they are needed.
    """
    first, last = 0, count - 1
    if clips.fps or clips.skip_seconds:
        if times is None:
            raise ValueError("numbered pictures have no times, and data.clips.fps and data.clips.skip_seconds need them")
        if clips.skip_seconds and times:
            first = bisect_left(times, times[0] + clips.skip_seconds - _TOLERANCE)
            last = bisect_right(times, times[-1] - clips.skip_seconds + _TOLERANCE) - 1
    left = f"{count} frames" if first == 0 else f"{max(last - first + 1, 0)} of {count} frames after what is skipped"
    share = {"first": 0.0, "middle": 0.5}.get(clips.start)
    if share is None:
        share = generator_of_name(f"{name}: start").random()
    if times is not None and clips.fps:
        length = (clips.frames - 1) / clips.fps
        spare = times[last] - times[first] - length if first <= last else -1.0
        if spare < -_TOLERANCE:
            raise ValueError(f"{left}, too short: {clips.frames} frames at {clips.fps:g} a second take {length:g} s")
        begin = times[first] + share * max(spare, 0)
        return [bisect_right(times, begin + k / clips.fps + _TOLERANCE) - 1 for k in range(clips.frames)]
    span = (clips.frames - 1) * clips.stride + 1
    spares = last - first + 1 - span
    if spares < 0:
        raise ValueError(f"{left}, too few: {clips.frames} frames at stride {clips.stride} take {span}")
    begins = first + int(share * (spares + 1))
    return list(range(begins, begins + span, clips.stride))


@contextmanager
def _footage(record: Record) -> Iterator[_Footage]:
    """Raises ValueError, with the record's name, for whatever goes wrong inside."""
    needs("av", "Clips", "video")
    import av

    content = record.content
    try:
        if isinstance(content, Path) and content.is_dir():
            yield _numbered_pictures(content)
        elif _is_animation(content):
            with Image.open(BytesIO(content) if isinstance(content, bytes) else content) as file:
                yield _animation(file)
        else:
            with av.open(BytesIO(content) if isinstance(content, bytes) else str(content), "r") as container:
                yield _video(container)
    except (
        av.FFmpegError, UnidentifiedImageError, OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError,
    ) as error:  # fmt: skip
        raise ValueError(f"{record.name} cannot be used as a clip: {error}") from error


def _is_animation(content: Path | bytes) -> bool:
    """Whether it is GIF or WebP, by its first bytes."""
    if isinstance(content, Path):
        with content.open("rb") as file:
            content = file.read(12)
    return content[:4] == b"GIF8" or (content[:4] == b"RIFF" and content[8:12] == b"WEBP")


def _numbered_pictures(folder: Path) -> _Footage:
    paths = frames_in(folder)
    steps = [(frame_number(b) - frame_number(a), a.name, b.name) for a, b in pairwise(paths)]
    for step, before, after in steps:
        if step == 0 or step != steps[0][0]:
            raise ValueError(f"its numbers do not rise evenly: {before} is followed by {after}")

    def decode(numbers: Sequence[int]) -> Iterator[Image.Image]:
        for number in numbers:
            with opened(Record(paths[number].name, paths[number])) as file:
                yield upright_rgb(file)

    return _Footage(len(paths), None, decode)


def _animation(file: Image.Image) -> _Footage:
    durations = []
    for number in range(getattr(file, "n_frames", 1)):
        file.seek(number)
        file.load()  # WebP tells a frame's time with its pixels; and what is cut off is found
        shown = file.info.get("duration", 0)
        durations.append(shown if shown >= 20 else 100)

    def decode(numbers: Sequence[int]) -> Iterator[Image.Image]:
        for number in numbers:
            file.seek(number)
            yield rgb(file)

    times = [milliseconds / 1000 for milliseconds in accumulate(durations[:-1], initial=0)]
    return _Footage(len(durations), times, decode)


def _video(container: InputContainer) -> _Footage:
    stream = cast("VideoStream | None", container.streams.best("video"))
    if stream is None or not stream.time_base:
        raise ValueError("it holds no video")
    unit = stream.time_base  # seconds
    found: set[int] = set()
    keys: dict[int, int] = {}  # when a keyframe is shown, and when it is decoded
    end = 0.0
    for packet in container.demux():
        if not packet.size:  # the streams' ends
            continue
        if packet.is_corrupt:
            raise ValueError("it is cut off or damaged")
        if packet.stream.index == stream.index:
            if packet.pts is None:
                raise ValueError("its frames have no times")
            if not packet.is_discard:  # before the place where an edited file begins
                found.add(packet.pts)
            if packet.is_keyframe:
                keys[packet.pts] = packet.pts if packet.dts is None else packet.dts
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    if container.duration and end < (1 - _MISSING_SHARE) * container.duration / 1e6:
        raise ValueError(f"it is cut off: it ends at {end:.2f} s of {container.duration / 1e6:.2f} s")
    if not found or not keys:
        raise ValueError("it holds no frames that can be decoded")
    stamps, shown = sorted(found), sorted(keys)

    def decode(numbers: Sequence[int]) -> Iterator[Image.Image]:
        for before, group in groupby((stamps[n] for n in numbers), key=lambda stamp: bisect_right(shown, stamp)):
            # some formats seek by the time of showing, some by that of decoding; if both come out too late, go further back
            places = (place for key in reversed(shown[: max(before, 1)]) for place in (key, keys[key]))
            yield from _decode_stretch(container, stream, places, list(group))

    times = [float((stamp - stamps[0]) * unit) for stamp in stamps]
    return _Footage(len(stamps), times, decode)


def _decode_stretch(
    container: InputContainer, stream: VideoStream, places: Iterable[int], stamps: Sequence[int]
) -> Iterator[Image.Image]:
    """The frames with these time stamps, ascending, that all come before the next keyframe."""
    wanted = iter(stamps)
    stamp = next(wanted)
    for frame in _from_keyframe(container, stream, places, stamp):
        if frame.pts is None or frame.pts < stamp:
            continue
        if frame.pts > stamp or frame.is_corrupt:
            break
        yield _image(frame, stream)
        after = next(wanted, None)
        if after is None:
            return
        stamp = after
    raise ValueError(f"its frame at {float(stamp * (stream.time_base or 0)):.3f} s cannot be decoded")


def _from_keyframe(container: InputContainer, stream: VideoStream, places: Iterable[int], stamp: int) -> Iterable[VideoFrame]:
    """Frames from the first of the places from which decoding begins at or before a time stamp; none if it is none of them."""
    for place in places:
        container.seek(place, stream=stream)
        frames = container.decode(stream)
        first = next(frames, None)
        if first is not None and first.pts is not None and first.pts <= stamp:
            return chain([first], frames)
    return ()


def _image(frame: VideoFrame, stream: VideoStream) -> Image.Image:
    """Square pixels, upright, RGB."""
    transparent = any(component.is_alpha for component in frame.format.components)
    image = Image.fromarray(frame.to_ndarray(format="rgba" if transparent else "rgb24"))
    aspect = stream.sample_aspect_ratio
    if aspect and aspect != 1:
        image = image.resize((round(image.width * aspect), image.height), Image.Resampling.LANCZOS)
    turn = _TURNS.get(frame.rotation % 360)
    return rgb(image if turn is None else image.transpose(turn))


def write_clip(frames: torch.Tensor, path: str | os.PathLike, fps: float) -> None:
    """Write a clip to a temporary name and rename, so that nobody meets half a file; the folder is made if missing.

    MP4 (H.264 where the build of FFmpeg has it) and WebM through PyAV; GIF and animated WebP through Pillow, looping. A GIF has
    256 colours a frame, and counts hundredths of seconds: frame times are rounded so that the whole keeps its length. Pillow
    stores neighbouring frames that are equal as one that is shown longer.

    Args:
        frames: (F, 3, H, W), uint8; H and W even for MP4 and WebM.
        path: its suffix says which: `.mp4`, `.webm`, `.gif` or `.webp`.
        fps: frames a second, above 0; at most 50 for a GIF.

    Raises:
        ValueError: another suffix, shape or rate, or PyAV is needed and not installed.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _ENCODERS and suffix not in _ANIMATIONS:
        raise ValueError(f"Clips are written as {', '.join([*_ENCODERS, *_ANIMATIONS])}; got {path.name}.")
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[1] != 3 or not len(frames):
        raise ValueError(f"frames must be (F, 3, H, W) and uint8; got {tuple(frames.shape)} and {frames.dtype}.")
    if not 0 < fps <= (50 if suffix == ".gif" else 1000):
        raise ValueError(f"fps must be above 0, and at most {50 if suffix == '.gif' else 1000} for {suffix}; got {fps}.")
    if suffix in _ENCODERS and (frames.shape[2] % 2 or frames.shape[3] % 2):
        raise ValueError(f"{suffix} takes frames of even height and width; got {tuple(frames.shape[2:])}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    if suffix in _ENCODERS:
        _write_video(frames, temporary, fps, suffix)
    else:
        images = [Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()) for frame in frames]
        unit = _ANIMATIONS[suffix]
        ends = [round(number * 1000 / fps / unit) * unit for number in range(len(images) + 1)]
        durations = [after - before for before, after in pairwise(ends)]
        quality = {} if suffix == ".gif" else {"quality": 90}
        images[0].save(
            temporary, format=suffix[1:], save_all=True, append_images=images[1:], duration=durations, loop=0, **quality
        )
    os.replace(temporary, path)


def _write_video(frames: torch.Tensor, path: Path, fps: float, suffix: str) -> None:
    needs("av", f"{suffix} files", "video")
    import av

    found = next(((name, options) for name, options in _ENCODERS[suffix] if name in av.codecs_available), None)
    if found is None:
        names = ", ".join(name for name, _ in _ENCODERS[suffix])
        raise ValueError(f"This build of PyAV has no encoder for {suffix}: none of {names}. Write a .gif or .webp instead.")
    codec, options = found
    head_first = {"movflags": "+faststart"} if suffix == ".mp4" else {}
    with av.open(str(path), "w", format=suffix[1:], container_options=head_first) as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = cast("VideoStream", container.add_stream(codec, rate=rate, options=options))
        stream.height, stream.width, stream.pix_fmt = frames.shape[2], frames.shape[3], "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().cpu().numpy(), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))

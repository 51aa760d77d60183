"""From a clip's file to the pixels of its frames. (From frames to a file: `pcm_scheduler.export_clip`.)

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

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate, chain, groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, cast

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

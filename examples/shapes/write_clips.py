"""Write moving scenes as captioned clips: a folder of mp4 or webp files, or tar shards of webdataset.

python examples/shapes/write_clips.py outputs/shapes_clips --count 4096
python examples/shapes/write_clips.py outputs/shapes_clips_webp --count 256 --form webp
python examples/shapes/write_clips.py outputs/shapes_clips_tar --count 4096 --form tar
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import webdataset
from PIL import Image
from tqdm import tqdm

import moving
from scenes import MOTION_TRAIN_SEED

FRAMES_PER_SECOND = 8
BATCH, SHARD = 16, 256  # clips painted at once, clips in a tar
OMIT = 0.1  # size, place, background and speed are left unsaid this often


def encode_mp4(frames: np.ndarray) -> bytes:
    """H.264 without chroma subsampling, at a quality (CRF 10) that is off by a few of 256 levels.

    Args:
        frames: (F, H, W, 3) uint8.
    """
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"crf": "10", "threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def encode_webp(frames: np.ndarray) -> bytes:
    """Lossless animated WebP of frames (F, H, W, 3) uint8."""
    first, *rest = map(Image.fromarray, frames)
    file = io.BytesIO()
    first.save(
        file, "WEBP", save_all=True, append_images=rest, duration=1000 // FRAMES_PER_SECOND, loop=0, lossless=True, quality=50
    )
    return file.getvalue()


ENCODERS: dict[str, Callable[[np.ndarray], bytes]] = {"mp4": encode_mp4, "webp": encode_webp}


def drawn(seed: int, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray, str]]:
    """Number, frames (F, H, W, 3) uint8 and words of some clips of a stream."""
    for start in range(0, len(indices), BATCH):
        some = indices[start : start + BATCH]
        clips = [moving.sample_clip(seed, i) for i in some]
        pixels = ((moving.render(clips) + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2).numpy()
        for i, clip, frames in zip(some, clips, pixels, strict=True):
            yield i, frames, moving.caption(clip, np.random.default_rng((seed, i)), OMIT)


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def write_folder(folder: Path, count: int, seed: int = MOTION_TRAIN_SEED, form: str = "mp4") -> None:
    """`count` clips as `00000.mp4` (or .webp) with `00000.txt` beside each; those already there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [i for i in range(count) if not (folder / f"{i:05d}.txt").exists()]
    for i, frames, words in tqdm(drawn(seed, missing), desc="write clips", total=len(missing)):
        _write(folder / f"{i:05d}.{form}", ENCODERS[form](frames))
        _write(folder / f"{i:05d}.txt", (words + "\n").encode())


def write_shards(folder: Path, count: int, seed: int = MOTION_TRAIN_SEED, shard: int = SHARD) -> None:
    """`count` clips as `clips-000000.tar` and on, `shard` in each, as `00000.mp4` and `00000.txt`; whole shards are kept.

    The same call writes the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(tqdm(range(0, count, shard), desc="write shards")):
        path = folder / f"clips-{number:06d}.tar"
        if path.exists():
            continue
        temporary = path.with_name(path.name + ".tmp")
        # of our own opening: webdataset would look at the name's end to tell whether to compress
        with temporary.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
            for i, frames, words in drawn(seed, range(start, min(start + shard, count))):
                tar.write({"__key__": f"{i:05d}", "mp4": encode_mp4(frames), "txt": (words + "\n").encode()})
        temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=MOTION_TRAIN_SEED)
    parser.add_argument("--form", choices=(*ENCODERS, "tar"), default="mp4")
    args = parser.parse_args()
    if args.form == "tar":
        write_shards(args.folder, args.count, args.seed)
    else:
        write_folder(args.folder, args.count, args.seed, args.form)


if __name__ == "__main__":
    main()

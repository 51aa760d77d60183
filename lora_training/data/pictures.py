"""From a picture's file to pixels: decoding, aspect-ratio buckets, crops."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin

from pcm_scheduler.pipelines.pictures import eight_bit_grey

from ..config import DataConfig
from .sources import Record

Size = tuple[int, int]  # height, width
_MOST_COVERING = 2**26
"""Pixels of a picture once it covers its size. One of 1 x 100000 would be scaled to 50 million on its long side."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture, or a clip of F frames, and its frame.

    Attributes:
        levels: (V, 3, H, W), or (V, F, 3, H, W), uint8; the variants are the picture and, if asked for, its mirror image.
        original_size: (height, width) of the file, upright.
        crop: (top, left) of what was kept, in pixels after scaling.
    """

    levels: torch.Tensor
    original_size: Size
    crop: tuple[int, int]

    @property
    def pixels(self) -> torch.Tensor:
        """In [-1, 1], as the VAE takes them."""
        return in_unit_range(self.levels)


def in_unit_range(levels: torch.Tensor) -> torch.Tensor:
    """uint8 to float32 in [-1, 1]."""
    return levels.float() / 127.5 - 1


def bucket_sizes(config: DataConfig) -> list[Size]:
    """The sizes trained on: the square alone, or every one of about its area, sides multiples of `bucket_step`.

    For each height the largest width with height * width <= resolution^2, as far as the ratio stays within `max_aspect`.
    """
    side, step = config.resolution, config.bucket_step
    if not config.aspect_buckets:
        return [(side, side)]
    sizes = set()
    for short in range(step, side + 1, step):
        long = side * side // short // step * step
        if long / short <= config.max_aspect:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def nearest_bucket(size: Size, sizes: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest to a picture's."""
    return min(sizes, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - math.log(size[0] / size[1])))


@contextmanager
def opened(record: Record) -> Iterator[Image.Image]:
    """The record's file through PIL; ValueError, with the record's name, for whatever goes wrong inside.

    PIL refuses pictures of more than twice `Image.MAX_IMAGE_PIXELS` by their heads, before anything is decoded.
    """
    try:
        with Image.open(io.BytesIO(record.content) if isinstance(record.content, bytes) else record.content) as file:
            if file.format == "EPS":
                raise ValueError("it is PostScript, a program that PIL would run")
            yield file
    except Exception as error:  # of broken files PIL's readers raise whatever struct, zlib and look-ups do
        raise ValueError(f"{record.name} cannot be read as a picture: {error}") from error


def upright_size(record: Record) -> Size:
    """(height, width) as it is looked at, from the file's head alone.

    Raises:
        ValueError: the file is not a picture.
    """
    with opened(record) as file:
        turned = file.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientations that lie on their side
        width, height = file.size
        if isinstance(file, TiffImagePlugin.TiffImageFile):  # whose size newer versions of PIL have turned already
            width, height = file.tag_v2[256], file.tag_v2[257]
        size = (width, height) if turned else (height, width)
        if min(size) < 1:
            raise ValueError(f"it is {size[0]} x {size[1]} pixels")
        return size


def load_picture(record: Record, size: Size, config: DataConfig) -> Picture:
    """Decode, turn upright, put transparency on white, scale to cover `size` and crop.

    Raises:
        ValueError: the file is not a readable picture.
    """
    with opened(record) as file:
        clip = framed([upright_rgb(file)], record.name, size, config)
    return Picture(clip.levels[:, 0], clip.original_size, clip.crop)


def framed(frames: Iterable[Image.Image], name: str, size: Size, config: DataConfig) -> Picture:
    """A clip of upright RGB frames, each scaled to cover `size` and cropped at the same place.

    A random crop is the same whenever the record is read: it is drawn from its name.

    Raises:
        ValueError: there are no frames, or they differ in size; without the name.
    """
    height, width = size
    found: Size | None = None
    kept = []
    for frame in frames:
        if found is None:
            found = frame.height, frame.width
            scale = max(height / frame.height, width / frame.width)
            covering = (max(round(frame.width * scale), width), max(round(frame.height * scale), height))
            if math.prod(covering) > _MOST_COVERING:
                raise ValueError(
                    f"it is {frame.height} x {frame.width} pixels: scaled to cover {height} x {width} it would be "
                    f"{covering[1]} x {covering[0]}. Crop it."
                )
            spare_left, spare_top = covering[0] - width, covering[1] - height
            if config.crop == "random":
                draw = generator_of_name(name)
                left, top = draw.integers(spare_left, endpoint=True).item(), draw.integers(spare_top, endpoint=True).item()
            else:
                left, top = spare_left // 2, spare_top // 2
        elif found != (frame.height, frame.width):
            raise ValueError(f"it has frames of {found[0]} x {found[1]} and of {frame.height} x {frame.width} pixels")
        scaled = frame.resize(covering, Image.Resampling.LANCZOS)
        # the mirror image is cropped at the same place, so that both have the same frame
        variants = [scaled, ImageOps.mirror(scaled)] if config.flip else [scaled]
        kept.append(np.stack([np.asarray(v.crop((left, top, left + width, top + height))) for v in variants]))
    if found is None:
        raise ValueError("it has no frames")
    levels = torch.from_numpy(np.stack(kept, axis=1)).permute(0, 1, 4, 2, 3)
    return Picture(levels, found, (top, left))


def generator_of_name(name: str) -> np.random.Generator:
    """Draws the same for a record whenever it is read."""
    # names of files may be no UTF-8, which Python has as half characters
    return np.random.default_rng(list(hashlib.sha256(name.encode(errors="surrogatepass")).digest()))


def upright_rgb(image: Image.Image) -> Image.Image:
    """As it is looked at, transparency on white."""
    return rgb(ImageOps.exif_transpose(image))


def rgb(image: Image.Image) -> Image.Image:
    """8 bits a channel, transparency on white; of 16 bits of grey white is 65535, of PIL's modes I and F it is guessed."""
    image = eight_bit_grey(image)
    if image.mode in ("I", "F"):  # which do not say what white is, and PIL's own conversion clips them to it
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it has pixels that are not finite numbers")
        white = 65535 if values.max() > 255 else 1 if image.mode == "F" and values.max() <= 1 else 255
        image = Image.fromarray((values / white * 255).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")

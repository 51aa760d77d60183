"""Pictures or clips of every method on disk, as PNG files: split between processes, and going on after an interruption.

A clip is one PNG too, its frames side by side: lossless, every frame is kept (animated files merge neighbours that are equal),
and any viewer shows it as a strip of film.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

from pcm_scheduler.lora_file import read_settings

from ..config import chosen
from ..files import replaced
from .methods import Gallery, MethodConfig


@dataclass(frozen=True)
class Pictures:
    """Where the pictures of one method at one number of steps are, or its clips.

    Attributes:
        folder: of `00000.png` and on, a picture for each prompt.
        count: pictures in all.
        batch_size: pictures at a time.
        frames: of every clip, F; 0: they are pictures.
    """

    folder: Path
    count: int
    batch_size: int
    frames: int = 0

    @property
    def noun(self) -> str:
        """What one of them is, for messages."""
        return "clip" if self.frames else "picture"

    @property
    def batches(self) -> list[range]:
        """The pictures' numbers, batch by batch."""
        return [range(a, min(a + self.batch_size, self.count)) for a in range(0, self.count, self.batch_size)]

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.png"

    def missing(self) -> list[int]:
        """Pictures that are not there."""
        there = {path.name for path in self.folder.glob("*.png")}
        return [number for number in range(self.count) if self.path(number).name not in there]

    def keep(self, number: int, picture: torch.Tensor) -> None:
        """A picture, uint8 (3, H, W), or a clip, (F, 3, H, W), under its number."""
        with replaced(self.path(number)) as temporary:
            to_pil_image(side_by_side(picture) if self.frames else picture).save(temporary, format="PNG", compress_level=1)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Batches (N, 3, H, W), or of clips (N, F, 3, H, W), in [-1, 1], in order.

        Raises:
            FileNotFoundError: some have not been drawn.
        """
        missing = self.missing()
        if missing:
            raise FileNotFoundError(f"{self.folder}: {len(missing)} of {self.count} {self.noun}s have not been drawn yet.")
        for batch in self.batches:
            found = torch.stack([read_picture(self.path(number)) for number in batch])
            # the frames are side by side
            yield found.unflatten(-1, (self.frames, -1)).permute(0, 3, 1, 2, 4) if self.frames else found


def side_by_side(clip: torch.Tensor) -> torch.Tensor:
    """Frames (F, 3, H, W) as one picture (3, H, F W)."""
    return clip.permute(1, 2, 0, 3).flatten(2)


def to_bytes(drawn: torch.Tensor) -> torch.Tensor:
    """Pictures (N, 3, H, W) or clips in [0, 1] as they are kept: uint8, on the CPU."""
    return (drawn.float().clamp(0, 1) * 255).round().byte().cpu()


def from_bytes(kept: torch.Tensor) -> torch.Tensor:
    """Pictures as they are measured: uint8 to [-1, 1]."""
    return kept.float() / 127.5 - 1


def read_picture(path: Path) -> torch.Tensor:
    """(3, H, W) in [-1, 1]."""
    with Image.open(path) as image:
        return from_bytes(pil_to_tensor(image.convert("RGB")))


def folder_of(root: Path, method: MethodConfig, steps: int, setting: object) -> Path:
    """A folder whose name changes when anything does that makes other pictures.

    Args:
        root: of all.
        method: whose adapter is known by its contents.
        steps: of sampling.
        setting: whatever else the pictures depend on: model, prompts, size, seed.
    """
    told = chosen(method) | {"steps": steps, "adapter": ""}
    digest = hashlib.sha256(json.dumps([told, setting], sort_keys=True, default=str).encode())
    if method.adapter:
        digest.update(Path(method.adapter).read_bytes())
        settings = read_settings(method.adapter)
        if settings is not None and settings.inferred:  # from its name
            digest.update(json.dumps(asdict(settings), sort_keys=True).encode())
    return root / method.name / f"{steps}-steps-{digest.hexdigest()[:12]}"


def generate(
    gallery: Gallery,
    name: str,
    steps: int,
    prompts: Sequence[str],
    size: tuple[int, int],
    seed: int,
    pictures: Pictures,
    process: tuple[int, int] = (0, 1),
) -> None:
    """Draw what is missing of a method's pictures.

    Args:
        gallery: draws.
        name, steps: of the method.
        prompts: one for each picture, or clip.
        size: (height, width).
        seed: of the noise.
        pictures: where to, and whether they are clips; the size of a batch does not change them beyond rounding.
        process: this one's number, and how many there are; each draws its share.
    """
    number, processes = process
    # by a picture's own number, so that a process that finds others' pictures done already still draws only its own
    mine = [i for i in pictures.missing() if i // pictures.batch_size % processes == number]
    pictures.folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(mine), desc=f"{name}, {steps} steps", unit=pictures.noun, disable=not mine or number > 0) as bar:
        for start in range(0, len(mine), pictures.batch_size):
            numbers = mine[start : start + pictures.batch_size]
            drawn = to_bytes(gallery.draw(name, steps, [prompts[n] for n in numbers], numbers, size, seed))
            for n, picture in zip(numbers, drawn, strict=True):
                pictures.keep(n, picture)
            bar.update(len(numbers))

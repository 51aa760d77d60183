"""Pictures of every method on disk: split between processes, and where a run was interrupted it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from pcm_scheduler.lora_file import write_safetensors

from .methods import Gallery, MethodConfig


@dataclass(frozen=True)
class Pictures:
    """Where the pictures of one method at one number of steps are.

    Attributes:
        folder: of its shards.
        count: pictures in all.
        shard_size: in a file.
    """

    folder: Path
    count: int
    shard_size: int

    @property
    def shards(self) -> list[range]:
        """The pictures' numbers, file by file."""
        return [range(a, min(a + self.shard_size, self.count)) for a in range(0, self.count, self.shard_size)]

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.safetensors"

    def missing(self) -> list[int]:
        """Shards that are not there."""
        return [i for i in range(len(self.shards)) if not self.path(i).is_file()]

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Batches (N, 3, H, W) in [-1, 1], in order.

        Raises:
            FileNotFoundError: some have not been drawn.
        """
        missing = self.missing()
        if missing:
            raise FileNotFoundError(f"{self.folder}: {len(missing)} of {len(self.shards)} files have not been drawn yet.")
        for i in range(len(self.shards)):
            yield load_file(self.path(i))["pictures"].float() / 127.5 - 1


def folder_of(root: Path, method: MethodConfig, steps: int, setting: object) -> Path:
    """A folder whose name changes when anything does that makes other pictures.

    Args:
        root: of all.
        method: whose adapter is known by its contents.
        steps: of sampling.
        setting: whatever else the pictures depend on: model, prompts, size, seed.
    """
    told = asdict(method) | {"steps": steps, "adapter": ""}
    digest = hashlib.sha256(json.dumps([told, setting], sort_keys=True, default=str).encode())
    if method.adapter:
        digest.update(Path(method.adapter).read_bytes())
    return root / method.name / f"{steps}-steps-{digest.hexdigest()[:12]}"


def generate(
    gallery: Gallery,
    name: str,
    steps: int,
    prompts: Sequence[str],
    size: tuple[int, int],
    pictures: Pictures,
    batch_size: int,
    process: tuple[int, int] = (0, 1),
) -> None:
    """Draw what is missing of a method's pictures.

    Args:
        gallery: draws.
        name, steps: of the method.
        prompts: one for each picture.
        size: (height, width).
        pictures: where to.
        batch_size: pictures at a time; it does not change them beyond rounding.
        process: this one's number, and how many there are; each draws its share of the files.
    """
    mine = [i for i in pictures.missing() if i % process[1] == process[0]]
    total = sum(len(pictures.shards[i]) for i in mine)
    with tqdm(total=total, desc=f"{name}, {steps} steps", unit="picture", disable=not mine or process[0] > 0) as bar:
        for i in mine:
            parts = []
            shard = pictures.shards[i]
            for start in range(0, len(shard), batch_size):
                numbers = shard[start : start + batch_size]
                drawn = gallery.draw(name, steps, [prompts[n] for n in numbers], numbers, size)
                parts.append((drawn.float().clamp(0, 1) * 255).round().byte().cpu())
                bar.update(len(numbers))
            write_safetensors({"pictures": torch.cat(parts)}, pictures.path(i), {})

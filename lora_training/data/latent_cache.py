"""Latents and conditioning, computed once and kept on disk in shards, so that training runs the UNet alone."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import accumulate, islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm import tqdm

from pcm_scheduler.lora_file import write_safetensors

from ..backbones import Backbone, Conditioning
from ..config import DataConfig, ModelConfig
from ..files import writing
from ..randomness import sent
from .clips import clip_size, load_clip
from .pictures import Picture, Size, bucket_sizes, in_unit_range, load_picture, nearest_bucket, upright_size
from .sources import Record, Source

_MEANS, _STDS, _CONDITIONING = "latent_means", "latent_stds", "conditioning/"
LISTED, _SHOWN = 20, 16  # of what is left out, and of captions


@dataclass(frozen=True)
class Example:
    """Encoded pictures or clips of one size: named tensors that share their first dimension, fp16.

    `latent_means` and `latent_stds` (N, V, 4, h, w), scaled latents of V variants; `conditioning/...` (N, ...). Of clips
    `latent_means` (N, V, 4, F, h, w) alone: deviations would double the largest part of the cache for a noise of less than a
    hundredth of the latents' own spread.
    """

    tensors: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.tensors[_MEANS])


@dataclass(frozen=True)
class Bucket:
    """All encoded pictures or clips of one size, as the files on disk hold them: read when they are asked for."""

    parts: tuple[Example, ...]

    @cached_property
    def _ends(self) -> list[int]:
        """Of each part, where it ends: there may be a thousand parts, and a batch has a few rows."""
        return list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def rows(self, which: Sequence[int]) -> dict[str, torch.Tensor]:
        """The named tensors of these, float32."""
        ends = self._ends
        places = [(part := bisect_right(ends, i), i - (ends[part - 1] if part else 0)) for i in which]
        return {
            name: torch.stack([self.parts[part].tensors[name][row] for part, row in places]).float()
            for name in self.parts[0].tensors
        }


@dataclass(frozen=True)
class TrainingData:
    """What a step draws from.

    Attributes:
        buckets: by (height, width) in pixels.
        empty: conditioning of the empty prompt, (1, ...), for guidance and caption dropout.
        captions: of the first, to show.
    """

    buckets: dict[Size, Bucket]
    empty: Conditioning
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return sum(map(len, self.buckets.values()))

    @property
    def fixed(self) -> TrainingData:
        """What validation draws from."""
        return self

    @property
    def largest_bucket(self) -> Size:
        """(height, width) of most."""
        return max(self.buckets, key=lambda size: len(self.buckets[size]))

    def describe(self) -> str:
        """How many, of which sizes."""
        sizes = ", ".join(f"{len(b)} of {h} x {w}" for (h, w), b in sorted(self.buckets.items()))
        means = next(iter(self.buckets.values())).parts[0].tensors[_MEANS]
        what = f"clips of {means.shape[3]} frames" if means.dim() == 6 else "pictures"
        return f"{len(self)} captioned {what}: {sizes} pixels"

    def skip(self, batches: int, batch_size: int) -> None:
        """Go on after so many batches; nothing to do, for a batch is a function of its generator."""

    def draw(
        self, batch_size: int, generator: torch.Generator, device: torch.device, caption_dropout: float = 0.0
    ) -> tuple[torch.Tensor, Conditioning]:
        """Latents of one size drawn from their posterior, (B, 4, h, w) or (B, 4, F, h, w), and their conditioning, float32."""
        buckets = list(self.buckets.values())
        shares = torch.tensor([float(len(bucket)) for bucket in buckets])
        bucket = buckets[int(torch.multinomial(shares, 1, generator=generator))] if len(buckets) > 1 else buckets[0]
        which = torch.randint(len(bucket), (batch_size,), generator=generator)
        return drawn(bucket.rows(which.tolist()), self.empty, generator, device, caption_dropout)


def drawn(
    rows: dict[str, torch.Tensor],
    empty: Conditioning,
    generator: torch.Generator,
    device: torch.device,
    caption_dropout: float,
) -> tuple[torch.Tensor, Conditioning]:
    """From what is encoded to a batch: a variant of each, its posterior's noise if kept, and some captions dropped."""
    means = rows[_MEANS]
    batch_size, variants = means.shape[:2]
    each = torch.arange(batch_size)
    variant = torch.randint(variants, (batch_size,), generator=generator) if variants > 1 else torch.zeros_like(each)
    latents = means[each, variant]
    if _STDS in rows:
        latents = latents + rows[_STDS][each, variant] * torch.randn(latents.shape, generator=generator)
    dropped = torch.rand(batch_size, generator=generator) < caption_dropout
    conditioning = {name.removeprefix(_CONDITIONING): t for name, t in rows.items() if name.startswith(_CONDITIONING)}
    for name, tensor in conditioning.items():
        if name in empty:
            tensor[dropped] = empty[name].float()
    return sent(latents, device), {name: sent(tensor, device) for name, tensor in conditioning.items()}


def encode(
    records: Sequence[Record], size: Size, backbone: Backbone, config: DataConfig
) -> tuple[Example | None, dict[str, str]]:
    """Pictures or clips of one bucket, and why some of them are left out, by their names; None if all are."""
    with ThreadPoolExecutor(8) as pool:
        decoded = list(pool.map(partial(_decoded, size=size, config=config), records))
    left_out = {record.name: found for record, found in zip(records, decoded, strict=True) if isinstance(found, str)}
    pictures = [found for found in decoded if isinstance(found, Picture)]
    captions = [record.caption for record, found in zip(records, decoded, strict=True) if isinstance(found, Picture)]
    if not pictures:
        return None, left_out
    frames = [backbone.frame_conditioning(p.original_size, p.crop, size) for p in pictures]
    with backbone.alone:
        told = {name: tensor.half() for name, tensor in backbone.encode_prompts(captions).items()}
    told |= {name: torch.cat([frame[name] for frame in frames]) for name in frames[0]}
    tensors = _latents(pictures, backbone, config)
    return Example(tensors | {_CONDITIONING + name: tensor.cpu() for name, tensor in told.items()}), left_out


def _latents(pictures: Sequence[Picture], backbone: Backbone, config: DataConfig) -> dict[str, torch.Tensor]:
    """As an `Example` holds them; the VAE sees `encode_batch_size` pictures or frames at a time."""
    shape = pictures[0].levels.shape[:-3]
    images = [image for picture in pictures for image in picture.levels.flatten(0, len(shape) - 1)]
    encoded = []
    for first in range(0, len(images), config.encode_batch_size):
        levels = torch.stack(images[first : first + config.encode_batch_size]).to(backbone.unet.device)
        encoded.append([t.half().cpu() for t in backbone.encode_images(in_unit_range(levels))])
    mean, std = (torch.cat(parts).unflatten(0, (len(pictures), *shape)) for parts in zip(*encoded, strict=True))
    return {_MEANS: mean.transpose(2, 3)} if config.clips else {_MEANS: mean, _STDS: std}


def bucket_of(record: Record, sizes: Sequence[Size], config: DataConfig) -> Size:
    """The size that a record is trained on.

    Raises:
        ValueError: its file cannot be read.
    """
    if len(sizes) == 1:
        return sizes[0]
    return nearest_bucket(clip_size(record) if config.clips else upright_size(record), sizes)


def _decoded(record: Record, size: Size, config: DataConfig) -> Picture | str:
    """The picture or clip, or what is wrong with it."""
    try:
        return (load_clip if config.clips else load_picture)(record, size, config)
    except ValueError as error:
        return str(error)


def empty_conditioning(backbone: Backbone) -> Conditioning:
    """Of the empty prompt, (1, ...), as the cache would keep it."""
    with backbone.alone:
        return {name: tensor.half().cpu() for name, tensor in backbone.empty_conditioning().items()}


def check_share(left_out: Sequence[str], total: int, config: DataConfig, most: float | None = None) -> str:
    """What is left out, in words; empty if nothing is.

    Args:
        left_out: a line for each.
        total: how many there are with them.
        config: whose `max_bad_share` may be left out.
        most: may be, instead.

    Raises:
        ValueError: it is more than that, or everything.
    """
    if not left_out:
        return ""
    more = [f"... and {len(left_out) - LISTED} more"] if len(left_out) > LISTED else []
    message = "\n".join([f"{len(left_out)} of {total} {config.noun}s cannot be used:", *left_out[:LISTED], *more])
    if len(left_out) > (config.max_bad_share * total if most is None else most) or len(left_out) == total:
        raise ValueError(f"{message}\nMend or remove them, or raise data.max_bad_share (now {config.max_bad_share:g}).")
    return message


@dataclass(frozen=True)
class LatentCache:
    """The shards of one source under one model and one set of settings.

    Shard k holds the source's records k * n and on, n the pictures, or the clips of so many frames, of `shard_size`; process p
    of P encodes the shards k = p modulo P. A shard is there or it is not, so that an encoding that is cut off goes on at the
    next one.

    Args:
        source: what is encoded.
        config: sizes, crops, shards.
        backbone: encodes; on whatever device it is.
        model: part of the cache's name, so that models do not share latents; so are the LoRA files that are merged into it, and
            so perhaps into its text encoders.
        root: the folder of all caches.
    """

    source: Source
    config: DataConfig
    backbone: Backbone
    model: ModelConfig
    root: Path

    @cached_property
    def folder(self) -> Path:
        """Named after everything that its content depends on; looked up once, for a source may look at every file."""
        c = self.config
        settings = [c.resolution, c.aspect_buckets, c.bucket_step, c.max_aspect, c.crop, c.flip, c.shard_size]
        clips = [asdict(c.clips)] if c.clips else []
        parts = ["4", self.source.identity, settings + clips, self.model.path, weights_seen(self.model.path)]
        if self.model.teacher_loras:
            parts.append([(path, weights_seen(path)) for path in self.model.teacher_loras])
        if self.model.variant:
            parts.append({"variant": self.model.variant})
        if self.model.single_file_config:
            parts.append(self.model.single_file_config)
        return self.root / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def _index(self) -> Path:
        return self.folder / "index.json"

    def _shard(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.safetensors"

    def encode(self, process: int = 0, processes: int = 1) -> None:
        """This process's shards, those that are missing."""
        if self._is_whole():
            return
        bar = tqdm(total=self.source.total, desc="encode", disable=process > 0, unit=self.config.noun)
        frames = self.config.clips.frames if self.config.clips else 1
        for number, records in enumerate(_chunks(self.source, max(self.config.shard_size // frames, 1))):
            if number % processes == process and not self._shard(number).exists():
                self._encode_shard(records, self._shard(number), bar)
            else:
                bar.update(len(records))
        bar.close()

    def _is_whole(self) -> bool:
        """Whether the encoding was done once, and no shard of it was lost since."""
        if not self._index.exists():
            return False
        return json.loads(self._index.read_text(encoding="utf-8"))["shards"] == len(self._shards())

    def _shards(self) -> list[Path]:
        return sorted(self.folder.glob("shard-*.safetensors"))

    def _encode_shard(self, records: Sequence[Record], path: Path, bar: tqdm) -> None:
        left_out = [f"{r.name} {r.problem}" for r in records if r.problem]
        sizes = bucket_sizes(self.config)
        by_size: dict[Size, list[Record]] = defaultdict(list)
        for record in records:
            if record.problem:
                continue
            try:
                by_size[bucket_of(record, sizes, self.config)].append(record)
            except ValueError as error:
                left_out.append(str(error))
        bar.update(len(left_out))
        tensors: dict[str, torch.Tensor] = {}
        for size, own in by_size.items():
            encoded = []
            for batch in _chunks(own, self.config.encode_batch_size):
                example, bad = encode(batch, size, self.backbone, self.config)
                left_out += bad.values()
                encoded += [example.tensors] if example else []
                bar.update(len(batch))
            if encoded:
                tensors |= {f"{size[0]}x{size[1]}/{k}": torch.cat([e[k] for e in encoded]) for k in encoded[0]}
        shown = [r.caption for r in records if not r.problem][:_SHOWN]
        report = {"records": len(records), "left_out": left_out, "captions": shown}
        with writing(path):
            write_safetensors(tensors, path, {"report": json.dumps(report)})

    def open(self) -> TrainingData:
        """What all processes have encoded; the same in each of them.

        Raises:
            ValueError: there are none, or more of them than `config.max_bad_share` cannot be used; they are named.
        """
        shards = self._shards()
        reports = []
        for path in shards:
            with safe_open(path, framework="pt") as file:
                reports.append(json.loads(file.metadata()["report"]))
        left_out = [line for report in reports for line in report["left_out"]]
        if not shards:
            raise ValueError(f"data.path: {self.config.path} holds no {self.config.noun}s.")
        message = check_share(left_out, sum(report["records"] for report in reports), self.config)
        if message:
            print(message, file=sys.stderr)
        if not self._index.exists():
            temporary = self._index.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps({"shards": len(shards)}), encoding="utf-8")
            temporary.replace(self._index)
        parts: dict[Size, list[Example]] = defaultdict(list)
        for path in shards:
            by_size: dict[Size, dict[str, torch.Tensor]] = defaultdict(dict)
            for key, tensor in load_file(path).items():  # mapped into memory, not read
                frame, name = key.split("/", 1)
                height, width = map(int, frame.split("x"))
                by_size[height, width][name] = tensor
            for size, tensors in by_size.items():
                parts[size].append(Example(tensors))
        captions = tuple(caption for report in reports for caption in report["captions"])[:_SHOWN]
        buckets = {size: Bucket(tuple(examples)) for size, examples in sorted(parts.items())}
        return TrainingData(buckets, empty_conditioning(self.backbone), captions)


def weights_seen(path: str) -> list[tuple[str, int, int]]:
    """Name, size and time of the file, or of those below the folder, by which a cache knows them; none for a hub id, or ""."""
    if not path:  # which Path takes for the working directory
        return []
    root = Path(path)
    found = [root] if root.is_file() else sorted(root.rglob("*.safetensors"))
    return [(str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns) for p in found]


def _chunks(records: Source | Sequence[Record], size: int) -> Iterator[list[Record]]:
    iterator = iter(records)
    while chunk := list(islice(iterator, size)):
        yield chunk

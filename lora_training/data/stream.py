"""Encoding what is read as it is read, for sets too large to keep: shuffled through a buffer, the same order every time."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

import numpy as np
import torch

from ..backbones import Backbone, Conditioning
from ..config import DataConfig
from .latent_cache import LISTED, Bucket, Example, TrainingData, bucket_of, check_share, drawn, empty_conditioning, encode
from .pictures import Size, bucket_sizes
from .sources import Record, Source

_FIXED = 16  # pictures or clips for validation
_CHECKED_FROM = 100  # records, before the share of bad ones means something


class StreamingData:
    """What a step draws from when nothing is kept. VAE and text encoders stay where the UNet is.

    The order is a function of the seed: records i = p modulo P for process p of P, shuffled through a buffer, anew every
    time the source has been read through. A run that goes on skips what it has seen without decoding it.

    Args:
        source: read again and again.
        config: sizes, crops, buffer.
        backbone: encodes.
        seed: of the order.
        process, processes: whose part this is.

    Raises:
        ValueError: none can be used, or too few.
    """

    def __init__(self, source: Source, config: DataConfig, backbone: Backbone, seed: int, process: int = 0, processes: int = 1):
        self._source, self._config, self._backbone = source, config, backbone
        self._seed, self._process, self._processes = seed, process, processes
        self._left_out: dict[str, str] = {}  # by name: what is broken is met again every time round
        self._seen, self._seen_all = 0, False  # of the first time round
        self._said = 0  # of those left out
        self._batches: Iterator[tuple[Size, list[Record]]] | None = None
        self._next: Future | None = None
        self._pool = ThreadPoolExecutor(1)
        self._last: Example | None = None
        self.empty = empty_conditioning(backbone)
        self.fixed = self._first()
        self._seen, self._seen_all = 0, False  # they come again
        self.captions = self.fixed.captions

    def _first(self) -> TrainingData:
        """The first pictures or clips, of one size."""
        size, records = next(self._sized(_FIXED, shuffled=False))
        example, left_out = encode(records, size, self._backbone, self._config)
        if example is None:
            raise ValueError(f"None of the first {self._config.noun}s can be used:\n" + "\n".join(left_out.values()))
        return TrainingData({size: Bucket((example,))}, self.empty, tuple(record.caption for record in records))

    @property
    def largest_bucket(self) -> Size:
        """(height, width) of what validation draws."""
        return self.fixed.largest_bucket

    def describe(self) -> str:
        """How many, as far as is known."""
        total, noun = self._source.total, self._config.noun
        return f"{'an unknown number of' if total is None else total} captioned {noun}s, streamed without a cache"

    def __len__(self) -> int:
        return self._source.total or 0

    def _records(self, epoch: int, shuffled: bool) -> Iterator[Record]:
        """This process's part, without what is known to be unusable."""
        draw = np.random.default_rng([self._seed, epoch])
        buffer: list[Record] = []
        for number, record in enumerate(self._source):
            if number % self._processes != self._process:
                continue
            self._seen += epoch == 0
            if epoch == 0 and self._seen == _CHECKED_FROM:
                self._check()
            if record.problem:
                self._leave_out({record.name: f"{record.name} {record.problem}"})
                continue
            if not shuffled:
                yield record
                continue
            buffer.append(record)
            if len(buffer) >= self._config.shuffle_buffer:
                chosen = int(draw.integers(len(buffer)))
                buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
                yield buffer.pop()
        draw.shuffle(buffer)
        yield from buffer

    def _leave_out(self, lines: Mapping[str, str]) -> None:
        """Count what was not counted before; by name, for what PIL says of bytes differs from one time to the next."""
        new = {name: line for name, line in lines.items() if name not in self._left_out}
        self._left_out |= new
        if new and (self._seen_all or self._seen >= _CHECKED_FROM):
            self._check()

    def _check(self) -> None:
        """Whether too many are left out, and say which are new: the first by name, later ones whenever they have doubled."""
        left_out = list(self._left_out.values())
        message = check_share(left_out, self._seen, self._config, self._most)
        new = left_out[self._said :]
        if not new or (len(left_out) > LISTED and len(left_out) < 2 * self._said):
            return
        lines = new if len(left_out) <= LISTED else []
        print("\n".join([message.split(":\n")[0] + (":" if lines else " so far"), *lines]), file=sys.stderr)
        self._said = len(left_out)

    @property
    def _most(self) -> float:
        """How many may be left out of what this process has seen: of a part, three standard deviations more than of all, for
        others may have fewer.
        """
        most = self._config.max_bad_share * self._seen
        return most if self._seen_all and self._processes == 1 else most + 3 * math.sqrt(most)

    def _sized(self, batch_size: int, shuffled: bool = True) -> Iterator[tuple[Size, list[Record]]]:
        """Batches of one size each; what does not fill a batch waits for the next time round."""
        sizes = bucket_sizes(self._config)
        waiting: dict[Size, list[Record]] = defaultdict(list)
        for epoch in count():
            usable = 0
            for record in self._records(epoch, shuffled):
                try:
                    size = bucket_of(record, sizes, self._config)
                except ValueError as error:
                    self._leave_out({record.name: str(error)})
                    continue
                usable += 1
                waiting[size].append(record)
                if len(waiting[size]) == batch_size:
                    yield size, waiting.pop(size)
            if not usable:
                listed = list(self._left_out.values())[:20]
                few = "" if listed else f" There are {self._processes} processes, and fewer {self._config.noun}s than those."
                raise ValueError(f"data.path: no {self._config.noun} can be used.{few}\n" + "\n".join(listed))
            if epoch == 0:
                self._seen_all = True
                self._check()
            if not shuffled and waiting:
                size = max(waiting, key=lambda key: len(waiting[key]))
                yield size, waiting.pop(size)

    def skip(self, batches: int, batch_size: int) -> None:
        """Go on after so many batches."""
        self._batches = self._sized(batch_size)
        for _ in range(batches):
            next(self._batches)

    def _encode_next(self) -> Example:
        if self._batches is None:
            raise RuntimeError("skip() comes first.")
        while True:
            size, records = next(self._batches)
            example, left_out = encode(records, size, self._backbone, self._config)
            self._leave_out(left_out)
            if example is None and self._last is None:
                continue
            self._last = example or self._last
            assert self._last is not None
            return self._last

    def draw(
        self, batch_size: int, generator: torch.Generator, device: torch.device, caption_dropout: float = 0.0
    ) -> tuple[torch.Tensor, Conditioning]:
        """Latents of one size drawn from their posterior, (B, 4, h, w) or (B, 4, F, h, w), and their conditioning, float32.

        One that turns out to be broken is replaced by another of its batch, so that the order of the others stays.
        """
        if self._batches is None:
            self.skip(0, batch_size)
        future = self._next or self._pool.submit(self._encode_next)
        example = future.result()
        self._next = self._pool.submit(self._encode_next)
        which = [i % len(example) for i in range(batch_size)]
        return drawn(Bucket((example,)).rows(which), self.empty, generator, device, caption_dropout)

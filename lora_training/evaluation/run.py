"""One evaluation from a checked configuration: draw, measure, write."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from ..backbones import FAMILIES
from ..config import DTYPES
from ..distances import load_lpips
from .alignment import load_scorer, mean_score
from .config import EvaluationConfig
from .distribution import Moments, frechet_distance, kernel_distance, precision_recall
from .features import Features, extract, load_features
from .generation import Pictures, folder_of, generate
from .methods import Gallery, MethodConfig
from .ode import ode_rows
from .prompts import read_pairs, read_prompts
from .response import Generate, guidance_response, negative_prompt_response
from .similarity import consistency, perceptual_distance

Row = dict[str, Any]
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


class Evaluation:
    """Everything that an evaluation holds.

    Args:
        config: what to do.

    Raises:
        ValueError, FileNotFoundError: a model, adapter, prompts or weights that are not there; which.
    """

    def __init__(self, config: EvaluationConfig):
        self.config, self.root = config, Path(config.output)
        self.accelerator = Accelerator()
        device = self.accelerator.device
        self.prompts = read_prompts(config.prompts, config.count)
        # judges first: what is missing is said before anything is drawn
        self.features = load_features(config.features, device) if config.features else None
        self.similarity = load_features(config.similarity, device, "similarity") if config.similarity else self.features
        self.scorer = load_scorer(config.alignment, device) if config.alignment else None
        self.lpips = load_lpips(config.lpips_weights, "lpips_weights").to(device) if config.lpips_weights else None
        family = FAMILIES[config.model.family]
        pipe = family.pipeline_class.from_pretrained(config.model.path, **family.load_arguments)
        pipe.to(device, DTYPES[config.precision])
        pipe.set_progress_bar_config(disable=True)
        self.methods = list(config.methods)
        self.gallery = Gallery(pipe, self.methods, config.seed)
        self.reference_gallery = Gallery(pipe, [config.reference.method], config.reference.seed)

    def pictures(self, method: MethodConfig, steps: int, seed: int) -> Pictures:
        """Where a method's pictures are, or will be."""
        told = {"model": asdict(self.config.model), "prompts": self.prompts, "size": self.config.size, "seed": seed}
        folder = folder_of(self.root / "pictures", method, steps, told | {"precision": self.config.precision})
        return Pictures(folder, len(self.prompts), self.config.shard_size)

    def draw(self) -> None:
        """All pictures that are missing, this process's share of them, and wait for the others."""
        config, reference = self.config, self.config.reference
        process = (self.accelerator.process_index, self.accelerator.num_processes)
        jobs = [(self.gallery, method, steps, config.seed) for method in self.methods for steps in method.steps]
        if self.features is not None and not reference.folder:
            jobs.insert(0, (self.reference_gallery, reference.method, reference.method.steps[0], reference.seed))
        for gallery, method, steps, seed in jobs:
            where = self.pictures(method, steps, seed)
            generate(gallery, method.name, steps, self.prompts, config.size, where, config.batch_size, process)
        self.accelerator.wait_for_everyone()

    def reference(self) -> Iterator[torch.Tensor]:
        """Batches (N, 3, H, W) in [-1, 1] of what distances are to."""
        reference = self.config.reference
        if not reference.folder:
            return iter(self.pictures(reference.method, reference.method.steps[0], reference.seed))
        files = sorted(path for path in Path(reference.folder).rglob("*") if path.suffix.lower() in _SUFFIXES)
        if len(files) < 2:
            raise ValueError(f"reference.folder: {reference.folder} has {len(files)} pictures.")
        return (_read(path)[None] for path in files)

    def measure(self) -> list[Row]:
        """A row for every method and number of steps."""
        rows: list[Row] = []
        known = torch.cat(list(extract(self.features, self.reference()))) if self.features is not None else None
        for method in self.methods:
            for steps in method.steps:
                row: Row = {"method": method.name, "steps": steps}
                drawn = self.pictures(method, steps, self.config.seed)
                if self.features is not None and known is not None:
                    row |= distances(torch.cat(list(extract(self.features, drawn))), known)
                if self.scorer is not None:
                    row["alignment"] = mean_score(self.scorer, self._with_prompts(drawn))
                rows.append(row)
            rows[-1] |= self._between_steps(method, self.similarity)
        return rows

    def _with_prompts(self, drawn: Pictures) -> Iterator[tuple[torch.Tensor, Sequence[str]]]:
        for numbers, pictures in zip(drawn.shards, drawn, strict=True):
            yield pictures, [self.prompts[n] for n in numbers]

    def _between_steps(self, method: MethodConfig, features: Features | None) -> Row:
        """Of the fewest steps and the most."""
        if len(method.steps) < 2:
            return {}
        few, many = (self.pictures(method, steps, self.config.seed) for steps in (min(method.steps), max(method.steps)))
        row: Row = {}
        if features is not None:
            row["consistency"] = consistency(features, few, many)
        if self.lpips is not None:
            row["perceptual_distance"] = perceptual_distance(self.lpips, few, many)
        return row

    def guidance(self) -> list[Row]:
        """Alignment and saturation of every method at every guidance scale."""
        asked, rows = self.config.guidance, []
        if not asked.scales or self.scorer is None:
            return []
        prompts, size = self.prompts[: asked.count], self.config.batch_size
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        for method in self.methods:
            draw = self._drawing(method.name, asked.steps, len(prompts))
            for found in guidance_response(draw, self.scorer, batches, asked.scales):
                rows.append({"method": method.name, "steps": asked.steps} | found._asdict())
        return rows

    def negative(self) -> list[Row]:
        """How often what a negative prompt names is in each method's pictures, without it and with it."""
        asked, size = self.config.negative, self.config.batch_size
        if not asked.pairs or self.scorer is None:
            return []
        pairs = read_pairs(asked.pairs)
        batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        rows: list[Row] = []
        for method in self.methods:
            # each batch is drawn twice, from the same noise
            draw = self._drawing(method.name, asked.steps, len(pairs), times=2)
            found = negative_prompt_response(draw, self.scorer, batches, asked.guidance_scale)
            told = {"method": method.name, "steps": asked.steps, "guidance_scale": asked.guidance_scale}
            rows.append(told | found._asdict())
        return rows

    def _drawing(self, name: str, steps: int, count: int, times: int = 1) -> Generate:
        """Draws a method's pictures in the order of `count` prompts, over and over from the same noise.

        Args:
            name, steps: of the method.
            count: of prompts.
            times: that each batch comes in a row.
        """
        calls, first = 0, 0

        def draw(prompts: Sequence[str], negative_prompts: Sequence[str], guidance_scale: float) -> torch.Tensor:
            nonlocal calls, first
            numbers = [(first + i) % count for i in range(len(prompts))]
            calls += 1
            first += len(prompts) if calls % times == 0 else 0
            size = self.config.size
            pictures = self.gallery.draw(name, steps, prompts, numbers, size, negative_prompts, guidance_scale)
            return pictures.float() * 2 - 1

        return draw

    def run(self) -> dict[str, Any] | None:
        """Draw and measure; returns the report in the main process, None in the others."""
        self.draw()
        if not self.accelerator.is_main_process:
            return None
        return {
            "title": self.config.title,
            "config": json.loads(json.dumps(asdict(self.config), default=str)),
            "pictures": len(self.prompts),
            "rows": self.measure(),
            "guidance": self.guidance(),
            "negative": self.negative(),
            "ode": ode_rows(self.gallery, self.config, self.prompts, self.accelerator.device),
        }


def distances(ours: torch.Tensor, known: torch.Tensor) -> Row:
    """Of features (N, D) to (N', D); those that there are pictures enough for."""
    row: Row = {"frechet_distance": frechet_distance(Moments.of([ours]), Moments.of([known]))}
    fewest = min(len(ours), len(known))
    kernel = kernel_distance(ours, known, subset_size=min(1000, fewest))
    row |= {"kernel_distance": kernel.mean, "kernel_distance_deviation": kernel.deviation}
    if fewest > 3:
        found = precision_recall(known, ours)
        row |= {"precision": found.precision, "recall": found.recall}
    return row


def _read(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return pil_to_tensor(image.convert("RGB")).float() / 127.5 - 1

"""One evaluation from a checked configuration: draw, measure, write."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from tqdm import tqdm

from ..backbones import FAMILIES
from ..config import chosen
from ..distances import load_lpips
from .alignment import load_scorer, mean_score
from .config import EvaluationConfig, PairConfig
from .distribution import Moments, frechet_distance, kernel_distance, precision_recall
from .features import extract, load_features
from .generation import Pictures, folder_of, generate, read_picture
from .methods import Gallery, MethodConfig
from .ode import ode_rows
from .prompts import read_pairs, read_prompts
from .response import Generate, guidance_response, negative_prompt_response
from .similarity import consistency, diversity, perceptual_distance

Row = dict[str, Any]
Item = TypeVar("Item")
KEYS = ("method", "steps", "guidance_scale")  # what a row is of; the rest of it was measured
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
        if family.sample_dimensions != 4:
            raise ValueError(f"Methods are compared by pictures, and model.family {config.model.family} draws clips.")
        pipe = family.pipeline_class.from_pretrained(config.model.path, **family.load_arguments)
        pipe.to(device, torch.float16 if config.precision == "fp16" else torch.float32)
        if config.precision == "bf16":
            pipe.unet.forward = convert_outputs_to_fp32(torch.autocast(device.type, torch.bfloat16)(pipe.unet.forward))
        pipe.set_progress_bar_config(disable=True)
        self.methods = list(config.methods)
        self.gallery = Gallery(pipe, [*self.methods, config.reference.method])

    def pictures(self, method: MethodConfig, steps: int, seed: int) -> Pictures:
        """Where a method's pictures are, or will be."""
        return pictures_of(self.config, method, steps, seed, self.prompts)

    def draw(self) -> None:
        """All pictures that are missing, this process's share of them, and wait for the others."""
        config, reference = self.config, self.config.reference
        process = (self.accelerator.process_index, self.accelerator.num_processes)
        jobs = [(method, steps, seed) for seed in config.seeds for method in self.methods for steps in method.steps]
        if self.features is not None and not reference.folder:
            jobs.insert(0, (reference.method, reference.method.steps[0], reference.seed))
        for method, steps, seed in jobs:
            where = self.pictures(method, steps, seed)
            generate(self.gallery, method.name, steps, self.prompts, config.size, seed, where, process)
        self.accelerator.wait_for_everyone()

    def reference(self) -> Iterator[torch.Tensor]:
        """Batches (N, 3, H, W) in [-1, 1] of what distances are to."""
        reference = self.config.reference
        if not reference.folder:
            return iter(self.pictures(reference.method, reference.method.steps[0], reference.seed))
        files = sorted(path for path in Path(reference.folder).rglob("*") if path.suffix.lower() in _SUFFIXES)
        if len(files) < 2:
            raise ValueError(f"reference.folder: {reference.folder} has {len(files)} pictures.")
        return (read_picture(path)[None] for path in files)

    def measure(self) -> list[Row]:
        """A row for every method and number of steps, over all seeds."""
        known = torch.cat(list(extract(self.features, self.reference()))) if self.features is not None else None
        rows = over_seeds([self._measure(seed, known) for seed in self.config.seeds])
        if len(self.config.seeds) > 1 and self.similarity is not None:
            for row, (method, steps) in zip(rows, self._rows(), strict=True):
                noises = zip(*(self.pictures(method, steps, seed) for seed in self.config.seeds), strict=True)
                groups = (group for batches in noises for group in torch.stack(batches, 1))
                row["diversity"] = diversity(self.similarity, groups)
        return rows

    def reference_row(self) -> list[Row]:
        """The alignment of the pictures that distances are to, if a method drew them."""
        reference = self.config.reference
        if self.scorer is None or self.features is None or reference.folder:
            return []
        steps = reference.method.steps[0]
        pictures = self.pictures(reference.method, steps, reference.seed)
        return [
            {
                "method": reference.method.name,
                "steps": steps,
                "alignment": mean_score(self.scorer, self._with_prompts(pictures)),
            }
        ]

    def _rows(self) -> list[tuple[MethodConfig, int]]:
        return [(method, steps) for method in self.methods for steps in method.steps]

    def _measure(self, seed: int, known: torch.Tensor | None) -> list[Row]:
        rows: list[Row] = []
        for method, steps in tqdm(self._rows(), desc=f"measuring, seed {seed}", unit="row"):
            row: Row = {"method": method.name, "steps": steps}
            drawn = self.pictures(method, steps, seed)
            if self.features is not None and known is not None:
                row |= distances(torch.cat(list(extract(self.features, drawn))), known)
            if self.scorer is not None:
                row["alignment"] = mean_score(self.scorer, self._with_prompts(drawn))
            rows.append(row)
        return rows

    def _with_prompts(self, drawn: Pictures) -> Iterator[tuple[torch.Tensor, Sequence[str]]]:
        for numbers, pictures in zip(drawn.batches, drawn, strict=True):
            yield pictures, [self.prompts[n] for n in numbers]

    def consistency(self) -> list[Row]:
        """Between the fewest steps and the most of every method, and between the pairs that are asked for."""
        ends = [PairConfig(m.name, m.name, (min(m.steps), max(m.steps))) for m in self.methods if len(m.steps) > 1]
        return over_seeds([[self._alike(pair, seed) for pair in (*ends, *self.config.pairs)] for seed in self.config.seeds])

    def _alike(self, pair: PairConfig, seed: int) -> Row:
        few, many = (
            self.pictures(self.gallery.methods[name], steps, seed)
            for name, steps in zip((pair.few, pair.many), pair.steps, strict=True)
        )
        method = pair.few if pair.few == pair.many else f"{pair.few} / {pair.many}"
        row: Row = {"method": method, "steps": f"{pair.steps[0]} / {pair.steps[1]}"}
        if self.similarity is not None:
            row["consistency"] = consistency(self.similarity, few, many)
        if self.lpips is not None:
            row["perceptual_distance"] = perceptual_distance(self.lpips, few, many)
        return row

    def guidance(self) -> list[Row]:
        """Alignment and saturation of every method at every guidance scale."""
        asked, scorer = self.config.guidance, self.scorer
        if not asked.scales or scorer is None:
            return []
        prompts = self.prompts[: asked.count]
        batches = self._batches(prompts)

        def rows(seed: int) -> Iterator[Row]:
            for name in tqdm(
                asked.methods or [method.name for method in self.methods], desc=f"guidance, seed {seed}", unit="method"
            ):
                draw = self._drawing(name, asked.steps, len(prompts), seed)
                for response in guidance_response(draw, scorer, batches, asked.scales):
                    yield {"method": name, "steps": asked.steps} | response._asdict()

        return over_seeds([list(rows(seed)) for seed in self.config.seeds])

    def negative(self) -> list[Row]:
        """How often what a negative prompt names is in each method's pictures, without it and with it."""
        asked, scorer = self.config.negative, self.scorer
        if not asked.pairs or scorer is None:
            return []
        pairs = read_pairs(asked.pairs)
        batches = self._batches(pairs)
        told = {"steps": asked.steps, "guidance_scale": asked.guidance_scale}

        def rows(seed: int) -> Iterator[Row]:
            for name in tqdm(
                asked.methods or [method.name for method in self.methods], desc=f"negative prompts, seed {seed}", unit="method"
            ):
                draw = self._drawing(name, asked.steps, len(pairs), seed, times=2)  # each batch twice, from the same noise
                yield {"method": name} | told | negative_prompt_response(draw, scorer, batches, asked.guidance_scale)._asdict()

        return over_seeds([list(rows(seed)) for seed in self.config.seeds])

    def _batches(self, items: Sequence[Item]) -> list[Sequence[Item]]:
        size = self.config.batch_size
        return [items[start : start + size] for start in range(0, len(items), size)]

    def _drawing(self, name: str, steps: int, count: int, seed: int, times: int = 1) -> Generate:
        """Draws a method's pictures in the order of `count` prompts, over and over from the same noise.

        Args:
            name, steps: of the method.
            count: of prompts.
            seed: of the noise.
            times: that each batch comes in a row.
        """
        calls, first = 0, 0

        def draw(prompts: Sequence[str], negative_prompts: Sequence[str], guidance_scale: float) -> torch.Tensor:
            nonlocal calls, first
            numbers = [(first + i) % count for i in range(len(prompts))]
            calls += 1
            first += len(prompts) if calls % times == 0 else 0
            size = self.config.size
            pictures = self.gallery.draw(name, steps, prompts, numbers, size, seed, negative_prompts, guidance_scale)
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
            "seeds": list(self.config.seeds),
            "reference": self.reference_row(),
            "rows": self.measure(),
            "consistency": self.consistency(),
            "guidance": self.guidance(),
            "negative": self.negative(),
            "ode": over_seeds(
                [ode_rows(self.gallery, self.config, self.prompts, seed, self.accelerator.device) for seed in self.config.seeds]
            ),
        }


def over_seeds(runs: Sequence[list[Row]]) -> list[Row]:
    """Rows of the same things measured with several seeds, as one list: means, and standard deviations beside them."""
    if len(runs) == 1:
        return runs[0]
    rows = []
    for same in zip(*runs, strict=True):
        row: Row = {}
        for name, value in same[0].items():
            if name in KEYS:
                row[name] = value
            elif not name.endswith("_deviation"):  # of one seed, and smaller
                values = [one[name] for one in same]
                row |= {name: statistics.fmean(values), f"{name}_deviation": statistics.stdev(values)}
        rows.append(row)
    return rows


def pictures_of(config: EvaluationConfig, method: MethodConfig, steps: int, seed: int, prompts: Sequence[str] = ()) -> Pictures:
    """Where an evaluation keeps a method's pictures; its prompts are read unless they are given."""
    prompts = prompts or read_prompts(config.prompts, config.count)
    told = {"model": chosen(config.model), "prompts": prompts, "size": config.size, "seed": seed}
    folder = folder_of(Path(config.output) / "pictures", method, steps, told | {"precision": config.precision})
    return Pictures(folder, len(prompts), config.batch_size)


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

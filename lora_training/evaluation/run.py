"""One evaluation from a checked configuration: draw, measure, write."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, convert_outputs_to_fp32, gather_object
from tqdm import tqdm

from ..backbones import load_backbone
from ..config import DataConfig, chosen
from ..cpu import coming_device, precision_here
from ..data.clips import load_clip
from ..data.pictures import load_picture
from ..data.sources import SUFFIXES, Record, clips_in
from ..distances import load_lpips
from ..files import write_text
from .alignment import Scorer, load_scorer, mean_score
from .config import EvaluationConfig, PairConfig
from .distribution import Moments, frechet_distance, kernel_distance, precision_recall
from .features import extract, load_features
from .generation import Pictures, folder_of, generate
from .methods import Gallery, MethodConfig
from .ode import check_ode, ode_rows
from .prompts import read_pairs, read_prompts
from .response import Generate, guidance_response, negative_prompt_response
from .similarity import consistency, diversity, perceptual_distance
from .video import Flow, flow_magnitude, frame_scores, load_flow, single_frames, temporal_consistency, video_frechet_distance

Row = dict[str, Any]
Figure = Callable[[Pictures], float]
Item = TypeVar("Item")
KEYS = ("method", "steps", "guidance_scale")  # what a row is of; the rest of it was measured


class Evaluation:
    """Everything that an evaluation holds.

    Args:
        config: what to do.

    Raises:
        ValueError, FileNotFoundError: a model, adapter, prompts or weights that are not there; which.
    """

    def __init__(self, config: EvaluationConfig):
        # processes that have drawn their part wait for the others, and for the main one, which measures what is kept alone
        patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
        self.accelerator = Accelerator(cpu=coming_device().type == "cpu", kwargs_handlers=[patience])
        device = self.accelerator.device
        config = replace(config, precision=precision_here(config.precision, device))
        self.config, self.root, clips = config, Path(config.output), config.clips
        self.prompts = read_prompts(config.prompts, config.count)
        if len(self.prompts) == 1 and (config.features or (clips and clips.features)):
            raise ValueError(f"prompts: {config.prompts} has 1, and distances need more: leave features out.")
        self.pairs = read_pairs(config.negative.pairs) if config.negative.pairs else []
        if config.reference.folder:
            self._reference_files()
        # judges first: what is missing is said before anything is drawn
        self.features = load_features(config.features, device) if config.features else None
        self.similarity = load_features(config.similarity, device, "similarity") if config.similarity else self.features
        scorer = load_scorer(config.alignment, device) if config.alignment else None
        self.scorer = frame_scores(scorer) if scorer and clips else scorer
        self.clip_features = load_features(clips.features, device, "clips.features") if clips and clips.features else None
        motion = load_scorer(clips.motion, device, "clips.motion") if clips and clips.motion else None
        flow = load_flow(clips.flow, device) if clips and clips.flow else None
        if clips and clips.alignment:
            self.scorer = load_scorer(clips.alignment, device, "clips.alignment")
        self.lpips = load_lpips(config.lpips_weights, "lpips_weights").to(device) if config.lpips_weights else None
        backbone = load_backbone(config.model)
        if clips:
            scale = backbone.latent_scale
            backbone.check_sample((4, clips.frames, config.size[0] // scale, config.size[1] // scale))
        pipe = backbone.pipe
        pipe.to(device, torch.float16 if config.precision == "fp16" else torch.float32)
        if config.precision == "bf16":
            pipe.unet.forward = convert_outputs_to_fp32(torch.autocast(device.type, torch.bfloat16)(pipe.unet.forward))
        pipe.set_progress_bar_config(disable=True)
        self.methods = list(config.methods)
        self.gallery = Gallery(pipe, [*self.methods, config.reference.method], clips.frames if clips else 0)
        check_ode(self.gallery, config)
        self._check_steps()
        self._check_things()
        self.figures = self._figures(motion, flow)

    def _check_steps(self) -> None:
        """Refuse numbers of steps that a method does not have, before anything is drawn."""
        config = self.config
        for method in [*self.methods, config.reference.method]:
            self.gallery.check_steps(method.name, method.steps)
        parts = ((config.guidance, bool(config.guidance.scales)), (config.negative, bool(self.pairs)))
        for part, asked in parts:
            for name in self._names(part.methods) if asked else ():
                self.gallery.check_steps(name, (part.steps,))

    def _names(self, chosen: Sequence[str]) -> Sequence[str]:
        """Of methods that a part of the configuration asks for: those that it names, or all."""
        return chosen or [method.name for method in self.methods]

    def _check_things(self) -> None:
        """Refuse what negative prompts name if the judge does not know it: of a blank picture it says so before drawing."""
        things = sorted({thing for _, thing in self.pairs})
        if self.scorer is not None:
            for batch in self._batches(things):
                frames = (self.config.clips.frames,) if self.config.clips else ()
                self.scorer(torch.zeros(len(batch), *frames, 3, *self.config.size), batch)

    def _figures(self, motion: Scorer | None, flow: Flow | None) -> dict[str, Figure]:
        """What is read off a method's own pictures, by the names of `METRICS`."""
        figures: dict[str, Figure] = {}
        for name, judge in (("alignment", self.scorer), ("motion", motion)):
            if judge is not None:
                figures[name] = partial(self._mean_score, judge)
        if self.config.clips and self.similarity is not None:
            figures["temporal_consistency"] = partial(temporal_consistency, self.similarity)
        if flow is not None:
            figures["flow"] = partial(flow_magnitude, flow)
        return figures

    def _mean_score(self, judge: Scorer, drawn: Pictures) -> float:
        told = ([self.prompts[n] for n in numbers] for numbers in drawn.batches)
        return mean_score(judge, zip(drawn, told, strict=True))

    def pictures(self, method: MethodConfig, steps: int, seed: int) -> Pictures:
        """Where a method's pictures are, or will be."""
        return pictures_of(self.config, method, steps, seed, self.prompts)

    def draw(self) -> None:
        """All pictures that are missing, this process's share of them, and wait for the others."""
        config, reference = self.config, self.config.reference
        process = (self.accelerator.process_index, self.accelerator.num_processes)
        jobs = [(method, steps, seed) for seed in config.seeds for method in self.methods for steps in method.steps]
        if self._draws_reference:
            jobs.insert(0, (reference.method, reference.method.steps[0], reference.seed))
        for method, steps, seed in jobs:
            where = self.pictures(method, steps, seed)
            generate(self.gallery, method.name, steps, self.prompts, config.size, seed, where, process)
        self.accelerator.wait_for_everyone()

    @property
    def _draws_reference(self) -> bool:
        return not self.config.reference.folder and (self.features is not None or self.clip_features is not None)

    def reference(self) -> Iterator[torch.Tensor]:
        """Batches (N, 3, H, W), or of clips (N, F, 3, H, W), in [-1, 1] of what distances are to."""
        reference, clips = self.config.reference, self.config.clips
        if not reference.folder:
            return iter(self.pictures(reference.method, reference.method.steps[0], reference.seed))
        files = self._reference_files()
        if clips:
            framing = DataConfig(clips=clips.of_reference)
            return (load_clip(Record(str(path), path), self.config.size, framing).pixels for path in files)
        return (load_picture(Record(str(path), path), self.config.size, DataConfig()).pixels for path in files)

    def _reference_files(self) -> list[Path]:
        """The pictures or clips of `reference.folder`.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: fewer than two.
        """
        folder, clips = Path(self.config.reference.folder), self.config.clips
        if not folder.is_dir():
            raise FileNotFoundError(f"reference.folder: there is no folder {folder}.")
        named = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        pictures = (path for path in named if path.is_file() and not path.name.startswith("."))  # such as what macOS leaves
        files = clips_in(folder) if clips else sorted(pictures)
        if len(files) < 2:
            raise ValueError(f"reference.folder: {folder} has {len(files)} {'clips' if clips else 'pictures'}.")
        return files

    def measure(self) -> list[Row]:
        """A row for every method and number of steps, over all seeds."""
        known = known_clips = None
        if self.features is not None:
            known = torch.cat(list(extract(self.features, single_frames(self.reference()))))
        if self.clip_features is not None:
            known_clips = Moments.of(extract(self.clip_features, self.reference()))
        rows = over_seeds([self._measure(seed, known, known_clips) for seed in self.config.seeds])
        if len(self.config.seeds) > 1 and self.similarity is not None:
            for row, (method, steps) in zip(rows, self._rows(), strict=True):
                noises = zip(*(self.pictures(method, steps, seed) for seed in self.config.seeds), strict=True)
                groups = (group for batches in noises for group in self._groups(batches))
                row["diversity"] = diversity(self.similarity, groups)
        return rows

    def _groups(self, batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """For every prompt, or every frame of its clip, the pictures (K, 3, H, W) from K noises."""
        together = torch.stack(tuple(batches), -4)  # beside the pictures, or the frames
        return together.flatten(0, 1) if self.config.clips else together

    def reference_row(self) -> list[Row]:
        """What there is to say of the pictures that distances are to, if a method drew them."""
        method, seed = self.config.reference.method, self.config.reference.seed
        if not self._draws_reference or not self.figures:
            return []
        drawn = self.pictures(method, method.steps[0], seed)
        row: Row = {"method": method.name, "steps": method.steps[0]}
        return [row | {name: figure(drawn) for name, figure in self.figures.items()}]

    def _rows(self) -> list[tuple[MethodConfig, int]]:
        return [(method, steps) for method in self.methods for steps in method.steps]

    def _measure(self, seed: int, known: torch.Tensor | None, known_clips: Moments | None) -> list[Row]:
        frames = self.config.clips.frames if self.config.clips else 1
        rows: list[Row] = []
        for method, steps in tqdm(self._rows(), desc=f"measuring, seed {seed}", unit="row"):
            row: Row = {"method": method.name, "steps": steps}
            drawn = self.pictures(method, steps, seed)
            if self.features is not None and known is not None:
                row |= distances(torch.cat(list(extract(self.features, single_frames(drawn)))), known, frames)
            if self.clip_features is not None and known_clips is not None:
                row["video_frechet_distance"] = video_frechet_distance(self.clip_features, drawn, known_clips)
            rows.append(row | {name: figure(drawn) for name, figure in self.figures.items()})
        return rows

    def consistency(self) -> list[Row]:
        """Between the fewest steps and the most of every method, and between the pairs that are asked for."""
        if self.similarity is None and self.lpips is None:
            return []
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
            row["consistency"] = consistency(self.similarity, single_frames(few), single_frames(many))
        if self.lpips is not None:
            row["perceptual_distance"] = perceptual_distance(self.lpips, single_frames(few), single_frames(many))
        return row

    def guidance(self) -> list[Row]:
        """Alignment and saturation of every method at every guidance scale."""
        asked, scorer = self.config.guidance, self.scorer
        if not asked.scales or scorer is None:
            return []
        prompts = self.prompts[: asked.count]
        batches = self._batches(prompts)

        def rows(seed: int, name: str) -> list[Row]:
            draw = self._drawing(name, asked.steps, len(prompts), seed)
            responses = guidance_response(draw, scorer, batches, asked.scales)
            return [{"method": name, "steps": asked.steps} | response._asdict() for response in responses]

        return self._over_seeds(rows, self._names(asked.methods), "guidance")

    def negative(self) -> list[Row]:
        """How often what a negative prompt names is in each method's pictures, without it and with it."""
        asked, scorer = self.config.negative, self.scorer
        if not self.pairs or scorer is None:
            return []
        pairs = self.pairs
        batches = self._batches(pairs)
        told = {"steps": asked.steps, "guidance_scale": asked.guidance_scale}
        threshold = 0.5 if asked.threshold is None else asked.threshold

        def rows(seed: int, name: str) -> list[Row]:
            draw = self._drawing(name, asked.steps, len(pairs), seed, times=2)  # each batch twice, from the same noise
            found = negative_prompt_response(draw, scorer, batches, asked.guidance_scale, threshold)
            return [{"method": name} | told | found._asdict()]

        return self._over_seeds(rows, self._names(asked.methods), "negative prompts")

    def _over_seeds(self, measure: Callable[[int, str], list[Row]], names: Sequence[str], said: str) -> list[Row]:
        """Rows of what is drawn to be measured at once, over all seeds; every process draws a share, and all get all.

        Args:
            measure: the rows of a seed and of one of `names`.
            names: in the order of the rows.
            said: on the progress bar.
        """
        processes = self.accelerator.num_processes
        units = list(product(self.config.seeds, names))
        own = units[self.accelerator.process_index :: processes]
        bar = tqdm(own, desc=said, unit="method", disable=not self.accelerator.is_main_process)
        shares = gather_object([[measure(*unit) for unit in bar]])  # one of each process
        runs: dict[int, list[Row]] = {seed: [] for seed in self.config.seeds}
        for number, (seed, _) in enumerate(units):
            runs[seed] += shares[number % processes][number // processes]
        return over_seeds(list(runs.values()))

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
        report: dict[str, Any] = {
            "title": self.config.title,
            "config": json.loads(json.dumps(asdict(self.config), default=str)),
            "pictures": len(self.prompts),
            "seeds": list(self.config.seeds),
        }
        of_all = {"reference": self.reference_row, "rows": self.measure, "consistency": self.consistency}
        shared = {"guidance": self.guidance, "negative": self.negative, "ode": self.ode}
        main = self.accelerator.is_main_process
        for name, measured in (of_all | shared if main else shared).items():
            report[name] = measured()
            if main:
                self.keep(report)  # whatever comes of those that follow
        return report if main else None

    def ode(self) -> list[Row]:
        """How far adapters leave their teacher's ODE."""
        if not self.config.ode.count:
            return []

        def rows(seed: int, _: str) -> list[Row]:  # of all methods at once: they share the teacher's path
            return ode_rows(self.gallery, self.config, self.prompts, seed, self.accelerator.device)

        return self._over_seeds(rows, ["all"], "ode")

    def keep(self, report: dict[str, Any]) -> None:
        """Write `report.json`."""
        write_text(self.root / "report.json", json.dumps(report, indent=1) + "\n")


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


_OF_A_MODEL = (".safetensors", ".bin", ".pt", ".json", ".txt")  # weights, configurations, and a tokenizer's merges


def weights_of(*named: str) -> str:
    """Of the files, and of those in the folders, that networks are made of, a digest.

    Args:
        named: paths; of what is not there, such as a repository on the hub, nothing, for its name says it.
    """
    roots = [Path(name) for name in named if name and Path(name).exists()]
    files = [
        file for root in roots for file in ([root] if root.is_file() else sorted(root.rglob("*"))) if _is_of_a_model(root, file)
    ]
    return (
        hashlib.sha256("".join(_digest(file, file.stat().st_mtime_ns) for file in files).encode()).hexdigest() if files else ""
    )


def _is_of_a_model(root: Path, file: Path) -> bool:
    return file.is_file() and (file == root or file.suffix in _OF_A_MODEL)


@cache
def _digest(file: Path, _changed: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def pictures_of(config: EvaluationConfig, method: MethodConfig, steps: int, seed: int, prompts: Sequence[str] = ()) -> Pictures:
    """Where an evaluation keeps a method's pictures; its prompts are read unless they are given."""
    prompts = prompts or read_prompts(config.prompts, config.count)
    told = {"model": chosen(config.model), "prompts": prompts, "size": config.size, "seed": seed}
    model = config.model
    weights = weights_of(model.path, model.motion_adapter, model.image_adapter, *model.teacher_loras)
    told |= {"weights": weights} if weights else {}
    frames = config.clips.frames if config.clips else 0
    if frames:
        told["frames"] = frames
    folder = folder_of(Path(config.output) / "pictures", method, steps, told | {"precision": config.precision})
    return Pictures(folder, len(prompts), config.batch_size, frames)


_SUBSET = 1000  # pictures in which the kernel distance is measured at a time, as its paper does


def distances(ours: torch.Tensor, known: torch.Tensor, frames: int = 1) -> Row:
    """Of features (N, D) to (N', D); those that there are pictures enough for.

    Args:
        ours, known: the features.
        frames: F of clips, whose features follow each other. A frame's nearest neighbours are of its own clip, so precision and
            recall look F times as far: for clips that stand still they are those of their pictures.
    """
    row: Row = {"frechet_distance": frechet_distance(Moments.of([ours]), Moments.of([known]))}
    fewest = min(len(ours), len(known)) // frames
    same = frames == 1 and len(ours) == len(known) <= _SUBSET  # every subset would be all of them
    kernel = kernel_distance(ours, known, 1 if same else 100, min(_SUBSET, fewest), frames=frames)
    row |= {"kernel_distance": kernel.mean} | ({} if same else {"kernel_distance_deviation": kernel.deviation})
    if fewest > 3:
        found = precision_recall(known, ours, neighbours=3 * frames)
        row |= {"precision": found.precision, "recall": found.recall}
    return row

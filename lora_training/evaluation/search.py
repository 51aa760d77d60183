"""Sampling times of one method that a metric likes best, searched among the points of its grid.

    python -m lora_training.evaluation.search examples/evaluation/shapes.yaml --method "PCM, 4 phases" --steps 8
    python -m lora_training.evaluation.search my.yaml --adapter my.safetensors --steps 6 --config.batch_size 8

The first argument is an evaluation's configuration, whose model, prompts, reference and judges are used; `--config.` overrides
any setting of it. What is found is measured once more beside the grid's own times, with other prompts and other noise: that
gain is to be believed, the searched one is not. An interrupted search goes on where it stopped: run the same command again.
Every figure that there are judges for is kept of every choice, so that another metric begins with what has been drawn;
`--metric alignment --config.features null` spares the reference's pictures.

`--help` lists every setting.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tabulate import tabulate
from tqdm import tqdm

from pcm_scheduler.phases import PhaseGrid
from pcm_scheduler.time_search import Timesteps, search_timesteps

from ..files import CannotWrite, write_text
from ..settings_parser import SettingsParser
from .__main__ import config_first
from .alignment import ScorerConfig, mean_score
from .config import EvaluationConfig, GuidanceConfig, NegativeConfig, OdeConfig
from .features import FeatureConfig, extract
from .generation import from_bytes, generate, to_bytes
from .methods import MethodConfig
from .metrics import METRICS
from .prompts import read_prompts
from .run import Evaluation, Row, distances, weights_of


@dataclass
class SearchConfig:
    """One search.

    Attributes:
        config: an evaluation, whose model, prompts, size, batch size, precision, reference and judges are used.
        steps: K, the number of times.
        method: of the evaluation, by its name; its scheduler must be `pcm`.
        adapter: a LoRA file, instead of a method.
        metric: what is made better: distances need the evaluation's `features`, alignment its judge.
        count: prompts that every choice is drawn for, the first of the file; as many after them, none of which is among the
            searched, are held out for the last measurement.
        seed: of the search's noise; the last measurement has the seed after it.
        output: a folder for what is found and for what has been measured; empty: `timesteps` in the evaluation's.
    """

    config: EvaluationConfig
    steps: int
    method: str = ""
    adapter: str = ""
    metric: Literal["frechet_distance", "kernel_distance", "alignment"] = "frechet_distance"
    count: int = 256
    seed: int = 5
    output: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is loaded.

        Raises:
            ValueError: what it is, and what would work.
        """
        if self.config.clips:
            raise ValueError("clips: times are searched with pictures, of which a search holds every choice's in memory.")
        names = [method.name for method in self.config.methods if method.scheduler == "pcm"]
        if bool(self.method) == bool(self.adapter):
            raise ValueError(f"Name either a method ({', '.join(names) or 'the configuration has none'}) or an adapter's file.")
        if self.method and self.method not in names:
            raise ValueError(f"method: {self.method!r} is not among those whose scheduler is pcm: {', '.join(names)}.")
        needed = "alignment" if self.metric == "alignment" else "features"
        if getattr(self.config, needed) is None:
            raise ValueError(f"metric: {self.metric} needs `{needed}` in the configuration.")
        if self.count < 2:
            raise ValueError(f"count must be at least 2; got {self.count}.")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative; got {self.seed}.")
        reference = () if self.config.reference.folder else (self.config.reference.seed,)
        taken = {self.seed, self.seed + 1} & {*self.config.seeds, *reference}
        if taken:
            raise ValueError(
                f"seed: the search has {self.seed} and {self.seed + 1}, and {min(taken)} is also the evaluation's or its "
                "reference's, which should not see the noise that was searched; choose another."
            )

    @property
    def searched(self) -> MethodConfig:
        """The method, with the number of steps that is asked for."""
        if self.adapter:
            name = re.sub(r"[^\w .,+-]", "_", Path(self.adapter).stem)  # of a folder too
            if name == self.config.reference.method.name or not re.match(r"\w", name):
                name = f"adapter {name}"
            return MethodConfig(name, self.adapter, steps=(self.steps,))
        (method,) = [method for method in self.config.methods if method.name == self.method]
        return replace(method, steps=(self.steps,), timesteps=())

    @property
    def evaluation(self) -> EvaluationConfig:
        """Of the method alone: what else the report asks for is neither loaded nor refused."""
        return replace(
            self.config, methods=(self.searched,), count=0, pairs=(), similarity=None, lpips_weights="",
            guidance=GuidanceConfig(), negative=NegativeConfig(), ode=OdeConfig(),
        )  # fmt: skip

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return Path(self.output) if self.output else Path(self.config.output) / "timesteps"


@dataclass(frozen=True)
class Part:
    """What choices are measured on.

    Attributes:
        name: of the part.
        prompts: one for each picture.
        seed: of the noise, which is the same for every choice: only so are they comparable, and scores deterministic.
        known: features (N, D) of the reference; None: distances are not measured.
    """

    name: str
    prompts: Sequence[str]
    seed: int
    known: torch.Tensor | None


class Kept:
    """Rows by their names in a JSON file, which is written anew after every measurement.

    Args:
        path: of the file; what is there already is not measured again.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[str, Row] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def row(self, name: str, measure: Callable[[], Row]) -> Row:
        """The row of a name, measured if it is not there."""
        if name not in self.rows:
            self.rows[name] = measure()
            write_text(self.path, json.dumps(self.rows, indent=1) + "\n")
        return self.rows[name]


class Search:
    """Everything that a search holds.

    Args:
        config: what to do.

    Raises:
        ValueError, FileNotFoundError: a model, adapter, prompts or weights that are not there, or nothing to choose among.
    """

    def __init__(self, config: SearchConfig):
        self.config, self.method = config, config.searched
        own = config.evaluation
        searched, held_out = split(read_prompts(own.prompts), config.count, own.prompts)
        self.evaluation = Evaluation(own)
        if self.evaluation.accelerator.num_processes > 1:
            raise ValueError("A search runs in one process: each choice of times depends on those before.")
        self.evaluation.prompts = [*searched, *held_out]  # those of the reference
        self.grid = self.evaluation.gallery.grid(self.method.name)
        if choices(self.grid, config.steps) == 1:
            raise ValueError(
                f"steps: {config.steps} on {self.grid.num_phases} phases leave nothing to choose: all stops are "
                f"{list(self.grid.sampling_timesteps(config.steps))}. Other numbers of steps have choices."
            )
        self.kept = Kept(config.folder / f"measured-{self._digest()}.json")
        self._texts = (searched, held_out)

    def parts(self) -> tuple[Part, Part]:
        """The searched and the held out, with their references; pictures of the reference that are missing are drawn."""
        count, seed, known = self.config.count, self.config.seed, self._known()
        own = (known, known) if self.evaluation.config.reference.folder or known is None else (known[:count], known[count:])
        searched, held_out = self._texts
        return Part("searched", searched, seed, own[0]), Part("held out", held_out, seed + 1, own[1])

    def _known(self) -> torch.Tensor | None:
        evaluation, reference = self.evaluation, self.evaluation.config.reference
        if evaluation.features is None:
            return None
        if not reference.folder:
            method, steps = reference.method, reference.method.steps[0]
            where = evaluation.pictures(method, steps, reference.seed)
            size = evaluation.config.size
            generate(evaluation.gallery, method.name, steps, evaluation.prompts, size, reference.seed, where)
        return torch.cat(list(extract(evaluation.features, evaluation.reference())))

    def _digest(self) -> str:
        """Of all that a row depends on beside its times."""
        evaluation, reference = self.evaluation, self.evaluation.config.reference
        pictures = evaluation.pictures(self.method, self.config.steps, self.config.seed)
        told: list[Any] = [pictures.folder.name, self.config.count]
        for judge in (evaluation.config.features, evaluation.config.alignment):
            told.append(judge and [asdict(judge), weights_of(*_files_of(judge))])
        if reference.folder:
            files = sorted(path for path in Path(reference.folder).rglob("*") if path.is_file())
            told.append([(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files])
        else:
            told.append(evaluation.pictures(reference.method, reference.method.steps[0], reference.seed).folder.name)
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]

    def measure(self, part: Part, timesteps: Timesteps) -> Row:
        """Every figure that the evaluation has judges for, of pictures that stop at these times; kept, and drawn once."""
        return self.kept.row(f"{part.name}: {' '.join(map(str, timesteps))}", lambda: self._measure(part, timesteps))

    def _measure(self, part: Part, timesteps: Timesteps) -> Row:
        evaluation, size = self.evaluation, self.evaluation.config.batch_size
        evaluation.gallery.use_timesteps(self.method.name, timesteps)
        drawn, row = [], Row()
        for start in range(0, len(part.prompts), size):
            texts = part.prompts[start : start + size]
            numbers = range(start, start + len(texts))
            pictures = evaluation.gallery.draw(
                self.method.name, len(timesteps), texts, numbers, evaluation.config.size, part.seed
            )
            drawn.append((to_bytes(pictures), texts))
        if evaluation.features is not None and part.known is not None:
            features = extract(evaluation.features, (from_bytes(pictures) for pictures, _ in drawn))
            row |= distances(torch.cat(list(features)), part.known)
        if evaluation.scorer is not None:
            row["alignment"] = mean_score(evaluation.scorer, ((from_bytes(pictures), texts) for pictures, texts in drawn))
        return row

    def run(self) -> Row:
        """Search, measure once more, write; returns what the file says."""
        config, metric = self.config, self.config.metric
        sign = -1 if METRICS[metric].better == "larger" else 1
        searched, held_out = self.parts()
        with tqdm(desc=f"{self.method.name}, {config.steps} steps", unit="choice") as bar:
            best = math.inf

            def tried(number: int, timesteps: Timesteps, score: float) -> None:
                nonlocal best
                best = min(best, score)
                bar.set_postfix({metric: f"{sign * best:.4g}"}, refresh=False)
                bar.update()

            def score(timesteps: Timesteps) -> float:
                return sign * self.measure(searched, timesteps)[metric]

            found = search_timesteps(self.grid, config.steps, score, tried)
        default = self.grid.sampling_timesteps(config.steps)
        told = json.dumps(asdict(config.config), sort_keys=True, default=str)
        report = {
            "timesteps": list(found.timesteps),
            "default_timesteps": list(default),
            "metric": metric,
            "scores": {
                part.name: {"found": self.measure(part, found.timesteps), "default": self.measure(part, default)}
                for part in (searched, held_out)
            },
            "choices_tried": len(found.tried),
            "method": json.loads(json.dumps(asdict(self.method))),
            "count": config.count,
            "precision": self.evaluation.config.precision,
            "seeds": {part.name: part.seed for part in (searched, held_out)},
            "command": shlex.join(["python", "-m", "lora_training.evaluation.search", *sys.argv[1:]]),
            "configuration_sha256": hashlib.sha256(told.encode()).hexdigest(),
        }
        write_text(self.path, json.dumps(report, indent=1) + "\n")
        return report

    @property
    def path(self) -> Path:
        """Of the file that says what was found."""
        return self.config.folder / f"{self.method.name}-{self.config.steps}-steps-{self.config.metric}.json"


def split(prompts: Sequence[str], count: int, path: str) -> tuple[list[str], list[str]]:
    """The first `count` prompts, and the next `count` that are none of them.

    Args:
        prompts: of the file, in which one may come several times.
        count: of each part.
        path: the file, for messages.

    Raises:
        ValueError: there are too few.
    """
    searched = list(prompts[:count])
    held_out = [prompt for prompt in prompts[count:] if prompt not in set(searched)][:count]
    if len(held_out) < count:
        raise ValueError(
            f"count: {count} prompts are searched and as many others held out, and {path} has {len(prompts)}, of which "
            f"{len(held_out)} are left for that; the prompts must be more or the count smaller."
        )
    return searched, held_out


def _files_of(judge: FeatureConfig | ScorerConfig) -> list[str]:
    """Of a judge that has been loaded, its weights and the source of its factory."""
    where = judge.factory.rpartition(":")[0]
    source = where if where.endswith(".py") else getattr(sys.modules.get(where), "__file__", None) or ""
    return [judge.path, source, *([judge.head] if isinstance(judge, ScorerConfig) else [])]


def choices(grid: PhaseGrid, num_inference_steps: int) -> int:
    """How many sets of stops `search_timesteps` chooses among.

    Raises:
        ValueError: the grid has no such number of steps.
    """
    k, m, n = len(grid.stops(num_inference_steps)), grid.num_phases, grid.num_solver_steps
    return math.comb(n - m, k - m) if k >= m else math.comb(m - 1, k - 1)


def text_of(report: Row, path: Path) -> str:
    """What a person reads: the figures, what they are worth, and how to use the times."""
    metric, scores, method = report["metric"], report["scores"], report["method"]
    names = [name for name in scores["held out"]["found"] if name in METRICS]
    rows = [
        [part, times, *(f"{scores[part][times][name]:.4g}" for name in names)]
        for part in scores
        for times in ("default", "found")
    ]
    found, default = (scores["held out"][times][metric] for times in ("found", "default"))
    better = found > default if METRICS[metric].better == "larger" else found < default
    said = f"On held-out prompts and noise the {METRICS[metric].title} goes from {default:.4g} to {found:.4g}"
    row = {"name": f"{method['name']}, searched", "adapter": method["adapter"], "steps": [len(report["timesteps"])]}
    row |= {name: method[name] for name in ("guidance_scale", "eta") if method[name] is not None}
    row |= {name: method[name] for name in ("num_phases", "num_solver_steps") if method[name]}
    parts = [
        f"default: {report['default_timesteps']}\nfound:   {report['timesteps']}, of {report['choices_tried']} choices tried",
        tabulate(rows, ["prompts", "timesteps", *(METRICS[name].title for name in names)], tablefmt="github"),
        f"{said}." if better else f"{said}: no better. Keep the default.",
        "To sample at them, after load_pcm_lora:\n"
        f"    pipe.scheduler = PCMScheduler.from_config(pipe.scheduler.config, timesteps={report['timesteps']})\n"
        "To compare them in a report, among methods:\n"
        f"    - {json.dumps(row | {'timesteps': report['timesteps']})}",
        f"wrote {path}",
    ]
    return "\n\n".join(parts)


def parse(arguments: list[str] | None = None) -> SearchConfig:
    """Configuration file, settings and overrides; exits with a message that names the bad setting."""
    usage = "%(prog)s CONFIG.yaml --steps STEPS (--method METHOD | --adapter FILE) [settings]"
    parser = SettingsParser(prog="python -m lora_training.evaluation.search", usage=usage, description=__doc__)
    parser.add_class_arguments(SearchConfig)
    return SearchConfig(**parser.settings(SearchConfig, config_first(sys.argv[1:] if arguments is None else arguments)))


def main() -> None:
    try:
        search = Search(parse())
        print(text_of(search.run(), search.path))
    except KeyboardInterrupt:
        sys.exit("search: stopped. What was measured is kept; the same command goes on from there.")
    except (ValueError, OSError, CannotWrite) as error:
        sys.exit(f"search: {error}")


if __name__ == "__main__":
    main()

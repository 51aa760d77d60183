"""Others' own training scripts, from checkouts, beside our trainer: seconds a step and memory.

    git clone https://github.com/G-U-N/Phased-Consistency-Model
    git clone https://github.com/huggingface/diffusers
    python benchmarks/reference_scripts.py --pcm Phased-Consistency-Model --lcm diffusers              (measures and prints)
    python benchmarks/reference_scripts.py --pcm Phased-Consistency-Model --lcm diffusers --write      (also rewrites README.md)

`training_step.py` takes the shape of their work apart; this runs what people run. Each script, and our trainer, is run from its
command line in a process of its own: the same random weights from one folder, the same pictures, batch, resolution, rank and
precision. A step is the time from one mark of its progress bar to the next, data, VAE and text encoders included (ours has
encoded the pictures before); steps of a script with a critic, which trains one network and then the other, are taken in pairs.
Memory is counted as in `training_step.py`.

Scripts are run as they are but for what would stop them here: PCM's read pictures from a folder of their author's machine; its
critics are built for widths of the full model; and some of both rely on what diffusers, torch and webdataset did when they were
written (`made_to_run`). Neither xformers nor 8-bit Adam is used, by them or by us. On a CPU the networks are narrow, and SDXL's
scripts, which spell its widths out, cannot run.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import multiprocessing
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets import unet_2d_condition
from measuring import UNMEASURED, Book, Figures, alone, conditions, named_cases, synchronize, table, write_section
from networks import build_pipeline, latent_side
from tqdm import tqdm
from training_step import OUT_OF_MEMORY, most_resident, write_pictures

import lora_training.loop
from lora_training.train import parse

RANK, PHASES = 64, 4
LCM_FOLDER = "examples/consistency_distillation"


@dataclass(frozen=True)
class Script:
    """One of theirs.

    Attributes:
        name: in tables.
        family: sd15 or sdxl.
        checkout: pcm or lcm, the repository.
        path: in it.
        objective: of ours that does the same.
        critic: it has an adversarial loss, and trains student and critic by turns.
    """

    name: str
    family: str
    checkout: str
    path: str
    objective: str
    critic: bool = False


SCRIPTS = (
    Script("PCM", "sd15", "pcm", "code/text_to_image_sd15/train_pcm_lora_sd15.py", "pcm"),
    Script("PCM, critic", "sd15", "pcm", "code/text_to_image_sd15/train_pcm_lora_sd15_adv.py", "pcm", critic=True),
    Script("PCM, critic", "sdxl", "pcm", "code/text_to_image_sdxl/train_pcm_lora_sdxl_adv.py", "pcm", critic=True),
    Script("LCM", "sd15", "lcm", f"{LCM_FOLDER}/train_lcm_distill_lora_sd_wds.py", "lcm"),
    Script("LCM", "sdxl", "lcm", f"{LCM_FOLDER}/train_lcm_distill_lora_sdxl_wds.py", "lcm"),
)


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        script: theirs.
        batch: pictures a step.
        checkpointing: of gradients.
        device: cpu, with narrow networks, or cuda.
    """

    script: Script
    batch: int
    checkpointing: bool
    device: str

    @property
    def name(self) -> str:
        return f"{self.script.name}, {self.script.family}, batch {self.batch}" + ", checkpointing" * self.checkpointing

    @property
    def narrow(self) -> bool:
        return self.device == "cpu"

    @property
    def precision(self) -> str:
        return "no" if self.narrow else "bf16"

    @property
    def resolution(self) -> int:
        return 8 * latent_side(self.script.family, self.narrow)


def cases(device: str) -> list[Case]:
    """Those of a device."""
    if device == "cuda":
        kinds = itertools.product(SCRIPTS, (1, 8, 16), (False, True))
    else:
        kinds = itertools.product([script for script in SCRIPTS if script.family == "sd15"], (1, 8), (False,))
    return [Case(*kind, device=device) for kind in kinds]


class Measured(Exception):  # noqa: N818  (not an error)
    """All steps were timed; what a run does after its last step is of no interest."""


class Marks:
    """Notes when a progress bar moves.

    Args:
        device: cpu or cuda.
        steps: after how many the run is left, beside the first, which is not timed.
    """

    def __init__(self, device: str, steps: int):
        self.device, self.steps = device, steps
        self.times: list[float] = []

    def mark(self) -> None:
        """A step has ended.

        Raises:
            Measured: it was the last.
        """
        synchronize(self.device)
        self.times.append(time.perf_counter())
        if len(self.times) == 1 and self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # of loading; what is held stays counted
        if len(self.times) > self.steps:
            raise Measured

    def bar(self) -> type[tqdm]:
        """What to use for `tqdm`."""
        marks = self

        class Bar(tqdm):
            def __iter__(self) -> Iterator[Any]:
                for item in self.iterable:
                    yield item
                    self.update()

            def update(self, n: float | None = 1) -> bool | None:
                shown = super().update(n)
                marks.mark()
                return shown

        return Bar

    def figures(self, period: int) -> Figures:
        """Seconds of a step, the first left out, and bytes that were held at most; call it once the run is left."""
        taken = [after - before for before, after in itertools.pairwise(self.times)]
        periods = [sum(taken[i : i + period]) / period for i in range(0, len(taken) - period + 1, period)]
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else most_resident()
        return {"seconds": statistics.median(periods), "peak": peak}


def script_arguments(case: Case, folder: Path) -> list[str]:
    """Of their command line; steps, checkpoints and validations are more than will be run."""
    named: dict[str, Any] = {
        "pretrained_teacher_model": folder / "model", "output_dir": folder / "theirs", "seed": 0,
        "mixed_precision": case.precision, "resolution": case.resolution, "lora_rank": RANK, "learning_rate": 1e-6,
        "loss_type": "huber", "max_train_samples": 10**6, "max_train_steps": 10**5, "train_batch_size": case.batch,
        "dataloader_num_workers": 1, "num_ddim_timesteps": 50, "checkpointing_steps": 10**6, "validation_steps": 10**6,
    }  # fmt: skip
    if case.script.checkout == "pcm":
        named |= {"multiphase": PHASES}
    else:
        named |= {"train_shards_path_or_url": folder / "pictures.tar"}
    given = list(itertools.chain.from_iterable((f"--{name}", str(value)) for name, value in named.items()))
    return given + ["--gradient_checkpointing"] * case.checkpointing


def loaded(path: Path) -> ModuleType:
    """The script as a module, with those beside it."""
    sys.path.insert(0, str(path.parent))
    sys.modules.setdefault("diffusers.models.unet_2d_condition", unet_2d_condition)  # where it was until diffusers 0.28
    spec = importlib.util.spec_from_file_location("reference_script", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference_script"] = module
    spec.loader.exec_module(module)
    return module


def critic_widths(script: Script, unet_widths: Sequence[int]) -> list[int]:
    """Channels of what a critic's heads read: ends of blocks on the way down, of the middle, and of those on the way up."""
    down, up = list(unet_widths), list(unet_widths[::-1])
    return [*down, down[-1], *(up if script.family == "sd15" else [])]


def made_to_run(script: ModuleType, case: Case, folder: Path) -> None:
    """Change in the loaded script what would stop it, and nothing that it does in a step."""
    names, adam = vars(script), torch.optim.AdamW
    # torch refuses a whole number beside a fraction
    torch.optim.AdamW = lambda *given, betas, **named: adam(*given, betas=tuple(map(float, betas)), **named)
    if case.narrow:
        torch.set_autocast_dtype("cpu", torch.float32)  # LCM's teachers are always within autocast; this turns it off
    if "CustomImageDataset" in names:
        dataset = names["CustomImageDataset"]
        names["CustomImageDataset"] = lambda _, size: dataset(str(folder / "pictures"), size)
    if "tar_file_expander" in names:  # webdataset marks the end of a shard since, by an item that is no file
        expand = names["tar_file_expander"]
        names["tar_file_expander"] = lambda *given, **named: (item for item in expand(*given, **named) if "fname" in item)
    if case.script.critic and case.narrow:
        unet = UNet2DConditionModel.load_config(folder / "model", subfolder="unet")
        widths = critic_widths(case.script, unet["block_out_channels"])
        names["Discriminator"] = functools.partial(names["Discriminator"], adapter_channel_dims=widths)


def run_script(case: Case, checkout: Path, folder: Path, marks: Marks) -> None:
    """Theirs, until all steps are timed."""
    multiprocessing.set_start_method("fork", force=True)  # their loaders' workers know what was loaded here
    path = checkout / case.script.path
    sys.argv = [str(path), *script_arguments(case, folder)]
    script = loaded(path)
    vars(script)["tqdm"] = marks.bar()
    made_to_run(script, case, folder)
    script.main(script.parse_args())


def run_ours(case: Case, _checkout: Path, folder: Path, marks: Marks) -> None:
    """Ours, as `train.py` does it."""
    settings: dict[str, Any] = {
        "model.path": folder / "model", "model.family": case.script.family, "data.path": folder / "pictures",
        "data.resolution": case.resolution, "data.cache": folder / "cache", "lora.rank": RANK,
        "objective.name": case.script.objective, "objective.num_phases": PHASES if case.script.objective == "pcm" else 1,
        "optimizer.batch_size": case.batch, "optimizer.steps": 10**5, "optimizer.learning_rate": 1e-6,
        "mixed_precision": case.precision, "gradient_checkpointing": case.checkpointing, "checkpoint_every": 10**6,
        "output": folder / "ours.safetensors",
    }  # fmt: skip
    if case.script.critic:
        settings |= {"adversarial.weight": 0.1, "adversarial.cadence": "alternate"}
    config = parse([f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in settings.items()])
    lora_training.loop.tqdm = marks.bar()
    lora_training.loop.run(config)


RUNS: dict[str, Callable[[Case, Path, Path, Marks], None]] = {"ours": run_ours, "theirs": run_script}


def timed(who: str, case: Case, checkout: Path, folder: Path, steps: int) -> Figures:
    """One run, in this process: its figures, or the problem that it met."""
    period = 2 if case.script.critic else 1
    marks = Marks(case.device, steps * period)
    try:
        RUNS[who](case, checkout, folder, marks)
    except Measured:
        return marks.figures(period)
    except torch.OutOfMemoryError:
        return {"problem": OUT_OF_MEMORY}
    except (Exception, SystemExit) as error:
        return {"problem": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    return {"problem": f"ended after {len(marks.times)} steps"}


def measure(case: Case, checkout: Path, folder: Path, steps: int, rounds: int) -> Figures:
    """Ours, theirs, ours, theirs."""
    found: dict[str, list[Figures]] = {who: [] for who in RUNS}
    for _ in range(rounds):
        for who, runs in found.items():
            if not (runs and "problem" in runs[0]):
                runs.append(alone(timed, who, case, checkout, folder, steps))
    figures: Figures = {}
    for who, runs in found.items():
        problem = next((run for run in runs if "problem" in run), None)
        figures[who] = problem or {
            "seconds": statistics.median(run["seconds"] for run in runs), "peak": max(run["peak"] for run in runs)
        }  # fmt: skip
    return figures


def write_model(case: Case, folder: Path) -> None:
    """Random weights and pictures, as a folder of images and as a tar of records."""
    build_pipeline(case.script.family, case.narrow).save_pretrained(folder / "model")
    write_pictures(folder / "pictures", case.resolution)
    with tarfile.open(folder / "pictures.tar", "w") as tar:
        for path in sorted((folder / "pictures").iterdir()):
            tar.add(path, path.name)


HEADERS = ("script, model, batch", "s a step", "GiB", "ours: s a step", "GiB", "time: theirs / ours", "memory: theirs / ours")


def row(case: Case, figures: Figures | None) -> list[str]:
    """Of the table."""
    if figures is None:
        return [case.name, UNMEASURED, *[""] * (len(HEADERS) - 2)]

    def told(of: Figures) -> list[str]:
        return [of["problem"], ""] if "problem" in of else [f"{of['seconds']:.3g}", f"{of['peak'] / 2**30:.2f}"]

    ours, theirs = figures["ours"], figures["theirs"]
    ratios = ["", ""]
    if not any("problem" in of for of in (ours, theirs)):
        ratios = [f"{theirs[what] / ours[what]:.2f}" for what in ("seconds", "peak")]
    return [case.name, *told(theirs), *told(ours), *ratios]


def section(device: str, book: Book) -> str:
    """All that is known of a device, as README.md has it."""
    return f"{book.conditions(device)}:\n\n{table([row(c, book.get(device, c.name)) for c in cases(device)], HEADERS)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pcm", type=Path, help="checkout of G-U-N/Phased-Consistency-Model")
    parser.add_argument("--lcm", type=Path, help="checkout of huggingface/diffusers")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", action="append", default=[], help="a case by name; may be given several times")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each")
    parser.add_argument("--steps", type=int, default=5, help="timed in a run, pairs of them with a critic")
    parser.add_argument("--figures", type=Path, default=Path("outputs/benchmarks/reference_scripts.json"))
    parser.add_argument("--write", action="store_true", help="then rewrite the tables in README.md from the file of figures")
    args = parser.parse_args()

    checkouts = {name: path.resolve() for name, path in (("pcm", args.pcm), ("lcm", args.lcm)) if path}
    known = {case.name: case for case in cases(args.device)}
    possible = [case for case in known.values() if case.script.checkout in checkouts]
    chosen = named_cases(parser, args.only, known, args.device) or possible
    if not chosen:
        parser.error("nothing to run: give --pcm, --lcm or both")
    missing = [case for case in chosen if case.script.checkout not in checkouts]
    if missing:
        parser.error(f"--only {missing[0].name!r} needs --{missing[0].script.checkout}, a checkout")
    for case in chosen:
        path = checkouts[case.script.checkout] / case.script.path
        if not path.is_file():
            parser.error(f"{path} is missing: is --{case.script.checkout} a checkout of the repository that --help names?")
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    book = Book(args.figures)
    print(conditions(args.device), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for case in chosen:
            folder = Path(temporary) / case.script.family
            if not folder.exists():
                folder.mkdir()
                write_model(case, folder)
            book.keep(args.device, case.name, measure(case, checkouts[case.script.checkout], folder, args.steps, args.rounds))
            print(table([row(case, book.get(args.device, case.name))], HEADERS), flush=True)
    print(section(args.device, book), flush=True)
    if args.write:
        write_section(f"reference_scripts {args.device}", section(args.device, book))


if __name__ == "__main__":
    main()

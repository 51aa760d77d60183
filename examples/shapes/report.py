"""What was claimed of few-step methods, measured on the shapes model: writes docs/results.md and its pictures.

    make report        (or: python examples/shapes/report.py, after the evaluation whose report.json it reads)
    make report-video  (or: python examples/shapes/report.py --kept, after that of clips)

Of three sources: the reports of `examples/evaluation/shapes.yaml` and `shapes_video.yaml`, which draw with the shipped
adapters, and the figures that `ablate.py` and the search of sampling times keep in `ablations/`. With `--kept` the sections on
pictures stay as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from ablate import BASE, FIGURES, IMAGES, UPDATES, figures_of, variants
from ablate import STEPS as ABLATION_STEPS
from evaluate import TEACHER_STATISTICS
from pictures import contact_sheet, save
from safetensors import safe_open
from tabulate import tabulate

from lora_training.evaluation.__main__ import parse
from lora_training.evaluation.generation import Pictures
from lora_training.evaluation.report import plot
from lora_training.evaluation.run import pictures_of
from lora_training.files import write_text
from pcm_scheduler.lora_file import read_settings

from model import HERE

ROOT = HERE.parents[1]
CONFIG = ROOT / "examples" / "evaluation" / "shapes.yaml"
VIDEO_CONFIG = CONFIG.with_name("shapes_video.yaml")
STEPS = (1, 2, 4, 8, 16)
VIDEO_STEPS = (1, 2, 4)
SHOWN = 9
EXACT = "Exact, 4 phases"  # the unguided teacher solved to the edges
TEACHER_RIVALS = ("DDIM", "DPM-Solver++", "UniPC", "Euler", EXACT)  # no distillation
DISTILLED_RIVALS = ("LCM", "LCM, guidance 1", "LCM, by LCMScheduler")
ALONE = "PCM, 4 phases"
MATCHED = {1: "PCM, 1 phase", 2: "PCM, 2 phases", 4: ALONE, 8: "PCM, 8 phases", 16: "PCM, 8 phases"}  # by steps
SEARCHED = FIGURES / "timesteps" / f"{ALONE}-6-steps-frechet_distance.json"  # written by `lora_training.evaluation.search`
TIMES, CLIPS, SETTINGS = "Sampling times", "Clips", "Settings of training, one changed at a time"  # sections of their own
Row = dict[str, Any]
Figures = dict[str, Row]  # of ablations, by name


def precision(config: Row) -> str:
    """What the UNet drew in, of an evaluation's configuration or of what a search has found."""
    return {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}[config["precision"]]


def markdown(cells: Sequence[Sequence[str]], heads: Sequence[str]) -> str:
    """A table of texts."""
    return tabulate(cells, heads, tablefmt="github", disable_numparse=True)


def spread(row: Row, name: str, scale: float = 1, digits: int = 2) -> str:
    """Mean ± standard deviation, as text."""
    deviation = row.get(f"{name}_deviation")
    return f"{scale * row[name]:.{digits}f}" + (f" ± {scale * deviation:.{digits}f}" if deviation is not None else "")


def tied(one: Row, other: Row, name: str) -> bool:
    """Whether two means differ by less than the larger of their standard deviations, twice."""
    deviation = max(row.get(f"{name}_deviation", 0.0) for row in (one, other))
    return abs(one[name] - other[name]) < 2 * deviation


def standing(ours: Row, rivals: Sequence[Row], name: str, best: Callable[..., Any]) -> str:
    """Whether a row is before, tied with or behind the best of its rivals, and which that is; `best` is min or max."""
    rival = best(rivals, key=lambda row: row[name])
    if tied(ours, rival, name):
        return f"tied with {rival['method']}"
    first = best(rival[name], ours[name]) != rival[name]
    return f"{'before' if first else 'behind'} {rival['method']}"


def by_steps(rows: Sequence[Row], name: str, scale: float, digits: int, best: Callable[..., float]) -> str:
    """Methods down, numbers of steps across; the best distilled one of each column in bold, and what ties with it."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = {(row["method"], row["steps"]): row for row in rows}
    leaders = {}
    for steps in STEPS:
        distilled = [row for (method, k), row in found.items() if k == steps and method not in TEACHER_RIVALS]
        leaders[steps] = best(distilled, key=lambda row: row[name]) if distilled else None
    cells = []
    for method in methods:
        line = [method]
        for steps in STEPS:
            row, leader = found.get((method, steps)), leaders[steps]
            text = spread(row, name, scale, digits) if row else ""
            leads = row and leader and method not in TEACHER_RIVALS and (row is leader or tied(row, leader, name))
            line.append(f"**{text}**" if leads else text)
        cells.append(line)
    return markdown(cells, ["method", *(f"{steps} step{'s' * (steps > 1)}" for steps in STEPS)])


def aims(report: Row) -> str:
    """What the project set out to show on this model, and whether it does."""
    found = {(row["method"], row["steps"]): row for row in report["rows"]}
    lines = []
    for adapters, words in (
        (dict.fromkeys(STEPS, ALONE), "One 4-phase adapter"),
        (MATCHED, "An adapter for each number of steps"),
    ):
        verdicts = []
        for steps in STEPS[1:]:
            ours = found[adapters[steps], steps]
            rivals = [row for (method, k), row in found.items() if k == steps and method in DISTILLED_RIVALS]
            verdicts.append(f"at {steps} {standing(ours, rivals, 'frechet_distance', min)}")
        lines.append(f"- {words}, by Frechet distance among distilled methods: {'; '.join(verdicts)}.")
    (teacher,) = report["reference"]
    best, steps = 100 * teacher["alignment"], teacher["steps"]
    gap = best - 100 * found[ALONE, 4]["alignment"]
    lines.append(
        f"- Alignment at 4 steps: {gap:.1f} points below the teacher's {best:.1f} % at {steps} steps (the aim: within 2)."
    )
    consistency = {row["method"]: row["consistency"] for row in report["consistency"] if row["steps"] == "1 / 16"}
    ours = f"{MATCHED[1]} / {MATCHED[16]}"
    rivals = {method: value for method, value in consistency.items() if method.startswith(("LCM", *TEACHER_RIVALS))}
    rival = max(rivals, key=lambda method: rivals[method])
    above = "above" if consistency[ours] > rivals[rival] else "not above"
    lines.append(
        f"- Consistency of 1 with 16 steps, an adapter for each: {consistency[ours]:.3f}, {above} every rival's, of which the "
        f"most is {rivals[rival]:.3f} ({rival})."
    )
    scales = sorted({row["guidance_scale"] for row in report["guidance"]})
    answers = [answer_to_guidance(report, method) for method in ("PCM, unguided teacher", EXACT)]
    lines.append(
        f"- Alignment from guidance {scales[0]:g} to {scales[-1]:g}: of the unguided adapter it {answers[0]}; of its teacher, "
        f"solved exactly to the edges of the same phases and guided there, it {answers[1]}."
    )
    return "\n".join(lines)


def answer_to_guidance(report: Row, method: str) -> str:
    """What alignment does as guidance grows."""
    answer = {row["guidance_scale"]: row["alignment"] for row in report["guidance"] if row["method"] == method}
    values = [answer[scale] for scale in sorted(answer)]
    return "rises all the way" if values == sorted(values) else f"is largest at {max(answer, key=answer.__getitem__):g}"


def consistency_table(report: Row) -> str:
    """With the distance of the fewer steps beside it, for a blur is consistent too."""
    distances = {(row["method"], row["steps"]): row for row in report["rows"]}
    cells = []
    for row in report["consistency"]:
        few = int(row["steps"].split(" / ")[0])
        beside = distances[row["method"].split(" / ")[0], few]
        cells.append([row["method"], row["steps"], spread(row, "consistency", 1, 3), spread(beside, "frechet_distance", 1000)])
    return markdown(cells, ["method", "steps", "consistency", "Frechet distance x 1000 of the fewer"])


def guidance_table(report: Row) -> str:
    """Methods down, scales across: alignment, and saturation below it."""
    scales = sorted({row["guidance_scale"] for row in report["guidance"]})
    cells = []
    for method in dict.fromkeys(row["method"] for row in report["guidance"]):
        mine = {row["guidance_scale"]: row for row in report["guidance"] if row["method"] == method}
        cells.append([method, "alignment, %", *(spread(mine[g], "alignment", 100, 1) for g in scales)])
        cells.append(["", "saturation, %", *(spread(mine[g], "saturation", 100, 1) for g in scales)])
    return markdown(cells, ["method", "", *(f"{g:g}" for g in scales)])


def negative_table(report: Row) -> str:
    cells = [
        [row["method"], spread(row, "without", 100, 1), spread(row, "with_negative", 100, 1)] for row in report["negative"]
    ]
    return markdown(cells, ["method", "without, %", "named in the negative prompt, %"])


def ode_table(report: Row) -> str:
    steps = sorted({row["steps"] for row in report["ode"]})
    found = {(row["method"], row["steps"]): row for row in report["ode"]}
    methods = dict.fromkeys(row["method"] for row in report["ode"])
    cells = [[m, *(spread(found[m, k], "ode_error", 1, 3) if (m, k) in found else "" for k in steps)] for m in methods]
    return markdown(cells, ["method", *map(str, steps)])


def ablation_table(rows: Sequence[Row], base: Row, deviation: dict[str, float]) -> str:
    """Each with its distances, and at 4 steps whether it is other than the base by more than training seeds are."""
    cells = []
    for row in rows:
        figures = row["steps"]
        verdict = ""
        if row is not base and deviation:
            gain = base["steps"]["4"]["frechet"] - figures["4"]["frechet"]
            verdict = "tie" if abs(gain) < 2 * deviation["4"] else "better" if gain > 0 else "worse"
        changes = in_words(row["settings"]) or "(the base)"
        cells.append(
            [row["name"], changes, " ".join(f"{figures[k]['guidance_scale']:g}" for k in map(str, ABLATION_STEPS))]
            + [f"{figures[k]['frechet']:.2f}" for k in map(str, ABLATION_STEPS)]
            + [verdict, f"{100 * figures['4']['shape_and_colour']:.1f}"]
            + [f"{error:.3f}" if (error := row.get("ode", {}).get(k)) is not None else "" for k in ("1", "4")]
        )
    heads = ["name", "what is set", "guidance", *map(str, ABLATION_STEPS), "at 4", "shape and colour at 4, %"]
    heads += ["ODE error at 1", "ODE error at 4"]
    return markdown(cells, heads)


def training_spread(figures: Figures, name: str) -> dict[str, float]:
    """Standard deviation of the distance over training seeds, by steps; nothing from fewer than three."""
    runs = [figures[n] for n in (name, f"{name}-seed1", f"{name}-seed2") if n in figures]
    if len(runs) < 3:
        return {}
    return {k: statistics.stdev(run["steps"][k]["frechet"] for run in runs) for k in map(str, ABLATION_STEPS)}


def seeds_table(figures: Figures) -> str:
    """Objectives trained from three seeds."""
    cells = []
    for name in figures:
        deviation = training_spread(figures, name)
        if deviation:
            runs = [figures[n]["steps"] for n in (name, f"{name}-seed1", f"{name}-seed2")]
            means = {k: statistics.fmean(run[k]["frechet"] for run in runs) for k in deviation}
            cells.append([name, *(f"{means[k]:.2f} ± {deviation[k]:.2f}" for k in deviation)])
    return markdown(cells, ["name", *map(str, ABLATION_STEPS)]) if cells else "Not trained from other seeds yet."


TABLES = {  # of ablations: heading, what is in it beside the base
    "objectives": "Objectives, with and without the critic",
    "phases": "One phase without the critic",
    "direct": "Direct against consistency",
    "distance": "Distance between student and target",
    "solver": "Solver of the teacher (the base: DDIM, which is Euler's)",
    "solver steps": "Solver steps N (the base: 50)",
    "solver skip": "Points of the grid that a step of the teacher goes down (the base: 1), and all the way (direct)",
    "starts": "Jumps that begin on the teacher's own trajectories (the base: at noised pictures)",
    "rank": "Rank (the base: 32)",
    "edges": "Phase edges where the teacher's ODE bends (the base: even ones)",
    "consistency training": "Consistency training in phases",
}


def in_words(settings: Mapping[str, Any]) -> str:
    """As they are told the trainer."""
    return ", ".join(f"`{key}={value}`" for key, value in settings.items())


def ablations(figures: Figures) -> str:
    """Every table that has rows."""
    base = figures["pcm-4"]
    deviation = training_spread(figures, "pcm-4")
    parts = []
    for table, heading in TABLES.items():
        rows = [row for name, row in figures.items() if row["table"] == table and "-seed" not in name]
        if rows:
            rows = rows if base in rows else [base, *rows]
            parts.append(f"### {heading}\n\n{ablation_table(rows, base, deviation)}")
    return "\n\n".join(parts)


def times_table(found: Row) -> str:
    """The searched times beside the grid's own, on what they were searched with and on what they never saw."""
    cells = [
        [part, times, " ".join(map(str, found[key])), f"{1000 * row['frechet_distance']:.2f}", f"{100 * row['alignment']:.1f}"]
        for part, rows in found["scores"].items()
        for times, key, row in (
            ("even", "default_timesteps", rows["default"]),
            ("searched", "timesteps", rows["found"]),
        )
    ]
    return markdown(cells, ["prompts and noise", "times", "", "Frechet distance x 1000", "alignment, %"])


def searched_times(path: Path = SEARCHED) -> str:
    """The section on times that a search has found; says so if there was none."""
    if not path.is_file():
        return "Not searched yet."
    found = json.loads(path.read_text(encoding="utf-8"))
    tried, steps, count = found["choices_tried"], len(found["timesteps"]), found["count"]
    return f"""{tried} choices of {steps} times tried for "{ALONE}", by the Frechet distance of {count} pictures; then both
measured with {count} other prompts and another noise, and only that gain is to be believed. Distances of so few pictures are
larger than those above. The UNet in {precision(found)}. Made by `{found["command"]}`.

{times_table(found)}"""


VIDEO_COLUMNS = (  # of a row: heading, scale, digits
    ("motion", "motion right, %", 100, 1),
    ("alignment", "motion and scene right, %", 100, 1),
    ("frechet_distance", "Frechet distance of frames x 1000", 1000, 1),
    ("temporal_consistency", "neighbouring frames, cosine", 1, 3),
    ("flow", "flow, pixels a frame", 1, 2),
)


def video_table(report: Row) -> str:
    """The paper's fourth table in miniature: methods and steps down, what was measured of their clips across."""
    cells = [
        [
            row["method"],
            str(row["steps"]),
            *(spread(row, name, scale, digits) if name in row else "" for name, _, scale, digits in VIDEO_COLUMNS),
        ]
        for row in (*report["rows"], *report["reference"])
    ]
    return markdown(cells, ["method", "steps", *(heading for _, heading, _, _ in VIDEO_COLUMNS)])


def video_aims(report: Row) -> str:
    """Whether few steps of PCM draw the motion that is asked for more often than its rivals, and how near to the teacher."""
    found = {(row["method"], row["steps"]): row for row in report["rows"]}
    (teacher,) = report["reference"]
    lines = []
    for name, words in (("motion", "Motion"), ("alignment", "Motion and scene")):
        for adapters, which in (
            (dict.fromkeys(VIDEO_STEPS, ALONE), "one 4-phase adapter"),
            (MATCHED, "an adapter for each number of steps"),
        ):
            verdicts = []
            for steps in VIDEO_STEPS:
                ours = found[adapters[steps], steps]
                rivals = [row for (method, k), row in found.items() if k == steps and method not in MATCHED.values()]
                verdicts.append(f"at {steps} {standing(ours, rivals, name, max)}")
            lines.append(f"- {words}, {which} among all methods: {'; '.join(verdicts)}.")
        gap = 100 * (teacher[name] - found[ALONE, 4][name])
        lines.append(
            f"- {words} at 4 steps: {gap:.1f} points below the teacher's {100 * teacher[name]:.1f} % at {teacher['steps']} "
            "(the aim: within 5)."
        )
    return "\n".join(lines)


def guidance_of(config: Row) -> str:
    """With which guidance the methods of an evaluation draw, and its reference: stated, or recommended by an adapter's file."""
    said = []
    for method in (*config["methods"], config["reference"]["method"]):
        scale = method["guidance_scale"]
        if scale is None:
            scale = read_settings(Path(method["adapter"])).guidance_scale
        said.append(f"{method['name']}: {scale:g}")
    return "; ".join(said)


def clips(path: Path) -> str:
    """The section on clips, of the report of their evaluation; says so if there is none."""
    if not path.is_file():
        return "Not measured yet."
    report = json.loads(path.read_text(encoding="utf-8"))
    drawn_in = precision(report["config"])
    return f"""{report["pictures"]} clips a figure from each of {len(report["seeds"])} noises, held-out prompts, the UNet in
{drawn_in} for all. The motion is measured by following the object; distances and cosines are of single frames, flow is
Farneback's. A clip that stands still has cosine 1 and flow 0. PCM and LCM adapters are distilled on the same clips with the
same rank, updates and teacher's guidance, each with the best of three sampling guidances
([tables](../examples/shapes/adapters)). PCM's jumps begin on the teacher's trajectories; LCM's have the best of both starts.
Sampling guidance: {guidance_of(report["config"])}.

{video_table(report)}

{video_aims(report)}"""


def precisions(figures: Figures) -> str:
    """Which rows were made in float32, as processors without bfloat16 make all."""
    single = [name for name, row in figures.items() if row.get("precision") == "float32"]
    if not single:
        return "The networks were trained and measured in bfloat16."
    return (
        f"In float32, on a processor without bfloat16: {', '.join(single)}. The others, the base too, in bfloat16; what that "
        "changes is not measured."
    )


def settings_of_training(figures: Figures) -> str:
    """The section on ablations."""
    missing = [variant.name for variant in variants() if variant.name not in figures]
    left = f"\n\nNot trained yet, and so in no table: {', '.join(missing)}." if missing else ""
    deviation = training_spread(figures, "pcm-4")
    ties = (
        '"Tie": nearer to the base than twice the deviation of the base\'s three training seeds.'
        if deviation
        else "The base has not been trained from other seeds yet, so no difference is called one."
    )
    return f"""{UPDATES} updates each, half of what the shipped adapters had, and {IMAGES} pictures from one noise, so these
distances are not to be compared with those above. The base, `pcm-4`, is the configuration of the adapter that ships with
{in_words(BASE)}. Each with the best of three sampling guidances at every number of steps (in one step they ask for less of it
than in four); one-phase rows with the learning rate that the search for LCM chose. {ties}
The error away from the ODE is that of the teacher guided as in training: rows with `objective.guidance_scale=1` have an easier
one to follow, and are to be compared with each other.

{precisions(figures)}

Every row is made by `python examples/shapes/ablate.py --only NAME`, and its figures, with the settings' hash, are in
[examples/shapes/ablations](../examples/shapes/ablations).{left}

{ablations(figures)}

### Training seeds

Three seeds of training, one noise: means ± standard deviations of the Frechet distance x 1000.

{seeds_table(figures)}"""


def document(report: Row, figures: Figures, floor: float, clips_section: str) -> str:
    """docs/results.md.

    Args:
        report: of the evaluation of pictures.
        figures: of ablations.
        floor: the distance of the teacher beside itself.
        clips_section: what stands below the heading of clips.
    """
    return f"""# Results on the shapes model

Written by `make report`, the section on clips by `make report-video`; no figure is typed by hand. They are of a small model on
drawn scenes and say nothing about Stable Diffusion.

## Methods and numbers of steps

{report["pictures"]} pictures a figure from each of {len(report["seeds"])} noises: means ± standard deviations
over them (the adapters were trained once; other seeds of the 4-phase one are in [seeds_shapes.md](seeds_shapes.md), of shorter
runs further down). Held-out prompts, the UNet in {precision(report["config"])} for all.
Frechet distance x 1000, in averaged channels of the attribute classifier (which ones, and why, in
[the model card](../examples/shapes/MODEL_CARD.md)), to the teacher's pictures of the same prompts from another noise, 50 DDIM
steps at guidance 5. Its size depends on the number of pictures: the floor, of the teacher beside itself, is {floor:.2f} with
2048, and higher here. In bold the best distilled method of a column, and those less than two deviations from it. PCM and LCM
adapters are distilled on the same data with the same rank, updates and teacher's guidance, each with the best of three learning
rates and sampling guidances ([tables](../examples/shapes/adapters)). PCM's, but for the one of one phase, learn where the
teacher's own trajectories cross their edges (`objective.name=direct`, `objective.starts=teacher`), which takes more of its time
for an update; LCM's has the best of both starts, too, and of three sizes of the solver's step.

{by_steps(report["rows"], "frechet_distance", 1000, 2, min)}

Alignment: everything that the prompt names is right, in percent of the pictures.

{by_steps(report["rows"], "alignment", 100, 1, max)}

![Frechet distance over steps](results_frechet_distance.png)

What was aimed at:

{aims(report)}

![rows: PCM and LCM at 1 to 16 steps, the teacher at 50; same prompts and noise](contact_sheet.png)

With fewer steps than phases a step jumps over an edge, which no training has taught it: the direction it takes is right for
the first edge only. Hence an adapter with as many phases as steps.

## Consistency

Cosine between the classifier's embeddings of the pictures of a prompt and a noise at two numbers of steps.

{consistency_table(report)}

## Guidance

Alignment and saturation at 4 steps over the sampling guidance. An adapter of a guided teacher has its guidance in its weights;
one of an unguided teacher leaves it to the sampler. "{EXACT}" is that teacher itself, its ODE solved to the edge of each
phase in five steps, with the text and without, so that guidance acts four times instead of everywhere on the way: what there is
to learn for an adapter of four phases.

{guidance_table(report)}

## Negative prompts

How often the second of two objects is there, which the prompt asks for and the negative prompt names (4 steps, guidance 4).

{negative_table(report)}

## Away from the teacher's ODE

Root mean square of the difference from the teacher's finely solved end point of the same noise, by steps. Sampling with new
noise leaves the ODE by it, so there a single step is measured alone.

{ode_table(report)}

## {TIMES}

{searched_times()}

## {CLIPS}

{clips_section}

## {SETTINGS}

{settings_of_training(figures)}
"""


def with_sections(text: str, sections: Mapping[str, str]) -> str:
    """A document with some of its sections written anew.

    Args:
        text: the document, whose sections begin with `## ` and their heading.
        sections: heading -> what stands below it.

    Raises:
        ValueError: the document has no such section.
    """
    start, there = split_sections(text)
    missing = sections.keys() - there.keys()
    if missing:
        raise ValueError(f"The document has no section named {', '.join(sorted(missing))}; it has {', '.join(there)}.")
    return "\n\n".join([start, *(f"## {heading}\n\n{below}" for heading, below in (there | sections).items())]) + "\n"


def split_sections(text: str) -> tuple[str, dict[str, str]]:
    """What stands before a document's first section, and heading -> what stands below it."""
    start, *parts = re.split(r"(?m)^(?=## )", text)
    split = (part.removeprefix("## ").partition("\n") for part in parts)
    return start.strip(), {heading: below.strip("\n") for heading, _, below in split}


def sheet_rows(config: Any) -> dict[str, torch.Tensor]:
    """The first prompts' pictures, as the evaluation drew them."""
    rows: dict[str, torch.Tensor] = {}
    shown = [method for method in config.methods if method.name in (ALONE, "LCM")]
    wanted = [(method, steps, config.seeds[0]) for method in shown for steps in STEPS]
    wanted.append((config.reference.method, config.reference.method.steps[0], config.reference.seed))
    for method, steps, seed in wanted:
        drawn: Pictures = pictures_of(config, method, steps, seed)
        first = next(iter(drawn))[:SHOWN]
        rows[f"{method.name.split(',')[0]}, {steps} step{'s' * (steps > 1)}"] = ((first + 1) * 127.5).round().byte()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--config", type=Path, default=CONFIG, help="of the evaluation")
    parser.add_argument("--kept", action="store_true", help="write only the sections that need no new evaluation of pictures")
    args = parser.parse_args()
    document_file = args.out / "results.md"
    figures = {variant.name: found for variant in variants() if (found := figures_of(variant))}
    video_report = Path(yaml.safe_load(VIDEO_CONFIG.read_text(encoding="utf-8"))["output"]) / "report.json"
    print(f"{document_file}: {len(figures)} of {len(variants())} variants have figures in {FIGURES}")
    if args.kept:
        sections = {TIMES: searched_times(), SETTINGS: settings_of_training(figures)}
        if video_report.exists():
            sections[CLIPS] = clips(video_report)
        write_text(document_file, with_sections(document_file.read_text(encoding="utf-8"), sections))
        return
    config = parse(["--config", str(args.config)])
    report = json.loads((Path(config.output) / "report.json").read_text(encoding="utf-8"))
    config = dataclasses.replace(config, precision=report["config"]["precision"])  # which is the processor's
    with safe_open(TEACHER_STATISTICS, framework="pt") as file:
        floor = float(file.metadata()["floor"])
    save(contact_sheet(sheet_rows(config)), args.out / "contact_sheet.png")
    drawn = {path.stem: path for path in plot(report["rows"], Path(config.output))}
    (args.out / "results_frechet_distance.png").write_bytes(drawn["frechet_distance"].read_bytes())
    shown = split_sections(document_file.read_text(encoding="utf-8"))[1] if document_file.is_file() else {}
    clips_section = shown[CLIPS] if CLIPS in shown and not video_report.is_file() else clips(video_report)
    write_text(document_file, document(report, figures, floor, clips_section))


if __name__ == "__main__":
    main()

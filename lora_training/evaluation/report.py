"""What people read: a Markdown table, a plot for every metric, a grid of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tabulate import tabulate

from ..files import replaced, write_text
from ..frames import shown_frames
from .generation import side_by_side
from .metrics import METRICS
from .run import Evaluation

SECTIONS = {
    "consistency": "Consistency between numbers of steps",
    "guidance": "Guidance",
    "negative": "Negative prompts",
    "ode": "Error to the teacher's ODE",
}


def write_report(evaluation: Evaluation, report: dict[str, Any]) -> Path:
    """`report.json`, `report.md` and the pictures in it; returns the Markdown file."""
    root = evaluation.root
    evaluation.keep(report)  # first: whatever comes of pictures, figures are kept
    shown = plot(report["rows"], root)
    if evaluation.config.shown:
        shown.append(picture_grid(evaluation, root / "pictures.png"))
    write_text(root / "report.md", markdown(report, shown))
    return root / "report.md"


def markdown(report: dict[str, Any], pictures: Sequence[Path]) -> str:
    """The tables, and the pictures below them."""
    parts = [f"# {report['title']}", what_a_row_is(report), table([*report["rows"], *report["reference"]])]
    for part, heading in SECTIONS.items():
        if report[part]:
            parts += [f"## {heading}", table(report[part])]
    parts += [f"![{path.stem}]({path.name})" for path in pictures]
    return "\n\n".join(parts) + "\n"


def what_a_row_is(report: dict[str, Any]) -> str:
    """How many pictures, of how many noises."""
    seeds = report["seeds"]
    spread = f" from each of {len(seeds)} noises: means ± standard deviations over them" if len(seeds) > 1 else ""
    clips = report["config"].get("clips")
    what = f"clips of {clips['frames']} frames" if clips else "pictures"
    return f"{report['pictures']} {what} a row{spread}."


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows under the metrics' titles; the best of each number of steps in bold."""
    names = list(dict.fromkeys(name for row in rows for name in row if not name.endswith("_deviation")))
    cells = []
    for row in rows:
        line = []
        for name in names:
            value = row.get(name)
            text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
            deviation = row.get(f"{name}_deviation")
            text += f" ± {deviation:.2g}" if deviation is not None else ""
            line.append(f"**{text}**" if value is not None and is_best(name, row, rows) else text)
        cells.append(line)
    heads = [METRICS[name].title if name in METRICS else name.replace("_", " ") for name in names]
    return tabulate(cells, heads, tablefmt="github", disable_numparse=True)


def is_best(name: str, row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> bool:
    """Whether no other row of as many steps has a better figure; only where there is another."""
    if name not in METRICS or METRICS[name].better is None:
        return False
    same = [other[name] for other in rows if other.get("steps") == row.get("steps") and other.get(name) is not None]
    return len(same) > 1 and row[name] == (min(same) if METRICS[name].better == "smaller" else max(same))


def plot(rows: Sequence[dict[str, Any]], root: Path) -> list[Path]:
    """A file for every metric that changes with the steps: metric over steps, a line for each method."""
    from matplotlib.figure import Figure

    written = []
    for name, metric in METRICS.items():
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if row.get(name) is not None:
                lines.setdefault(row["method"], []).append((row["steps"], row[name]))
        if not any(len(points) > 1 for points in lines.values()):
            continue
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for method, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=method)
        axes.set_xscale("log", base=2)
        steps = sorted({step for points in lines.values() for step, _ in points})
        axes.set_xticks(steps, [str(step) for step in steps])
        if metric.better == "smaller" and min(value for points in lines.values() for _, value in points) > 0:
            axes.set_yscale("log")
        axes.set(xlabel="steps", ylabel=f"{metric.title} ({metric.unit})" if metric.unit else metric.title)
        axes.legend()
        path = root / f"{name}.png"
        with replaced(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
        written.append(path)
    return written


def picture_grid(evaluation: Evaluation, path: Path) -> Path:
    """The first prompts' pictures, or strips of a few frames of their clips, a row for every method and number of steps."""
    shown = min(evaluation.config.shown, len(evaluation.prompts))
    rows = [(method, steps) for method in evaluation.methods for steps in method.steps]
    drawn = [_first(evaluation, method, steps, shown) for method, steps in rows]
    height, width = drawn[0].shape[-2:]
    label, gap = 200, 4
    sheet = Image.new("RGB", (label + shown * (width + gap), len(rows) * (height + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, ((method, steps), pictures) in enumerate(zip(rows, drawn, strict=True)):
        pen.text((6, i * (height + gap) + height // 2), f"{method.name}, {steps} steps", fill="black")
        for j, picture in enumerate(pictures):
            pixels = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(pixels), (label + j * (width + gap), i * (height + gap)))
    with replaced(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def _first(evaluation: Evaluation, method: Any, steps: int, count: int) -> torch.Tensor:
    found: list[torch.Tensor] = []
    for batch in evaluation.pictures(method, steps, evaluation.config.seeds[0]):
        found += list(batch[: count - len(found)])
        if len(found) == count:
            break
    if evaluation.config.clips:
        found = [side_by_side(clip[shown_frames(len(clip))]) for clip in found]
    return torch.stack(found)

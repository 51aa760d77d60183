"""The same numbers as diffusers, and the cost of the sampler, in real ComfyUI: writes docs/comfyui.md.

    COMFYUI_PATH=... COMFYUI_PYTHON=... python benchmarks/comfyui.py

Needs a ComfyUI checkout and a Python with its requirements.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import diffusers
from tabulate import tabulate

sys.path.append(str(Path(__file__).parents[1] / "examples" / "comfyui"))

from comfyui_parity import CASES, DENOISE, Case, InComfyUI, InDiffusers, difference, in_comfyui

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "comfyui.md"
HEAD = """# The nodes in ComfyUI, measured

Written by `benchmarks/comfyui.py`; no figure is typed by hand. ComfyUI {comfyui} with torch {torch} against diffusers
{diffusers}, both on a CPU in float32, with the shapes models and their adapters. The figures say that the arithmetic is the
same; they say nothing about pictures of Stable Diffusion.

## The same numbers as diffusers

Same seed, same texts, eta 0. ComfyUI: its own text encoding, its own LoRA loader, PCM KSampler. diffusers: its pipelines with
`load_lora_weights` and `PCMScheduler`, and for masks a loop that does what ComfyUI does with them. "image" starts in the middle
of the schedule (denoise {denoise}), in both hosts from the same stops. The v rows read the network's answer as v, which draws
no picture but is the same arithmetic. At zero terminal SNR ComfyUI's table ends at an alpha of 2e-4, ours and diffusers' at 0.

Root mean square of the difference of the final latents, relative to that of the latents; the worse of guidance 1 and 5.

{parity}

The largest of all without zero terminal SNR: {largest:.1e}.

## The cost of the sampler

{cost}

The least of 30 runs in turn, 8 steps at 32 x 32 latents on one core, on the same sigmas. The sampler's own work is the
difference without a network: {overhead:.0f} microseconds a step, {share:.3%} of a step of this small network.

## What was run

`test_comfyui.py`, `test_comfyui_server.py` and `test_comfyui_browser.py` in `tests/integration`, with COMFYUI_PATH set: every
node in `/object_info`, every example workflow posted as it is and run from the front-end's queue button in Chromium, progress
and previews over the websocket, cancelling, refusals. {evolved}

In ComfyUI 0.8.0 too, later: `test_comfyui.py`, `test_comfyui_server.py`, `test_comfyui_words.py`, and with AnimateDiff-Evolved
1.5.7 `test_comfyui_animatediff.py`; not its front-end.

CPU only; no real Stable Diffusion weights.
"""


def parity_table(cases: Sequence[Case], differences: Sequence[float]) -> str:
    """A row for each kind of case, a column for each number of steps."""
    steps = sorted({case.steps for case in cases})
    rows: dict[tuple[str, ...], dict[int, float]] = {}
    for case, found in zip(cases, differences, strict=True):
        prediction = "v, zero-SNR" if case.zero_snr else case.prediction_type.removesuffix("_prediction")
        family = {"model": "SD1.5's shape", "model_xl": "SDXL's shape"}[case.model]
        row = rows.setdefault((family, prediction, case.kind), {})
        row[case.steps] = max(row.get(case.steps, 0.0), found)
    table = [[*key, *(f"{row[k]:.0e}" if k in row else "" for k in steps)] for key, row in rows.items()]
    return tabulate(
        table,
        ["model", "predicts", "from", *(f"{k} step{'s' * (k > 1)}" for k in steps)],
        tablefmt="github",
        disable_numparse=True,
    )


def cost_table(cost: dict[str, float]) -> str:
    rows = [[name, f"{1000 * seconds:.3f} ms"] for name, seconds in cost.items()]
    return tabulate(rows, ["sampler", "a step"], tablefmt="github", disable_numparse=True)


def evolved() -> str:
    """A sentence on AnimateDiff-Evolved, if it is beside."""
    folder = os.environ.get("COMFYUI_ANIMATEDIFF_PATH")
    if not folder:
        return ""
    project = (Path(folder) / "pyproject.toml").read_text(encoding="utf-8")
    (version,) = re.findall(r'^version = "(.+)"', project, re.MULTILINE)
    return (
        f"With AnimateDiff-Evolved {version}\nbeside it `test_comfyui_animatediff.py`: 16 frames, and 32 with context windows, "
        "on its own schedules."
    )


def page(found: InComfyUI, differences: Sequence[float]) -> str:
    ordinary = [d for case, d in zip(CASES, differences, strict=True) if not case.zero_snr]
    overhead = found.cost["PCM Sampler, no network"] - found.cost["euler, no network"]
    return HEAD.format(
        comfyui=found.version["ComfyUI"],
        torch=found.version["torch"],
        diffusers=diffusers.__version__,
        denoise=DENOISE,
        evolved=evolved(),
        parity=parity_table(CASES, differences),
        largest=max(ordinary),
        cost=cost_table(found.cost),
        overhead=1e6 * overhead,
        share=overhead / found.cost["euler"],
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if "COMFYUI_PATH" not in os.environ:
        raise SystemExit("Set COMFYUI_PATH to a ComfyUI checkout, and COMFYUI_PYTHON to a Python with its requirements.")
    found = in_comfyui(CASES, ROOT)
    draws = InDiffusers()
    differences = [difference(draws.draw(case), latents) for case, latents in zip(CASES, found.latents, strict=True)]
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(page(found, differences), encoding="utf-8")
    temporary.replace(PAGE)
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

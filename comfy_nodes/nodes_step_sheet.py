"""PCM Step Sheet: one run, and a sheet of what each number of steps draws, beside ComfyUI's own samplers if wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image, ImageDraw, ImageFont

from .face import HIDDEN, finite_advice, sampling_advice, say
from .inputs import (
    CATEGORY,
    PhaseNode,
    cfg_input,
    chosen_grid,
    eta_input,
    model_input,
    phase_inputs,
    prompt_inputs,
    seed_input,
)
from .sampling import pcm_sampler, phased_sigmas, sample_latent

MOST = 500


@dataclass(frozen=True)
class Row:
    """A row of the sheet: PCM, or a sampler and a scheduler of ComfyUI's drop-downs."""

    sampler: str | None = None
    scheduler: str | None = None

    @property
    def name(self) -> str:
        return "PCM" if self.sampler is None else f"{self.sampler}, {self.scheduler}"


def read_steps(text: str) -> list[int]:
    """Numbers of steps from text such as `1, 2, 4, 8`.

    Raises:
        ValueError: no numbers, or numbers out of range.
    """
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isdecimal() and 1 <= int(part) <= MOST for part in parts):
        raise ValueError(f"step_counts are whole numbers from 1 to {MOST} such as 1, 2, 4, 8; got {text!r}.")
    return [int(part) for part in parts]


def read_rows(text: str) -> list[Row]:
    """PCM, and a row for each line such as `euler simple`.

    Raises:
        ValueError: a line that does not name a sampler and a scheduler that ComfyUI has.
    """
    rows = [Row()]
    for line in filter(str.strip, text.splitlines()):
        names = line.replace(",", " ").split()
        if len(names) != 2 or names[0] not in comfy.samplers.SAMPLER_NAMES or names[1] not in comfy.samplers.SCHEDULER_NAMES:
            raise ValueError(
                f"compare_with has a sampler and a scheduler of ComfyUI's on each line, such as 'euler simple'; got {line!r}. "
                f"Schedulers: {', '.join(comfy.samplers.SCHEDULER_NAMES)}."
            )
        rows.append(Row(*names))
    return rows


def contact_sheet(pictures: Sequence[Sequence[torch.Tensor]], rows: Sequence[str], columns: Sequence[str]) -> torch.Tensor:
    """Labelled pictures, (1, H, W, 3) in [0, 1].

    Args:
        pictures: rows of pictures (H, W, 3) in [0, 1], all of one size.
        rows, columns: labels.
    """
    height, width = pictures[0][0].shape[:2]
    text = max(12, height // 16)
    font = ImageFont.load_default(text)
    gap = text // 2
    left = max(round(font.getlength(name)) for name in rows) + 2 * gap
    top = text + 2 * gap
    sheet = Image.new("RGB", (left + len(columns) * (width + gap), top + len(rows) * (height + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for j, name in enumerate(columns):
        pen.text((left + j * (width + gap) + width / 2, top / 2), name, "black", font, anchor="mm")
    for i, (name, row) in enumerate(zip(rows, pictures, strict=True)):
        pen.text((gap, top + i * (height + gap) + height / 2), name, "black", font, anchor="lm")
        for j, picture in enumerate(row):
            pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
            sheet.paste(Image.fromarray(pixels), (left + j * (width + gap), top + i * (height + gap)))
    return torch.from_numpy(np.array(sheet)).float().div(255)[None]


class PCMStepSheet(PhaseNode, io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCMStepSheet",
            display_name="PCM Step Sheet",
            category=CATEGORY,
            description="Draw the same picture with several numbers of steps, on one labelled sheet.",
            inputs=[
                model_input(),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                *prompt_inputs(),
                io.Latent.Input("latent_image", tooltip="An empty latent, of which the first picture is drawn."),
                seed_input("Of the initial noise, the same for every picture."),
                io.String.Input("step_counts", default="1, 2, 4, 8, 16", tooltip="Numbers of steps, a column each."),
                cfg_input(),
                eta_input(),
                io.String.Input(
                    "compare_with",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Rows beside PCM: a sampler and a scheduler of ComfyUI's on each line, such as: euler simple",
                ),
                *phase_inputs(),
            ],
            outputs=[
                io.Image.Output("sheet", display_name="sheet", tooltip="The labelled sheet."),
                io.Image.Output("images", display_name="images", tooltip="The pictures alone, row by row."),
            ],
            hidden=[*HIDDEN],  # to which ComfyUI adds what an output node needs
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls,
        step_counts: str | None = None,
        compare_with: str | None = None,
        settings: Any = "none",
        num_phases: int | None = 4,
        num_solver_steps: int | None = 50,
    ) -> bool | str:
        """As of every `PhaseNode`, and the two texts.

        Raises:
            ValueError: what is wrong. ComfyUI shows it once; what is returned it shows for every input that is named here.
        """
        read_steps(step_counts) if step_counts is not None else None
        read_rows(compare_with) if compare_with is not None else None
        fits = super().validate_inputs(settings, num_phases, num_solver_steps)
        if fits is not True:
            raise ValueError(fits)
        return fits

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: Any,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        seed: int,
        step_counts: str,
        cfg: float,
        eta: float,
        compare_with: str = "",
        settings: Any = None,
        num_phases: int = 4,
        num_solver_steps: int = 50,
    ) -> io.NodeOutput:
        grid = chosen_grid(settings, num_phases, num_solver_steps)
        counts, rows = read_steps(step_counts), read_rows(compare_with)
        if max(counts) > grid.num_solver_steps:
            raise ValueError(f"step_counts go to {max(counts)}, and the adapter's grid has {grid.num_solver_steps} points.")
        latent = latent_image | {"samples": latent_image["samples"][:1]}
        if latent.get("batch_index") is not None:
            latent["batch_index"] = latent["batch_index"][:1]
        # One bar over the whole sheet. No previews: the front-end would show the last of them instead of the sheet.
        bar = comfy.utils.ProgressBar(len(rows) * sum(counts))
        pictures: list[list[torch.Tensor]] = []
        finite, unscheduled = True, []
        for row in rows:
            pictures.append([])
            for steps in counts:
                if row.sampler is None:
                    sampler, sigmas = pcm_sampler(eta), phased_sigmas(model, grid, steps)
                else:
                    sampler = comfy.samplers.sampler_object(row.sampler)
                    stock = comfy.samplers.KSampler(model, steps, model.load_device, row.sampler, row.scheduler)
                    sigmas = stock.sigmas  # some samplers leave one out
                if not sigmas.isfinite().all():  # kl_optimal's of 1 step
                    unscheduled.append(f"{row.name} at {steps}")
                    bar.update(steps)
                    pictures[-1].append(torch.zeros_like(pictures[0][0]))
                    continue
                drawn = sample_latent(
                    model, seed, cfg, sampler, sigmas, positive, negative, latent, callback=lambda *_: bar.update(1)
                )
                finite &= bool(drawn["samples"].isfinite().all())
                pictures[-1].append(vae.decode(drawn["samples"])[0, ..., :3])
        columns = [f"{steps} step{'s' * (steps > 1)}" for steps in counts]
        sheet = contact_sheet(pictures, [row.name for row in rows], columns)
        every = torch.stack([picture for row in pictures for picture in row])
        said = [f"PCM: {grid.num_phases} phases on {grid.num_solver_steps} points"]
        if unscheduled:
            said.append(
                f"Left black, for ComfyUI's scheduler gives numbers that are not finite: {'; '.join(unscheduled)}. Choose "
                "another scheduler or other step_counts."
            )
        said += finite_advice(finite) + sampling_advice(cls, model, grid, cfg, eta, settings)
        return io.NodeOutput(sheet, every, ui=ui.PreviewImage(sheet, cls=cls).as_dict() | say(cls, *said).as_dict())

"""The adapter file: put it into a model, and read how it wants to be sampled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..pcm_scheduler.lora_file import (
    SOLVER_STEPS,
    AdapterSettings,
    read_lora_tensors,
    read_settings,
    with_overrides,
)
from ..pcm_scheduler.lora_layouts import PEFT_CONFIG
from .advice import EVOLVED_SCHEDULES
from .face import HIDDEN, say
from .inputs import CATEGORY, Settings
from .lora import with_lora
from .sampling import is_sdxl


def recommended(settings: AdapterSettings) -> tuple[int, float, float]:
    """Steps, cfg and eta. diffusers leaves guidance out at 1 and below, ComfyUI at 1 alone."""
    return settings.num_inference_steps, max(1.0, settings.guidance_scale), settings.eta


def in_words(settings: AdapterSettings, stated: AdapterSettings | None) -> str:
    """For the node's face.

    Args:
        settings: of a file, with what the node overrides.
        stated: of the file alone; None if it says nothing of itself.
    """
    grid = settings.grid
    source = "phases as this node says"
    if stated == settings:
        source = f"{settings.base_model}, " + ("guessed from its name or hash" if settings.inferred else "as the file says")
    steps, cfg, eta = recommended(settings)
    betas = settings.beta_schedule
    return (
        f"{grid.num_phases} phases, {steps} steps, cfg {cfg:g}, eta {eta:g}\n({source})\n"
        f"edges {', '.join(map(str, grid.edges))} of {grid.num_solver_steps} points; predicts {settings.prediction_type}"
        + (f"\ntrained on {betas} betas, which AnimateDiff-Evolved calls {EVOLVED_SCHEDULES[betas]}" if betas else "")
    )


ENDINGS = (".safetensors", ".sft")


def file_inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "lora_name",
            options=[name for name in folder_paths.get_filename_list("loras") if name.lower().endswith(ENDINGS)],
            tooltip="A .safetensors file in models/loras.",
        )
    ]


def overrides() -> list[Any]:
    told = "0: as the file says. Anything else overrides it; needed for files that say nothing."
    return [
        io.Int.Input("num_phases", default=0, min=0, max=500, optional=True, tooltip=told),
        io.Int.Input(
            "num_solver_steps",
            default=0,
            min=0,
            max=500,
            optional=True,
            tooltip=f"{told} 50 for SD1.5, 40 for SDXL.",
        ),
    ]


def settings_outputs() -> list[Any]:
    return [
        Settings.Output("settings", display_name="settings", tooltip="For PCM Scheduler, PCM KSampler and the editing nodes."),
        io.Int.Output("steps", display_name="steps", tooltip="Recommended number of steps."),
        io.Float.Output("cfg", display_name="cfg", tooltip="Recommended guidance. At 1 a negative prompt has no effect."),
        io.Float.Output("eta", display_name="eta", tooltip="Recommended eta."),
    ]


def settings_of(
    lora_name: str, num_phases: int, num_solver_steps: int, family: str = "sd15"
) -> tuple[str, AdapterSettings, AdapterSettings | None]:
    """The path of a file in models/loras, its settings, and those that it states.

    Args:
        lora_name, num_phases, num_solver_steps: of the node.
        family: of the model, as far as it is known: its usual grid is taken when neither file nor node says one.

    Raises:
        ValueError: the file says nothing of its phases and neither does the node.
    """
    path = folder_paths.get_full_path_or_raise("loras", lora_name)
    stated = read_settings(path)
    if stated is None and not num_phases:
        raise ValueError(
            f"{lora_name} does not say how it was trained: it has no header of ours and is none of the published files. Set "
            f"num_phases, and num_solver_steps if it is not {SOLVER_STEPS[family]}."
        )
    if stated is None:
        num_solver_steps = num_solver_steps or SOLVER_STEPS[family]
    given = {"num_phases": num_phases or None, "num_solver_steps": num_solver_steps or None}
    steps = steps_for(stated, num_phases, num_solver_steps)
    return path, with_overrides(stated, **given, num_inference_steps=steps), stated


def steps_for(stated: AdapterSettings | None, num_phases: int, num_solver_steps: int) -> int:
    """The steps to recommend: the file's, or one for each phase that the node states; no more than the grid has points.

    Args:
        stated: of the file.
        num_phases, num_solver_steps: of the node; 0: as the file says, if it says something.
    """
    if stated is not None:
        return min(stated.num_inference_steps, num_solver_steps or stated.num_solver_steps)
    return min(num_phases if num_phases > 1 else 4, num_solver_steps)


class FileNode:
    """Of a node that reads a file in models/loras."""

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None) -> bool | str:
        if lora_name is not None and folder_paths.get_full_path("loras", lora_name) is None:
            return f"There is no {lora_name} in models/loras. Choose another file, or put it there and refresh."
        return True

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: Any) -> tuple[int, ...]:
        """Another file of the same name is read anew, or another configuration of PEFT's beside it.

        ComfyUI passes None for a name that another node will give.
        """
        path = folder_paths.get_full_path("loras", lora_name) if lora_name is not None else None
        if path is None:
            return 0, 0
        found = [os.stat(file) for file in (path, Path(path).with_name(PEFT_CONFIG)) if os.path.isfile(file)]
        return tuple(number for file in found for number in (file.st_mtime_ns, file.st_size))


class PCMLoraLoader(FileNode, io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCMLoraLoader",
            display_name="PCM LoRA Loader",
            category=CATEGORY,
            description="Load a phased consistency LoRA and read from it how it wants to be sampled.",
            inputs=[
                io.Model.Input("model", tooltip="What the adapter is put into. Other LoRAs may come before or after."),
                *file_inputs(),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="1 is what the adapter was trained at.",
                ),
                *overrides(),
            ],
            outputs=[
                io.Model.Output("adapted", display_name="model", tooltip="The model with the adapter."),
                *settings_outputs(),
            ],
            hidden=HIDDEN,
        )

    @classmethod
    def execute(
        cls, model: Any, lora_name: str, strength_model: float, num_phases: int = 0, num_solver_steps: int = 0
    ) -> io.NodeOutput:
        family = "sdxl" if is_sdxl(model) else "sd15"
        path, settings, stated = settings_of(lora_name, num_phases, num_solver_steps, family)
        said = [in_words(settings, stated)]
        if stated is None and not num_solver_steps and family == "sdxl":
            said.append(
                f"The file says nothing and the model is SDXL, so {settings.num_solver_steps} points are taken. If it was "
                "trained on another number, set num_solver_steps."
            )
        if strength_model:
            stated_family = settings.base_model if stated else None
            model, more = with_lora(model, *read_lora_tensors(path), strength_model, stated_family)
            said += more
        return io.NodeOutput(model, settings, *recommended(settings), ui=say(cls, *said))


class PCMLoraSettings(FileNode, io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCMLoraSettings",
            display_name="PCM LoRA Settings",
            category=CATEGORY,
            description="Read from a LoRA file how it wants to be sampled, when ComfyUI's own loader puts it into the model.",
            inputs=[*file_inputs(), *overrides()],
            outputs=settings_outputs(),
            hidden=HIDDEN,
        )

    @classmethod
    def execute(cls, lora_name: str, num_phases: int = 0, num_solver_steps: int = 0) -> io.NodeOutput:
        _, settings, stated = settings_of(lora_name, num_phases, num_solver_steps)
        return io.NodeOutput(settings, *recommended(settings), ui=say(cls, in_words(settings, stated)))

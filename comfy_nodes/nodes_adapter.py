"""The adapter file: put it into a model, and read how it wants to be sampled."""

from __future__ import annotations

import os
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.sd
import comfy.supported_models
import folder_paths
from comfy_api.latest import io

from ..pcm_scheduler.lora_file import AdapterSettings, read_settings, read_tensors, with_overrides
from .face import HIDDEN, say
from .inputs import CATEGORY, Settings

FAMILIES = {
    "sd15": comfy.supported_models.SD15,
    "sdxl": comfy.supported_models.SDXL,
    "animatediff": comfy.supported_models.SD15,  # spatial layers; motion modules are in a file of their own
}


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
    wanted = f"{settings.num_inference_steps} steps, cfg {settings.guidance_scale:g}, eta {settings.eta:g}"
    return (
        f"{grid.num_phases} phases, {wanted}\n({source})\n"
        f"edges {', '.join(map(str, grid.edges))} of {grid.num_solver_steps} points; predicts {settings.prediction_type}"
        + (f"\ntrained on {settings.beta_schedule} betas" if settings.beta_schedule else "")
        + (", which AnimateDiff-Evolved calls sqrt_linear (AnimateDiff)" if settings.beta_schedule == "linear" else "")
    )


def file_inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "lora_name",
            options=[name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors")],
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


def settings_of(lora_name: str, num_phases: int, num_solver_steps: int) -> tuple[str, AdapterSettings, AdapterSettings | None]:
    """The path of a file in models/loras, its settings, and those that it states.

    Raises:
        ValueError: the file says nothing of its phases and neither does the node.
    """
    path = folder_paths.get_full_path_or_raise("loras", lora_name)
    stated = read_settings(path)
    if stated is None and not num_phases:
        raise ValueError(
            f"{lora_name} does not say how it was trained: it has no header of ours and is none of the published files. Set "
            "num_phases, and num_solver_steps if it is not 50."
        )
    settings = with_overrides(stated, num_phases=num_phases or None, num_solver_steps=num_solver_steps or None)
    return path, settings, stated


class FileNode(io.ComfyNode):
    """A node that reads a file in models/loras."""

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None) -> bool | str:
        if lora_name is not None and folder_paths.get_full_path("loras", lora_name) is None:
            return f"There is no {lora_name} in models/loras. Choose another file, or put it there and refresh."
        return True

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_: Any) -> tuple[int, int]:
        """Another file of the same name is read anew."""
        found = os.stat(folder_paths.get_full_path_or_raise("loras", lora_name))
        return found.st_mtime_ns, found.st_size


class PCMLoraLoader(FileNode):
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
        path, settings, stated = settings_of(lora_name, num_phases, num_solver_steps)
        if strength_model:
            model = with_lora(model, read_tensors(path)[0], strength_model, settings.base_model if stated else None)
        recommended = (settings.num_inference_steps, settings.guidance_scale, settings.eta)
        return io.NodeOutput(model, settings, *recommended, ui=say(cls, in_words(settings, stated)))


def with_lora(model: Any, tensors: dict[str, Any], strength: float, family: str | None) -> Any:
    """The model with a LoRA in it.

    Args:
        model: a MODEL.
        tensors: of the file.
        strength: 1 is what it was trained at.
        family: for which the file says it is, of `FAMILIES`; None if it does not say.

    Raises:
        ValueError: a file for another kind of model. Many of the modules' names are the same, and ComfyUI would only log those
            that do not fit.
    """
    config = model.model.model_config
    others = tuple(kind for kind in FAMILIES.values() if kind is not FAMILIES.get(family))
    if family in FAMILIES and isinstance(config, others):
        raise ValueError(f"This adapter is for {family}, and the model is {type(config).__name__}: load the other file.")
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    if not comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), names, log_missing=False):
        raise ValueError(f"Nothing in this file fits the model, which is {type(config).__name__}: is it a LoRA of a UNet?")
    return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0]


class PCMLoraSettings(FileNode):
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
        recommended = (settings.num_inference_steps, settings.guidance_scale, settings.eta)
        return io.NodeOutput(settings, *recommended, ui=say(cls, in_words(settings, stated)))

"""The adapter file: put it into a model, and read how it wants to be sampled."""

from __future__ import annotations

from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.sd
import folder_paths
from comfy_api.latest import io, ui

from ..pcm_scheduler.lora_file import AdapterSettings, read_settings, read_tensors, with_overrides
from .inputs import CATEGORY, Settings


def in_words(settings: AdapterSettings) -> str:
    """For the node's face."""
    grid = settings.grid
    source = "inferred from the file's name or hash" if settings.inferred else "stated in the file"
    return (
        f"{settings.base_model}, predicts {settings.prediction_type} ({source})\n"
        f"{grid.num_phases} phases: {', '.join(map(str, grid.edges))}; {grid.num_solver_steps} solver steps\n"
        f"recommended: {settings.num_inference_steps} steps, cfg {settings.guidance_scale:g}, eta {settings.eta:g}"
    )


def file_inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "lora_name",
            options=[name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors")],
            tooltip="A .safetensors file in models/loras.",
        )
    ]


def phases_override() -> Any:
    return io.Int.Input(
        "num_phases",
        default=0,
        min=0,
        max=100,
        optional=True,
        tooltip="0: as the file says. Anything else overrides it; needed for files that say nothing.",
    )


def settings_outputs() -> list[Any]:
    return [
        Settings.Output("settings", display_name="settings", tooltip="For PCM Scheduler, PCM KSampler and the editing nodes."),
        io.Int.Output("steps", display_name="steps", tooltip="Recommended number of steps."),
        io.Float.Output("cfg", display_name="cfg", tooltip="Recommended guidance. At 1 a negative prompt has no effect."),
        io.Float.Output("eta", display_name="eta", tooltip="Recommended eta."),
    ]


def settings_of(lora_name: str, num_phases: int) -> tuple[str, AdapterSettings]:
    """The path and the settings of a file in models/loras.

    Raises:
        ValueError: the file says nothing of its phases and neither does the node.
    """
    path = folder_paths.get_full_path_or_raise("loras", lora_name)
    return path, with_overrides(read_settings(path), num_phases=num_phases or None)


class PCMLoraLoader(io.ComfyNode):
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
                phases_override(),
            ],
            outputs=[
                io.Model.Output("adapted", display_name="model", tooltip="The model with the adapter."),
                *settings_outputs(),
            ],
        )

    @classmethod
    def execute(cls, model: Any, lora_name: str, strength_model: float, num_phases: int = 0) -> io.NodeOutput:
        path, settings = settings_of(lora_name, num_phases)
        if strength_model:
            model = with_lora(model, read_tensors(path)[0], strength_model, settings)
        recommended = (settings.num_inference_steps, settings.guidance_scale, settings.eta)
        return io.NodeOutput(model, settings, *recommended, ui=ui.PreviewText(in_words(settings)))


def with_lora(model: Any, tensors: dict[str, Any], strength: float, settings: AdapterSettings) -> Any:
    """The model with a LoRA in it.

    Raises:
        ValueError: a file for another kind of model, of which nothing fits.
    """
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    if not comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), names, log_missing=False):
        family = type(model.model.model_config).__name__
        raise ValueError(
            f"Nothing in this file fits the model: the adapter is for {settings.base_model}, the model is {family}."
        )
    return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0]


class PCMLoraSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCMLoraSettings",
            display_name="PCM LoRA Settings",
            category=CATEGORY,
            description="Read from a LoRA file how it wants to be sampled, when ComfyUI's own loader puts it into the model.",
            inputs=[*file_inputs(), phases_override()],
            outputs=settings_outputs(),
        )

    @classmethod
    def execute(cls, lora_name: str, num_phases: int = 0) -> io.NodeOutput:
        _, settings = settings_of(lora_name, num_phases)
        recommended = (settings.num_inference_steps, settings.guidance_scale, settings.eta)
        return io.NodeOutput(settings, *recommended, ui=ui.PreviewText(in_words(settings)))

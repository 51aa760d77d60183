"""The example workflows as they are wired, in the form that ComfyUI's API takes; `write_workflows.py` writes the files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Graph = dict[str, dict[str, Any]]

SD15, SDXL = "v1-5-pruned-emaonly-fp16.safetensors", "sd_xl_base_1.0.safetensors"
LORA = {SD15: "pcm_sd15_smallcfg_4step_converted.safetensors", SDXL: "pcm_sdxl_smallcfg_4step_converted.safetensors"}
MOTION_LORA = "pcm_animatediff_4phase_motion.safetensors"


@dataclass
class Node:
    """A node of a graph; `node[i]` is a link from its output i."""

    id: str

    def __getitem__(self, output: int) -> list[Any]:
        return [self.id, output]


class Builder:
    """Adds nodes to a graph."""

    def __init__(self) -> None:
        self.graph: Graph = {}

    def add(self, class_type: str, **inputs: Any) -> Node:
        node = Node(str(len(self.graph) + 1))
        self.graph[node.id] = {"class_type": class_type, "inputs": inputs}
        return node


@dataclass
class Loaded:
    """What every workflow begins with."""

    base: Node
    adapter: Node
    positive: Node
    negative: Node

    @property
    def common(self) -> dict[str, Any]:
        """Inputs of a sampling node."""
        return {
            "model": self.adapter[0],
            "settings": self.adapter[1],
            "positive": self.positive[0],
            "negative": self.negative[0],
        }

    @property
    def vae(self) -> list[Any]:
        return self.base[2]


def load(g: Builder, prompt: str, checkpoint: str = SD15) -> Loaded:
    base = g.add("CheckpointLoaderSimple", ckpt_name=checkpoint)
    file = {"lora_name": LORA[checkpoint], "num_phases": 0, "num_solver_steps": 0}
    adapter = g.add("PCMLoraLoader", model=base[0], **file, strength_model=1.0)
    positive = g.add("CLIPTextEncode", clip=base[1], text=prompt)
    negative = g.add("CLIPTextEncode", clip=base[1], text="")
    return Loaded(base, adapter, positive, negative)


def save(g: Builder, image: list[Any], name: str) -> None:
    g.add("SaveImage", images=image, filename_prefix=name)


def sampled(**changes: Any) -> dict[str, Any]:
    """Widgets of a sampling node."""
    return {"seed": 1, "steps": 4, "cfg": 1.0, "eta": 0.0, "num_phases": 4, "num_solver_steps": 50} | changes


def text_to_image(g: Builder, checkpoint: str = SD15, side: int = 512) -> None:
    loaded = load(g, "a lighthouse on a cliff in a storm, oil painting", checkpoint)
    empty = g.add("EmptyLatentImage", width=side, height=side, batch_size=1)
    drawn = g.add("PCMKSampler", **loaded.common, **sampled(), latent_image=empty[0], denoise=1.0)
    save(g, g.add("VAEDecode", samples=drawn[0], vae=loaded.vae)[0], "pcm")


def text_to_image_sdxl(g: Builder) -> None:
    text_to_image(g, SDXL, 1024)


def image_to_image(g: Builder) -> None:
    loaded = load(g, "a watercolour of the same scene")
    image = g.add("LoadImage", image="example.png")
    latent = g.add("VAEEncode", pixels=image[0], vae=loaded.vae)
    drawn = g.add("PCMKSampler", **loaded.common, **sampled(), latent_image=latent[0], denoise=0.6)
    save(g, g.add("VAEDecode", samples=drawn[0], vae=loaded.vae)[0], "pcm_image_to_image")


def masked_latent(g: Builder) -> None:
    """A mask in ComfyUI's own way, in latents, and the adapter in its own loader: PCM LoRA Settings reads the file."""
    loaded = load(g, "a bunch of red tulips")
    file = {name: g.graph[loaded.adapter.id]["inputs"].pop(name) for name in ("num_phases", "num_solver_steps")}
    g.graph[loaded.adapter.id]["class_type"] = "LoraLoaderModelOnly"
    settings = g.add("PCMLoraSettings", lora_name=LORA[SD15], **file)
    image = g.add("LoadImage", image="example.png")
    latent = g.add("VAEEncode", pixels=image[0], vae=loaded.vae)
    masked = g.add("SetLatentNoiseMask", samples=latent[0], mask=square(g, loaded))
    common = loaded.common | {"settings": settings[0]}
    drawn = g.add("PCMKSampler", **common, **sampled(), latent_image=masked[0], denoise=1.0)
    save(g, g.add("VAEDecode", samples=drawn[0], vae=loaded.vae)[0], "pcm_masked")


def two_passes(g: Builder) -> None:
    """PCM Scheduler and PCM Sampler with SamplerCustom: small first, then larger from the middle of the schedule."""
    loaded = load(g, "an old library with a spiral staircase")
    prompts = {"positive": loaded.positive[0], "negative": loaded.negative[0]}
    empty = g.add("EmptyLatentImage", width=512, height=512, batch_size=1)
    phases = {"settings": loaded.adapter[1], "num_phases": 4, "num_solver_steps": 50}
    sampler = g.add("PCMSampler", eta=0.0)
    first = g.add("PCMScheduler", model=loaded.adapter[0], steps=4, denoise=1.0, **phases)
    options = {"model": loaded.adapter[0], "add_noise": True, "noise_seed": 1, "cfg": 1.0, "sampler": sampler[0]} | prompts
    small = g.add("SamplerCustom", **options, sigmas=first[0], latent_image=empty[0])
    larger = g.add("LatentUpscaleBy", samples=small[0], upscale_method="bicubic", scale_by=1.5)
    second = g.add("PCMScheduler", model=loaded.adapter[0], steps=4, denoise=0.5, **phases)
    drawn = g.add("SamplerCustom", **options, sigmas=second[0], latent_image=larger[0])
    save(g, g.add("VAEDecode", samples=drawn[0], vae=loaded.vae)[0], "pcm_two_passes")


def edited(g: Builder, node: str, prompt: str, name: str, **inputs: Any) -> None:
    loaded = load(g, prompt)
    given = {key: value(g, loaded) if callable(value) else value for key, value in inputs.items()}
    result = g.add(node, **loaded.common, vae=loaded.vae, **(sampled() | given))
    save(g, result[0], name)


def picture(g: Builder, _: Loaded) -> list[Any]:
    """The picture that ComfyUI brings along, 768 x 768."""
    return g.add("LoadImage", image="example.png")[0]


def small_picture(g: Builder, loaded: Loaded) -> list[Any]:
    """Its miniature, to be enlarged."""
    return g.add("ImageScale", image=picture(g, loaded), upscale_method="area", width=128, height=128, crop="center")[0]


def square(g: Builder, _: Loaded) -> list[Any]:
    """A mask for it: a square in its middle."""
    black = g.add("SolidMask", value=0.0, width=768, height=768)
    white = g.add("SolidMask", value=1.0, width=384, height=384)
    return g.add("MaskComposite", destination=black[0], source=white[0], x=192, y=192, operation="add")[0]


def inpaint(g: Builder) -> None:
    given = {"image": picture, "mask": square, "strength": 0.8, "eta": 1.0}
    edited(g, "PCMInpaint", "a bunch of red tulips", "pcm_inpaint", **given)


def outpaint(g: Builder) -> None:
    margins = {"left": 64, "top": 0, "right": 64, "bottom": 0, "strength": 0.8, "eta": 1.0}
    edited(g, "PCMOutpaint", "a wide landscape", "pcm_outpaint", image=picture, **margins)


def colorize(g: Builder) -> None:
    given = {"image": picture, "strength": 0.6, "eta": 1.0}
    edited(g, "PCMColorize", "a colour photograph", "pcm_colorize", **given)


def super_resolve(g: Builder) -> None:
    given = {"image": small_picture, "factor": 4, "kernel": "mean", "strength": 0.6, "eta": 1.0}
    edited(g, "PCMSuperResolve", "a sharp photograph", "pcm_super_resolve", **given)


def stroke(g: Builder) -> None:
    edited(g, "PCMStroke", "a photograph of a beach", "pcm_stroke", image=picture, strength=0.6)


def denoise(g: Builder) -> None:
    edited(g, "PCMDenoise", "a photograph", "pcm_denoise", image=picture, noise_level=20.0)


def interpolate(g: Builder) -> None:
    given = {"second_seed": 2, "count": 5, "width": 512, "height": 512}
    edited(g, "PCMInterpolate", "a photograph of a mountain lake", "pcm_interpolate", **given)


def step_sheet(g: Builder) -> None:
    loaded = load(g, "a lighthouse on a cliff in a storm, oil painting")
    empty = g.add("EmptyLatentImage", width=512, height=512, batch_size=1)
    widgets = {name: value for name, value in sampled().items() if name != "steps"}
    g.add(
        "PCMStepSheet",
        **loaded.common,
        **widgets,
        vae=loaded.vae,
        latent_image=empty[0],
        step_counts="1, 2, 4, 8, 16",
        compare_with="euler simple\nlcm sgm_uniform",
    )


def animatediff(g: Builder) -> None:
    """With the nodes of AnimateDiff-Evolved: 16 frames."""
    loaded = load(g, "waves breaking on a beach")
    motion = g.add("ADE_LoadAnimateDiffModel", model_name="mm_sd_v15_v2.ckpt")
    lora = g.add("ADE_AnimateDiffLoRALoader", name=MOTION_LORA, strength=1.0)
    applied = g.add("ADE_ApplyAnimateDiffModelSimple", motion_model=motion[0], motion_lora=lora[0])
    betas = "sqrt_linear (AnimateDiff)"
    moving = g.add("ADE_UseEvolvedSampling", model=loaded.adapter[0], beta_schedule=betas, m_models=applied[0])
    empty = g.add("EmptyLatentImage", width=512, height=512, batch_size=16)
    drawn = g.add("PCMKSampler", **(loaded.common | {"model": moving[0]}), **sampled(), latent_image=empty[0], denoise=1.0)
    save(g, g.add("VAEDecode", samples=drawn[0], vae=loaded.vae)[0], "pcm_animatediff")


WORKFLOWS: dict[str, Callable[[Builder], None]] = {
    "text_to_image_sd15": text_to_image,
    "text_to_image_sdxl": text_to_image_sdxl,
    "image_to_image": image_to_image,
    "two_passes": two_passes,
    "step_sheet": step_sheet,
    "masked_latent": masked_latent,
    "inpaint": inpaint,
    "outpaint": outpaint,
    "colorize": colorize,
    "super_resolve": super_resolve,
    "stroke": stroke,
    "denoise": denoise,
    "interpolate": interpolate,
    "animatediff": animatediff,
}


_MASK = "To paint your own mask: right-click Load Image, Open in MaskEditor, and connect its MASK in place of the square's."
NOTES = {
    "text_to_image_sd15": "Four steps with a PCM LoRA. The loader reads from the file how it wants to be sampled.",
    "text_to_image_sdxl": "The same for SDXL.",
    "image_to_image": "denoise says how much is drawn anew; the steps stay on the edges of the phases.",
    "two_passes": "A small picture, then larger, from the middle of the schedule. PCM Scheduler keeps to the edges in both.",
    "step_sheet": "One run shows what each number of steps draws, beside samplers of ComfyUI's own.",
    "masked_latent": "ComfyUI's own LoRA loader and its own masking, in latents. " + _MASK,
    "inpaint": "Every pixel outside of the mask is kept. " + _MASK,
    "outpaint": "The picture continues past its edges and is itself kept, pixel for pixel.",
    "colorize": "The luminance of the picture is kept, its colours are drawn.",
    "super_resolve": "Enlarge a picture; shrunk again it is the picture, to half a grey level.",
    "stroke": "From a sketch to a picture; strength says how freely.",
    "denoise": "Take out noise of a known strength; 0 estimates it.",
    "interpolate": "From one seed to another; or between two pictures, with the model before the adapter as base_model.",
    "animatediff": "16 frames. Needs ComfyUI-AnimateDiff-Evolved and a motion module in models/animatediff_models. The motion "
    "file of a video adapter goes to models/animatediff_motion_lora and its spatial file to models/loras; without a motion "
    "file, bypass Load AnimateDiff LoRA (Ctrl+B).",
}
_FILES = (
    "Files: a checkpoint in models/checkpoints, and a PCM LoRA such as those of "
    "[wangfuyun/PCM_Weights](https://huggingface.co/wangfuyun/PCM_Weights) in models/loras."
)


def note(name: str) -> str:
    """What is said beside the graph, in Markdown."""
    return f"{NOTES[name]}\n\n{_FILES}"


def build(name: str) -> Graph:
    """The graph of a workflow, in API form."""
    g = Builder()
    WORKFLOWS[name](g)
    return g.graph


def for_shapes(graph: Graph, prompt: str, image: str) -> Graph:
    """A graph at the size of the shapes models and on a picture of theirs, for a person to look at.

    Args:
        graph: any of the examples.
        prompt: instead of its own.
        image: instead of every loaded one.
    """
    changes = {
        "CLIPTextEncode": lambda inputs: {"text": prompt if inputs["text"] else ""},
        "EmptyLatentImage": lambda _: {"width": 128, "height": 128},
        "LoadImage": lambda _: {"image": image},
        "PCMOutpaint": lambda _: {"left": 32, "right": 32},
        "PCMInterpolate": lambda _: {"width": 128, "height": 128},
        "SolidMask": lambda inputs: {side: inputs[side] // 6 for side in ("width", "height")},
        "MaskComposite": lambda _: {"x": 62, "y": 32},  # beside the middle, where the scene has something
        "ImageScale": lambda _: {"width": 32, "height": 32},
    }
    changed = {}
    for key, node in graph.items():
        change = changes.get(node["class_type"], lambda _: {})
        changed[key] = node | {"inputs": node["inputs"] | change(node["inputs"])}
    return changed

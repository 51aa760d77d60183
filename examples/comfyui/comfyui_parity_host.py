"""Run with ComfyUI's own Python by `comfyui_parity.py`: draws its cases with PCM KSampler and writes latents and times."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tests" / "integration"))
import comfyui_tiny

PACK, COMFYUI, FOLDER = (Path(argument) for argument in sys.argv[1:4])
comfyui_tiny.start(COMFYUI)

import comfy.sample
import comfy.samplers
import comfyui_version
import folder_paths
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from nodes import LoraLoaderModelOnly
from safetensors.torch import load_file, save_file

SHAPES = Path(__file__).parents[1] / "shapes"
folder_paths.add_model_folder_path("loras", str(SHAPES / "adapters"))
shapes = comfyui_tiny.load_pack(Path(__file__).parent / "shapes_pack", "shapes_pack")
ours = comfyui_tiny.load_our_nodes(PACK)
told = json.loads((FOLDER / "cases.json").read_text())
given = load_file(FOLDER / "given.safetensors")
loaded = {name: shapes.load(name) for name in told["adapters"]}


def encode(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def model_of(case):
    """With the adapter that ComfyUI's own loader puts in, and the schedule of the case."""
    model = LoraLoaderModelOnly().load_lora_model_only(loaded[case["model"]][0], told["adapters"][case["model"]], 1.0)[0]
    if case["prediction_type"] == "v_prediction":
        return ModelSamplingDiscrete().patch(model, "v_prediction", case["zero_snr"])[0]
    return model


def draw(case):
    """Latents, scaled as the network sees them."""
    model, (_, clip, _) = model_of(case), loaded[case["model"]]
    scale = model.get_model_object("latent_format").scale_factor
    settings = ours["PCMLoraSettings"].execute(told["adapters"][case["model"]])[0]
    text = case["kind"] == "text"
    latent = {"samples": torch.zeros_like(given["latents"]) if text else given["latents"] / scale}
    if case["kind"] == "mask":
        latent["noise_mask"] = given["mask"]
    denoise = told["denoise"] if case["kind"] == "image" else 1.0
    prompts = encode(clip, told["prompt"]), encode(clip, told["negative"])
    drawn = ours["PCMKSampler"].execute(
        model, told["seed"], case["steps"], case["cfg"], 0.0, *prompts, latent, denoise, settings
    )
    return drawn[0]["samples"] * scale


class Answers:
    """A model for a sampler's function that costs nothing."""

    def __call__(self, x, sigma, **_):
        return x


def seconds(function, count):
    """The least of several runs of a function."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def cost(steps=8, side=32):
    """Seconds a step, ours and euler's in turn on the same sigmas, with the network and without."""
    model, clip, _ = loaded["model"]
    sigmas = ours["PCMScheduler"].execute(model, steps, 1.0)[0]
    samplers = {"euler": comfy.samplers.ksampler("euler"), "PCM Sampler": ours["PCMSampler"].execute(0.0)[0]}
    prompt, latent = encode(clip, told["prompt"]), torch.zeros(1, 4, side, side)
    noise = comfy.sample.prepare_noise(latent, 0)
    best: dict[str, float] = {}
    for _ in range(30):
        for name, sampler in samplers.items():

            def whole(sampler=sampler):
                comfy.sample.sample_custom(model, noise, 1.0, sampler, sigmas, prompt, prompt, latent, disable_pbar=True)

            def alone(sampler=sampler):
                sampler.sampler_function(Answers(), noise, sigmas, extra_args={"seed": 0}, disable=True)

            for kind, function, count in ((name, whole, 1), (f"{name}, no network", alone, 20)):
                best[kind] = min(best.get(kind, float("inf")), seconds(function, count) / steps)
    return best


with torch.inference_mode():
    drawn = {str(i): draw(case).clone() for i, case in enumerate(told["cases"])}
    measured = cost()
save_file(drawn, FOLDER / "drawn.safetensors")
version = {"ComfyUI": comfyui_version.__version__, "torch": torch.__version__}
(FOLDER / "found.json").write_text(json.dumps({"cost": measured, "version": version}))

"""Run by `test_comfyui.py` with ComfyUI's own Python, in its own process: our nodes on a tiny random SD1.5. Prints JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from comfyui_tiny import load_our_nodes, start, tiny_lora, tiny_model, tiny_prompts

PACK, COMFYUI, LORAS = (Path(argument) for argument in sys.argv[1:4])
start(COMFYUI)

import comfy.sample
import comfy.samplers
import folder_paths
import torch
from comfy_extras.nodes_custom_sampler import SplitSigmas
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingSD3
from safetensors import safe_open
from safetensors.torch import save_file

folder_paths.add_model_folder_path("loras", str(LORAS))
ours = load_our_nodes(PACK)
model = tiny_model()
positive, negative = tiny_prompts()
empty = {"samples": torch.zeros(2, 4, 8, 8)}
found = {"nodes": sorted(ours), "by_hand": [], "euler": [], "masked": [], "refused": {}}


def by_hand(steps, cfg, sampler, denoise=1.0, latent=empty, seed=7):
    sigmas = ours["PCMScheduler"].execute(model, steps, denoise)[0]
    noise = comfy.sample.prepare_noise(latent["samples"], seed)
    return comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        sampler,
        sigmas,
        positive,
        negative,
        latent["samples"],
        noise_mask=latent.get("noise_mask"),
        seed=seed,
    )


def in_one(steps, cfg, eta=0.0, denoise=1.0, latent=empty, seed=7):
    return ours["PCMKSampler"].execute(model, seed, steps, cfg, eta, positive, negative, latent, denoise)[0]["samples"]


for steps in (1, 2, 3, 4, 8, 16):
    for cfg in (1.0, 5.0):
        for eta in (0.0, 0.5):
            sampler = ours["PCMSampler"].execute(eta)[0]
            found["by_hand"].append((in_one(steps, cfg, eta) - by_hand(steps, cfg, sampler)).abs().max().item())
        euler = by_hand(steps, cfg, comfy.samplers.ksampler("euler"))
        found["euler"].append(((in_one(steps, cfg) - euler).abs().max() / euler.abs().max()).item())
guided, unguided = in_one(4, 5.0), in_one(4, 1.0)
found["guidance_matters"] = ((guided - unguided).abs().max() / guided.abs().max()).item()

# At eta 1 a jump from sigma 10 to 5 ends at x0 and 5 times the new noise.
shown, initial = [], comfy.sample.prepare_noise(empty["samples"], 7)
jump = (ours["PCMSampler"].execute(1.0)[0], torch.tensor([10.0, 5.0]), positive, negative, empty["samples"])
end = comfy.sample.sample_custom(model, initial, 1.0, *jump, callback=lambda step, x0, *_: shown.append(x0), seed=7)
new_noise = (model.model.process_latent_in(end) - shown[0]) / 5
found["new_noise"] = [new_noise.std().item(), (new_noise - initial).std().item()]

picture = {
    "samples": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)),
    "noise_mask": torch.zeros(1, 1, 8, 8),
}
picture["noise_mask"][..., 4:] = 1
drawn = in_one(4, 1.0, latent=picture, denoise=0.7)
found["masked"] = [(drawn - picture["samples"])[..., part].abs().max().item() for part in (slice(0, 4), slice(4, 8))]
found["nothing_to_do"] = torch.equal(in_one(4, 1.0, latent=picture, denoise=0.0), picture["samples"])

sigmas = ours["PCMScheduler"].execute(model, 8, 1.0)[0]
sampler, noise = ours["PCMSampler"].execute(0.0)[0], comfy.sample.prepare_noise(empty["samples"], 7)
high, low = SplitSigmas().get_sigmas(sigmas, 3)
args = (positive, negative)
first = comfy.sample.sample_custom(model, noise, 1.0, sampler, high, *args, empty["samples"], seed=7)
second = comfy.sample.sample_custom(model, torch.zeros_like(noise), 1.0, sampler, low, *args, first, seed=7)
whole = comfy.sample.sample_custom(model, noise, 1.0, sampler, sigmas, *args, empty["samples"], seed=7)
found["split"] = ((second - whole).abs().max() / whole.abs().max()).item()

timestep = model.get_model_object("model_sampling").timestep
found["timesteps"] = {k: timestep(ours["PCMScheduler"].execute(model, k, 1.0)[0][:-1]).tolist() for k in (1, 2, 3, 4, 8)}
found["half"] = timestep(ours["PCMScheduler"].execute(model, 4, 0.5)[0][:-1]).tolist()

file = LORAS / "pcm_4phase.safetensors"
with safe_open(file, "pt") as trained:
    header = trained.metadata()
save_file(tiny_lora(model), file, metadata=header)  # what the trainer wrote of itself, over tensors of this model's shapes
loaded = ours["PCMLoraLoader"].execute(model, "pcm_4phase.safetensors", 1.0)
found["settings"] = [loaded[1].num_solver_steps, list(loaded[1].phase_edges), loaded[2], loaded[3], loaded[4]]
from_settings = ours["PCMScheduler"].execute(model, 4, 1.0, loaded[1])[0]
found["from_settings"] = torch.equal(from_settings, ours["PCMScheduler"].execute(model, 4, 1.0)[0])
found["text"] = loaded.ui.as_dict()["text"][0]

for name, patched in (
    ("lcm", ModelSamplingDiscrete().patch(model, "lcm", False)[0]),
    ("flow", ModelSamplingSD3().patch(model, 3.0)[0]),
):
    try:
        ours["PCMScheduler"].execute(patched, 4, 1.0)
    except ValueError as error:
        found["refused"][name] = str(error)
zero_snr = ModelSamplingDiscrete().patch(model, "v_prediction", True)[0]
found["zero_snr_top"] = ours["PCMScheduler"].execute(zero_snr, 4, 1.0)[0][0].item()
print("FOUND " + json.dumps(found))

"""Run by `test_comfyui_words.py` with ComfyUI's own Python: what our nodes read, refuse and say on a tiny random SD1.5.

Prints JSON.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

from comfyui_tiny import CONFIG, load_our_nodes, start, tiny_lora, tiny_model, tiny_prompts

PACK, COMFYUI, LORAS = (Path(argument) for argument in sys.argv[1:4])
start(COMFYUI)

import comfy.lora
import comfy.model_sampling
import comfy.supported_models
import execution
import folder_paths
import nodes
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

folder_paths.add_model_folder_path("loras", str(LORAS))
ours = load_our_nodes(PACK)
PACKAGE = ours["PCMLoraLoader"].__module__.split(".comfy_nodes")[0]
layouts = importlib.import_module(f"{PACKAGE}.pcm_scheduler.lora_layouts")
lora_file = importlib.import_module(f"{PACKAGE}.pcm_scheduler.lora_file")
face = importlib.import_module(f"{PACKAGE}.comfy_nodes.face")
model = tiny_model()
positive, negative = tiny_prompts()
empty = {"samples": torch.zeros(1, 4, 8, 8)}
drawn = torch.Generator().manual_seed(0)


def attempt(function, *arguments, **options):
    """What a node answers, or what it raises, as text."""
    try:
        return function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def randn(*shape):
    return torch.randn(*shape, generator=drawn) * 0.05


# ------------------------------------------------------------------------------------------------- adapter files
HEADER = lora_file.AdapterSettings("sd15", (0, 239, 499, 739, 999), 50).to_header()
UNGUIDED = lora_file.AdapterSettings("sd15", (0, 239, 499, 739, 999), 50, guidance_scale=0.0).to_header()


def write(name, tensors, header):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, LORAS / f"{name}.safetensors", metadata=header)


kohya = tiny_lora(model)
loha = {}
for key, up in kohya.items():
    if key.endswith("lora_up.weight") and up.ndim == 2:
        module, inputs = key.removesuffix(".lora_up.weight"), kohya[key.replace("lora_up", "lora_down")].shape[1]
        loha |= {f"{module}.hada_w{i}_a": randn(len(up), 4) for i in (1, 2)}
        loha |= {f"{module}.hada_w{i}_b": randn(4, inputs) for i in (1, 2)}
diffusers, metadata = layouts.to_diffusers(layouts.sort_tensors(kohya))
stated = HEADER | {layouts.METADATA_KEY: metadata}
old = {key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): tensor for key, tensor in diffusers.items()}
text_encoder = {f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{side}.weight": randn(4, 4) for side in "AB"}
wide = {
    key: randn(4, 2 * tensor.shape[1]) if key.endswith("attn2_to_k.lora_down.weight") else tensor
    for key, tensor in kohya.items()
}
write("kohya", kohya, HEADER)
write("silent", kohya, None)
write("unguided", kohya, UNGUIDED)
write("diffusers", diffusers | text_encoder, stated)
write("old", old, stated)
write("loha", loha, HEADER)
write("wide", wide, HEADER)
write("other_shapes", {key: tensor for key, tensor in wide.items() if "attn2_to_k" in key}, HEADER)
broken = "unet.mid_block.attentions.0.proj_in.lora_B.weight"
write("not_finite", diffusers | {broken: torch.full_like(diffusers[broken], torch.nan)}, stated)
(LORAS / "peft").mkdir()
peft = {key.replace("unet.", "base_model.model.", 1): tensor for key, tensor in diffusers.items()}
write("peft/adapter_model", peft, HEADER)
(LORAS / "peft" / lora_file.PEFT_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 0.5}))
write("garbled", diffusers, HEADER | {layouts.METADATA_KEY: "{"})
write("half", {key: tensor for key, tensor in diffusers.items() if key != broken}, stated)
write("no_alpha", {key: tensor for key, tensor in kohya.items() if not key.endswith("alpha")}, HEADER)
for side in ("down", "up"):
    lost = f"lora_unet_mid_block_attentions_0_proj_in.lora_{side}.weight"
    write(f"no_{side}", {key: tensor for key, tensor in kohya.items() if key != lost}, HEADER)


def loaded(name, num_phases=0, num_solver_steps=0):
    """Face, recommended values, and the latents that the adapted model draws."""
    out = ours["PCMLoraLoader"].execute(model, f"{name}.safetensors", 1.0, num_phases, num_solver_steps)
    latents = ours["PCMKSampler"].execute(out[0], 1, 4, 1.0, 0.0, positive, negative, empty, 1.0)[0]["samples"]
    return {"text": out.ui.as_dict()["text"][0], "recommended": list(out[2:5]), "latents": latents.flatten().tolist()}


names = ("kohya", "silent", "unguided", "diffusers", "old", "peft/adapter_model", "loha", "wide", "other_shapes", "garbled")
names += ("half", "no_down", "no_up", "not_finite", "no_alpha")
found = {"modules": len(kohya) // 3, "wide_modules": sum("attn2_to_k.alpha" in key for key in wide)}
found["loaded"] = {name: attempt(loaded, name, 4 if name == "silent" else 0) for name in names}
plain = ours["PCMKSampler"].execute(model, 1, 4, 1.0, 0.0, positive, negative, empty, 1.0)[0]["samples"]
found["plain"] = plain.flatten().tolist()


def settings(name, num_phases=0, num_solver_steps=0):
    out = ours["PCMLoraSettings"].execute(f"{name}.safetensors", num_phases, num_solver_steps)
    return [out[0].grid.num_phases, *out[1:]]


found["unguided_settings"] = settings("unguided")
found["steps"] = [
    attempt(settings, *given)
    for given in (("silent", 8), ("silent", 1), ("silent", 1, 2), ("silent", 2, 2), ("kohya", 2, 2), ("kohya", 8))
]
found["fingerprints"] = [
    attempt(ours[node].fingerprint_inputs, lora_name=name)
    for node in ("PCMLoraLoader", "PCMLoraSettings")
    for name in (None, "nowhere.safetensors", "kohya.safetensors")
]

by_peft = {"lora_name": "peft/adapter_model.safetensors"}
before = ours["PCMLoraLoader"].fingerprint_inputs(**by_peft)
(LORAS / "peft" / lora_file.PEFT_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 16}))
found["config_is_in_the_fingerprint"] = before != ours["PCMLoraLoader"].fingerprint_inputs(**by_peft)


# ----------------------------------------------------------------------------------------------------------- DoRA
BASE = {key: weight.clone() for key, weight in tiny_model().model.state_dict().items()}
mapped = comfy.lora.model_lora_keys_unet(model.model, {})
dora, wanted = {}, {}
for key, alpha in kohya.items():
    if key.endswith(".alpha"):
        module = key.removesuffix(".alpha")
        down, up, weight = kohya[f"{module}.lora_down.weight"], kohya[f"{module}.lora_up.weight"], BASE[mapped[module]]
        ones = (1,) * (weight.ndim - 1)
        merged = weight + 100 * alpha / len(down) * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        magnitude = weight.flatten(1).norm(dim=1) * torch.linspace(0.8, 1.2, len(weight))
        dora |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up, key: 100 * alpha}
        dora[f"{module}.dora_scale"] = magnitude.reshape(-1, *ones)
        wanted[mapped[module]] = merged * (magnitude / merged.flatten(1).norm(dim=1)).reshape(-1, *ones)  # PEFT's
pefts, pefts_alphas = layouts.to_diffusers(layouts.sort_tensors(dora))
write("dora", dora, HEADER)
write("peft_dora", pefts, {layouts.METADATA_KEY: pefts_alphas})
write("other_dora", dora, None)


def from_trained(name):
    """The largest difference of a weight of the model from PEFT's, relative to that."""
    adapted = ours["PCMLoraLoader"].execute(model, f"{name}.safetensors", 1.0, 4)[0]
    patched = {key: comfy.lora.calculate_weight(adapted.patches[key], BASE[key].clone(), key) for key in wanted}
    return max(((patched[key] - weight).norm() / weight.norm()).item() for key, weight in wanted.items())


found["dora"] = {name: attempt(from_trained, name) for name in ("dora", "peft_dora", "other_dora")}
found["dora"]["said"] = loaded("dora")["text"]  # which leaves it in the network
found["dora"]["again"] = attempt(from_trained, "dora")
narrow = tiny_model()
quantized = next(parameter for name, parameter in narrow.model.named_parameters() if name.endswith("attn1.to_q.weight"))
quantized.data = quantized.data.to(torch.float8_e4m3fn)
on_quantized = ours["PCMLoraLoader"].execute(narrow, "dora.safetensors", 1.0)
found["dora"]["quantized"] = on_quantized.ui.as_dict()["text"][0]


# ------------------------------------------------------------------------------------------------------- pictures
class BlockVAE:
    """Latents are means of 8 x 8 pixels."""

    latent_channels, latent_dim = 4, 2

    def spacial_compression_encode(self):
        return 8

    def encode(self, image):
        return F.avg_pool2d(image.movedim(-1, 1).mean(1, keepdim=True).expand(-1, 4, -1, -1), 8)

    def decode(self, latents):
        return F.interpolate(latents[:, :3], scale_factor=8).movedim(1, -1).clamp(0, 1)


COMMON = {"model": model, "vae": BlockVAE(), "positive": positive, "negative": negative, "seed": 1, "steps": 2, "cfg": 1.0}
COMMON |= {"eta": 1.0, "strength": 0.8}


def images(count):
    return (torch.rand(count, 64, 96, 3, generator=drawn) * 255).round() / 255


def masks(count):
    return F.pad(torch.ones(count, 16, 16), (16, 64, 16, 32))


def shape_of(node, **inputs):
    return list(ours[node].execute(**inputs, **COMMON)[0].shape)


found["counts"] = {
    f"{node} {n} {m}": attempt(shape_of, node, image=images(n), mask=masks(m))
    for node in ("PCMInpaint", "PCMColorize")
    for n, m in ((3, 1), (3, 3), (1, 3), (4, 2), (1, 0))
}
frames, some = images(3), masks(3)
some[1] = 0
edited = attempt(lambda: ours["PCMInpaint"].execute(image=frames, mask=some, **COMMON)[0])
found["frames"] = edited if isinstance(edited, str) else (edited - frames).abs().amax(dim=(1, 2, 3)).tolist()
found["all_black"] = attempt(shape_of, "PCMInpaint", image=frames, mask=0 * some)

sharp = torch.ones(1, 32, 32, 3)
sharp[:, 10:20, ::2] = 0
small = {kernel: attempt(shape_of, "PCMSuperResolve", image=sharp, factor=4, kernel=kernel) for kernel in ("mean", "antialias")}
smooth = torch.linspace(0.2, 0.8, 32).expand(1, 32, 32)[..., None].expand(-1, -1, -1, 3)
decoded = torch.rand(1, 64, 96, 3, generator=drawn)  # not of 8 bits
hole = masks(1)
returned = attempt(lambda: ours["PCMInpaint"].execute(image=decoded, mask=hole, **COMMON)[0])
found["decoded"] = returned if isinstance(returned, str) else (returned - decoded).abs().amax(-1)[hole == 0].max().item()
wider = attempt(lambda: ours["PCMOutpaint"].execute(image=decoded, left=8, top=0, right=0, bottom=0, **COMMON)[0])
found["outpainted"] = wider if isinstance(wider, str) else (wider[:, :, 8:] - decoded).abs().max().item()
found["as_latents_have_it"] = attempt(shape_of, "PCMInpaint", image=images(1), mask=masks(1)[None])
found["grey"] = attempt(shape_of, "PCMColorize", image=images(1)[..., :1])
found["sharp"], found["smooth"] = small, attempt(shape_of, "PCMSuperResolve", image=smooth, factor=4, kernel="antialias")


# ---------------------------------------------------------------------------------------------------------- faces
def text(out):
    return (out.ui if isinstance(out.ui, dict) else out.ui.as_dict())["text"][0]


def on_faces(adapted, cfg, **given):
    """Of the nodes that know where the steps stop."""
    sampled = ours["PCMKSampler"].execute(adapted, 1, 2, cfg, 0.0, positive, negative, empty, 1.0, **given)
    inputs = COMMON | {"model": adapted, "cfg": cfg}
    inpainted = ours["PCMInpaint"].execute(image=images(1), mask=masks(1), **inputs, **given)
    prompts = {"positive": positive, "negative": negative, "latent_image": empty}
    sheet = {"vae": BlockVAE(), "seed": 1, "step_counts": "1 2", "cfg": cfg, "eta": 0.0}
    compared = ours["PCMStepSheet"].execute(model=adapted, **sheet, **prompts, **given)
    return [text(ours["PCMScheduler"].execute(adapted, 4, 1.0, **given)), *map(text, (sampled, inpainted, compared))]


xl = tiny_model()
xl.model.model_config = comfy.supported_models.SDXL(CONFIG)
found["xl"] = {points: on_faces(xl, 1.0, num_solver_steps=points) for points in (50, 40)}
known = lora_file.AdapterSettings("sdxl", (0, 239, 499, 739, 999), 50)
found["xl"]["settings"] = on_faces(xl, 1.0, settings=known)
stated = lora_file.AdapterSettings("sd15", (0, 239, 499, 739, 999), 50)
found["xl"]["other_family"] = on_faces(xl, 1.0, settings=stated)
published = lora_file.published_settings("pcm_sd15_smallcfg_4step")
found["xl"]["published"] = on_faces(xl, 1.0, settings=published)
unread = ours["PCMLoraSettings"].execute("silent.safetensors", 4, 0)[0]
found["xl"]["silent"] = on_faces(xl, 1.0, settings=unread)
through_loader = ours["PCMLoraLoader"].execute(xl, "silent.safetensors", 1.0, 4, 0)
found["xl"]["loaded"] = [text(through_loader), *on_faces(xl, 1.0, settings=through_loader[1])]
found["xl"]["points"] = through_loader[1].num_solver_steps


found["betas"] = {
    betas: on_faces(model, 1.0, settings=dataclasses.replace(stated, beta_schedule=betas))
    for betas in ("linear", "scaled_linear")
}


class Velocity(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
    pass


velocity = model.clone()
velocity.add_object_patch("model_sampling", Velocity(model.model.model_config))
found["velocity"] = {"stated": on_faces(velocity, 1.0, settings=stated), "silent": on_faces(velocity, 1.0)}
sd2 = tiny_model()
sd2.model.model_config = comfy.supported_models.SD20(CONFIG)
found["sd2"] = attempt(ours["PCMLoraLoader"].execute, sd2, "kohya.safetensors", 1.0, 0, 0)
torn = model.clone()
torn.set_model_unet_function_wrapper(
    lambda network, given: network(given["input"], given["timestep"], **given["c"]) * torch.nan
)
found["torn"] = [attempt(on_faces, torn, 1.0) for _ in range(2)]
found["cfg"] = {cfg: on_faces(model, cfg)[1:] for cfg in (0.0, 1.0)}


def drawn_at(cfg, *prompts):
    return ours["PCMKSampler"].execute(model, 1, 2, cfg, 0.0, *prompts, empty, 1.0)[0]["samples"]


found["cfg_0_follows"] = {
    "positive": (drawn_at(0.0, positive, negative) - drawn_at(0.0, negative, negative)).abs().max().item(),
    "negative": (drawn_at(0.0, positive, negative) - drawn_at(0.0, positive, positive)).abs().max().item(),
}

unscheduled = {"compare_with": "euler simple\neuler kl_optimal", "step_counts": "1 2", "cfg": 1.0, "eta": 0.0, "seed": 1}
prompts = {"positive": positive, "negative": negative, "latent_image": empty}
sheet = ours["PCMStepSheet"].execute(model=model, vae=BlockVAE(), **prompts, **unscheduled)
found["unscheduled"] = {"text": text(sheet), "brightest": sheet[1].amax(dim=(1, 2, 3)).tolist()}


class Sources:
    """A node with an output of every kind that ours take."""

    RETURN_TYPES = ("MODEL", "VAE", "CONDITIONING", "LATENT")
    FUNCTION = "none"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {}}


nodes.NODE_CLASS_MAPPINGS |= {"Sources": Sources, "PCMStepSheet": ours["PCMStepSheet"]}


def refused(**changes):
    """(input that is marked, sentence) of every error of a graph with this step sheet, as the server answers."""
    inputs = {"model": ["1", 0], "vae": ["1", 1], "positive": ["1", 2], "negative": ["1", 2], "latent_image": ["1", 3]}
    inputs |= {"seed": 1, "step_counts": "1, 2", "cfg": 1.0, "eta": 0.0, "compare_with": "", "num_phases": 4}
    sheet = {"class_type": "PCMStepSheet", "inputs": inputs | {"num_solver_steps": 50} | changes}
    graph = {"1": {"class_type": "Sources", "inputs": {}}, "2": sheet}
    errors = asyncio.run(execution.validate_prompt("an id", graph, None))[3].get("2", {"errors": []})["errors"]
    return [[error["extra_info"].get("input_name"), error["details"]] for error in errors]


found["refused_sheets"] = {
    "fine": refused(),
    "row": refused(compare_with="eular simple"),
    "counts": refused(step_counts="two"),
    "grid": refused(num_phases=60),
}


class Progress:
    """Of a server, as far as a node's face needs one."""

    client_id = "client"

    def send_progress_text(self, words, node_id, *, sid):
        found["sent"] = [words, node_id, sid]


sys.modules["server"] = SimpleNamespace(PromptServer=SimpleNamespace(instance=Progress()))
attempt(face.say, SimpleNamespace(hidden=SimpleNamespace(unique_id="7")), "one", "two")

found["info"] = {name: node.GET_NODE_INFO_V1() for name, node in ours.items()}
print("FOUND " + json.dumps(found))

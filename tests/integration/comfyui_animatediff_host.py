"""Our nodes on AnimateDiff-Evolved's. `test_comfyui_animatediff.py` runs it with ComfyUI's own Python, in its own process.

Prints JSON. The motion modules are files of AnimateDiff's layout with random weights, loaded by AnimateDiff-Evolved's nodes.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from comfyui_tiny import load_our_nodes, load_pack, start, tiny_model, tiny_prompts

PACK, COMFYUI, ANIMATEDIFF, BASE = (Path(argument) for argument in (*sys.argv[1:4], sys.argv[5]))
VIDEO_SCALE = float(sys.argv[4])  # alpha / rank of the video adapter
start(COMFYUI, "--base-directory", str(BASE))

import comfy.sample
import comfy.samplers
import torch
from safetensors.torch import load_file, save_file

WIDTH = 32


def write_motion_module(name, middle, positions):
    """With a middle block it is a v2, without a v3, without positions an AnimateLCM. v2 and v3 know 32 positions."""
    drawn = torch.Generator().manual_seed(5)
    blocks = [(f"{way}_blocks.{i}", count) for way, count in (("down", 2), ("up", 3)) for i in range(4)]
    blocks += [("mid_block", 1)] if middle else []
    tensors = {}

    def put(name, *shape, bias=True):
        norm = len(shape) == 1
        tensors[f"{name}.weight"] = torch.randn(shape, generator=drawn) * (0.1 if norm else shape[1] ** -0.5) + norm
        if bias:
            tensors[f"{name}.bias"] = torch.randn(shape[0], generator=drawn) * 0.1

    for block, count in blocks:
        for top in (f"{block}.motion_modules.{i}.temporal_transformer" for i in range(count)):
            layer = f"{top}.transformer_blocks.0"
            for norm in (f"{top}.norm", f"{layer}.norms.0", f"{layer}.norms.1", f"{layer}.ff_norm"):
                put(norm, WIDTH)
            for i in (0, 1):
                for part in ("to_q", "to_k", "to_v"):
                    put(f"{layer}.attention_blocks.{i}.{part}", WIDTH, WIDTH, bias=False)
                put(f"{layer}.attention_blocks.{i}.to_out.0", WIDTH, WIDTH)
                if positions:
                    tensors[f"{layer}.attention_blocks.{i}.pos_encoder.pe"] = torch.randn(1, 32, WIDTH, generator=drawn)
            put(f"{layer}.ff.net.0.proj", 8 * WIDTH, WIDTH)
            put(f"{layer}.ff.net.2", WIDTH, 4 * WIDTH)
            for projection in (f"{top}.proj_in", f"{top}.proj_out"):
                put(projection, WIDTH, WIDTH)
    save_file(tensors, BASE / "models" / "animatediff_models" / name)


write_motion_module("v3.safetensors", middle=False, positions=True)
write_motion_module("v2.safetensors", middle=True, positions=True)
write_motion_module("lcm.safetensors", middle=True, positions=False)
ours = load_our_nodes(PACK)
animatediff = load_pack(ANIMATEDIFF, "AnimateDiff-Evolved")
# Its code has SD1.5's widths, 320 to 1280, written in; the tiny model's are all the same.
modules = sys.modules[f"{animatediff.__name__}.animatediff.motion_module_ad"]
FullWidth = modules.MotionModule
modules.MotionModule = lambda _, **options: FullWidth(WIDTH, **options)

model = tiny_model(
    num_res_blocks=[2] * 4,
    channel_mult=[1] * 4,
    transformer_depth=[1] * 6 + [0] * 2,
    transformer_depth_output=[1] * 9 + [0] * 3,
)
positive, negative = tiny_prompts()
calls = []


def note(_, args, kwargs):
    """What the network is asked, and for which frames when there are windows."""
    window = kwargs["transformer_options"].get("ad_params", {}).get("sub_idxs")
    calls.append({"timesteps": args[1].unique().tolist(), "batch": len(args[0]), "window": window})


model.model.diffusion_model.register_forward_pre_hook(note, with_kwargs=True)


def node(name, /, **inputs):
    """The first output of a node of AnimateDiff-Evolved, called as ComfyUI calls it."""
    found = animatediff.NODE_CLASS_MAPPINGS[name]()
    return getattr(found, found.FUNCTION)(**inputs)[0]


def animated(file="v3.safetensors", schedule="autoselect", base=model, motion_lora=None, **options):
    """A MODEL with a motion module; `options` are context options and sample settings."""
    motion = node("ADE_LoadAnimateDiffModel", model_name=file)
    motion = node("ADE_ApplyAnimateDiffModelSimple", motion_model=motion, motion_lora=motion_lora)
    return node("ADE_UseEvolvedSampling", model=base, beta_schedule=schedule, m_models=motion, **options)


def latents(frames):
    return {"samples": torch.zeros(frames, 4, 8, 8)}


def in_one(on, latent, steps=4, cfg=1.0, eta=0.0, denoise=1.0, seed=7):
    calls.clear()
    return ours["PCMKSampler"].execute(on, seed, steps, cfg, eta, positive, negative, latent, denoise)[0]["samples"]


def in_parts(on, latent, sampler, steps=4, cfg=1.0, denoise=1.0, seed=7, nudge=0.0):
    sigmas = ours["PCMScheduler"].execute(on, steps, denoise)[0]
    noise = comfy.sample.prepare_noise(latent["samples"], seed) * (1 + nudge)
    calls.clear()
    return comfy.sample.sample_custom(on, noise, cfg, sampler, sigmas, positive, negative, latent["samples"], seed=seed)


def difference(a, b):
    """The largest, relative to the largest number in b."""
    return ((a - b).abs().max() / b.abs().max()).item()


def asked():
    """Timesteps, call by call."""
    return [call["timesteps"] for call in calls]


euler = comfy.samplers.ksampler("euler")


def compared(on, frames, steps=(1, 2, 4, 8)):
    """Against the three nodes wired by hand, and against euler; and what the network is asked meanwhile.

    `rounding` is how far euler itself moves when its noise moves by a few of float32's last places.
    """
    found = {"finite": True, "by_hand": [], "euler": [], "rounding": [], "asked": {}}
    start, jump, noisy_jump = latents(frames), *(ours["PCMSampler"].execute(eta)[0] for eta in (0.0, 0.5))
    for k in steps:
        for cfg in (1.0, 5.0):
            drawn, ours_asked = in_one(on, start, k, cfg), list(calls)
            found["finite"] &= drawn.isfinite().all().item()
            found["by_hand"].append(difference(drawn, in_parts(on, start, jump, k, cfg)))
            eulers = in_parts(on, start, euler, k, cfg)
            found["euler"].append(difference(drawn, eulers))
            found["asked"][f"{k} steps, cfg {cfg:g}"] = {"ours": ours_asked, "eulers": list(calls)}
            found["rounding"].append(difference(in_parts(on, start, euler, k, cfg, nudge=2**-22), eulers))
    noisy = in_one(on, start, eta=0.5)
    found["eta_again"] = difference(in_one(on, start, eta=0.5), noisy)
    found["eta_by_hand"] = difference(in_parts(on, start, noisy_jump), noisy)
    found["eta_matters"] = difference(in_one(on, start), noisy)
    return found


def tried(on):
    """The first sigma, and the timesteps that the network is asked at; or why our nodes refuse."""
    try:
        drawn = in_one(on, latents(16))
    except ValueError as error:
        return {"refused": str(error)}
    top = ours["PCMScheduler"].execute(on, 4, 1.0)[0][0].item()
    return {"top": top, "finite": drawn.isfinite().all().item(), "asked": asked()}


still = in_one(model, latents(16))
found = {
    "schedules": {},
    "lcm": {},
    "v3": compared(animated("v3.safetensors"), 16),
    "v2": compared(animated("v2.safetensors"), 16, steps=(4,)),
}

# Windows of 16 in 32 frames, and 32 frames at once, which these modules can too.
at_once = in_one(animated(), latents(32))
for kind, options in {"StandardUniform": {"context_stride": 1}, "StandardStatic": {}}.items():
    windows = node(f"ADE_{kind}ContextOptions", context_length=16, context_overlap=4, **options)
    windowed = animated(context_options=windows)
    found[kind] = compared(windowed, 32, steps=(4,))
    found[kind]["at_once"] = difference(in_one(windowed, latents(32)), at_once)

# The table of sigmas, and the timesteps it leads to, of every schedule in the drop-down.
found["unpatched_sigmas"] = ours["PCMScheduler"].execute(model, 4, 1.0)[0].tolist()
found["sigmas"] = ours["PCMScheduler"].execute(animated(), 4, 1.0)[0].tolist()
for schedule in animatediff.NODE_CLASS_MAPPINGS["ADE_UseEvolvedSampling"].INPUT_TYPES()["required"]["beta_schedule"][0]:
    try:
        on = animated(schedule=schedule)
    except TypeError as error:
        found["schedules"][schedule] = {"cannot be built": str(error)}
        continue
    found["schedules"][schedule] = tried(on)

# AnimateLCM's modules ask for a cut schedule by themselves; another can be chosen.
for schedule in ("autoselect", "sqrt_linear (AnimateDiff)"):
    found["lcm"][schedule] = tried(animated("lcm.safetensors", schedule))

# The motion module moves something: frames hear of each other.
same_table = animated(schedule="use existing")
found["motion_matters"] = difference(in_one(same_table, latents(16)), still)
other = latents(16)
other["samples"][0] += 20  # of sigma 14.6: another beginning
found["frames_hear"] = difference(in_one(same_table, other)[9], in_one(same_table, latents(16))[9])
found["frames_deaf"] = difference(in_one(model, other)[9], still[9])

# Part of the way, a mask, and what else a latent carries.
picture = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(3))
mask = torch.zeros(16, 1, 8, 8)
mask[..., 4:] = 1
carried = {"samples": picture, "noise_mask": mask, "batch_index": list(range(16)), "frames_per_second": 8}
result = ours["PCMKSampler"].execute(animated(), 7, 4, 1.0, 0.0, positive, negative, carried, 0.7)[0]
found["keys"] = sorted(result)
found["keys_same"] = all(result[key] is carried[key] for key in carried if key != "samples")
found["masked"] = [difference(result["samples"][..., part], picture[..., part]) for part in (slice(0, 4), slice(4, 8))]
part = {"latent": {"samples": picture}, "denoise": 0.5}
found["half"] = difference(in_one(animated(), **part), in_parts(animated(), sampler=euler, **part))
found["half_asked"] = asked()

# AnimateDiff-Evolved's own noise for samplers that draw noise, here the same for all frames.
options = node("ADE_AncestralOptions", noise_type="constant", seed_offset=0)
settings = {"batch_offset": 0, "noise_type": "default", "seed_gen": "comfy", "seed_offset": 0, "ancestral_opts": options}
shared = animated(sample_settings=node("ADE_AnimateDiffSamplingSettings", **settings))


def fresh_noise(on):
    """What eta 1 adds to x0 on the way to sigma 5, over 5: how much it differs between frames."""
    seen, start, sampler = [], latents(16)["samples"], ours["PCMSampler"].execute(1.0)[0]
    noise, sigmas = comfy.sample.prepare_noise(start, 7), torch.tensor([10.0, 5.0])
    args = (positive, negative, start)
    end = comfy.sample.sample_custom(
        on, noise, 1.0, sampler, sigmas, *args, callback=lambda step, x0, *_: seen.append(x0), seed=7
    )
    return ((model.model.process_latent_in(end) - seen[0]) / 5).std(0).mean().item()


found["fresh_noise"] = {"shared": fresh_noise(shared), "own": fresh_noise(animated())}

# The adapter, before the motion module and after it.
load = ours["PCMLoraLoader"].execute
before = animated(base=load(model, "adapter.safetensors", 1.0)[0])
after = load(animated(), "adapter.safetensors", 1.0)[0]
drawn = in_one(animated(), latents(16))
found["adapter_order"] = difference(in_one(before, latents(16)), in_one(after, latents(16)))
found["adapter_matters"] = difference(in_one(after, latents(16)), drawn)

# The motion file of a video adapter, and the same added by hand to the motion module, from the file of diffusers' layout.
merged = load_file(BASE / "models" / "animatediff_models" / "v3.safetensors")
loras = BASE / "models" / "animatediff_motion_lora"
whole = load_file(loras / "video.safetensors")
for key in [key for key in whole if "motion_modules" in key and key.endswith(".lora_A.weight")]:
    name = key.removeprefix("unet.").removesuffix(".lora_A.weight")
    name = re.sub(r"\.attn([12])\.", lambda found: f".attention_blocks.{int(found[1]) - 1}.", name)
    name = name.replace(".motion_modules.0.", ".motion_modules.0.temporal_transformer.")
    down, up = whole[key].float(), whole[key.replace("lora_A", "lora_B")].float()
    merged[f"{name}.weight"] += VIDEO_SCALE * up @ down
save_file(merged, BASE / "models" / "animatediff_models" / "merged.safetensors")
motion_lora = node("ADE_AnimateDiffLoRALoader", name="video_motion.safetensors", strength=1.0)
with_lora = in_one(animated(motion_lora=motion_lora), latents(16))
found["motion_lora_by_hand"] = difference(with_lora, in_one(animated("merged.safetensors"), latents(16)))
found["motion_lora_matters"] = difference(with_lora, drawn)

# Nothing stays behind: the same graph again, the same graph built again, and the model without motion.
on = animated()
found["again"] = [difference(in_one(on, latents(16)), drawn), difference(in_one(on, latents(16)), drawn)]
found["without"] = difference(in_one(model, latents(16)), still)
print("FOUND " + json.dumps(found))

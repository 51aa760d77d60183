"""A control picture and a prompt in, a picture out.

    python examples/controlnet.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --controlnet lllyasviel/sd-controlnet-canny --adapter my_pcm_lora.safetensors \
        --control edges.png --prompt "a house by the sea"

Without --controlnet it makes a fresh one from the model's UNet. Its output is zero until it is trained: good for trying the
wiring, not for control. The command above has not been run here.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoPipelineForText2Image, ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image

from pcm_scheduler import load_pcm_lora

SHAPES = Path(__file__).parent / "shapes"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--prompt", default="a large red star in the center on a plain sky background")
parser.add_argument("--control", type=Path, help="the control picture; default: white")
parser.add_argument("--controlnet", help="hub id or folder; default: a fresh one without effect")
parser.add_argument("--conditioning-scale", type=float, default=1.0)
parser.add_argument("--model", default=str(SHAPES / "model"), help="hub id or diffusers folder, SD1.5's family")
parser.add_argument("--adapter", default=str(SHAPES / "adapters/pcm_4phase.safetensors"), help="file, folder or hub id")
parser.add_argument("--weight-name", help="the file in a folder or hub repository")
parser.add_argument("--phases", type=int, help="if the adapter does not say")
parser.add_argument("--steps", type=int, help="default: what the adapter recommends")
parser.add_argument("--guidance-scale", type=float, help="default: what the adapter recommends")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("outputs/controlnet.png"))
args = parser.parse_args()

device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
base = AutoPipelineForText2Image.from_pretrained(args.model, use_safetensors=True)
controlnet = (
    ControlNetModel.from_pretrained(args.controlnet, use_safetensors=True)
    if args.controlnet
    else ControlNetModel.from_unet(base.unet)
)
pipe = StableDiffusionControlNetPipeline(**base.components, controlnet=controlnet, requires_safety_checker=False).to(
    device, dtype
)
settings = load_pcm_lora(pipe, args.adapter, weight_name=args.weight_name, num_phases=args.phases)
side = pipe.unet.config.sample_size * pipe.vae_scale_factor
control = Image.open(args.control).convert("RGB") if args.control else Image.new("RGB", (side, side), "white")

image = pipe(
    args.prompt,
    image=control,
    controlnet_conditioning_scale=args.conditioning_scale,
    num_inference_steps=args.steps or settings.num_inference_steps,
    guidance_scale=settings.guidance_scale if args.guidance_scale is None else args.guidance_scale,
    eta=settings.eta,
    generator=torch.Generator(device).manual_seed(args.seed),
).images[0]

args.out.parent.mkdir(parents=True, exist_ok=True)
image.save(args.out)
print(f"{args.out}: {pipe.scheduler.num_inference_steps} steps at timesteps {pipe.scheduler.timesteps.tolist()}")

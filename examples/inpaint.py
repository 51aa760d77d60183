"""A picture, a mask and a prompt in; the white part of the mask is drawn anew.

    python examples/inpaint.py --image input.png --mask mask.png --prompt "a small blue ring on the right"

Without --image it draws its own input with the shapes model first and masks the right half.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoPipelineForInpainting, AutoPipelineForText2Image
from PIL import Image

from pcm_scheduler import load_pcm_lora

SHAPES = Path(__file__).parent / "shapes"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--image", type=Path)
parser.add_argument("--mask", type=Path, help="white is drawn anew, black is kept")
parser.add_argument(
    "--prompt", default="a medium red star on the left and a medium blue ring on the right on a plain sky background"
)
parser.add_argument("--model", default=str(SHAPES / "model"), help="hub id or diffusers folder")
parser.add_argument("--adapter", default=str(SHAPES / "adapters/pcm_4phase.safetensors"), help="file, folder or hub id")
parser.add_argument("--weight-name", help="the file in a folder or hub repository")
parser.add_argument("--phases", type=int, help="if the adapter does not say")
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--guidance-scale", type=float, help="default: what the adapter recommends")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("outputs/inpaint.png"))
args = parser.parse_args()
if bool(args.image) != bool(args.mask):
    parser.error("--image and --mask go together")

device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = AutoPipelineForText2Image.from_pretrained(args.model, use_safetensors=True).to(device, dtype)
settings = load_pcm_lora(pipe, args.adapter, weight_name=args.weight_name, num_phases=args.phases)
guidance_scale = settings.guidance_scale if args.guidance_scale is None else args.guidance_scale
generator = torch.Generator(device).manual_seed(args.seed)

if args.image:
    image, mask = Image.open(args.image).convert("RGB"), Image.open(args.mask).convert("L")
else:
    words = "a medium red star on the left on a plain sky background"
    image = pipe(words, num_inference_steps=4, guidance_scale=guidance_scale, generator=generator).images[0]
    mask = Image.new("L", image.size, 0)
    mask.paste(255, (image.width // 2, 0, *image.size))

pipe = AutoPipelineForInpainting.from_pipe(pipe)
painted = pipe(
    args.prompt,
    image=image,
    mask_image=mask,
    width=image.width,
    height=image.height,
    strength=1.0,
    num_inference_steps=args.steps,
    guidance_scale=guidance_scale,
    eta=settings.eta,
    generator=generator,
).images[0]
painted = pipe.image_processor.apply_overlay(mask, image, painted)  # the kept part, pixel for pixel

args.out.parent.mkdir(parents=True, exist_ok=True)
painted.save(args.out)
print(f"{args.out}: {args.steps} steps at timesteps {pipe.scheduler.timesteps.tolist()}")

"""A picture and a prompt in, a changed picture out.

    python examples/image_to_image.py --image input.png --prompt "a large red star in the center" --strength 0.8

Without --image it draws its own input with the shapes model first.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image
from PIL import Image

from pcm_scheduler import load_pcm_lora

SHAPES = Path(__file__).parent / "shapes"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--image", type=Path)
parser.add_argument("--prompt", default="a large yellow heart in the center on a plain navy background")
parser.add_argument("--strength", type=float, default=0.75, help="how much changes: a share of the steps, 0 to 1")
parser.add_argument("--model", default=str(SHAPES / "model"), help="hub id or diffusers folder")
parser.add_argument("--adapter", default=str(SHAPES / "adapters/pcm_4phase.safetensors"), help="file, folder or hub id")
parser.add_argument("--weight-name", help="the file in a folder or hub repository")
parser.add_argument("--phases", type=int, help="if the adapter does not say")
parser.add_argument("--steps", type=int, default=8, help="of the whole schedule; strength times as many are run")
parser.add_argument("--guidance-scale", type=float, help="default: what the adapter recommends")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("outputs/image_to_image.png"))
args = parser.parse_args()

device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = AutoPipelineForText2Image.from_pretrained(args.model, use_safetensors=True).to(device, dtype)
settings = load_pcm_lora(pipe, args.adapter, weight_name=args.weight_name, num_phases=args.phases)
guidance_scale = settings.guidance_scale if args.guidance_scale is None else args.guidance_scale
generator = torch.Generator(device).manual_seed(args.seed)

if args.image:
    image = Image.open(args.image).convert("RGB")
else:
    words = "a large red circle in the center on a plain sky background"
    image = pipe(words, num_inference_steps=4, guidance_scale=guidance_scale, generator=generator).images[0]

pipe = AutoPipelineForImage2Image.from_pipe(pipe)
edited = pipe(
    args.prompt,
    image=image,
    strength=args.strength,
    num_inference_steps=args.steps,
    guidance_scale=guidance_scale,
    eta=settings.eta,
    generator=generator,
).images[0]

args.out.parent.mkdir(parents=True, exist_ok=True)
edited.save(args.out)
print(f"{args.out}: the last {int(args.steps * args.strength)} of timesteps {pipe.scheduler.timesteps.tolist()}")

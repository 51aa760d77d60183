"""A prompt in, a picture out, in a few steps.

    python examples/text_to_image.py "a large red star in the center on a dotted mint background"
    python examples/text_to_image.py "a cat on a sofa" --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --adapter wangfuyun/PCM_Weights --weight-name sd15/pcm_sd15_smallcfg_4step_converted.safetensors

The second command is written from the adapter's published names; it has not been run here.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoPipelineForText2Image, StableDiffusionPipeline, StableDiffusionXLPipeline

from pcm_scheduler import load_pcm_lora

SHAPES = Path(__file__).parent / "shapes"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="?", default="a large red star on the left and a small blue ring on the right")
parser.add_argument("--negative-prompt", help="needs a guidance scale above 1")
parser.add_argument("--model", default=str(SHAPES / "model"), help="hub id, diffusers folder or .safetensors checkpoint")
parser.add_argument("--sdxl", action="store_true", help="the single-file checkpoint is SDXL")
parser.add_argument("--adapter", default=str(SHAPES / "adapters/pcm_4phase.safetensors"), help="file, folder or hub id")
parser.add_argument("--weight-name", help="the file in a folder or hub repository")
parser.add_argument("--phases", type=int, help="if the adapter does not say")
parser.add_argument("--steps", type=int, help="1 to 16; default: what the adapter recommends")
parser.add_argument("--guidance-scale", type=float, help="default: what the adapter recommends")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("outputs/text_to_image.png"))
args = parser.parse_args()

device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
if args.model.endswith(".safetensors"):
    single_file = StableDiffusionXLPipeline if args.sdxl else StableDiffusionPipeline
    pipe = single_file.from_single_file(args.model)
else:
    pipe = AutoPipelineForText2Image.from_pretrained(args.model, use_safetensors=True)
pipe.to(device, dtype)

settings = load_pcm_lora(pipe, args.adapter, weight_name=args.weight_name, num_phases=args.phases)
image = pipe(
    args.prompt,
    negative_prompt=args.negative_prompt,
    num_inference_steps=args.steps or settings.num_inference_steps,
    guidance_scale=settings.guidance_scale if args.guidance_scale is None else args.guidance_scale,
    eta=settings.eta,
    generator=torch.Generator(device).manual_seed(args.seed),
).images[0]

args.out.parent.mkdir(parents=True, exist_ok=True)
image.save(args.out)
print(f"{args.out}: {pipe.scheduler.num_inference_steps} steps at timesteps {pipe.scheduler.timesteps.tolist()}")

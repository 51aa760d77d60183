"""Edit a picture with a consistency adapter and no training for the task.

    python examples/edit.py inpaint photo.png --mask mask.png --prompt "a small blue ring on the right"
    python examples/edit.py outpaint photo.png --margins 0 64 0 64
    python examples/edit.py colorize grey.png
    python examples/edit.py super_resolve small.png --factor 4
    python examples/edit.py stroke sketch.png --strength 0.6
    python examples/edit.py denoise noisy.png --noise-level 25
    python examples/edit.py vary photo.png --amount 0.3 --count 4
    python examples/edit.py interpolate first.png --second second.png --count 5
    python examples/edit.py rewrite photo.png --source-prompt "a red star" --prompt "a blue star"

What a task measures is true of the file it writes: kept pixels, luminance, block means.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoPipelineForText2Image
from PIL import Image

from pcm_scheduler import PCMEditPipeline, load_pcm_lora

SHAPES = Path(__file__).parent / "shapes"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
tasks = ["inpaint", "outpaint", "colorize", "super_resolve", "stroke", "denoise", "vary", "interpolate", "rewrite"]
parser.add_argument("task", choices=tasks)
parser.add_argument("image", type=Path)
parser.add_argument("--mask", type=Path, help="white is drawn anew, black is kept: for inpaint, and if you like for colorize")
parser.add_argument("--margins", type=int, nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"), help="for outpaint, pixels")
parser.add_argument("--factor", type=int, default=4, help="for super_resolve")
parser.add_argument("--strength", type=float, help="for stroke: little keeps the sketch, 1 forgets it")
parser.add_argument("--noise-level", type=float, help="for denoise, in grey levels; default: estimated")
parser.add_argument("--amount", type=float, default=0.3, help="for vary: 0 draws the picture again, 1 another one")
parser.add_argument("--second", type=Path, help="for interpolate")
parser.add_argument("--count", type=int, default=4, help="pictures, for vary and interpolate")
parser.add_argument("--source-prompt", default="", help="for rewrite: what is there now")
parser.add_argument("--prompt", default="")
parser.add_argument("--negative-prompt", default="")
parser.add_argument("--model", default=str(SHAPES / "model"), help="hub id or diffusers folder")
parser.add_argument("--adapter", default=str(SHAPES / "adapters/pcm_4phase.safetensors"), help="file, folder or hub id")
parser.add_argument("--weight-name", help="the file in a folder or hub repository")
parser.add_argument("--phases", type=int, help="if the adapter does not say")
parser.add_argument("--steps", type=int)
parser.add_argument("--guidance-scale", type=float, help="default: what the adapter recommends")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, help="default: outputs/TASK.png")
args = parser.parse_args()
needed = {"inpaint": "mask", "outpaint": "margins", "interpolate": "second"}.get(args.task)
if needed and getattr(args, needed) is None:
    parser.error(f"{args.task} needs --{needed}")

device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = AutoPipelineForText2Image.from_pretrained(args.model, use_safetensors=True).to(device, dtype)
settings = load_pcm_lora(pipe, args.adapter, weight_name=args.weight_name, num_phases=args.phases)
edit = PCMEditPipeline.from_pipe(pipe, settings)
image = Image.open(args.image)
mask = Image.open(args.mask) if args.mask else None
options = {
    "prompt": args.prompt,
    "negative_prompt": args.negative_prompt,
    "num_inference_steps": args.steps,
    "guidance_scale": args.guidance_scale,
    "generator": torch.Generator(device).manual_seed(args.seed),
}
run = {
    "inpaint": lambda: edit.inpaint(image, mask, **options),
    "outpaint": lambda: edit.outpaint(image, *args.margins, **options),
    "colorize": lambda: edit.colorize(image, mask, **options),
    "super_resolve": lambda: edit.super_resolve(image, args.factor, **options),
    "stroke": lambda: edit.stroke(image, args.strength, **options),
    "denoise": lambda: edit.denoise(image, args.noise_level, **options),
    "vary": lambda: edit.vary(image, args.amount, args.count, **options),
    "interpolate": lambda: edit.interpolate(image, Image.open(args.second), args.count, **options),
    "rewrite": lambda: edit.rewrite(image, source_prompt=args.source_prompt, **options),
}
result = run[args.task]()

out = args.out or Path(f"outputs/{args.task}.png")
out.parent.mkdir(parents=True, exist_ok=True)
names = [out] if len(result.images) == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(len(result.images))]
for name, picture, residual in zip(names, result.images, result.residual, strict=True):
    picture.save(name)
    print(f"{name}: {picture.width} x {picture.height}, {residual:.3f} grey levels from what was measured")

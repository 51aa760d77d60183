"""The cost of one scheduler step, PCMScheduler beside diffusers' own, without the network.

python benchmarks/scheduler_step.py            (prints)
python benchmarks/scheduler_step.py --write    (also rewrites the table in benchmarks/README.md)
"""

from __future__ import annotations

import argparse
import time

import torch
from diffusers import DDIMScheduler, LCMScheduler, TCDScheduler
from measuring import conditions, table, write_section

from pcm_scheduler import PCMScheduler

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS = {
    "PCMScheduler": PCMScheduler(**BETAS),
    "DDIMScheduler": DDIMScheduler(**BETAS, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False),
    "TCDScheduler": TCDScheduler(**BETAS),
    "LCMScheduler": LCMScheduler(**BETAS),
}
SHAPES = {"SD1.5, 512 px": (1, 4, 64, 64), "SDXL, 1024 px, guidance": (2, 4, 128, 128)}
STEPS, ROUNDS = 8, 60


def microseconds(scheduler, shape: tuple[int, ...], device: str, dtype: torch.dtype) -> float:
    """Median over rounds of the mean time of a step; all steps of a schedule, as a pipeline calls them."""
    sample, output = torch.randn(2, *shape, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    kwargs = {"eta": 0.0} if not isinstance(scheduler, LCMScheduler) else {}
    if not isinstance(scheduler, DDIMScheduler):
        kwargs["generator"] = generator  # DDIM draws nothing at eta 0 and is slower with one
    times = []
    for _ in range(ROUNDS):
        scheduler.set_timesteps(STEPS, device=device)
        timesteps, x = scheduler.timesteps, sample
        if device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for t in timesteps:
            x = scheduler.step(output, t, x, return_dict=False, **kwargs)[0]
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) / STEPS * 1e6)
    return sorted(times)[ROUNDS // 2]


def compared(device: str, dtype: torch.dtype) -> str:
    """Markdown: microseconds per step and the ratio to TCDScheduler."""
    measured = {
        name: {s: microseconds(scheduler, shape, device, dtype) for s, shape in SHAPES.items()}
        for name, scheduler in SCHEDULERS.items()
    }
    rows = [
        [name, *(f"{times[s]:.0f} ({times[s] / measured['TCDScheduler'][s]:.2f})" for s in SHAPES)]
        for name, times in measured.items()
    ]
    return table(rows, ["", *SHAPES])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(1)  # latents are small; threads only add noise
    measured = compared(args.device, getattr(torch, args.dtype))
    text = f"Microseconds per step (ratio to TCDScheduler), {args.dtype}, {conditions(args.device)}:\n\n{measured}"
    print(text)
    if args.write:
        write_section(f"scheduler_step {args.device}", text)


if __name__ == "__main__":
    main()

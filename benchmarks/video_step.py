"""One training step of AnimateDiff at its true size, with random weights: whether it fits, and how long it takes.

    python benchmarks/video_step.py --frames 8 --side 8

UNet and motion modules v3 are as large as those that people use; text encoder and VAE are not part of a step and are tiny.
Prints what was run, its seconds and the largest memory that the process has held. It says nothing about quality.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from diffusers import AnimateDiffPipeline, AutoencoderKL, DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_training.backbones.animatediff import AnimateDiff
from lora_training.backbones.full_size import full_size_unet
from lora_training.config import LoraConfig, ObjectiveConfig
from lora_training.objectives import ConsistencyObjective, total
from lora_training.students import Adapter
from pcm_scheduler.phases import PhaseGrid

BETAS = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012}


def backbone() -> AnimateDiff:
    with torch.device("meta"):
        unet = full_size_unet("animatediff")
    positions = full_positions(unet)
    unet.to_empty(device="cpu")
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in unet.parameters():
            p.normal_(0, 0.02, generator=drawn) if p.ndim > 1 else p.fill_(0.1)
    for name, buffer in positions.items():
        unet.get_buffer(name).copy_(buffer)
    width = unet.config.cross_attention_dim
    text = CLIPTextConfig(vocab_size=2, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    tokenizer = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[], model_max_length=77)
    vae = AutoencoderKL(block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=1)  # fmt: skip
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1)
    pipe = AnimateDiffPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, motion_adapter=None, scheduler=scheduler
    )
    return AnimateDiff(pipe)


def full_positions(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The sinusoidal positions, buffers that are empty on the meta device, made anew by the class that holds them."""
    found = {}
    for name, module in unet.named_modules():
        if hasattr(module, "pe"):
            _, length, width = module.pe.shape
            found[f"{name}.pe"] = type(module)(width, max_seq_length=length).pe
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--side", type=int, default=8, help="of the latents")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--parts", choices=("all", "spatial", "motion"), default="motion")
    parser.add_argument("--checkpointing", action="store_true")
    given = parser.parse_args()
    body = backbone()
    if given.checkpointing:
        body.enable_gradient_checkpointing()
    adapter = Adapter(body, LoraConfig(rank=given.rank, parts=given.parts), seed=0)
    optimizer = torch.optim.AdamW(adapter.parameters.values(), lr=5e-6)
    objective = ConsistencyObjective(body, PhaseGrid.even(4), ObjectiveConfig())
    drawn = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, given.frames, given.side, given.side, generator=drawn)
    told = {"prompt_embeds": torch.randn(1, 77, body.unet.config.cross_attention_dim, generator=drawn)}
    weights = sum(p.numel() for p in body.unet.parameters()) - sum(p.numel() for p in adapter.parameters.values())
    trained = sum(p.numel() for p in adapter.parameters.values())
    print(f"{weights / 1e6:.0f} M frozen parameters, {trained / 1e6:.1f} M trained: {adapter.describe()}", flush=True)
    begun = time.perf_counter()
    loss = total(objective.losses(latents, told, told, drawn))
    loss.backward()
    optimizer.step()
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{tuple(latents.shape)}: loss {loss.item():.4f}, {time.perf_counter() - begun:.0f} s on {torch.get_num_threads()} "
        f"thread(s), at most {held:.1f} GiB"
    )


if __name__ == "__main__":
    main()

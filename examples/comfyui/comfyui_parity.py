"""The same picture in diffusers and in ComfyUI: cases, and what diffusers draws; `comfyui_parity_host.py` draws in ComfyUI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from pcm_scheduler import PCMScheduler, read_settings

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "examples" / "shapes"
ADAPTERS = {"model": "pcm_4phase.safetensors", "model_xl": "xl_pcm_4phase.safetensors"}
SEED, SIDE = 7, 16
PROMPT, NEGATIVE = "a large red star on the left and a small blue ring on the right", "a green heart"


@dataclass(frozen=True)
class Case:
    """One drawing.

    Attributes:
        steps, cfg: K and g.
        kind: `text`, `image` (from the middle of the schedule) or `mask` (half of the latents are kept).
        model: a folder of the shapes models.
        prediction_type: what the network's answer is taken for; the picture is only a picture for epsilon.
        zero_snr: the schedule is rescaled to zero terminal SNR.
    """

    steps: int
    cfg: float = 1.0
    kind: str = "text"
    model: str = "model"
    prediction_type: str = "epsilon"
    zero_snr: bool = False

    @property
    def tolerance(self) -> float:
        """Of `difference`. At zero terminal SNR ComfyUI's table ends at an alpha of 2e-4, ours and diffusers' at 0."""
        return 1e-3 if self.zero_snr else 1e-4


STEPS = (1, 2, 3, 4, 8, 16)
DENOISE = 0.5
CASES = [
    *(Case(steps, cfg) for steps in STEPS for cfg in (1.0, 5.0)),
    *(Case(steps, cfg, kind) for kind in ("image", "mask") for steps in (2, 4, 8) for cfg in (1.0, 5.0)),
    *(Case(steps, cfg, model="model_xl") for steps in (2, 4, 8) for cfg in (1.0, 5.0)),
    *(Case(steps, cfg, prediction_type="v_prediction") for steps in STEPS for cfg in (1.0, 5.0)),
    *(Case(steps, cfg, prediction_type="v_prediction", zero_snr=True) for steps in (4, 8) for cfg in (1.0, 5.0)),
]


def given_latents() -> torch.Tensor:
    """Of a picture to start from, or to keep half of; scaled as the network sees them."""
    return torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


def given_mask() -> torch.Tensor:
    """1 where drawn anew: the right half."""
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., SIDE // 2 :] = 1
    return mask


class InDiffusers:
    """Draws cases with diffusers' pipelines and PCMScheduler."""

    def __init__(self) -> None:
        options = {"torch_dtype": torch.float32}
        self.pipes: dict[str, Any] = {
            "model": StableDiffusionPipeline.from_pretrained(SHAPES / "model", safety_checker=None, **options),
            "model_xl": StableDiffusionXLPipeline.from_pretrained(SHAPES / "model_xl", **options),
        }
        for name, pipe in self.pipes.items():
            pipe.set_progress_bar_config(disable=True)
            pipe.load_lora_weights(SHAPES / "adapters", weight_name=ADAPTERS[name])
            pipe.base_config = dict(pipe.scheduler.config)

    def scheduler(self, case: Case) -> PCMScheduler:
        settings = read_settings(SHAPES / "adapters" / ADAPTERS[case.model])
        changes = {"prediction_type": case.prediction_type, "rescale_betas_zero_snr": case.zero_snr}
        return PCMScheduler.from_config(self.pipes[case.model].base_config, **settings.scheduler_config, **changes)

    @torch.no_grad()
    def draw(self, case: Case) -> torch.Tensor:
        """Latents (1, 4, h, w), scaled."""
        pipe = self.pipes[case.model]
        pipe.scheduler = self.scheduler(case)
        options: dict[str, Any] = {
            "guidance_scale": case.cfg, "generator": torch.Generator().manual_seed(SEED), "output_type": "latent",
        }  # fmt: skip
        if case.kind == "mask":
            return self.draw_masked(case)
        texts = {"prompt": PROMPT, "negative_prompt": NEGATIVE}
        if case.kind == "image":
            pipe = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
            pipe.set_progress_bar_config(disable=True)
            stops = list(pipe.scheduler.grid.sampling_timesteps(case.steps, DENOISE))
            return pipe(**texts, image=given_latents(), timesteps=stops, strength=1.0, **options).images
        return pipe(**texts, num_inference_steps=case.steps, height=8 * SIDE, width=8 * SIDE, **options).images

    def draw_masked(self, case: Case) -> torch.Tensor:
        """ComfyUI's masking, step by step: kept latents are put in at each level, and as they are at the end.

        What is drawn anew starts from alpha x_0 + eps, not from pure noise: at full denoising ComfyUI adds the latent too.
        """
        pipe, scheduler = self.pipes[case.model], self.pipes[case.model].scheduler
        guided = case.cfg > 1
        embeds, negative = pipe.encode_prompt(PROMPT, "cpu", 1, guided, NEGATIVE)
        told = torch.cat([negative, embeds]) if guided else embeds
        kept, mask = given_latents(), given_mask()
        noise = torch.randn(kept.shape, generator=torch.Generator().manual_seed(SEED))
        scheduler.set_timesteps(case.steps)
        sample = scheduler.alphas_cumprod[scheduler.timesteps[0]].sqrt() * kept + noise
        for t in scheduler.timesteps:
            sample = mask * sample + (1 - mask) * scheduler.add_noise(kept, noise, t[None])
            answer = pipe.unet(sample.repeat(1 + guided, 1, 1, 1), t, told, return_dict=False)[0]
            if guided:
                without, with_prompt = answer.chunk(2)
                answer = without + case.cfg * (with_prompt - without)
            sample = scheduler.step(answer, t, sample, return_dict=False)[0]
        return mask * sample + (1 - mask) * kept


@dataclass
class InComfyUI:
    """What ComfyUI drew and measured.

    Attributes:
        latents: of the cases, in their order.
        cost: seconds a step of ComfyUI's euler, of PCM Sampler on the same sigmas, and of each without a network.
        version: of ComfyUI, and of torch.
    """

    latents: list[torch.Tensor]
    cost: dict[str, float]
    version: dict[str, str]


def in_comfyui(cases: list[Case], pack: Path) -> InComfyUI:
    """Draw with ComfyUI's own Python, from COMFYUI_PATH and COMFYUI_PYTHON."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_file({"latents": given_latents(), "mask": given_mask()}, folder / "given.safetensors")
        told = {"prompt": PROMPT, "negative": NEGATIVE, "seed": SEED, "denoise": DENOISE, "adapters": ADAPTERS}
        (folder / "cases.json").write_text(json.dumps(told | {"cases": [asdict(case) for case in cases]}))
        command = [os.environ.get("COMFYUI_PYTHON", sys.executable), str(Path(__file__).parent / "comfyui_parity_host.py")]
        command += [str(pack), os.environ["COMFYUI_PATH"], str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not (folder / "found.json").exists():
            raise RuntimeError(done.stderr[-3000:])
        found = json.loads((folder / "found.json").read_text())
        drawn = load_file(folder / "drawn.safetensors")
        return InComfyUI([drawn[str(i)] for i in range(len(cases))], found["cost"], found["version"])


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of a - b, relative to that of a."""
    return ((a - b).square().mean() / a.square().mean()).sqrt().item()

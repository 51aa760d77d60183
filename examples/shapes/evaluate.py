"""Pictures from the shapes pipeline under each method, and the figures that are read off them."""

from __future__ import annotations

import hashlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from safetensors.torch import load_file
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from lora_training.cpu import fast_autocast, keep_freed_memory
from lora_training.randomness import generator_of
from pcm_scheduler import load_pcm_lora
from pcm_scheduler.lora_file import write_safetensors

from attributes import AttributeClassifier, judge, load_classifier, rates
from model import HERE, MODEL_DIR, RUNS_DIR, build_scheduler, fingerprint, load_pipeline
from scenes import TEST_SEED, Scene, caption, sample_scene

ADAPTERS = {"PCM": HERE / "adapters" / "pcm_4phase.safetensors", "LCM": HERE / "adapters" / "lcm.safetensors"}
TEACHER_STATISTICS = HERE / "teacher_statistics.safetensors"
XL_ADAPTER = HERE / "adapters" / "xl_pcm_4phase.safetensors"
XL_TEACHER_STATISTICS = HERE / "teacher_statistics_xl.safetensors"
TEACHER_STEPS, TEACHER_GUIDANCE = 50, 5.0
STEPS = (1, 2, 4, 8, 16)
FRECHET_BLOCKS = 3  # 64 channels that look at 22 pixels: local form, edges, texture. Deeper ones are trained not to see blur


def held_out_scenes(count: int, seed: int = TEST_SEED) -> list[Scene]:
    """Held-out scenes; every second one contains a shape in a colour it never had in training."""
    return [sample_scene(seed, i, held_out=i % 2 == 0) for i in range(count)]


def model_fingerprint(model: Path = MODEL_DIR) -> str:
    """Changes when the model's weights do."""
    return fingerprint(sorted(model.rglob("*.safetensors")))


def prompts_of(scenes: list[Scene]) -> list[str]:
    """Full captions in varied wordings."""
    return [caption(scene, np.random.default_rng((TEST_SEED, i))) for i, scene in enumerate(scenes)]


def noise(count: int, seed: int) -> torch.Tensor:
    """Initial latents (count, 4, 16, 16), one generator per picture, so that batches do not matter."""
    draws = [torch.randn(4, 16, 16, generator=generator_of(seed, i)) for i in range(count)]
    return torch.stack(draws)


@dataclass(frozen=True)
class Method:
    """A scheduler and an adapter on the shapes pipeline."""

    name: str
    guidance_scale: float
    eta: float = 0.0


def in_fast_precision(unet: nn.Module) -> None:
    """Autocast inside, float32 outside: guidance and the scheduler keep their precision."""
    forward = unet.forward

    def autocast_forward(*args, **kwargs):
        with fast_autocast():
            (output,) = forward(*args, **{**kwargs, "return_dict": False})
        return UNet2DConditionOutput(output.float())  # by index or by name, as pipelines ask

    unet.forward = autocast_forward


class Studio:
    """The shapes pipeline with every adapter loaded, switched between methods.

    Args:
        adapters: name -> file.
        model: the pipeline's folder.
        fast: run the UNet in `fast_precision`; for measurements over thousands of pictures.
    """

    def __init__(self, adapters: dict[str, Path] = ADAPTERS, model: Path = MODEL_DIR, fast: bool = False):
        keep_freed_memory()
        self.model = model
        missing = [path for path in (model / "model_index.json", *adapters.values()) if not path.is_file()]
        if missing:
            sys.exit(f"Not in this checkout: {', '.join(map(str, missing))}. Train them with: make shapes adapters")
        self.pipe: StableDiffusionPipeline | StableDiffusionXLPipeline = load_pipeline(model)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.vae.to(memory_format=torch.channels_last)  # a quarter faster on CPUs, where pictures of few steps wait for it
        if fast:
            in_fast_precision(self.pipe.unet)
        self.adapters = adapters
        self.methods, self.schedulers = (
            {"teacher": Method("teacher", TEACHER_GUIDANCE)},
            {"teacher": build_scheduler()},
        )
        self._peft_names = {name: f"adapter{i}" for i, name in enumerate(adapters)}  # PEFT's may not have every letter
        for name, path in adapters.items():
            settings = load_pcm_lora(self.pipe, path, adapter_name=self._peft_names[name])
            self.methods[name] = Method(name, settings.guidance_scale, settings.eta)
            self.schedulers[name] = self.pipe.scheduler

    def select(self, name: str) -> None:
        """The pipeline with this adapter and its scheduler, or as the bare `teacher`."""
        self.pipe.scheduler = self.schedulers[name]
        if name in self.adapters:
            self.pipe.enable_lora()
            self.pipe.set_adapters(self._peft_names[name])
        elif self.adapters:
            self.pipe.disable_lora()

    def generate(
        self,
        method: Method,
        prompts: list[str],
        latents: torch.Tensor,
        steps: int,
        batch: int = 32,
        progress: str | None = None,
        **frame: tuple[int, int],
    ) -> torch.Tensor:
        """One picture per prompt through the stock pipeline.

        Args:
            method: which adapter, scheduler and guidance.
            prompts: N texts.
            latents: initial noise (N, 4, 16, 16).
            steps: num_inference_steps.
            batch: pictures at a time.
            progress: name of a progress bar; None shows none.
            frame: original_size and the like, for a pipeline of SDXL's shape.

        Returns:
            uint8 pictures (N, 3, 128, 128).
        """
        self.select(method.name)
        pictures = []
        for start in tqdm(range(0, len(prompts), batch), desc=progress, disable=progress is None):
            images = self.pipe(
                prompt=prompts[start : start + batch],
                latents=latents[start : start + batch],
                num_inference_steps=steps,
                guidance_scale=method.guidance_scale,
                eta=method.eta,
                generator=torch.Generator().manual_seed(start),
                output_type="pt",
                **frame,
            ).images
            pictures.append((images * 255).round().byte())
        return torch.cat(pictures)

    def seconds_per_image(self, method: Method, prompts: list[str], steps: int) -> float:
        """Wall time of a batch of at most eight after a warm-up, by picture."""
        prompts = prompts[:8]
        latents = noise(len(prompts), seed=0)
        self.generate(method, prompts, latents, 1)
        begun = time.perf_counter()
        self.generate(method, prompts, latents, steps)
        return (time.perf_counter() - begun) / len(prompts)


def teacher_pictures(studio: Studio, prompts: list[str], seed: int, steps: int) -> torch.Tensor:
    """The teacher's pictures from one noise, uint8 (N, 3, 128, 128); kept on disk, for they take minutes."""
    asked = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:8]
    path = (
        RUNS_DIR / "teacher" / model_fingerprint(studio.model) / f"{len(prompts)}-{asked}-noise{seed}-{steps}steps.safetensors"
    )
    if not path.exists():
        latents, name = noise(len(prompts), seed), f"teacher, {steps} steps"
        write_safetensors({"images": studio.generate(studio.methods["teacher"], prompts, latents, steps, progress=name)}, path)
    return load_file(path)["images"]


class _Features(nn.Module):
    """uint8 pictures to the classifier's averaged channels at some depth."""

    def __init__(self, classifier: AttributeClassifier, blocks: int):
        super().__init__()
        self.classifier, self.blocks = classifier, blocks
        self.num_features = classifier.widths[blocks - 1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier.features(images.float() / 127.5 - 1, self.blocks)


class Judge:
    """The classifier, as the judge of alignment, of consistency, and of the distance from the teacher's pictures."""

    def __init__(self):
        self.classifier = load_classifier()

    def alignment(self, images: torch.Tensor, scenes: list[Scene]) -> dict[str, float]:
        """Share of pictures that are right, per attribute."""
        verdicts = []
        for part, batch in enumerate(images.split(256)):
            verdicts += judge(self.classifier, batch.float() / 127.5 - 1, scenes[part * 256 : part * 256 + len(batch)])
        return rates(verdicts)

    @torch.no_grad()
    def embeddings(self, images: torch.Tensor) -> torch.Tensor:
        """What and where, as the classifier sees it: (N, 256) from uint8 pictures (N, 3, 128, 128)."""
        return torch.cat([self.classifier.embedding(part.float() / 127.5 - 1) for part in images.split(256)])

    def consistency(self, few: torch.Tensor, many: torch.Tensor) -> float:
        """Mean cosine between the embeddings of two pictures of each prompt."""
        return nn.functional.cosine_similarity(self.embeddings(few), self.embeddings(many)).mean().item()

    def frechet(self, blocks: int = FRECHET_BLOCKS) -> FrechetInceptionDistance:
        """An empty Frechet distance over the classifier's features after that many blocks."""
        return FrechetInceptionDistance(feature=_Features(self.classifier, blocks), reset_real_features=False)

    def frechet_to_teacher(self, images: torch.Tensor, statistics: Path = TEACHER_STATISTICS) -> float:
        """Frechet distance (x 1000) of uint8 pictures to the teacher's stored statistics."""
        metric = self.frechet()
        for name, tensor in load_file(statistics).items():
            setattr(metric, name, tensor)
        return distance(metric, images)


def add_reference(metric: FrechetInceptionDistance, images: torch.Tensor) -> None:
    """Count uint8 pictures (N, 3, H, W) as those to be near to."""
    for part in images.split(256):
        metric.update(part, real=True)


def distance(metric: FrechetInceptionDistance, images: torch.Tensor) -> float:
    """Frechet distance (x 1000) of uint8 pictures to the metric's reference."""
    metric.reset()  # forgets other pictures, not the reference
    for part in images.split(256):
        metric.update(part, real=False)
    return 1000 * metric.compute().item()


def teacher_state(metric: FrechetInceptionDistance) -> dict[str, torch.Tensor]:
    """The sums that `frechet_to_teacher` reads back."""
    names = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples")
    return {name: getattr(metric, name) for name in names}

"""Train the attribute classifier on rendered scenes and check it on held-out ones; about six minutes on two cores.

python examples/shapes/train_classifier.py
"""

from __future__ import annotations

import argparse
import dataclasses

import torch
from torch.nn import functional as F
from tqdm import tqdm

from lora_training.cpu import fast_autocast, keep_freed_memory
from pcm_scheduler.lora_file import write_safetensors

from attributes import CLASSIFIER_FILE, AttributeClassifier, attribute_loss
from model import RUNS_DIR
from scenes import CLASSIFIER_SEED, CLASSIFIER_TEST_SEED, Labels, labels, render, sample_scene
from training import train


def worn(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What generated pictures suffer from: a little blur, noise and a shift of brightness."""
    n = len(images)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = torch.rand(n, 1, 1, 1, generator=generator)
    noise = 0.08 * torch.rand(n, 1, 1, 1, generator=generator) * torch.randn(images.shape, generator=generator)
    shift = 0.06 * torch.randn(n, 3, 1, 1, generator=generator)
    return (torch.lerp(images, blurred, amount) + noise + shift).clamp(-1, 1)


def accuracy(classifier: AttributeClassifier, images: torch.Tensor, truth: Labels) -> dict[str, float]:
    """Share of right answers per attribute: over objects for shape, colour and size, over pictures for the rest."""
    with torch.no_grad():
        parts = [classifier(x.float() / 127.5 - 1) for x in images.split(128)]
    present = truth.shape >= 0
    presence = torch.cat([p.presence for p in parts]) > 0
    table = {"place": (presence == present).all(dim=1), "count": presence.sum(1) == present.sum(1)}
    for name in ("shape", "colour", "size"):
        table[name] = torch.cat([getattr(p, name) for p in parts]).argmax(-1)[present] == getattr(truth, name)[present]
    for name in ("background", "texture"):
        table[name] = torch.cat([getattr(p, name) for p in parts]).argmax(-1) == getattr(truth, name)
    return {name: right.float().mean().item() for name, right in table.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--scenes", type=int, default=16384)
    args = parser.parse_args()

    def drawn(seed: int, count: int) -> tuple[torch.Tensor, Labels]:
        # every fourth scene has a held-out pair: the judge must know the combinations that the model never saw
        scenes = [sample_scene(seed, i, held_out=i % 4 == 0) for i in range(count)]
        pixels = [((render(scenes[j : j + 64]) + 1) * 127.5).round().byte() for j in tqdm(range(0, count, 64), desc="render")]
        return torch.cat(pixels), labels(scenes)

    keep_freed_memory()
    torch.manual_seed(0)
    classifier = AttributeClassifier()
    images, truth = drawn(CLASSIFIER_SEED, args.scenes)

    def loss(generator: torch.Generator) -> torch.Tensor:
        which = torch.randint(len(images), (args.batch,), generator=generator)
        batch = worn(images[which].float() / 127.5 - 1, generator)
        picked = Labels(**{f.name: getattr(truth, f.name)[which] for f in dataclasses.fields(Labels)})
        with fast_autocast():
            logits = classifier(batch)
        logits = type(logits)(**{f.name: getattr(logits, f.name).float() for f in dataclasses.fields(logits)})
        return attribute_loss(logits, picked)

    train(classifier, loss, steps=args.steps, peak_learning_rate=2e-3, checkpoint=RUNS_DIR / "classifier.safetensors")
    table = accuracy(classifier, *drawn(CLASSIFIER_TEST_SEED, 2048))
    print("held-out renders:", {name: round(value, 4) for name, value in table.items()})
    write_safetensors(
        {name: p.half() for name, p in classifier.state_dict().items()},
        CLASSIFIER_FILE,
        {f"accuracy.{name}": f"{value:.4f}" for name, value in table.items()},
    )


if __name__ == "__main__":
    main()

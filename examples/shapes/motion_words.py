"""The words of motion, which the shapes model has never read: one token each, and embeddings that its text encoder reads.

The text encoder knows 60 words. What else it is given falls into pieces whose embeddings were never trained, and it has
learned to ignore them: neither its own output nor the UNet's attention to it tells "growing" from "shrinking". Here every
word of `moving` that is no token becomes one, and its embedding alone is trained (textual inversion, arXiv:2208.01618) for two
things: that the mean of the text encoder's output names the kind of motion and its speed, and that the UNet draws what it would
draw without the words. No other weight changes, so captions without such words are encoded exactly as before. A motion adapter
may go on training these rows.

    python examples/shapes/motion_words.py        # a few minutes on two cores
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from agreement import read_motion
from safetensors.torch import load_file
from tokenizers import AddedToken
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from lora_training.cpu import keep_freed_memory
from pcm_scheduler.lora_file import write_safetensors

import moving
from denoising import cached_moments, drawn_latents, noised
from model import HERE, RUNS_DIR, load_pipeline
from moving import KINDS, SPEEDS, Clip, sample_clip
from scenes import MOTION_TEST_SEED, MOTION_TRAIN_SEED, render
from training import train

WORDS_FILE = HERE / "motion_words.safetensors"
OMIT = 0.1  # size, place, background and speed are left unsaid this often
START_NORM = 0.22  # as of the embeddings that were never trained: the UNet ignores them
KEPT_WEIGHT = 10.0  # of what the words change in the UNet's prediction, as a share of what the whole caption does
KEPT_BATCH, KEPT_CLIPS = 12, 512
PROBE_CAPTIONS, PROBE_TEST = 4000, 1000
_EMBEDDING = "embeddings.token_embedding.weight"


def words_of_motion() -> list[str]:
    """Every word that may be said of a motion, once."""
    phrases = [*(words for table in KINDS.values() for words in table.words), *SPEEDS]
    return list(dict.fromkeys(word for phrase in phrases for word in phrase.split()))


def unknown_words(tokenizer: CLIPTokenizer, words: Iterable[str]) -> list[str]:
    """Those that are several tokens."""
    return [word for word in words if len(tokenizer.tokenize(word)) > 1]


def add_words(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, embeddings: Mapping[str, torch.Tensor]) -> None:
    """Give a tokenizer and its text encoder new words, in place.

    Args:
        tokenizer: to which every word is added as one token.
        text_encoder: whose table of embeddings grows; the rows it has stay.
        embeddings: word -> (width,).

    Raises:
        ValueError: a word is one token already, or its embedding is of another width.
    """
    known = sorted(set(embeddings) - set(unknown_words(tokenizer, embeddings)))
    if known:
        raise ValueError(f"These words are tokens already: {', '.join(known)}. Words are added once, to the model as shipped.")
    width = text_encoder.get_input_embeddings().weight.shape[1]
    wrong = [f"{word} {tuple(row.shape)}" for word, row in embeddings.items() if row.shape != (width,)]
    if wrong:
        raise ValueError(f"The text encoder is {width} wide; got embeddings of other shapes: {', '.join(wrong)}.")
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in embeddings])
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        for word, row in embeddings.items():
            table[tokenizer.convert_tokens_to_ids(word)] = row.to(table)


def load_words(path: Path = WORDS_FILE) -> dict[str, torch.Tensor]:
    """The embeddings that ship: word -> (width,), in fp32."""
    return {word: row.float() for word, row in load_file(path).items()}


class MotionReader(nn.Module):
    """A text encoder, frozen but for the rows of some words, and a linear layer that names the motion.

    Args:
        tokenizer: knows the words.
        text_encoder: too; it is not trained.
        words: whose rows are.
    """

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, words: list[str]):
        super().__init__()
        self._encoder = [text_encoder]  # hidden from `parameters`
        self._ids = torch.tensor(tokenizer.convert_tokens_to_ids(words))
        self.rows = nn.Parameter(text_encoder.get_input_embeddings().weight.detach()[self._ids].clone())
        self.head = nn.Linear(self.rows.shape[1], len(KINDS) + len(SPEEDS) + 1)

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        """Tokens (N, L) -> (N, L, width), with the rows as they are now."""
        (encoder,) = self._encoder
        name, table = next((n, p) for n, p in encoder.named_parameters() if n.endswith(_EMBEDDING))
        return functional_call(encoder, {name: table.detach().index_put((self._ids,), self.rows)}, (ids,)).last_hidden_state

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of the kinds (N, kinds), and of the speeds and of none said (N, speeds + 1)."""
        scores = self.head(self.encode(ids).mean(1))
        return scores[:, : len(KINDS)], scores[:, len(KINDS) :]


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Texts as tokens (N, L), padded as pipelines do."""
    padded = tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
    return torch.tensor(padded.input_ids)


def told(tokenizer: CLIPTokenizer, clips: list[Clip], rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    """Captions in random wordings as tokens (N, L), kinds (N,) and speeds (N,), where the last is for none said."""
    texts = [moving.caption(clip, rng, OMIT) for clip in clips]
    kinds = [list(KINDS).index(clip.motion.kind) for clip in clips]
    said = [next((i for i, speed in enumerate(SPEEDS) if speed in text.split()), len(SPEEDS)) for text in texts]
    return tokens(tokenizer, texts), torch.tensor(kinds), torch.tensor(said)


def linear_probe(train_set: tuple[torch.Tensor, torch.Tensor], test_set: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Which of the test features (M, D) a logistic regression on the training ones names rightly, (M,) bool.

    Args:
        train_set: features (N, D) and classes (N,).
        test_set: features (M, D) and classes (M,).
    """
    (features, classes), (test_features, test_classes) = train_set, test_set
    mean, std = features.mean(0), features.std(0) + 1e-6
    layer = nn.Linear(features.shape[1], int(classes.max()) + 1)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=150, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(layer((features - mean) / std), classes) + 3e-4 * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return layer((test_features - mean) / std).argmax(1) == test_classes


def probe(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> dict[str, float]:
    """Share of test captions whose kind, and speed, a linear probe reads from the mean of the text encoder's output."""
    sets = []
    for seed, count in ((MOTION_TRAIN_SEED, PROBE_CAPTIONS), (MOTION_TEST_SEED, PROBE_TEST)):
        clips = [sample_clip(seed, i) for i in range(count)]
        ids, kinds, speeds = told(tokenizer, clips, np.random.default_rng((seed, count)))
        with torch.no_grad():
            outputs = torch.cat([text_encoder(part).last_hidden_state.mean(1) for part in ids.split(200)])
        sets.append((outputs, kinds, speeds))
    (a, kinds, speeds), (b, test_kinds, test_speeds) = sets
    right = linear_probe((a, kinds), (b, test_kinds))
    table = {f"kind {kind}": right[test_kinds == i].float().mean().item() for i, kind in enumerate(KINDS)}
    moves, test_moves = speeds < len(SPEEDS), test_speeds < len(SPEEDS)
    right_speeds = linear_probe((a[moves], speeds[moves]), (b[test_moves], test_speeds[test_moves]))
    return {"kind": right.float().mean().item(), "speed": right_speeds.float().mean().item(), **table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--clips", type=int, default=8192)
    args = parser.parse_args()

    keep_freed_memory()
    pipe = load_pipeline()
    tokenizer, text_encoder = pipe.tokenizer, pipe.text_encoder.requires_grad_(False)
    clips = [sample_clip(MOTION_TRAIN_SEED, i) for i in range(args.clips)]
    words = unknown_words(tokenizer, words_of_motion())
    start = torch.randn(len(words), text_encoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    add_words(tokenizer, text_encoder, dict(zip(words, START_NORM * F.normalize(start, dim=1), strict=True)))
    torch.manual_seed(0)
    reader = MotionReader(tokenizer, text_encoder, words)

    unet, vae, scheduler = pipe.unet.requires_grad_(False), pipe.vae, pipe.scheduler
    moments = cached_moments(
        vae, KEPT_CLIPS, lambda some: render([sample_clip(MOTION_TRAIN_SEED, i).scene for i in some]), "moving-moments"
    )

    def kept(generator: torch.Generator, rng: np.random.Generator) -> torch.Tensor:
        """What the words change in the predicted noise, as a share of what the whole caption changes."""
        which = torch.randint(KEPT_CLIPS, (KEPT_BATCH,), generator=generator)
        texts = [moving.caption(clips[i], rng, OMIT) for i in which.tolist()]
        given = noised(drawn_latents(moments, which, vae, generator), scheduler, generator, layout=True)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            scenes = text_encoder(tokens(tokenizer, [read_motion(text)[1] for text in texts])).last_hidden_state
            nothing = text_encoder(tokens(tokenizer, [""])).last_hidden_state.expand_as(scenes)
            aim = unet(given.sample, given.timesteps, scenes).sample.float()
            empty = unet(given.sample, given.timesteps, nothing).sample.float()
        with torch.autocast("cpu", torch.bfloat16):
            drawn = unet(given.sample, given.timesteps, reader.encode(tokens(tokenizer, texts))).sample.float()
        errors = [(given.weight * (other - aim).square().mean((1, 2, 3))).mean() for other in (drawn, empty)]
        return errors[0] / errors[1]

    def loss(generator: torch.Generator) -> torch.Tensor:
        which = torch.randint(len(clips), (args.batch,), generator=generator).tolist()
        rng = np.random.default_rng(torch.randint(2**62, (), generator=generator).item())
        ids, kinds, speeds = told(tokenizer, [clips[i] for i in which], rng)
        kind_scores, speed_scores = reader(ids)
        reading = F.cross_entropy(kind_scores, kinds) + F.cross_entropy(speed_scores, speeds)
        return reading + KEPT_WEIGHT * kept(generator, rng)

    train(reader, loss, steps=args.steps, peak_learning_rate=2e-2, checkpoint=RUNS_DIR / "motion_words.safetensors")
    rows = {word: row.detach().half() for word, row in zip(words, reader.rows, strict=True)}
    fresh = load_pipeline()
    before = probe(fresh.tokenizer, fresh.text_encoder)
    add_words(fresh.tokenizer, fresh.text_encoder, rows)
    after = probe(fresh.tokenizer, fresh.text_encoder)
    for name, value in after.items():
        print(f"{name}: {before[name]:.1%} as the model ships, {value:.1%} with these words")
    write_safetensors(rows, WORDS_FILE, {f"probe.{name}": f"{value:.4f}" for name, value in after.items()})


if __name__ == "__main__":
    main()

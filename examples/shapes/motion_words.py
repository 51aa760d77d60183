"""The words of motion, which the shapes model has never read: one token each, and embeddings that its text encoder reads.

The text encoder knows 60 words. What else it is given falls into pieces whose embeddings were never trained, and it has
learned to ignore them: neither its own output nor the UNet's attention to it tells "growing" from "shrinking". Here every
word of `moving` that is no token becomes one, and its embedding alone is trained (textual inversion, arXiv:2208.01618) for two
things: that the UNet's features name the kind of motion and its speed at every place, for a motion module looks at one place at
a time, and that the UNet draws what it would draw without the words. No other weight changes, so captions without such words
are encoded exactly as before.

    python examples/shapes/motion_words.py        # a few minutes on two cores
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from agreement import read_motion
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from tokenizers import AddedToken
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from lora_training.cpu import fast_autocast, keep_freed_memory, use_plain_attention
from pcm_scheduler.lora_file import write_safetensors

import moving
from denoising import Layout, cached_moments, drawn_latents, noised, random_of
from model import HERE, RUNS_DIR, load_pipeline
from moving import KINDS, SPEEDS, Clip, sample_clip
from scenes import MOTION_TRAIN_SEED, render
from training import train

WORDS_FILE = HERE / "motion_words.safetensors"
OMIT = 0.1  # size, place, background and speed are left unsaid this often
START_NORM = 0.22  # as of the embeddings that were never trained: the UNet ignores them
KEPT_WEIGHT = 1.0  # of what the words change in the UNet's prediction, as a share of what the whole caption does
TESTED = 256  # clips, the first, that are not trained on
WHERE = ("down", "middle", "up")
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


class WordRows(nn.Module):
    """The rows of some words in a text encoder's table of embeddings, which are trained; nothing else of it is.

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

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        """Tokens (N, L) -> (N, L, width), with the rows as they are now."""
        (encoder,) = self._encoder
        name, table = next((n, p) for n, p in encoder.named_parameters() if n.endswith(_EMBEDDING))
        rows = table.detach().index_put((self._ids.to(table.device),), self.rows)
        return functional_call(encoder, {name: rows}, (ids.to(table.device),)).last_hidden_state


class PlaceReader(nn.Module):
    """Names the motion at every place of the UNet where a motion module will stand behind attention to text.

    Args:
        unet: whose features are read, of its last forward.
    """

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        layers = [unet.down_blocks[1].attentions[-1], unet.mid_block.attentions[-1], unet.up_blocks[1].attentions[-1]]
        self.heads = nn.ModuleList(nn.Conv2d(layer.proj_out.out_channels, len(KINDS) + len(SPEEDS) + 1, 1) for layer in layers)
        self.seen: dict[int, torch.Tensor] = {}
        for number, layer in enumerate(layers):
            layer.register_forward_hook(partial(self._see, number))

    def _see(self, number: int, _layer: nn.Module, _given: object, output: Sequence[torch.Tensor]) -> None:
        self.seen[number] = output[0]

    def forward(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each layer the scores of the kinds (N, kinds, h, w), and of the speeds and of none said (N, speeds + 1, h, w)."""
        scores = [head(self.seen[number].float()) for number, head in enumerate(self.heads)]
        return [(s[:, : len(KINDS)], s[:, len(KINDS) :]) for s in scores]


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Texts as tokens (N, L), padded as pipelines do."""
    padded = tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
    return torch.tensor(padded.input_ids)


def told(clips: list[Clip], rng: np.random.Generator) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Captions in random wordings, kinds (N,) and speeds (N,), where the last is for none said."""
    texts = [moving.caption(clip, rng, OMIT) for clip in clips]
    kinds = [list(KINDS).index(clip.motion.kind) for clip in clips]
    said = [next((i for i, speed in enumerate(SPEEDS) if speed in text.split()), len(SPEEDS)) for text in texts]
    return texts, torch.tensor(kinds), torch.tensor(said)


def everywhere(classes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Classes (N,) at every place of scores (N, C, h, w)."""
    return classes[:, None, None].expand(len(classes), *scores.shape[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--clips", type=int, default=4096)
    args = parser.parse_args()

    keep_freed_memory()
    torch.manual_seed(0)
    pipe = load_pipeline()
    tokenizer, text_encoder = pipe.tokenizer, pipe.text_encoder.requires_grad_(False)
    unet, vae, scheduler = pipe.unet.requires_grad_(False), pipe.vae, pipe.scheduler
    use_plain_attention(unet)
    words = unknown_words(tokenizer, words_of_motion())
    start = torch.randn(len(words), text_encoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    add_words(tokenizer, text_encoder, dict(zip(words, START_NORM * F.normalize(start, dim=1), strict=True)))
    rows, reader = WordRows(tokenizer, text_encoder, words), PlaceReader(unet)
    clips = [sample_clip(MOTION_TRAIN_SEED, i) for i in range(args.clips)]
    moments = cached_moments(vae, args.clips, lambda some: render([clips[i].scene for i in some]), "moving-moments")

    def measured(which: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """How badly places name the motion, what the words change in units of what captions do, the share named right."""
        rng = random_of(generator)
        texts, kinds, speeds = told([clips[i] for i in which.tolist()], rng)
        given = noised(drawn_latents(moments, which, vae, generator), scheduler, generator, Layout())
        with torch.no_grad(), fast_autocast():
            scenes = text_encoder(tokens(tokenizer, [read_motion(text)[1] for text in texts])).last_hidden_state
            nothing = text_encoder(tokens(tokenizer, [""])).last_hidden_state.expand_as(scenes)
            aim = unet(given.sample, given.timesteps, scenes).sample.float()
            empty = unet(given.sample, given.timesteps, nothing).sample.float()
        with fast_autocast():
            drawn = unet(given.sample, given.timesteps, rows.encode(tokens(tokenizer, texts))).sample.float()
        errors = [(given.weight * (other - aim).square().mean((1, 2, 3))).mean() for other in (drawn, empty)]
        scores = reader()
        reading = [F.cross_entropy(s, everywhere(a, s)) for pair in scores for s, a in zip(pair, (kinds, speeds), strict=True)]
        right = [(k.argmax(1) == everywhere(kinds, k)).float().mean() for k, _ in scores]
        return torch.stack(reading).sum() / len(scores), errors[0] / errors[1], torch.stack(right)

    def loss(generator: torch.Generator) -> torch.Tensor:
        reading, changed, _ = measured(torch.randint(TESTED, args.clips, (args.batch,), generator=generator), generator)
        return reading + KEPT_WEIGHT * changed

    student = nn.ModuleDict({"rows": rows, "reader": reader})
    checkpoint = RUNS_DIR / "motion_words.safetensors"
    train(student, loss, steps=args.steps, peak_learning_rate=2e-2, checkpoint=checkpoint, average_decay=0.98)
    with torch.no_grad():
        _, changed, right = measured(torch.arange(TESTED), torch.Generator().manual_seed(1))
    figures = {"changed": changed.item()} | {f"right at {where}": r.item() for where, r in zip(WHERE, right, strict=True)}
    print(figures)
    written = {word: row.detach().half() for word, row in zip(words, rows.rows, strict=True)}
    write_safetensors(written, WORDS_FILE, {name: f"{value:.4f}" for name, value in figures.items()})


if __name__ == "__main__":
    main()

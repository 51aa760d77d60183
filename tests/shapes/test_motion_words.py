"""The words of motion as tokens of the shapes model: they are read, and nothing else is read otherwise than before."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from motion_words import add_words, load_words, tokens, told, unknown_words, words_of_motion
from torch.nn import functional as F

import moving
from model import load_pipeline
from moving import KINDS, sample_clip
from scenes import MOTION_TEST_SEED, MOTION_TRAIN_SEED, caption, sample_scene


@pytest.fixture(scope="module")
def shipped():
    pipe = load_pipeline()
    return pipe.tokenizer, pipe.text_encoder


@pytest.fixture(scope="module")
def taught(shipped):
    tokenizer, text_encoder = copy.deepcopy(shipped)
    add_words(tokenizer, text_encoder, load_words())
    return tokenizer, text_encoder


def encoded(tokenizer, text_encoder, texts):
    with torch.no_grad():
        return text_encoder(tokens(tokenizer, texts)).last_hidden_state


def test_captions_of_pictures_are_encoded_exactly_as_before(shipped, taught):
    texts = [caption(sample_scene(4, i), np.random.default_rng(i)) for i in range(32)]
    assert torch.equal(encoded(*shipped, texts), encoded(*taught, texts))


def test_every_word_is_one_token_and_captions_fit(taught, tmp_path):
    tokenizer, _ = taught
    assert unknown_words(tokenizer, words_of_motion()) == []
    texts = [moving.caption(sample_clip(MOTION_TEST_SEED, i), np.random.default_rng(i)) for i in range(200)]
    tokens = [tokenizer.tokenize(text) for text in texts]
    assert [[token.removesuffix("</w>") for token in found] for found in tokens] == [text.split() for text in texts]
    assert max(map(len, tokens)) + 2 <= tokenizer.model_max_length
    tokenizer.save_pretrained(tmp_path)
    assert [type(tokenizer).from_pretrained(tmp_path).tokenize(text) for text in texts] == tokens


def test_words_are_added_once_and_of_the_right_width(shipped, taught):
    with pytest.raises(ValueError, match="tokens already: bouncing"):
        add_words(*taught, {"bouncing": torch.zeros(160)})
    with pytest.raises(ValueError, match=r"160 wide.*wobbling \(8,\)"):
        add_words(*shipped, {"wobbling": torch.zeros(8)})


def test_the_kind_of_motion_can_be_read_from_the_unet_with_them(shipped, taught):
    """By ridge regression on the mean features of the middle block, from pure noise; one in ten by chance."""
    unet = load_pipeline().unet
    seen = {}
    unet.mid_block.attentions[0].register_forward_hook(lambda layer, given, output: seen.update(now=output[0].mean((2, 3))))
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    right = {}
    for name, (tokenizer, text_encoder) in (("shipped", shipped), ("taught", taught)):
        sets = []
        for seed, count in ((MOTION_TRAIN_SEED, 320), (MOTION_TEST_SEED, 96)):
            texts, kinds, _ = told([sample_clip(seed, i) for i in range(count)], np.random.default_rng(seed))
            parts = []
            for start in range(0, count, 32):
                embeds = encoded(tokenizer, text_encoder, texts[start : start + 32])
                with torch.no_grad():
                    unet(noise.expand(len(embeds), -1, -1, -1), 999, embeds)
                parts.append(seen["now"])
            sets.append((torch.cat(parts), kinds))
        (features, kinds), (held_out, asked) = sets
        mean, std = features.mean(0), features.std(0)
        x, y = ((f - mean) / std for f in (features, held_out))
        linear = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ F.one_hot(kinds, len(KINDS)).float())
        right[name] = ((y @ linear).argmax(1) == asked).float().mean().item()
    # measured 0.77 and 0.22; 96 captions have a standard error of 0.04
    assert right["taught"] > 0.6, right
    assert right["shipped"] < 0.4, right

"""The attribute classifier as the modules that configurations of `lora_training` and its `evaluation` name.

examples/shapes/agreement.py:form_features       where local form is compared: Frechet distance
examples/shapes/agreement.py:embedding_features  what and where: consistency, diversity
examples/shapes/agreement.py:form_maps           the same before it is averaged, for a critic (`adversarial.factory`): the
                                                 adapter must then be measured in something else
examples/shapes/agreement.py:caption_agreement   whether everything a text names is there: alignment, negative prompts
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import nn

from attributes import AttributeClassifier, Logits, load_classifier
from scenes import BACKGROUNDS, COLOURS, PLACE_WORDS, PLACES, SHAPES, SIZE_WORDS, SIZES, TEXTURES

FORM_BLOCKS = 3  # 64 channels that look at 22 pixels: local form, edges, texture. Deeper ones are trained not to see blur

_NAMES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "place": tuple(PLACES)}
_WORDS: dict[str, dict[str, str]] = {  # attribute -> phrase -> the name it stands for
    "shape": {name: name for name in SHAPES},
    "colour": {name: name for name in COLOURS},
    "size": {word: name for name, words in SIZE_WORDS.items() for word in words},
    "place": {phrase: name for name, phrases in PLACE_WORDS.items() for phrase in phrases},
}
_TEXTURE_WORDS = {"stripes": "striped", "checks": "checkered", "dots": "dotted"}
_BACKGROUND = re.compile(
    rf"\bon an? (?:({'|'.join(TEXTURES)}) )?({'|'.join(BACKGROUNDS)}) background(?: with ({'|'.join(_TEXTURE_WORDS)}))?"
)


@dataclass(frozen=True)
class Named:
    """What a text names: of every object some attributes, as indices; of the background, if it is named, all."""

    objects: tuple[Mapping[str, int], ...]
    background: tuple[int, int] | None  # colour, texture


def read_text(text: str) -> Named:
    """The reverse of `scenes.caption`, and of parts of it, such as "red star" or "a star on the left".

    Raises:
        ValueError: the text names nothing that is known.
    """
    background = None
    found = _BACKGROUND.search(text)
    if found:
        before, colour, after = found.groups()
        texture = before or _TEXTURE_WORDS.get(after, "plain")
        background = (list(BACKGROUNDS).index(colour), TEXTURES.index(texture))
        text = text[: found.start()] + text[found.end() :]
    objects = [said for phrase in text.split(" and ") if (said := _attributes(phrase))]
    if not objects and background is None:
        raise ValueError(f"No shape, colour, size, place or background is named in {text!r}.")
    return Named(tuple(objects), background)


def _attributes(phrase: str) -> dict[str, int]:
    said = {}
    for attribute, words in _WORDS.items():
        # the longest first: "in the top left corner" is not "in the top left" alone, nor "at the top"
        for word in sorted(words, key=len, reverse=True):
            if re.search(rf"\b{word}\b", phrase):
                said[attribute] = _NAMES[attribute].index(words[word])
                break
    return said


def _shown(logits: Logits, i: int, named: Named) -> bool:
    """Whether picture i has a different object for each one named, with all that is said of it, and the background."""
    slots = (logits.presence[i] > 0).nonzero().flatten().tolist()
    there = [
        {name: int(getattr(logits, name)[i, slot].argmax()) for name in ("shape", "colour", "size")} | {"place": slot}
        for slot in slots
    ]
    scene = (int(logits.background[i].argmax()), int(logits.texture[i].argmax()))
    objects = any(
        all(wanted.items() <= seen.items() for wanted, seen in zip(named.objects, order, strict=True))
        for order in permutations(there, len(named.objects))
    )
    return objects and named.background in (None, scene)


class CaptionAgreement(nn.Module):
    """A `Scorer`: 1 where everything that the text names is in the picture, else 0."""

    def __init__(self, classifier: AttributeClassifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, pictures: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        logits = self.classifier(pictures.float())
        return torch.tensor([float(_shown(logits, i, read_text(text))) for i, text in enumerate(texts)])


class _Part(nn.Module):
    """The classifier up to some depth, as (N, 3, 128, 128) in [-1, 1] -> (N, D)."""

    def __init__(self, classifier: AttributeClassifier, blocks: int | None):
        super().__init__()
        self.classifier, self.blocks = classifier, blocks

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        if self.blocks is None:
            return self.classifier.embedding(pictures.float())
        return self.classifier.features(pictures.float(), self.blocks)


def form_features() -> nn.Module:
    """64 wide: the averaged channels of the first blocks, in which docs/results.md measures Frechet distance."""
    return _Part(load_classifier(), FORM_BLOCKS)


class _Maps(nn.Module):
    """Pictures (N, 3, H, W) in [-1, 1] -> what each of the first blocks puts out, (N, 16..64, H / 2.., W / 2..)."""

    def __init__(self, classifier: AttributeClassifier):
        super().__init__()
        self.blocks = nn.ModuleList(classifier.trunk[3 * i : 3 * i + 3] for i in range(FORM_BLOCKS))

    def forward(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        found = [pictures]
        for block in self.blocks:
            found.append(block(found[-1]))
        return found[1:]


def form_maps() -> nn.Module:
    """Maps of 16, 32 and 64 channels: what a critic in pixel space judges."""
    return _Maps(load_classifier())


def embedding_features() -> nn.Module:
    """256 wide: the last layer before the answers, in which docs/results.md measures consistency."""
    return _Part(load_classifier(), None)


def caption_agreement() -> CaptionAgreement:
    """Agreement with captions of the shapes model."""
    return CaptionAgreement(load_classifier())

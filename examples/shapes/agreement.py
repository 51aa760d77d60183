"""The attribute classifier as the modules that configurations of `lora_training` and its `evaluation` name.

examples/shapes/agreement.py:form_features       where local form is compared: Frechet distance
examples/shapes/agreement.py:embedding_features  what and where: consistency, diversity
examples/shapes/agreement.py:form_maps           the same before it is averaged, for a critic (`adversarial.factory`): the
                                                 adapter must then be measured in something else
examples/shapes/agreement.py:caption_agreement   whether everything a text names is there: alignment, negative prompts

and of clips, which have one more dimension:

examples/shapes/agreement.py:motion_agreement            whether the motion that a text names is made
examples/shapes/agreement.py:motion_and_scene_agreement  and everything else it names is in the middle frame
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from motion import measure_motion
from torch import nn

from attributes import AttributeClassifier, Logits, load_classifier
from moving import KINDS, SPEEDS
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


_MOTION = re.compile(rf"\b({'|'.join(words for table in KINDS.values() for words in table.words)})(?: ({'|'.join(SPEEDS)}))?\b")
_MOTION_KINDS = {words: kind for kind, table in KINDS.items() for words in table.words}


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


@dataclass(frozen=True)
class NamedMotion:
    """The motion that a text names, of `moving.KINDS`; its speed and the colour of what makes it, or None."""

    kind: str
    speed: str | None
    colour: str | None


def read_motion(text: str) -> tuple[NamedMotion, str]:
    """The motion of `moving.caption`, and the text without its words, which `read_text` reads.

    Raises:
        ValueError: no motion is named, or more than one.
    """
    found = list(_MOTION.finditer(text))
    if len(found) != 1:
        told = f"{len(found)} motions are" if found else "No motion is"
        raise ValueError(f"{told} named in {text!r}; one is judged. Known: {', '.join(_MOTION_KINDS)}.")
    start, end = found[0].span()
    words, speed = found[0].groups()
    before = text[:start].split(" and ")[-1]
    after = re.split(r" and | on an? ", text[end:])[0]
    colour = _attributes(before + after).get("colour")
    named = NamedMotion(_MOTION_KINDS[words], speed, None if colour is None else _NAMES["colour"][colour])
    return named, f"{text[:start].rstrip()}{text[end:]}".strip()


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


class MotionAgreement(nn.Module):
    """1 where a clip makes the motion that its text names, at the speed if one is named, else 0.

    Args:
        classifier: if given, everything else that the text names must be in the middle frame too.
    """

    def __init__(self, classifier: AttributeClassifier | None = None):
        super().__init__()
        self.classifier = classifier

    def forward(self, clips: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        """Scores (N,) of clips (N, F, 3, H, W) in [-1, 1], each beside its own of N texts.

        Raises:
            ValueError: a text names no motion or several, or nothing else where the scene is judged too.
        """
        motions, rests = zip(*map(read_motion, texts), strict=True)
        # before the clips are measured, for a text that cannot be read
        scenes = [read_text(rest) for rest in rests] if self.classifier is not None else []
        shown = measure_motion(clips, [motion.colour for motion in motions])
        right = [m.kind == s.kind and m.speed in (None, s.speed) for m, s in zip(motions, shown, strict=True)]
        if self.classifier is not None:
            logits = self.classifier(clips[:, clips.shape[1] // 2].float())
            right = [made and _shown(logits, i, scenes[i]) for i, made in enumerate(right)]
        return torch.tensor(right, dtype=torch.float32)


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


def motion_agreement() -> MotionAgreement:
    """Agreement with the motion in captions of moving scenes."""
    return MotionAgreement()


def motion_and_scene_agreement() -> MotionAgreement:
    """Agreement with all of captions of moving scenes."""
    return MotionAgreement(load_classifier())

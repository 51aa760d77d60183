"""The shapes classifier as a scorer: captions are read back exactly, and drawings agree with their own."""

from __future__ import annotations

import numpy as np
import pytest
from agreement import caption_agreement, read_text

from scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, TEXTURES, caption, render, sample_scene


def indices(obj):
    return {
        "shape": SHAPES.index(obj.shape), "colour": list(COLOURS).index(obj.colour),
        "size": list(SIZES).index(obj.size), "place": list(PLACES).index(obj.place),
    }  # fmt: skip


def test_every_caption_is_read_back():
    for i in range(500):
        scene = sample_scene(5, i, held_out=i % 2 == 0)
        named = read_text(caption(scene, np.random.default_rng((5, i))))
        assert named.background == (list(BACKGROUNDS).index(scene.background), TEXTURES.index(scene.texture))
        key = lambda said: said["place"]  # noqa: E731
        assert sorted(named.objects, key=key) == sorted((indices(obj) for obj in scene.objects), key=key)


def test_parts_of_captions_are_read():
    assert read_text("star").objects == ({"shape": SHAPES.index("star")},)
    assert read_text("a red thing at the top").objects == ({"colour": 0, "place": list(PLACES).index("top")},)
    assert read_text("on a striped mint background").objects == ()
    assert read_text("a star and a ring").background is None
    with pytest.raises(ValueError, match="a lighthouse"):
        read_text("a lighthouse")


def test_drawings_agree_with_their_captions_and_not_with_others():
    scenes = [sample_scene(6, i) for i in range(128)]
    texts, pictures = [caption(scene) for scene in scenes], render(scenes)
    scorer = caption_agreement()
    # the classifier misses an attribute of a few per cent of drawings; two scenes in 128 are hardly ever of the same words
    assert scorer(pictures, texts).mean() > 0.9
    assert scorer(pictures, texts[1:] + texts[:1]).mean() < 0.05
    shapes = [scene.objects[0].shape for scene in scenes]
    absent = [next(name for name in SHAPES if all(obj.shape != name for obj in scene.objects)) for scene in scenes]
    assert scorer(pictures, shapes).mean() > 0.95
    assert scorer(pictures, absent).mean() < 0.05

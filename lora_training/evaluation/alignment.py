"""How well a picture shows what its prompt says, by judges whose weights are local."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from ..local_weights import call_factory, fill, library, local_file, read_state
from .clip import Clip, load_clip, of_open_clip

HPS_ARCHITECTURE = "ViT-H-14"
_HPS_SOURCE = "Put HPS_v2_compressed.pt or HPS_v2.1_compressed.pt of the repository xswu/HPSv2 there."
_AESTHETIC_SOURCE = (
    "Put sac+logos+ava1-l14-linearMSE.pth there, from https://github.com/christophschuhmann/improved-aesthetic-predictor."
)


class Scorer(Protocol):
    """Judges pictures beside texts; a classifier that knows what captions mean is one too."""

    def __call__(self, pictures: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        """Scores (N,) of pictures (N, 3, H, W) in [-1, 1], each beside its own of N texts; more is better."""


@dataclass
class ScorerConfig:
    """A judge of pictures beside their prompts.

    Attributes:
        kind: `clip` (CLIP score), `hps` (HPSv2), `pickscore`, `aesthetic` (which sees no prompt), or `factory` for a `Scorer`
            of your own, such as a classifier that reads captions.
        path: a folder with a CLIP of open_clip or transformers; for `pickscore` that of the repository
            yuvalkirstain/PickScore_v1, for `aesthetic` of openai/clip-vit-large-patch14. For `hps` its checkpoint, a file.
            Optional for `factory`, which is called with it.
        head: of `aesthetic`, the file of the predictor on CLIP's embedding.
        factory: `package.module:name` or `folder/file.py:name` of a function that returns the scorer.
    """

    kind: Literal["clip", "hps", "pickscore", "aesthetic", "factory"] = "clip"
    path: str = ""
    head: str = ""
    factory: str = ""


def load_scorer(config: ScorerConfig, device: torch.device | str = "cpu", setting: str = "alignment") -> Scorer:
    """The scorer of a configuration, frozen.

    Args:
        config: which.
        device: where it runs; pictures may be anywhere.
        setting: the name of the configuration's part, for messages.

    Raises:
        FileNotFoundError: weights are missing; which, and where they come from.
        ValueError: a library is missing, weights are another network's, or the factory is not there. When called: not as many
            texts as pictures, or scores that are not finite.
    """
    if config.kind == "factory":
        judge: Scorer = call_factory(config.factory, config.path, device, setting)
    elif config.kind == "aesthetic":
        head = load_aesthetic_head(config.head, f"{setting}.head")
        judge = aesthetic_score(load_clip(config.path, f"{setting}.path", device), head.to(device))
    elif config.kind == "hps":
        judge = load_hps(config.path, f"{setting}.path", device).cosine
    else:
        clip = load_clip(config.path, f"{setting}.path", device)
        judge = clip_score(clip) if config.kind == "clip" else pick_score(clip)

    @torch.no_grad()
    def score(pictures: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        if len(pictures) != len(texts):
            raise ValueError(f"Every picture is judged beside its own text; got {len(pictures)} and {len(texts)}.")
        scores = judge(pictures.to(device), texts).float().cpu()
        if not scores.isfinite().all():
            raise ValueError(f"{setting} ({config.kind}) gave scores that are not finite, such as for {texts[0]!r}.")
        return scores

    return score


def mean_score(scorer: Scorer, batches: Iterable[tuple[torch.Tensor, Sequence[str]]]) -> float:
    """Over batches of pictures (N, 3, H, W) in [-1, 1] with their N prompts."""
    return torch.cat([scorer(pictures, prompts) for pictures, prompts in batches]).double().mean().item()


def clip_score(clip: Clip) -> Scorer:
    """100 max(cosine, 0) (arXiv 2104.08718, Section 3, with the factor 100 that papers on generation report); 0..100."""
    return lambda pictures, texts: 100 * clip.cosine(pictures, texts).clamp(min=0)


def pick_score(clip: Clip) -> Scorer:
    """The scaled cosine (arXiv 2305.01569, Eq. 1) of the CLIP that was trained on people's choices; about 15 to 25."""
    return lambda pictures, texts: clip.logit_scale * clip.cosine(pictures, texts)


def load_hps(path: str, setting: str, device: torch.device | str = "cpu") -> Clip:
    """HPSv2 (arXiv 2306.09341): a CLIP of open_clip whose cosine, about 0.2 to 0.35, follows people's choices.

    Args:
        path: its checkpoint, with the tensors under `state_dict` as published, or bare.
        setting: that names it, for messages.
        device: where it runs.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: open_clip is not installed, or the file is another network's.
    """
    open_clip = library("open_clip", setting, "open_clip_torch")
    file = local_file(path, setting, "HPSv2's checkpoint", _HPS_SOURCE)
    model, _, preprocess = open_clip.create_model_and_transforms(HPS_ARCHITECTURE)
    state: Any = read_state(file)
    fill(model, state.get("state_dict", state), file, setting, f"open_clip's {HPS_ARCHITECTURE}")
    return of_open_clip(model, preprocess, open_clip.get_tokenizer(HPS_ARCHITECTURE), device)


def load_aesthetic_head(path: str, setting: str) -> nn.Module:
    """The predictor of LAION's aesthetic score, from CLIP's normalised embedding (N, D) to (N, 1).

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it holds something else.
    """
    file = local_file(path, setting, "the aesthetic predictor's weights", _AESTHETIC_SOURCE)
    state = read_state(file)
    first = state.get("layers.0.weight")
    width = first.shape[1] if first is not None else 768
    head = nn.Module()
    # five linear layers with nothing between them, numbered as in the file, where dropout has numbers too
    sizes = {0: (width, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    head.layers = nn.Sequential(*(nn.Linear(*sizes[i]) if i in sizes else nn.Identity() for i in range(8)))
    fill(head, state, file, setting, "the aesthetic predictor")
    return head.layers.eval().requires_grad_(False)


def aesthetic_score(clip: Clip, head: nn.Module) -> Scorer:
    """LAION's aesthetic score, about 1 to 10, of the picture alone."""
    return lambda pictures, texts: head(F.normalize(clip.pictures(pictures), dim=1)).squeeze(1)

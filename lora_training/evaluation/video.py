"""What is measured of clips: their frames as pictures, how one frame follows from the one before, and how much moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torchvision.models.optical_flow import raft_large, raft_small

from ..local_weights import fill, library, local_file
from .alignment import Scorer
from .distribution import Moments, frechet_distance
from .features import Features, extract

Flow = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Two sets of pictures (N, 3, H, W) in [-1, 1] -> (N, 2, H, W) on the CPU: how far to the right, and how far down, in pixels,
what is at each pixel of the first has gone in the second."""

_RAFT = {"raft_small": raft_small, "raft_large": raft_large}
_RAFT_SOURCE = (
    "Download the weights of torchvision.models.optical_flow, such as Raft_Large_Weights.C_T_SKHT_V2, and write their state "
    "there with safetensors.torch.save_file."
)
_RAFT_STRIDE, _RAFT_LEAST = 8, 128  # it looks at an eighth of the picture's size, and halves that three times


@dataclass
class FlowConfig:
    """How motion is read off neighbouring frames.

    Attributes:
        kind: `farneback` (OpenCV's dense flow, which needs no weights), or `raft_small` or `raft_large` (torchvision's
            networks, arXiv 2003.12039).
        path: of RAFT, its weights: a `.safetensors` file.
    """

    kind: Literal["farneback", "raft_small", "raft_large"] = "farneback"
    path: str = ""


def single_frames(batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Of batches of clips (N, F, 3, H, W) every clip as a batch of pictures; batches of pictures as they are."""
    for batch in batches:
        yield from batch if batch.ndim == 5 else (batch,)


def frame_scores(scorer: Scorer) -> Scorer:
    """A judge of clips (N, F, 3, H, W): the mean of what a judge of pictures says of the frames, beside the clip's text."""

    def score(pictures: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        return torch.stack([scorer(clip, [text] * len(clip)).mean() for clip, text in zip(pictures, texts, strict=True)])

    return score


def video_frechet_distance(features: Features, clips: Iterable[torch.Tensor], known: Moments) -> float:
    """The Frechet distance of whole clips (FVD, arXiv 1812.01717); it is biased as that of pictures is.

    Args:
        features: of clips, (N, F, 3, H, W) in [-1, 1] -> (N, D).
        clips: batches (N, F, 3, H, W) in [-1, 1].
        known: of the reference's features.

    Raises:
        ValueError: fewer than two clips.
    """
    return frechet_distance(Moments.of(extract(features, clips)), known)


def temporal_consistency(features: Features, clips: Iterable[torch.Tensor]) -> float:
    """Mean cosine between the features of neighbouring frames, over pairs and clips; -1..1.

    1 for clips in which nothing changes, so that it must be read beside how much moves.

    Args:
        features: of pictures.
        clips: batches (N, F, 3, H, W) in [-1, 1], F at least 2.
    """
    found = (features(clip) for clip in single_frames(clips))
    return torch.stack([F.cosine_similarity(x[1:], x[:-1]).double().mean().cpu() for x in found]).mean().item()


def flow_magnitude(flow: Flow, clips: Iterable[torch.Tensor]) -> float:
    """Mean length of the optical flow between neighbouring frames, in pixels a frame, over pixels, pairs and clips.

    In pixels of the clips as they are: twice as large at twice the size.

    Args:
        flow: of pairs of pictures.
        clips: batches (N, F, 3, H, W) in [-1, 1], F at least 2.
    """
    found = (flow(clip[:-1], clip[1:]) for clip in single_frames(clips))
    return torch.stack([vectors.double().norm(dim=1).mean() for vectors in found]).mean().item()


def load_flow(config: FlowConfig, device: torch.device | str = "cpu", setting: str = "clips.flow") -> Flow:
    """The optical flow of a configuration.

    Args:
        config: which.
        device: where a network runs; pictures may be anywhere.
        setting: the name of the configuration's part, for messages.

    Raises:
        FileNotFoundError: RAFT's weights are missing; where they come from.
        ValueError: OpenCV is not installed, or the weights are no `.safetensors` file or another network's.
    """
    if config.kind == "farneback":
        return _farneback(setting)
    return _raft(config, device, setting)


def _farneback(setting: str) -> Flow:
    """Farnebäck's polynomial expansion, with the settings of OpenCV's tutorial."""
    cv2 = library("cv2", f"{setting}.kind: farneback", "opencv-python-headless")

    def one(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        grey = (cv2.cvtColor(p.permute(1, 2, 0).contiguous().numpy(), cv2.COLOR_RGB2GRAY) for p in (first, second))
        found = cv2.calcOpticalFlowFarneback(
            *grey, None, pyr_scale=0.5, levels=3, winsize=15, iterations=3, poly_n=5, poly_sigma=1.2, flags=0
        )
        return torch.from_numpy(found).permute(2, 0, 1)

    def flow(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        levels = [((p.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu() for p in (first, second)]
        return torch.stack([one(a, b) for a, b in zip(*levels, strict=True)])

    return flow


def _raft(config: FlowConfig, device: torch.device | str, setting: str) -> Flow:
    if config.path and Path(config.path).suffix != ".safetensors":
        raise ValueError(f"{setting}.path must be a .safetensors file; got {config.path}. {_RAFT_SOURCE}")
    file = local_file(config.path, f"{setting}.path", f"the weights of {config.kind}", _RAFT_SOURCE)
    network = _RAFT[config.kind](weights=None)
    fill(network, load_file(file), file, f"{setting}.path", f"torchvision's {config.kind}")
    network.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def flow(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        height, width = first.shape[-2:]
        down, right = (max(-side % _RAFT_STRIDE, _RAFT_LEAST - side) for side in (height, width))
        grown = (F.pad(p.float().to(device), (0, right, 0, down), mode="replicate") for p in (first, second))
        return network(*grown)[-1][..., :height, :width].cpu()

    return flow

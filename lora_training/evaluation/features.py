"""Feature modules that a configuration names, all of them from local files: pictures to vectors."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import AutoImageProcessor, AutoModel

from ..local_weights import call_factory, library, local_file, local_folder, read_state
from .clip import load_clip, to_bytes

Features = Callable[[torch.Tensor], torch.Tensor]
"""(N, 3, H, W) floating point in [-1, 1] -> (N, D)."""

_INCEPTION_SOURCE = (
    "Put weights-inception-2015-12-05-6726825d.pth there, from https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0."
)
_DINOV2_SOURCE = "Put a download of a DINOv2 repository there, such as facebook/dinov2-large."
_DINOV2_FILES = ("config.json", "*.safetensors", "preprocessor_config.json")


@dataclass
class FeatureConfig:
    """The space in which pictures are compared.

    Attributes:
        kind: `inception` (torch-fidelity's, 2048 wide: the usual Frechet distance), `clip` (open_clip's or transformers'),
            `dinov2` (transformers'), `torchscript`, or `factory` for a module of your own. The first three resize and
            normalise as their authors do; the others see pictures in [-1, 1] as they are.
        path: the weights: a file, or a folder for `clip` and `dinov2`; optional for `factory`, which is called with it.
        factory: `package.module:name` or `folder/file.py:name` of a function that returns the module.
    """

    kind: Literal["inception", "clip", "dinov2", "torchscript", "factory"] = "inception"
    path: str = ""
    factory: str = ""


def load_features(config: FeatureConfig, device: torch.device | str = "cpu", setting: str = "features") -> Features:
    """The feature module of a configuration, frozen.

    Args:
        config: which.
        device: where it runs; pictures may be anywhere.
        setting: the name of the configuration's part, for messages.

    Returns:
        a function that gives (N, D) float32 on `device`, without a gradient.

    Raises:
        FileNotFoundError: weights are missing; which, and where they come from.
        ValueError: a library is missing, or the factory is not there. When called: the module gives something else than (N, D).
    """
    loaders = {"inception": _inception, "clip": _clip, "dinov2": _dinov2, "torchscript": _torchscript, "factory": _factory}
    network = loaders[config.kind](config, device, setting)

    @torch.no_grad()
    def features(pictures: torch.Tensor) -> torch.Tensor:
        found = network(pictures.to(device)).float()
        if found.ndim != 2 or len(found) != len(pictures):
            raise ValueError(
                f"{setting} ({config.kind}) must give (N, D); got {tuple(found.shape)} for {len(pictures)} pictures."
            )
        if not found.isfinite().all():  # distances to it would be, or look like a picture that nothing is near to
            raise ValueError(
                f"{setting} ({config.kind}) gave features that are not finite: its weights are broken, or it overflows."
            )
        return found

    return features


def extract(features: Features, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The features (N, D) of each batch of pictures (N, 3, H, W), on the CPU, as they come."""
    return (features(pictures).cpu() for pictures in batches)


def _inception(config: FeatureConfig, device: torch.device | str, setting: str) -> Features:
    library("torch_fidelity", f"{setting}.kind: inception", "torch-fidelity")
    path = local_file(config.path, f"{setting}.path", "Inception's weights, converted from TensorFlow", _INCEPTION_SOURCE)
    read_state(path)  # refuses a file with code in it, which torch-fidelity would run
    extractor = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    network = extractor("inception", ["2048"], feature_extractor_weights_path=str(path)).to(device).eval()
    return lambda pictures: network(to_bytes(pictures))[0]


def _clip(config: FeatureConfig, device: torch.device | str, setting: str) -> Features:
    return load_clip(config.path, f"{setting}.path", device).pictures


def _dinov2(config: FeatureConfig, device: torch.device | str, setting: str) -> Features:
    """The class token after the last norm (arXiv 2304.07193)."""
    folder = local_folder(config.path, f"{setting}.path", "a DINOv2 of transformers", _DINOV2_FILES, _DINOV2_SOURCE)
    network = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    network.to(device).eval().requires_grad_(False)

    def features(pictures: torch.Tensor) -> torch.Tensor:
        prepared = processor(images=list(to_bytes(pictures).cpu()), return_tensors="pt").to(device)
        return network(**prepared).pooler_output

    return features


def _torchscript(config: FeatureConfig, device: torch.device | str, setting: str) -> Features:
    path = local_file(config.path, f"{setting}.path", "a TorchScript module", "Write one with torch.jit.save.")
    return torch.jit.load(path, map_location=device).eval()


def _factory(config: FeatureConfig, device: torch.device | str, setting: str) -> Features:
    return call_factory(config.factory, config.path, device, setting)

"""How far the student's landing is from its target: in latents, or as pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model

from .backbones import Backbone
from .config import ObjectiveConfig
from .frames import frames_as_batch
from .local_weights import library, local_file

# landed and target (B, 4, h, w) or (B, 4, F, h, w), alpha (B, 1, ...) of the edge that both are at -> scalar
Distance = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def pseudo_huber(difference: torch.Tensor, c: float) -> torch.Tensor:
    """Mean of sqrt(d^2 + c^2) - c, written so that small d does not cancel."""
    square = difference.square()
    return (square / ((square + c * c).sqrt() + c)).mean()


def build_distance(config: ObjectiveConfig, backbone: Backbone) -> Distance:
    """The distance that `objective.distance` names.

    Raises:
        FileNotFoundError, ValueError: as of `load_lpips`.
    """
    if config.distance == "lpips":
        return _lpips(config, backbone)
    of_difference: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "pseudo_huber": lambda d: pseudo_huber(d, config.huber_c),
        "l2": lambda d: d.square().mean(),
        "l1": lambda d: d.abs().mean(),
    }
    measure = of_difference[config.distance]
    return lambda landed, target, alpha: measure(landed - target)


def _lpips(config: ObjectiveConfig, backbone: Backbone) -> Distance:
    """LPIPS (arXiv 1801.03924) of the decoded points, each scaled to unit signal.

    At an edge above 0 that is a picture with noise in it; it is still zero only where the two points are one.
    """
    network = load_lpips(config.lpips_weights, "objective.lpips_weights")
    network.to(backbone.unet.device)

    def pictures(sample: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        return frames_as_batch(backbone.decode_latents(sample / alpha))

    def distance(landed: torch.Tensor, target: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            there = pictures(target, alpha)
        return network(pictures(landed, alpha), there).mean()

    return distance


def load_lpips(path: str, setting: str, net: Literal["alex", "vgg", "squeeze"] = "vgg") -> torch.nn.Module:
    """LPIPS (arXiv 1801.03924), frozen: two batches of pictures (N, 3, H, W) in [-1, 1] -> (N, 1, 1, 1).

    Args:
        path: a `.safetensors` file with the state of `lpips.LPIPS(net=net)`.
        setting: that names it, for messages.
        net: the trunk; papers report `alex`, and losses are taken from `vgg`.

    Raises:
        FileNotFoundError: the file is not there; how to make it.
        ValueError: the library is not installed, or the file is another network's.
    """
    lpips = library("lpips", setting, "lpips")
    how = f"safetensors.torch.save_model(lpips.LPIPS(net='{net}'), 'lpips.safetensors') makes one where there is a network."
    weights = local_file(path, setting, f"a .safetensors file with the state of lpips.LPIPS(net='{net}')", how)
    network = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    try:
        load_model(network, weights)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{setting}: {weights} is not the state of lpips.LPIPS(net='{net}'): {error}") from error
    return network.eval().requires_grad_(False)

"""How far the student's landing is from its target: in latents, or as pictures."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_model

from .backbones import Backbone
from .config import ObjectiveConfig

# landed and target (B, 4, h, w), alpha (B, 1, 1, 1) of the edge that both are at -> scalar
Distance = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def pseudo_huber(difference: torch.Tensor, c: float) -> torch.Tensor:
    """Mean of sqrt(d^2 + c^2) - c, written so that small d does not cancel."""
    square = difference.square()
    return (square / ((square + c * c).sqrt() + c)).mean()


def build_distance(config: ObjectiveConfig, backbone: Backbone) -> Distance:
    """The distance that `objective.distance` names.

    Raises:
        ValueError: LPIPS without its library, or with weights that are not there or not its own.
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
    if find_spec("lpips") is None:
        raise ValueError("objective.distance is lpips, which needs its library: pip install lpips")
    import lpips

    path = Path(config.lpips_weights)
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(
            f"objective.lpips_weights must be a .safetensors file with the state of lpips.LPIPS(net='vgg'); got '{path}'. "
            "To make one: safetensors.torch.save_model(lpips.LPIPS(net='vgg'), 'lpips.safetensors')"
        )
    network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    try:
        load_model(network, path)
    except RuntimeError as error:
        raise ValueError(f"objective.lpips_weights: {path} is not the state of lpips.LPIPS(net='vgg'): {error}") from error
    device = backbone.unet.device
    network.to(device).requires_grad_(False)
    backbone.vae.to(device)

    def pictures(sample: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        return backbone.vae.decode(sample / alpha / backbone.vae.config.scaling_factor).sample

    def distance(landed: torch.Tensor, target: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            there = pictures(target, alpha)
        return network(pictures(landed, alpha), there).mean()

    return distance

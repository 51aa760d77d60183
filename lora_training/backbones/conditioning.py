"""What a UNet is told besides the noisy sample and its timestep: named tensors that share their first dimension."""

from __future__ import annotations

import torch

Conditioning = dict[str, torch.Tensor]


def expanded(conditioning: Conditioning, batch: int) -> Conditioning:
    """Tensors (1, ...) as (batch, ...), without a copy."""
    return {name: tensor.expand(batch, *tensor.shape[1:]) for name, tensor in conditioning.items()}


def joined(first: Conditioning, second: Conditioning) -> Conditioning:
    """One batch after the other. What `first` does not say is as `second` says it: the unguided half sees the same frame."""
    return {name: torch.cat([first.get(name, tensor), tensor]) for name, tensor in second.items()}

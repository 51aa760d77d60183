"""Seeds for random streams that are named by several numbers, and the way of what is drawn to where it is used."""

from __future__ import annotations

import numpy as np
import torch


def seed_of(*names: int) -> int:
    """A seed in 0..2**32 - 1 that mixes every one of `names`, non-negative integers of any size.

    torch's CPU generator reads only the low 32 bits of a seed: with `(seed << 32) + step` every `seed` gives the same numbers.

    Raises:
        ValueError: a name is negative.
    """
    return int(np.random.SeedSequence(names).generate_state(1)[0])


def sent(drawn: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on the device. Out of pageable memory a copy waits until a GPU has done all that it was told to."""
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)


def generator_of(*names: int) -> torch.Generator:
    """A CPU generator for the stream that `names` name, e.g. (seed, process, step)."""
    return torch.Generator().manual_seed(seed_of(*names))

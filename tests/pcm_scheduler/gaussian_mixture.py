"""An analytic teacher: data from a Gaussian mixture, whose score, and so whose probability-flow ODE, is known.

In variance-exploding coordinates x = x_0 + sigma eps the ODE is dx/dsigma = eps(x, sigma), eps the posterior mean of
the noise; variance-preserving states are alpha x.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.integrate import solve_ivp

MEANS = torch.tensor([[1.2, -0.4], [-0.8, 0.9], [0.1, -1.3]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
SPREAD = 0.25


def epsilon(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """E[eps | x] for x = x_0 + sigma eps; x is (N, 2) float64."""
    variance = SPREAD**2 + sigma**2
    difference = x[:, None] - MEANS
    weights = (WEIGHTS.log() - difference.square().sum(-1) / (2 * variance)).softmax(dim=1)
    return sigma / variance * (weights[..., None] * difference).sum(1)


def solve(x: torch.Tensor, sigma: float, next_sigma: float) -> torch.Tensor:
    """Follow the ODE from one sigma to another, to about 1e-11."""
    if sigma == next_sigma:
        return x
    shape = x.shape

    def slope(s: float, y: np.ndarray) -> np.ndarray:
        return epsilon(torch.from_numpy(y.reshape(shape)), s).numpy().ravel()

    solution = solve_ivp(slope, (sigma, next_sigma), x.numpy().ravel(), method="DOP853", rtol=1e-11, atol=1e-12)
    return torch.from_numpy(solution.y[:, -1].reshape(shape))


def ideal_phase_epsilon(x: torch.Tensor, sigma: float, edge_sigma: float) -> torch.Tensor:
    """What a perfect phased network predicts: the eps whose single jump from sigma lands on the ODE at the edge."""
    return (x - solve(x, sigma, edge_sigma)) / (sigma - edge_sigma)

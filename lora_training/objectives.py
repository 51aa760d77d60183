"""What is learned: where the student jumps to, and what it should meet there.

Both objectives here are one loss on different grids (`lcm` is one phase): the jump from x_n to the edge of its phase
must land where the jump from the teacher's next point x_(n-1) lands (arXiv 2405.18407, Eq. 7).
"""

from __future__ import annotations

import torch

from pcm_scheduler.noise_schedule import predict_x0_and_epsilon
from pcm_scheduler.phases import PhaseGrid
from pcm_scheduler.sampling import jump

from .backbones import StableDiffusion15
from .teacher import ddim_step


def pseudo_huber(difference: torch.Tensor, c: float) -> torch.Tensor:
    """Mean of sqrt(d^2 + c^2) - c, written so that small d does not cancel."""
    square = difference.square()
    return (square / ((square + c * c).sqrt() + c)).mean()


class ConsistencyObjective:
    """The consistency loss on a phase grid.

    Args:
        backbone: student and teacher in one.
        grid: solver points and edges.
        guidance_scale: of the teacher's solver.
        huber_c: of the distance.
    """

    def __init__(self, backbone: StableDiffusion15, grid: PhaseGrid, guidance_scale: float, huber_c: float):
        self.backbone, self.grid = backbone, grid
        self.guidance_scale, self.huber_c = guidance_scale, huber_c
        device = backbone.unet.device
        stops = torch.tensor(grid.timesteps)
        self.timesteps = stops.to(device)  # tau_0..tau_N
        self.alphas = backbone.alphas[stops].float().to(device)
        self.sigmas = backbone.sigmas[stops].float().to(device)

    def levels(self, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and sigma at points n (B,), as (B, 1, 1, 1)."""
        return self.alphas[n].view(-1, 1, 1, 1), self.sigmas[n].view(-1, 1, 1, 1)

    def jump_to_edge(
        self, sample: torch.Tensor, n: torch.Tensor, edge: torch.Tensor, prompt_embeds: torch.Tensor
    ) -> torch.Tensor:
        """The student's f(x_n -> edge), (B, 4, h, w) float32; the identity where n is the edge."""
        alpha, sigma = self.levels(n)
        output = self.backbone.predict(sample, self.timesteps[n], prompt_embeds)
        x0, _ = predict_x0_and_epsilon(output, sample, alpha, sigma, self.backbone.prediction_type)
        landed = jump(sample, x0, alpha, sigma, *self.levels(edge))
        return torch.where((n == edge).view(-1, 1, 1, 1), sample, landed)

    def __call__(
        self,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        empty_embeds: torch.Tensor,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """The loss of a batch.

        Args:
            latents: x_0, (B, 4, h, w), scaled, float32.
            prompt_embeds: (B, tokens, width).
            empty_embeds: (1, tokens, width).
            generator: on the CPU, so that every device draws the same.
        """
        batch, device = len(latents), latents.device
        n = torch.randint(1, self.grid.num_solver_steps + 1, (batch,), generator=generator).to(device)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        edge = self.grid.target(n)
        alpha, sigma = self.levels(n)
        sample = alpha * latents + sigma * noise
        lower = ddim_step(
            self.backbone, sample, self.timesteps[n], prompt_embeds, empty_embeds.expand(batch, -1, -1),
            self.guidance_scale, (alpha, sigma, *self.levels(n - 1)),
        )  # fmt: skip
        landed = self.jump_to_edge(
            sample, n, edge, prompt_embeds
        )  # before the target: autocast caches casts with their history
        with torch.no_grad():
            target = self.jump_to_edge(lower, n - 1, edge, prompt_embeds)
        return pseudo_huber(landed - target, self.huber_c)

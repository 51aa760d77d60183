"""What is learned: where the student jumps to, and what it should meet there.

Both objectives here are one loss on different grids (`lcm` is one phase): the jump from x_n to the edge of its phase
must land where the jump from the teacher's next point lands (arXiv 2405.18407, Eq. 7).
"""

from __future__ import annotations

import torch

from pcm_scheduler.noise_schedule import predict_x0_and_epsilon
from pcm_scheduler.phases import PhaseGrid
from pcm_scheduler.sampling import jump

from .backbones import Backbone, Conditioning
from .backbones.conditioning import expanded
from .config import ObjectiveConfig
from .distances import build_distance
from .teacher import SOLVERS, Levels, guided_prediction


class ConsistencyObjective:
    """The consistency loss on a phase grid.

    Args:
        backbone: student and teacher in one.
        grid: solver points and edges.
        config: solver, guidance and distance.
    """

    def __init__(self, backbone: Backbone, grid: PhaseGrid, config: ObjectiveConfig):
        self.backbone, self.grid, self.config = backbone, grid, config
        device = backbone.unet.device
        stops = torch.tensor(grid.timesteps)
        self.levels = Levels(
            stops.to(device), backbone.alphas[stops].float().to(device), backbone.sigmas[stops].float().to(device)
        )
        self.solver, self.distance = SOLVERS[config.solver], build_distance(config, backbone)

    def jump_to_edge(
        self, sample: torch.Tensor, n: torch.Tensor, edge: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The student's f(x_n -> edge), (B, 4, h, w) float32; the identity where n is the edge."""
        alpha, sigma = self.levels(n)
        output = self.backbone.predict(sample, self.levels.timesteps[n], conditioning)
        x0, _ = predict_x0_and_epsilon(output, sample, alpha, sigma, self.backbone.prediction_type)
        landed = jump(sample, x0, alpha, sigma, *self.levels(edge))
        return torch.where((n == edge).view(-1, 1, 1, 1), sample, landed)

    def draw_guidance(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """g of every sample, (batch,), uniform in the configured range; on the CPU."""
        low, high = self.config.guidance_range
        return low + (high - low) * torch.rand(batch, generator=generator) if high > low else torch.full((batch,), low)

    def __call__(
        self,
        latents: torch.Tensor,
        conditioning: Conditioning,
        empty: Conditioning,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """The loss of a batch.

        Args:
            latents: x_0, (B, 4, h, w), scaled, float32.
            conditioning: of the batch, (B, ...) each.
            empty: of the unguided half, (1, ...) each.
            generator: on the CPU, so that every device draws the same.
        """
        batch, device = len(latents), latents.device
        n = torch.randint(1, self.grid.num_solver_steps + 1, (batch,), generator=generator).to(device)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        edge = self.grid.target(n)
        lower = torch.maximum(n - self.config.solver_skip, edge)  # the solver, too, stops at the edge
        alpha, sigma = self.levels(n)
        sample = alpha * latents + sigma * noise
        teacher = guided_prediction(
            self.backbone, self.levels, conditioning, expanded(empty, batch), self.draw_guidance(batch, generator)
        )
        below = self.solver(teacher, self.levels, sample, n, lower)
        landed = self.jump_to_edge(sample, n, edge, conditioning)  # before the target: autocast caches casts with their history
        with torch.no_grad(), self.backbone.target():
            target = self.jump_to_edge(below, lower, edge, conditioning)
        return self.distance(landed, target, self.levels(edge)[0])

"""What is learned: where the student jumps to, and what it should meet there.

Every objective is one loss: the jump from x_n to a stop must land where the jump from a point below n, on the way there,
lands (arXiv 2405.18407, Eq. 7). They differ in the stop and in where that point comes from:

| | stop | the point below |
|---|---|---|
| pcm, lcm (one phase) | the edge of n's phase | one step of the teacher |
| ctm | any point from the edge to there | one step of the teacher (arXiv 2310.02279, 2402.19159) |
| direct | the edge | the teacher's ODE solved to the stop (arXiv 2411.08954) |
| ct | the edge | the same noise at a lower level, no teacher (arXiv 2303.01469, Algorithm 3) |

x_n is a noised picture, or a point of a trajectory that the teacher was followed along from pure noise. Then the point below
is on that trajectory too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from pcm_scheduler.noise_schedule import predict_x0_and_epsilon
from pcm_scheduler.phases import PhaseGrid
from pcm_scheduler.sampling import jump

from .backbones import Backbone, Conditioning
from .backbones.conditioning import expanded
from .config import ObjectiveConfig
from .distances import build_distance
from .frames import draw_noise
from .randomness import sent
from .teacher import SOLVERS, Prediction, draw_guidance, guided_prediction, levels_of
from .trajectories import Trajectories

if TYPE_CHECKING:
    from .discriminator import AdversarialLoss


@dataclass(frozen=True)
class Start:
    """Where a batch of jumps begins: at noised pictures.

    Attributes:
        n: points of the solver's grid, (B,).
        latents, noise, sample: x_0, eps and x_n, (B, 4, h, w); of clips (B, 4, F, h, w), here and below.
        teacher: its x_0, guided; None if the objective has none.
    """

    n: torch.Tensor
    latents: torch.Tensor
    noise: torch.Tensor
    sample: torch.Tensor
    teacher: Prediction | None


@dataclass(frozen=True)
class Landing:
    """A batch of the student's jumps, and where they should have ended.

    Attributes:
        n, sample: where they begin: points of the solver's grid, (B,), and x_n, (B, 4, h, w).
        stop: points where they end, (B,), below n.
        landed, target: the student's and the target's sample there, (B, 4, h, w).
    """

    n: torch.Tensor
    sample: torch.Tensor
    stop: torch.Tensor
    landed: torch.Tensor
    target: torch.Tensor


def to_edge(edge: torch.Tensor, below: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The edge of the phase."""
    return edge


def to_any_point(edge: torch.Tensor, below: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Uniform from the edge to the point below, both included."""
    share = sent(torch.rand(len(edge), generator=generator), edge.device)
    return edge + (share * (below - edge + 1)).long()


Stop = Callable[[torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]
"""(edges, points below, generator) -> stops, (B,)."""

CONSISTENCY = "consistency"  # of a loss's parts, the objective's own


def total(losses: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The sum of a loss's parts, a scalar."""
    return torch.stack(list(losses.values())).sum()


Descend = Callable[["ConsistencyObjective", Start, torch.Tensor], torch.Tensor]
"""(objective, start, points below) -> samples there, (B, 4, h, w)."""


def one_step(objective: ConsistencyObjective, start: Start, below: torch.Tensor) -> torch.Tensor:
    """One step of the teacher's solver."""
    assert start.teacher is not None
    return objective.solver(start.teacher, objective.levels, start.sample, start.n, below)


def all_the_way(objective: ConsistencyObjective, start: Start, below: torch.Tensor) -> torch.Tensor:
    """As many steps of the teacher's solver as lead there; samples that have arrived stay."""
    assert start.teacher is not None
    sample, at = start.sample, start.n
    skip = objective.config.solver_skip
    for _ in range(-(-objective.longest_phase // skip)):
        to = torch.maximum(at - skip, below)
        stepped = objective.solver(start.teacher, objective.levels, sample, at, to)
        sample = torch.where(objective.levels.per_sample(at == to), sample, stepped)
        at = to
    return sample


def same_noise(objective: ConsistencyObjective, start: Start, below: torch.Tensor) -> torch.Tensor:
    """x_0 with less of the same noise: on average a step of the data's own ODE."""
    alpha, sigma = objective.levels(below)
    return alpha * start.latents + sigma * start.noise


@dataclass(frozen=True)
class Kind:
    """An objective.

    Attributes:
        stop: where the jump ends.
        descend: how the sample below is made.
        to_the_edge: the point below is the edge, and not one a few points below n.
        taught: there is a teacher.
        one_phase_eta: how an adapter of one phase is sampled by default.
    """

    stop: Stop = to_edge
    descend: Descend = one_step
    to_the_edge: bool = False
    taught: bool = True
    one_phase_eta: float = 0.0


KINDS = {
    "pcm": Kind(),
    "lcm": Kind(one_phase_eta=1.0),
    "ctm": Kind(stop=to_any_point),
    "direct": Kind(descend=all_the_way, to_the_edge=True, one_phase_eta=1.0),
    "ct": Kind(descend=same_noise, taught=False, one_phase_eta=1.0),
}


def sampling_eta(config: ObjectiveConfig) -> float:
    """How the adapter is sampled: to the end of the ODE and with new noise from there, or from edge to edge."""
    return KINDS[config.name].one_phase_eta if config.num_phases == 1 else 0.0


def discretization(config: ObjectiveConfig, progress: float) -> int:
    """N(k) of consistency training: how many intervals the schedule has by now (arXiv 2303.01469, Appendix C).

    ceil(sqrt(k/K ((N+1)^2 - s_0^2) + s_0^2) - 1) + 1, from s_0 up to at most N.

    Args:
        config: s_0 is `ct_start`, N `num_solver_steps`.
        progress: k / K, in [0, 1].
    """
    first, last = config.ct_start, config.num_solver_steps
    return min(math.ceil(math.sqrt(progress * ((last + 1) ** 2 - first**2) + first**2) - 1) + 1, last)


def target_decay(config: ObjectiveConfig, progress: float) -> float:
    """Of the running average of the student: `target_ema`, or with `ct` mu(k) = exp(s_0 log mu_0 / N(k)) (ibid.)."""
    if config.name != "ct" or config.target_ema == 0:
        return config.target_ema
    return math.exp(config.ct_start * math.log(config.target_ema) / discretization(config, progress))


class ConsistencyObjective:
    """The consistency loss on a phase grid.

    Args:
        backbone: student and teacher in one.
        grid: solver points and edges.
        config: which objective; solver, guidance and distance.
    """

    def __init__(self, backbone: Backbone, grid: PhaseGrid, config: ObjectiveConfig):
        self.backbone, self.grid, self.config = backbone, grid, config
        self.levels = levels_of(backbone, grid)
        self.edges = torch.tensor(grid.edge_indices, device=self.levels.timesteps.device)  # (M + 1,)
        self.kind, self.solver, self.distance = KINDS[config.name], SOLVERS[config.solver], build_distance(config, backbone)
        self.longest_phase = max(b - a for a, b in pairwise(grid.edge_indices))

    def jump_to(self, sample: torch.Tensor, n: torch.Tensor, stop: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The student's f(x_n -> stop), (B, 4, h, w) float32; the identity where n is the stop."""
        alpha, sigma = self.levels(n)
        output = self.backbone.predict(sample, self.levels.timesteps[n], conditioning)
        x0, _ = predict_x0_and_epsilon(output, sample, alpha, sigma, self.backbone.prediction_type)
        landed = jump(sample, x0, alpha, sigma, *self.levels(stop))
        return torch.where(self.levels.per_sample(n == stop), sample, landed)

    def land(
        self,
        begun: torch.Tensor | Trajectories,
        conditioning: Conditioning,
        empty: Conditioning,
        generator: torch.Generator,
        progress: float = 1.0,
    ) -> Landing:
        """A batch of jumps; arguments as of `losses`."""
        batch, device, kind = len(begun), self.levels.timesteps.device, self.kind
        drawn = torch.randint(1, self.grid.num_solver_steps + 1, (batch,), generator=generator)
        edges = self.grid.target(drawn)
        lower = edges if kind.to_the_edge else torch.maximum(drawn - self.skip(progress), edges)  # at most down to the edge
        n, edge, below = sent(drawn, device), sent(edges, device), sent(lower, device)
        if isinstance(begun, Trajectories):
            sample, sample_below = sent(begun.at(drawn), device), sent(begun.at(lower), device)
        else:
            start = self.noised(begun, n, conditioning, empty, generator)
            with torch.no_grad():
                sample, sample_below = start.sample, kind.descend(self, start, below)
        stop = kind.stop(edge, below, generator)
        landed = self.jump_to(sample, n, stop, conditioning)  # before the target: autocast caches casts with their history
        with torch.no_grad(), self.backbone.target():
            target = sample_below if kind.to_the_edge else self.jump_to(sample_below, below, stop, conditioning)
        return Landing(n, sample, stop, landed, target)

    def noised(
        self,
        latents: torch.Tensor,
        n: torch.Tensor,
        conditioning: Conditioning,
        empty: Conditioning,
        generator: torch.Generator,
    ) -> Start:
        """Pictures with the noise of points n, and the teacher of their captions."""
        batch = len(latents)
        noise = sent(draw_noise(latents.shape, self.config.shared_noise, generator), latents.device)
        alpha, sigma = self.levels(n)
        teacher = None
        if self.kind.taught:
            guidance = draw_guidance(self.config, batch, generator)
            teacher = guided_prediction(self.backbone, self.levels, conditioning, expanded(empty, batch), guidance)
        return Start(n, latents, noise, alpha * latents + sigma * noise, teacher)

    def skip(self, progress: float) -> int:
        """Points of the grid from n to the point below."""
        if self.kind.taught:
            return self.config.solver_skip
        return max(1, round(self.grid.num_solver_steps / discretization(self.config, progress)))

    def losses(
        self,
        begun: torch.Tensor | Trajectories,
        conditioning: Conditioning,
        empty: Conditioning,
        generator: torch.Generator,
        progress: float = 1.0,
        critic: AdversarialLoss | None = None,
    ) -> dict[str, torch.Tensor]:
        """The parts of a batch's loss, scalars by name; their `total` is what is trained.

        Args:
            begun: x_0, (B, 4, h, w), scaled, float32, which is noised; or the trajectories that the jumps begin on.
            conditioning: of the batch, (B, ...) each.
            empty: of the unguided half, (1, ...) each.
            generator: on the CPU, so that every device draws the same.
            progress: share of the run that is done, for schedules.
            critic: adds its own loss and what it thinks of the landing.
        """
        landing = self.land(begun, conditioning, empty, generator, progress)
        parts = {CONSISTENCY: self.distance(landing.landed, landing.target, self.levels(landing.stop)[0])}
        return parts if critic is None else parts | critic(landing, self, conditioning, generator)

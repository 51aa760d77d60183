"""PCMScheduler: phased consistency sampling as a diffusers scheduler (arXiv 2405.18407)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .checks import shortened
from .noise_schedule import (
    Level,
    alphas_and_sigmas,
    check_prediction_type,
    make_alphas_cumprod,
    make_betas,
    prediction_coefficients,
    rescale_zero_terminal_snr,
    widen,
)
from .phases import PhaseGrid
from .sampling import check_eta, noise_fractions, warn_if_not_finite

FINAL_SIGMAS_TYPES = ("zero", "sigma_min")


@dataclass
class PCMSchedulerOutput(BaseOutput):
    """
    Output of [`PCMScheduler.step`].

    Args:
        prev_sample (`torch.Tensor` of shape `(batch_size, num_channels, ...)`):
            The sample at the next stop; the input of the next step.
        pred_original_sample (`torch.Tensor` of the same shape):
            `x_0` as the network sees it. With more than one phase it is the end of the ODE in the last phase only.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


def _combine(x: torch.Tensor, a: Level, y: torch.Tensor, b: Level) -> torch.Tensor:
    """a x + b y in x's dtype, in new memory."""
    if isinstance(b, torch.Tensor):
        return a * x + b * y
    return torch.mul(x, a).add_(y, alpha=b)


def _plain(value: Any) -> Any:
    """A setting as JSON has it: numbers and lists of Python's own instead of numpy's and torch's."""
    if isinstance(value, (list, tuple, range)):
        return [one.tolist() if hasattr(one, "tolist") else one for one in value]
    return value.tolist() if hasattr(value, "tolist") else value


_BETAS = ("beta_start", "beta_end", "beta_schedule")


def _other_noise(config: Mapping[str, Any]) -> str:
    """What a scheduler's config is of, in words, if its noise has no betas: straight paths, which have a shift or a flag, or
    EDM's levels (arXiv 2206.00364).
    """
    has_betas = "beta_start" in config
    if config.get("use_flow_sigmas") or ("shift" in config and not has_betas):
        return "for flow matching (Stable Diffusion 3, Flux and the like)"
    return "with EDM's noise levels (Playground v2.5 and the like)" if "sigma_data" in config and not has_betas else ""


class PCMScheduler(SchedulerMixin, ConfigMixin):
    """
    Multistep phased consistency sampling: every step jumps along the edges that the adapter was trained on.

    ```py
    pipe.scheduler = PCMScheduler.from_config(pipe.scheduler.config, num_phases=4)
    ```

    Steps and phases are independent: `num_inference_steps` may be anything from 1 to `num_solver_steps`. With at least as
    many steps as phases no step crosses an edge; with at most as many every stop is an edge.

    Args:
        num_train_timesteps (`int`, defaults to 1000):
            The number of diffusion steps the model was trained with.
        beta_start (`float`, defaults to 0.00085):
            The first beta of the schedule.
        beta_end (`float`, defaults to 0.012):
            The last beta of the schedule.
        beta_schedule (`str`, defaults to `"scaled_linear"`):
            `linear`, `scaled_linear` or `squaredcos_cap_v2`. AnimateDiff's motion modules want `linear`.
        trained_betas (`list[float]`, *optional*):
            The betas themselves, instead of the three above.
        prediction_type (`str`, defaults to `"epsilon"`):
            What the network predicts: `epsilon`, `v_prediction`, `sample` or `flow` (`eps - x_0`).
        rescale_betas_zero_snr (`bool`, defaults to `False`):
            Rescale to zero terminal signal-to-noise ratio (arXiv 2305.08891). Needs a prediction type other than `epsilon`.
        num_phases (`int`, defaults to 4):
            The number of phases the adapter was trained with.
        phase_edges (`list[int]`, *optional*):
            The trained edges as timesteps, e.g. `[999, 739, 499, 239]`, instead of `num_phases`.
        num_solver_steps (`int`, defaults to 50):
            The number of points of the solver's grid in training: 50 for published SD1.5 adapters, 40 for SDXL.
        final_sigmas_type (`str`, defaults to `"zero"`):
            Where the last step ends: `zero` at `x_0`; `sigma_min` at timestep 0, where training's last phase ends.
        timesteps (`list[int]`, *optional*):
            Stops to use instead of the grid's own whenever as many steps are asked for as there are, e.g. what
            `time_search.search_timesteps` found: points of the grid, strictly decreasing. Other numbers of steps, and
            `set_timesteps(strength=...)` below 1, keep the grid's own.
    """

    _compatibles: ClassVar[list[str]] = [e.name for e in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
        num_phases: int = 4,
        phase_edges: Sequence[int] | None = None,
        num_solver_steps: int = 50,
        final_sigmas_type: str = "zero",
        timesteps: Sequence[int] | None = None,
    ):
        if "_use_default_values" in self.config:
            self._state_defaults()
        check_prediction_type(prediction_type)
        if final_sigmas_type not in FINAL_SIGMAS_TYPES:
            raise ValueError(
                f"Unknown final_sigmas_type {shortened(final_sigmas_type)}; choose one of {', '.join(FINAL_SIGMAS_TYPES)}."
            )
        self.grid = (  # first: it refuses numbers of timesteps that no table should be made of
            PhaseGrid.even(num_phases, num_solver_steps, num_train_timesteps)
            if phase_edges is None
            else PhaseGrid.from_timesteps(phase_edges, num_solver_steps, num_train_timesteps)
        )
        if trained_betas is not None:
            self.alphas_cumprod = make_alphas_cumprod(trained_betas)
            betas = torch.as_tensor(trained_betas, dtype=torch.float32)
        else:
            betas = make_betas(beta_schedule, beta_start, beta_end, num_train_timesteps)
            self.alphas_cumprod = make_alphas_cumprod(betas)
        if rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
            self.alphas_cumprod = make_alphas_cumprod(betas)
        self.betas = betas
        if timesteps is not None:
            starts = self.grid.timesteps[1:]  # from timestep 0, where training ends, no step starts
            off = [t for t in self._check_timesteps(timesteps) if t not in starts]
            if off:
                nearest = min(starts, key=lambda t: abs(t - off[0]))
                raise ValueError(
                    f"timesteps {off} are not points of the grid of {num_solver_steps} solver steps where a step can start; "
                    f"the nearest to {off[0]} is {nearest}."
                )
        self.register_to_config(**{name: _plain(value) for name, value in self.config.items()})
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.tensor(self.grid.sampling_timesteps(self.grid.num_phases))
        self._alphas, self._sigmas = alphas_and_sigmas(self.alphas_cumprod)
        self._coefficients: list[list[float]] = []
        self._coefficient_table = torch.empty(0, 7)
        self._noising_levels: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._warned_eta = False
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """
        Build the scheduler from another scheduler's config; keyword arguments override it.

        Unlike diffusers' own, values that the source held by default are kept: an in-memory
        `DDIMScheduler(beta_schedule="linear")` stays at its betas of 1e-4 to 0.02. A new `num_phases` replaces `phase_edges`,
        new betas `trained_betas`, and anything new about the grid drops `timesteps`, which were chosen on the old one.

        Raises:
            ValueError: the config of a scheduler for flow matching or of EDM, which have other noise schedules.
        """
        if isinstance(config, dict) and (other := _other_noise(config)):
            raise ValueError(
                f"This is the config of a scheduler {other}. PCMScheduler has the noise of Stable Diffusion 1.5, SDXL and "
                "AnimateDiff, by which such a model draws nothing."
            )
        in_memory = isinstance(config, dict) and "_use_default_values" in config
        if isinstance(config, dict):
            config = {key: value for key, value in config.items() if key != "_use_default_values"}
            if "num_phases" in kwargs:
                kwargs.setdefault("phase_edges", None)
            if kwargs.keys() & set(_BETAS):
                kwargs.setdefault("trained_betas", None)
            if kwargs.keys() & {"num_phases", "phase_edges", "num_solver_steps", "num_train_timesteps"}:
                kwargs.setdefault("timesteps", None)
        result = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        if in_memory:
            (result[0] if return_unused_kwargs else result)._state_defaults()
        return result

    def _state_defaults(self) -> None:
        """Count no value as held by default: others' from_config drops those, although their own defaults differ."""
        self.register_to_config(_use_default_values=[])

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def step_index(self) -> int | None:
        """The number of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The step that sampling begins with, if a pipeline has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """
        Say with which step sampling begins (image-to-image), which saves the first step a look-up.

        Args:
            begin_index (`int`, defaults to 0): Index into `timesteps`.
        """
        self._begin_index = begin_index

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """
        The input as it is: a variance-preserving scheduler scales nothing.

        Args:
            sample (`torch.Tensor`): The noisy sample.
            timestep (`int` or `torch.Tensor`, *optional*): Unused, part of the interface.
        """
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | torch.Tensor | None = None,
        strength: float = 1.0,
    ) -> None:
        """
        Choose the stops and compute each step's coefficients.

        Args:
            num_inference_steps (`int`, *optional*):
                1 to `num_solver_steps`. The configured `timesteps` are used if they are this many.
            device (`str` or `torch.device`, *optional*):
                Where `timesteps` lie.
            timesteps (`list[int]`, *optional*):
                Explicit stops instead, strictly decreasing. Stops off the trained grid work, with a warning.
            strength (`float`, defaults to 1.0):
                Below 1, all `num_inference_steps` lie below that part of the schedule, still aligned to the edges. Stock
                image-to-image pipelines do not pass it: they drop the first steps and call `set_begin_index`.

        Raises:
            ValueError: steps, strength or timesteps out of range, both or neither of steps and timesteps, betas that are
                not `num_train_timesteps` many, or an epsilon prediction asked for where alpha is 0.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Pass either num_inference_steps or timesteps.")
        if timesteps is not None and strength != 1:
            raise ValueError(f"strength={strength} chooses among stops, and timesteps are all of them: pass one of the two.")
        if len(self.alphas_cumprod) != len(self):
            raise ValueError(
                f"There are {len(self.alphas_cumprod)} betas for num_train_timesteps={len(self)}; they must be equally many."
            )
        configured = self.config.timesteps
        if num_inference_steps is None:
            assert timesteps is not None
            stops = self._check_timesteps(timesteps)
            off = [t for t in stops if t not in self.grid.timesteps]
            if off:
                warnings.warn(
                    f"Timesteps {off} are not points of the grid of {self.grid.num_solver_steps} solver steps that the phases "
                    f"are cut from; edges are {list(self.grid.edges)}. Sampling works, but not where the adapter was trained.",
                    stacklevel=2,
                )
        elif configured is not None and len(configured) == num_inference_steps and strength == 1:
            stops = self._check_timesteps(configured)
        else:
            stops = list(self.grid.sampling_timesteps(num_inference_steps, strength))
        proper = self.betas.max() <= 1  # others were warned about
        if self.config.prediction_type == "epsilon" and self._alphas[stops[0]] == 0 and proper:
            raise ValueError(
                f"At timestep {stops[0]} alpha is 0 (zero terminal SNR) and an epsilon prediction says nothing about x_0: "
                "use a v_prediction model, or set rescale_betas_zero_snr=False."
            )
        self.num_inference_steps = len(stops)
        self.timesteps = torch.tensor(stops, dtype=torch.int64, device=device)
        table = self._step_coefficients(stops)
        self._coefficients = table.tolist()
        self._coefficient_table = table.float()  # stays on the CPU: no kernel waits for its scalars
        self._step_index = None
        self._begin_index = None

    def _step_coefficients(self, stops: list[int]) -> torch.Tensor:
        """Rows (a, b, c, d, p, q, sigma_s), (K, 7) float64: x_0 = a x + b F, eps = c x + d F, x_s = p x + q F at eta = 0."""
        alpha, sigma = self._alphas[stops], self._sigmas[stops]
        last = (alpha.new_ones(1), alpha.new_zeros(1))
        if self.config.final_sigmas_type == "sigma_min":
            last = (self._alphas[:1], self._sigmas[:1])
        next_alpha, next_sigma = torch.cat([alpha[1:], last[0]]), torch.cat([sigma[1:], last[1]])
        from_network = prediction_coefficients(self.config.prediction_type, alpha, sigma)
        a, b, c, d = (torch.as_tensor(value, dtype=alpha.dtype).expand_as(alpha) for value in from_network)
        p, q = next_alpha * a + next_sigma * c, next_alpha * b + next_sigma * d
        return torch.stack([a, b, c, d, p, q, next_sigma], dim=1)

    def _check_timesteps(self, timesteps: Sequence[int] | torch.Tensor) -> list[int]:
        top = len(self) - 1
        try:
            values = timesteps.tolist() if isinstance(timesteps, torch.Tensor) else list(timesteps)
            stops = [int(t) for t in values]
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"timesteps must be integers from {top} to 0; got {shortened(timesteps)}.") from error
        if not stops or stops != values or not all(0 <= t <= top for t in stops):
            raise ValueError(f"timesteps must be integers from {top} to 0; got {shortened(values)}.")
        if any(b >= a for a, b in pairwise(stops)):
            raise ValueError(f"timesteps must decrease strictly; got {shortened(stops)}.")
        return stops

    def index_for_timestep(self, timestep: int | torch.Tensor, schedule_timesteps: torch.Tensor | None = None) -> int:
        """
        Find a timestep among the stops.

        Args:
            timestep (`int` or `torch.Tensor`): One of `timesteps`.
            schedule_timesteps (`torch.Tensor`, *optional*): Look here instead of in `timesteps`.
        """
        stops = self.timesteps if schedule_timesteps is None else schedule_timesteps
        found = (stops == timestep).nonzero()
        if len(found) == 0:
            raise ValueError(f"Timestep {int(timestep)} is not one of the stops that set_timesteps chose: {stops.tolist()}.")
        return int(found[0].item())

    def _init_step_index(self, timestep: int | torch.Tensor) -> int:
        return self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> PCMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        Jump from this stop to the next.

        `x_s = alpha_s x_0 + sigma_s (sqrt(r) eps + sqrt(1-r) z)` with `sqrt(r) = 1 - eta` (arXiv 2405.18407, Eq. 44).
        Computed in float32; returned in the sample's dtype. After the last step a sample that is not finite is warned about.

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, num_channels, ...)`):
                The network's prediction, after guidance.
            timestep (`int` or `torch.Tensor`):
                The stop; looked at in the first step only, to find where to begin.
            sample (`torch.Tensor` of the same shape):
                The noisy sample at this stop.
            eta (`float`, defaults to 0.0):
                0 is deterministic, 1 draws all noise anew, as LCM does. Neither DDIM's nor TCD's eta.
            generator (`torch.Generator` or a list of them, *optional*):
                Draws the noise when `eta > 0`; a list has one per image.
            return_dict (`bool`, defaults to `True`):
                Return a [`PCMSchedulerOutput`] instead of the tuple `(prev_sample, pred_original_sample)`.

        Raises:
            ValueError: `set_timesteps` was not called, `timestep` is not a stop, or eta is out of range.
        """
        if not self._coefficients:
            raise ValueError("Call set_timesteps before step.")
        if self._step_index is None:
            self._step_index = self._init_step_index(timestep)
        if self._step_index >= len(self._coefficients):
            raise ValueError(f"All {len(self._coefficients)} steps are done; call set_timesteps to begin again.")
        # Numbers save a kernel each. Traced, they would be constants of the graph and every step a new graph.
        table = self._coefficient_table if torch.compiler.is_compiling() else self._coefficients
        a, b, c, d, p, q, next_sigma = table[self._step_index]
        self._step_index += 1

        x = widen(sample)
        x0 = _combine(x, a, model_output, b)
        last = self._step_index == len(self._coefficients)
        ends_at_x0 = last and self.config.final_sigmas_type == "zero"
        if eta:
            check_eta(eta)
            self._warn_about_eta(eta)
        if ends_at_x0:
            prev = x0
        elif not eta:
            prev = _combine(x, p, model_output, q)
        else:
            kept, fresh = noise_fractions(eta)
            lost = (1 - kept) * next_sigma
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            prev = _combine(_combine(x, p - lost * c, model_output, q - lost * d), 1.0, noise, fresh * next_sigma)
        prev, x0 = prev.to(sample.dtype), x0.to(sample.dtype)
        if last and not torch.compiler.is_compiling():
            warn_if_not_finite(prev, self._step_index)
        return PCMSchedulerOutput(prev, x0) if return_dict else (prev, x0)

    def _warn_about_eta(self, eta: float) -> None:
        if not self._warned_eta and self.grid.num_phases > 1:
            self._warned_eta = True
            warnings.warn(
                f"eta={eta} re-noises a predicted x_0, which with {self.grid.num_phases} phases is the end of the ODE "
                "in the last phase only; eta=0 is what phased adapters are trained for.",
                stacklevel=3,
            )

    def _levels(self, like: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and sigma at `timesteps`, shaped to broadcast against `like`, in its dtype, on its device."""
        if like.device not in self._noising_levels:
            self._noising_levels[like.device] = (
                self._alphas.to(like.device, torch.float32),
                self._sigmas.to(like.device, torch.float32),
            )
        shape = (-1, *(1,) * (like.ndim - 1))
        index = timesteps.to(like.device)
        alphas, sigmas = self._noising_levels[like.device]
        return alphas[index].to(like.dtype).view(shape), sigmas[index].to(like.dtype).view(shape)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        The forward process: `alpha_t x_0 + sigma_t noise`.

        Args:
            original_samples (`torch.Tensor` of shape `(batch_size, ...)`): Clean samples.
            noise (`torch.Tensor` of the same shape): Standard normal noise.
            timesteps (`torch.Tensor` of shape `(batch_size,)` or `(1,)`): Integer timesteps.

        Raises:
            ValueError: there are no timesteps, as in image-to-image with too little strength.
        """
        if timesteps.numel() == 0:  # noise for none of the samples would be an empty batch, and nobody is told
            raise ValueError(
                "There is no timestep to noise for. Image-to-image and video-to-video take int(num_inference_steps * strength) "
                "steps, and that is 0: ask for more steps or more strength."
            )
        alphas, sigmas = self._levels(original_samples, timesteps)
        return alphas * original_samples + sigmas * noise

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        The target of a v-prediction network: `alpha_t noise - sigma_t x_0`.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, ...)`): Clean samples.
            noise (`torch.Tensor` of the same shape): The noise added to them.
            timesteps (`torch.Tensor` of shape `(batch_size,)` or `(1,)`): Integer timesteps.
        """
        alphas, sigmas = self._levels(sample, timesteps)
        return alphas * noise - sigmas * sample

"""PCMEditPipeline: a picture, what must stay true of it, and a prompt; a few steps later an edit in which it is true."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch.nn import functional as F

from ..editing import Known, estimate_noise, invert, last_phase_steps, latent_mask, nearby_noise, sample_edit, slerp
from ..lora_file import AdapterSettings
from ..operators import BlockMean, Downsample, Everything, Free, KeepRegion, Luminance, Operator
from .latent_model import LatentModel
from .pictures import Pictures, check_output_type, from_pictures, to_mask, to_pictures

Generators = torch.Generator | list[torch.Generator] | None
StepEnd = Callable[["PCMEditPipeline", int, int, dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]


@dataclass
class PCMEditOutput(BaseOutput):
    """What `PCMEditPipeline` returns.

    Attributes:
        images: PIL pictures, numpy or a tensor, by `output_type`.
        residual: for each picture, how far its measurement is from what was given, the worst pixel or block, in grey levels (of
            255) before rounding. Of a noisy measurement, the noise that was taken out.
    """

    images: Any
    residual: list[float]


@dataclass(frozen=True)
class Strategy:
    """Where in sampling a measurement acts.

    Attributes:
        projected: which steps send x_0 through pixels and the projection: `all`, those of the `last phase`, or only the
            `end`.
        known: put known latents back between steps, where the measurement keeps a region.
        strength: how far up the schedule sampling starts from the measured picture; 1 is pure noise.
        eta: how much of the noise is drawn anew between steps; None: as the adapter recommends.
    """

    projected: str = "all"
    known: bool = False
    strength: float = 1.0
    eta: float | None = None


BLACK = 0.02  # of a mask: five grey levels, which JPEG makes of black
PROJECTED = ("all", "last phase", "end")

# Measured on the shapes model: docs/editing.md has the figures and `benchmarks/editing.py` writes them.
STRATEGIES = {
    "inpaint": Strategy("all", strength=0.8, eta=1.0),
    "colorize": Strategy("all", strength=0.6, eta=1.0),
    "super_resolve": Strategy("all", strength=0.6, eta=1.0),
    "stroke": Strategy("end", strength=0.6),
    "denoise": Strategy("end"),  # its strength is that of the noise
}


class PCMEditPipeline:
    """Zero-shot editing with any consistency adapter, on the networks of a loaded pipeline.

    ```py
    settings = load_pcm_lora(pipe, "pcm.safetensors")
    edit = PCMEditPipeline.from_pipe(pipe, settings)
    image = edit.inpaint(image, mask_image, prompt="a red door").images[0]
    ```

    Every method takes the options of `__call__`. What a task measures is true of its result: kept pixels are copied, a
    luminance or block mean is off by rounding at most.

    Args:
        pipe: a diffusers pipeline of SD1.5's or SDXL's kind, with a `PCMScheduler`.
        settings: of the adapter, as `load_pcm_lora` returns them: recommended steps, guidance and eta become the defaults.

    Raises:
        ValueError: another kind of pipeline or scheduler; what to do.
    """

    def __init__(self, pipe: Any, settings: AdapterSettings | None = None):
        self.pipe = pipe
        self.model = LatentModel(pipe)
        self.num_inference_steps = settings.num_inference_steps if settings else 4
        self.guidance_scale = settings.guidance_scale if settings else 1.0
        self.eta = settings.eta if settings else 0.0

    @classmethod
    def from_pipe(cls, pipe: Any, settings: AdapterSettings | None = None) -> PCMEditPipeline:
        """On the networks of `pipe`, which stays usable; nothing is copied."""
        return cls(pipe, settings)

    # ------------------------------------------------------------------------------------------ the general call

    def __call__(
        self,
        operator: Operator,
        measurement: Any,
        size: tuple[int, int],
        start: torch.Tensor | None = None,
        strategy: Strategy = Strategy(),
        measurement_noise: float = 0.0,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        generator: Generators = None,
        noise: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepEnd | None = None,
    ) -> PCMEditOutput:
        """Sample a picture of which the measurement holds.

        Args:
            operator, measurement: what must hold, for one picture or a batch.
            size: (height, width) of the pictures, any.
            start: pictures (N, 3, H, W) in [-1, 1] to start from at `strategy.strength`, and whose kept latents are put back.
            strategy: where in sampling the measurement acts.
            measurement_noise: standard deviation of the noise in the measurement, in units of [-1, 1]; 0: exact.
            prompt, negative_prompt: one text, or one for each picture; several texts draw several pictures of one measurement.
            num_inference_steps: K; None: what the adapter recommends.
            guidance_scale: g; None: what the adapter recommends.
            eta: how much of the noise is drawn anew between steps; None: what the strategy says.
            generator: draws the noise; a list has one for each picture.
            noise: the initial noise itself, (N, 4, h, w), instead.
            output_type: `pil`, `np` or `pt`.
            callback_on_step_end: called after each step but the last with (pipeline, step, timestep, state), state holding
                `latents` and `pred_original_sample`; latents that it returns in a dict replace the sample.

        Raises:
            ValueError: a measurement that no picture has, counts that do not fit, steps or strength out of range.
        """
        check_output_type(output_type)
        if strategy.projected not in PROJECTED:
            raise ValueError(f"Strategy.projected is one of {', '.join(PROJECTED)}; got {strategy.projected!r}.")
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance = self.guidance_scale if guidance_scale is None else guidance_scale
        eta = next(e for e in (eta, strategy.eta, self.eta) if e is not None)
        model, device = self.model, self.model.device

        given = _first(measurement).shape[0]
        count, (prompts, negatives) = _counts(given, prompt, negative_prompt)
        measurement = _map(measurement, lambda y: y.to(device).expand(count, *y.shape[1:]))
        if not measurement_noise:
            operator.check(measurement)
        strength = strategy.strength if start is not None else 1.0
        points = model.grid.stops(steps, strength)
        levels = model.levels(points)
        codec = model.codec(size)
        noise = self.noise(count, size, generator) if noise is None else noise.to(device, torch.float32)
        if len(noise) != count:
            raise ValueError(f"noise is of {len(noise)} pictures, and {count} are drawn.")
        sample, known = noise, None
        if start is not None and (strength < 1 or strategy.known):
            first = codec.encode(start.to(device)).expand(count, -1, -1, -1)
            if strength < 1:
                sample = levels.alphas[0] * first + levels.sigmas[0] * noise
            if strategy.known and isinstance(operator, KeepRegion):
                kept = latent_mask(operator.mask.to(device), model.latent_size(size))
                known = Known(first, noise, kept)
        projected = {
            "all": [True] * steps,
            "last phase": last_phase_steps(model.grid, points),
            "end": [False] * steps,
        }[strategy.projected]
        told = model.prompts(prompts, negatives, guidance, size)
        with self._progress(steps) as bar:

            def step_end(i: int, latents: torch.Tensor, x0: torch.Tensor) -> torch.Tensor | None:
                bar.update()
                if callback_on_step_end is None:
                    return None
                state = {"latents": latents, "pred_original_sample": x0}
                returned = callback_on_step_end(self, i, levels.timesteps[i], state)
                return (returned or {}).get("latents")

            pictures = sample_edit(
                model.denoiser(levels, told),
                operator,
                measurement,
                sample,
                levels.alphas,
                levels.sigmas,
                codec,
                projected,
                known,
                eta,
                lambda *_: randn_tensor(sample.shape, generator=generator, device=device, dtype=torch.float32),
                measurement_noise,
                callback=step_end,
            )
            bar.update()
        self.pipe.maybe_free_model_hooks()
        residual = operator.residual(pictures, measurement) * 127.5
        return PCMEditOutput(from_pictures(pictures, output_type), residual.tolist())

    # ------------------------------------------------------------------------------------------ tasks

    def inpaint(self, image: Pictures, mask_image: Pictures, **options: Any) -> PCMEditOutput:
        """Draw the white part of the mask anew; the black part is kept, pixel for pixel.

        Args:
            image: the pictures.
            mask_image: of the same size; white is drawn anew, black is kept, grey shows so much of the new.
            **options: of `__call__`.
        """
        pictures = to_pictures(image).to(self.model.device)
        mask = to_mask(mask_image, _size(pictures)).to(self.model.device)
        operator = KeepRegion(mask < BLACK, blend=mask)
        return self._edit("inpaint", operator, pictures, _filled(pictures, mask < 0.5), options)

    def outpaint(
        self, image: Pictures, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0, **options: Any
    ) -> PCMEditOutput:
        """Continue the picture past its edges, by so many pixels; the picture itself is kept, pixel for pixel."""
        margins = {"left": left, "top": top, "right": right, "bottom": bottom}
        if min(margins.values()) < 0 or not any(margins.values()):
            raise ValueError(f"Margins are 0 or more pixels, at least one of them more; got {margins}.")
        pictures = to_pictures(image).to(self.model.device)
        frame = (left, right, top, bottom)
        kept = F.pad(torch.ones_like(pictures[:1, :1]), frame) > 0
        operator = KeepRegion(kept)
        wide = F.pad(pictures, frame)
        return self._edit("inpaint", operator, operator.measure(wide), _filled(wide, operator.mask), options)

    def colorize(self, image: Pictures, mask_image: Pictures | None = None, **options: Any) -> PCMEditOutput:
        """Colour a greyscale picture; its luminance (0.299 R + 0.587 G + 0.114 B) is kept.

        Args:
            image: the pictures; of coloured ones the luminance is taken.
            mask_image: white is drawn anew altogether, colour and luminance.
            **options: of `__call__`.
        """
        pictures = to_pictures(image).to(self.model.device)
        kept = None if mask_image is None else to_mask(mask_image, _size(pictures)).to(self.model.device) < 0.5
        operator = Luminance(kept)
        y = operator.measure(pictures)
        return self._edit("colorize", operator, y, y.expand(-1, 3, -1, -1), options)

    def super_resolve(self, image: Pictures, factor: int = 4, kernel: str = "mean", **options: Any) -> PCMEditOutput:
        """Enlarge a picture; shrunk again, the result is the picture.

        Args:
            image: the small pictures.
            factor: of enlargement along each side.
            kernel: how they were made small: `mean` of factor x factor pixels, or `antialias`, a wider kernel.
            **options: of `__call__`.
        """
        if factor < 2 or int(factor) != factor:
            raise ValueError(f"factor is a whole number from 2; got {factor}.")
        small = to_pictures(image).to(self.model.device)
        size = (small.shape[-2] * factor, small.shape[-1] * factor)
        if kernel not in ("mean", "antialias"):
            raise ValueError(f"kernel is mean or antialias; got {kernel!r}.")
        operator = BlockMean(factor) if kernel == "mean" else Downsample(size, _size(small))
        start = F.interpolate(small, size, mode="bicubic", antialias=False).clamp(-1, 1)
        return self._edit("super_resolve", operator, small, operator.project(start, small), options)

    def stroke(self, image: Pictures, strength: float | None = None, **options: Any) -> PCMEditOutput:
        """From a sketch of coloured strokes, or a photograph, to a picture (SDEdit, arXiv 2108.01073).

        Args:
            image: the sketch.
            strength: in (0, 1]: little keeps the sketch, much follows the prompt.
            **options: of `__call__`.
        """
        pictures = to_pictures(image).to(self.model.device)
        if strength is not None:
            options["strategy"] = Strategy("end", strength=strength)
        operator = Free()
        return self._edit("stroke", operator, operator.measure(pictures), pictures, options)

    def denoise(self, image: Pictures, noise_level: float | None = None, **options: Any) -> PCMEditOutput:
        """Take white noise out of a picture: sampling starts from it, at the noise's own level.

        Little noise leaves room for few steps; more than fit are not taken.

        Args:
            image: the noisy pictures.
            noise_level: standard deviation in grey levels of 0 to 255; None: estimated from the picture.
            **options: of `__call__`.
        """
        pictures = to_pictures(image).to(self.model.device)
        sigma = estimate_noise(pictures).mean().item() if noise_level is None else noise_level / 127.5
        if not 0 < sigma <= 2:
            raise ValueError(
                f"noise_level is above 0 and at most 255 grey levels; got {sigma * 127.5:g}"
                f"{' by estimation: there is no noise to take out' if noise_level is None else ''}."
            )
        grid = self.model.grid
        levels = self.model.levels(range(1, grid.num_solver_steps + 1), ends_at_zero=False)
        point = 1 + sum(s / a < sigma for a, s in zip(levels.alphas, levels.sigmas, strict=True))
        if point > grid.num_solver_steps:
            raise ValueError(f"A noise_level of {sigma * 127.5:g} grey levels is above the schedule's highest.")
        steps = options.pop("num_inference_steps", None) or self.num_inference_steps
        strategy = replace(STRATEGIES["denoise"], strength=point / grid.num_solver_steps)
        given = {"measurement_noise": sigma, "num_inference_steps": min(steps, point), "strategy": strategy}
        return self._edit("denoise", Everything(), pictures, pictures, given | options)

    # ------------------------------------------------------------------------------------------ through the noise

    def invert(self, image: Pictures, prompt: str | Sequence[str] = "") -> torch.Tensor:
        """The noise (N, 4, h, w) from which the unguided teacher draws the picture, on the fine grid of the solver.

        Args:
            image: the pictures.
            prompt: what is in them; empty: nothing said.
        """
        pictures = to_pictures(image).to(self.model.device)
        return self._invert(pictures, prompt)

    def _invert(self, pictures: torch.Tensor, prompt: str | Sequence[str]) -> torch.Tensor:
        model, size = self.model, _size(pictures)
        levels = model.levels(range(model.grid.num_solver_steps + 1), ends_at_zero=False)
        count, (prompts, negatives) = _counts(len(pictures), prompt, "")
        if count != len(pictures):
            raise ValueError(f"{count} prompts do not fit {len(pictures)} pictures to invert: give one, or one for each.")
        told = model.prompts(prompts, negatives, 1.0, size)
        denoiser = model.denoiser(levels, told)
        with self._progress(model.grid.num_solver_steps) as bar, model.teacher():

            def counted(sample: torch.Tensor, i: int) -> torch.Tensor:
                bar.update()
                return denoiser(sample, i)

            return invert(counted, model.codec(size).encode(pictures), levels.alphas, levels.sigmas)

    def sample(self, noise: torch.Tensor, size: tuple[int, int], **options: Any) -> PCMEditOutput:
        """Draw from given noise, measuring nothing; the options of `__call__`."""
        operator = Free()
        nothing = noise.new_zeros(len(noise), 0)
        return self(operator, nothing, size, noise=noise, **options)

    def rewrite(
        self, image: Pictures, prompt: str | Sequence[str], source_prompt: str | Sequence[str] = "", **options: Any
    ) -> PCMEditOutput:
        """Draw a picture again from its own noise, with other words.

        Args:
            image: the pictures.
            prompt: of the result.
            source_prompt: of what is there now.
            **options: of `__call__`.
        """
        pictures = to_pictures(image).to(self.model.device)
        return self.sample(self._invert(pictures, source_prompt), _size(pictures), prompt=prompt, **options)

    def interpolate(
        self, first: Pictures | int, second: Pictures | int, count: int = 5, size: tuple[int, int] | None = None, **options: Any
    ) -> PCMEditOutput:
        """Pictures on the way from one to another: slerp of their noise.

        Args:
            first, second: seeds, or pictures, which are inverted.
            count: pictures, both ends included.
            size: (height, width); needed between seeds.
            **options: of `__call__`.
        """
        if count < 2:
            raise ValueError(f"count includes both ends, so it is at least 2; got {count}.")
        prompt = options.get("prompt", "")
        ends: list[torch.Tensor] = []
        for end in (first, second):
            if isinstance(end, int):
                if size is None:
                    raise ValueError("Between seeds, say the size: (height, width).")
                ends.append(self.noise(1, size, torch.Generator("cpu").manual_seed(end)))
            else:
                pictures = to_pictures(end).to(self.model.device)
                size = _size(pictures)
                ends.append(self._invert(pictures, prompt))
        assert size is not None
        noise = torch.cat([slerp(ends[0], ends[1], i / (count - 1)) for i in range(count)])
        return self.sample(noise, size, **options)

    def vary(self, image: Pictures, amount: float = 0.3, count: int = 4, **options: Any) -> PCMEditOutput:
        """Pictures around a picture: its own noise, turned a little towards fresh noise.

        Args:
            image: one picture.
            amount: in [0, 1]: 0 draws it again, 1 draws something else.
            count: how many.
            **options: of `__call__`.
        """
        if not 0 <= amount <= 1:
            raise ValueError(f"amount is in [0, 1]; got {amount}.")
        pictures = to_pictures(image).to(self.model.device)
        noise = self._invert(pictures, options.get("prompt", "")).repeat(count, 1, 1, 1)
        fresh = self.noise(len(noise), _size(pictures), options.get("generator"))
        return self.sample(nearby_noise(noise, fresh, amount), _size(pictures), **options)

    # ------------------------------------------------------------------------------------------ parts

    def noise(self, count: int, size: tuple[int, int], generator: Generators = None) -> torch.Tensor:
        """Initial noise for `count` pictures of (height, width)."""
        shape = (count, self.model.vae.config.latent_channels, *self.model.latent_size(size))
        return randn_tensor(shape, generator=generator, device=self.model.device, dtype=torch.float32)

    def _edit(
        self, task: str, operator: Operator, measurement: Any, start: torch.Tensor, options: dict[str, Any]
    ) -> PCMEditOutput:
        return self(operator, measurement, _size(start), start=start, **({"strategy": STRATEGIES[task]} | options))

    @contextmanager
    def _progress(self, total: int) -> Iterator[Any]:
        """The pipeline's own bar, with what its user has configured."""
        with self.pipe.progress_bar(total=total) as bar:
            yield bar


def _size(pictures: torch.Tensor) -> tuple[int, int]:
    return pictures.shape[-2], pictures.shape[-1]


def _filled(pictures: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The pictures with the mean of their kept pixels elsewhere: a start that leans to no side."""
    mean = (pictures * kept).sum(dim=(2, 3), keepdim=True) / kept.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    return torch.where(kept, pictures, mean)


def _first(measurement: Any) -> torch.Tensor:
    return _first(measurement[0]) if isinstance(measurement, tuple) else measurement


def _map(measurement: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return tuple(_map(part, function) for part in measurement) if isinstance(measurement, tuple) else function(measurement)


def _counts(
    pictures: int, prompt: str | Sequence[str], negative_prompt: str | Sequence[str]
) -> tuple[int, tuple[list[str], list[str]]]:
    """How many pictures are drawn, and a prompt and a negative prompt for each.

    Raises:
        ValueError: several pictures with several prompts of another number.
    """
    texts = [[one] if isinstance(one, str) else list(one) for one in (prompt, negative_prompt)]
    count = max(pictures, *(len(t) for t in texts))
    for name, length in (("pictures", pictures), ("prompts", len(texts[0])), ("negative prompts", len(texts[1]))):
        if length not in (1, count):
            raise ValueError(f"{length} {name} do not fit {count}: give one for all, or one for each.")
    prompts, negatives = (t if len(t) == count else t * count for t in texts)
    return count, (prompts, negatives)

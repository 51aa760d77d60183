"""PCMEditPipeline: a picture, what must stay true of it, and a prompt; a few steps later an edit in which it is true."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..edit_tasks import (
    EVERY_STEP,
    STRATEGIES,
    Edit,
    Strategy,
    colorization,
    denoising,
    draw,
    free,
    inpainting,
    outpainting,
    size_of,
    stroke_guided,
    super_resolution,
)
from ..editing import invert, nearby_noise, slerp
from ..lora_file import AdapterSettings
from ..operators import Operator
from ..sampling import check_eta
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
        strategy: Strategy = EVERY_STEP,
        measurement_noise: float = 0.0,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        generator: Generators = None,
        noise: torch.Tensor | Callable[[], torch.Tensor] | None = None,
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
            generator: draws the noise; a list has one for each picture, or one for all.
            noise: the initial noise itself, (N, 4, h, w), instead; or what makes it, called once all else is found to fit.
            output_type: `pil`, `np` or `pt`.
            callback_on_step_end: called after each step but the last with (pipeline, step, timestep, state), state holding
                `latents` and `pred_original_sample`; latents that it returns in a dict replace the sample.

        Raises:
            ValueError: a measurement that no picture has, counts that do not fit, steps or strength out of range.
        """
        check_output_type(output_type)
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance = self.guidance_scale if guidance_scale is None else guidance_scale
        eta = next(e for e in (eta, strategy.eta, self.eta) if e is not None)
        check_eta(eta)
        model, device = self.model, self.model.device

        given = [*_parts(measurement), *([] if start is None else [start])]
        count, (prompts, negatives) = _counts([len(part) for part in given], prompt, negative_prompt)
        _check_generators(generator, count)
        measurement = _map(measurement, lambda y: y.to(device).expand(count, *y.shape[1:]))
        if not measurement_noise:
            operator.check(measurement)
        edit = Edit(operator, measurement, size, None if start is None else start.to(device), strategy, measurement_noise)
        points = model.grid.stops(steps, edit.strength)
        levels = model.levels(points)
        told = model.prompts(prompts, negatives, guidance, size)
        initial = self.noise(count, size, generator) if noise is None else noise() if callable(noise) else noise
        initial = initial.to(device, torch.float32)
        if len(initial) != count:
            raise ValueError(f"noise is of {len(initial)} pictures, and {count} are drawn.")
        with self._progress(steps) as bar:

            def step_end(i: int, latents: torch.Tensor, x0: torch.Tensor) -> torch.Tensor | None:
                bar.update()
                if callback_on_step_end is None:
                    return None
                state = {"latents": latents, "pred_original_sample": x0}
                returned = callback_on_step_end(self, i, levels.timesteps[i], state)
                return (returned or {}).get("latents")

            def fresh(*_: float) -> torch.Tensor:
                return randn_tensor(initial.shape, generator=generator, device=device, dtype=torch.float32)

            codec = model.codec(size)
            denoiser = model.denoiser(levels, told)
            pictures = draw(
                edit, denoiser, codec, model.grid, points, levels.alphas, levels.sigmas, initial, eta, fresh, step_end
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
        pictures = self._pictures(image)
        mask = to_mask(mask_image, size_of(pictures)).to(self.model.device)
        return self._edit(inpainting(pictures, mask), options)

    def outpaint(
        self, image: Pictures, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0, **options: Any
    ) -> PCMEditOutput:
        """Continue the picture past its edges, by so many pixels; the picture itself is kept, pixel for pixel."""
        return self._edit(outpainting(self._pictures(image), left, top, right, bottom), options)

    def colorize(self, image: Pictures, mask_image: Pictures | None = None, **options: Any) -> PCMEditOutput:
        """Colour a greyscale picture; its luminance (0.299 R + 0.587 G + 0.114 B) is kept.

        Args:
            image: the pictures; of coloured ones the luminance is taken.
            mask_image: white is drawn anew altogether, colour and luminance.
            **options: of `__call__`.
        """
        pictures = self._pictures(image)
        mask = None if mask_image is None else to_mask(mask_image, size_of(pictures)).to(self.model.device)
        return self._edit(colorization(pictures, mask), options)

    def super_resolve(self, image: Pictures, factor: int = 4, kernel: str = "mean", **options: Any) -> PCMEditOutput:
        """Enlarge a picture; shrunk again, the result is the picture.

        Args:
            image: the small pictures.
            factor: of enlargement along each side.
            kernel: how they were made small: `mean` of factor x factor pixels, or `antialias`, a wider kernel.
            **options: of `__call__`.
        """
        return self._edit(super_resolution(self._pictures(image), factor, kernel), options)

    def stroke(self, image: Pictures, strength: float | None = None, **options: Any) -> PCMEditOutput:
        """From a sketch of coloured strokes, or a photograph, to a picture (SDEdit, arXiv 2108.01073).

        Args:
            image: the sketch.
            strength: in (0, 1]: little keeps the sketch, much follows the prompt.
            **options: of `__call__`.
        """
        if strength is not None:
            options["strategy"] = replace(STRATEGIES["stroke"], strength=strength)
        return self._edit(stroke_guided(self._pictures(image)), options)

    def denoise(self, image: Pictures, noise_level: float | None = None, **options: Any) -> PCMEditOutput:
        """Take white noise out of a picture: sampling starts from it, at the noise's own level.

        Little noise leaves room for few steps; more than fit are not taken.

        Args:
            image: the noisy pictures.
            noise_level: standard deviation in grey levels of 0 to 255; None: estimated from the picture.
            **options: of `__call__`.
        """
        grid = self.model.grid
        edit = denoising(self._pictures(image), noise_level, grid, self.model.noise_ratios())
        asked = options.pop("num_inference_steps", None)
        steps = self.num_inference_steps if asked is None else asked
        return self._edit(edit, {"num_inference_steps": min(steps, grid.start_point(edit.strength))} | options)

    # ------------------------------------------------------------------------------------------ through the noise

    def invert(self, image: Pictures, prompt: str | Sequence[str] = "") -> torch.Tensor:
        """The noise (N, 4, h, w) from which the unguided teacher draws the picture, on the fine grid of the solver.

        Args:
            image: the pictures.
            prompt: what is in them; empty: nothing said.
        """
        pictures = self._pictures(image)
        noise = self._invert(pictures, prompt)
        self.pipe.maybe_free_model_hooks()
        return noise

    def _invert(self, pictures: torch.Tensor, prompt: str | Sequence[str]) -> torch.Tensor:
        model, size = self.model, size_of(pictures)
        levels = model.levels(range(model.grid.num_solver_steps + 1), ends_at_zero=False)
        count, (prompts, negatives) = _counts([len(pictures)], prompt, "")
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
        return self._edit(free(len(noise), size), {"noise": noise} | options)

    def rewrite(
        self, image: Pictures, prompt: str | Sequence[str], source_prompt: str | Sequence[str] = "", **options: Any
    ) -> PCMEditOutput:
        """Draw a picture again from its own noise, with other words.

        Args:
            image: the pictures.
            prompt: of the result; of one picture several draw several.
            source_prompt: of what is there now.
            **options: of `__call__`.
        """
        pictures = self._pictures(image)
        # one picture in other words, again and again
        times = len(prompt) if len(pictures) == 1 and not isinstance(prompt, str) else 1

        def noise() -> torch.Tensor:
            return self._invert(pictures, source_prompt).repeat(times, 1, 1, 1)

        return self._draw_from(noise, len(pictures) * times, size_of(pictures), {"prompt": prompt} | options)

    def interpolate(
        self, first: Pictures | int, second: Pictures | int, count: int = 5, size: tuple[int, int] | None = None, **options: Any
    ) -> PCMEditOutput:
        """Pictures on the way from one to another: slerp of their noise.

        Args:
            first, second: seeds, or pictures, which are inverted.
            count: pictures, both ends included.
            size: (height, width); needed between seeds, and otherwise the pictures'.
            **options: of `__call__`. Of several prompts, one for each picture, the first and the last are of the ends.

        Raises:
            ValueError: fewer than two pictures, no size, or ends of several sizes or numbers of pictures.
        """
        if count < 2:
            raise ValueError(f"count includes both ends, so it is at least 2; got {count}.")
        ends = [int(end) if isinstance(end, Integral) else self._pictures(end) for end in (first, second)]  # type: ignore[arg-type]
        sizes = {size_of(end) for end in ends if not isinstance(end, int)} | ({(size[0], size[1])} if size else set())
        if len(sizes) != 1:
            raise ValueError(
                f"What is interpolated has one size (height, width); got {sorted(sizes)}."
                if sizes
                else "Between seeds, say the size: (height, width)."
            )
        numbers = [1 if isinstance(end, int) else len(end) for end in ends]
        if min(numbers) not in (1, max(numbers)):
            raise ValueError(f"The ends are of {numbers[0]} and {numbers[1]} pictures: give one for all, or one for each.")
        (height, width), prompt = sizes.pop(), options.get("prompt", "")
        several = not isinstance(prompt, str) and len(prompt) > 1

        def noise() -> torch.Tensor:
            begin, last = (
                self.noise(1, (height, width), torch.Generator("cpu").manual_seed(end))
                if isinstance(end, int)
                else self._invert(end, prompt[number] if several else prompt)
                for number, end in ((0, ends[0]), (-1, ends[1]))
            )
            return torch.cat([slerp(begin, last, i / (count - 1)) for i in range(count)])

        return self._draw_from(noise, count * max(numbers), (height, width), options)

    def vary(self, image: Pictures, amount: float = 0.3, count: int = 4, **options: Any) -> PCMEditOutput:
        """Pictures around a picture: its own noise, turned a little towards fresh noise.

        Args:
            image: one picture.
            amount: in [0, 1]: 0 draws it again, 1 draws something else.
            count: how many.
            **options: of `__call__`. Of several prompts, one for each result, none says what is in the picture now.
        """
        if not 0 <= amount <= 1:
            raise ValueError(f"amount is in [0, 1]; got {amount}.")
        pictures, prompt = self._pictures(image), options.get("prompt", "")
        several = not isinstance(prompt, str) and len(prompt) > len(pictures)
        number, size = len(pictures) * count, size_of(pictures)

        def noise() -> torch.Tensor:
            fresh = self.noise(number, size, options.get("generator"))
            return nearby_noise(self._invert(pictures, "" if several else prompt).repeat(count, 1, 1, 1), fresh, amount)

        return self._draw_from(noise, number, size, options)

    # ------------------------------------------------------------------------------------------ parts

    def noise(self, count: int, size: tuple[int, int], generator: Generators = None) -> torch.Tensor:
        """Initial noise for `count` pictures of (height, width).

        Raises:
            ValueError: a list of another number of generators.
        """
        _check_generators(generator, count)
        shape = (count, self.model.vae.config.latent_channels, *self.model.latent_size(size))
        return randn_tensor(shape, generator=generator, device=self.model.device, dtype=torch.float32)

    def _pictures(self, image: Pictures) -> torch.Tensor:
        return to_pictures(image).to(self.model.device)

    def _draw_from(
        self, noise: Callable[[], torch.Tensor], count: int, size: tuple[int, int], options: dict[str, Any]
    ) -> PCMEditOutput:
        """`sample` from noise that takes the whole teacher to make: it is made when no option can be refused any more."""
        return self._edit(free(count, size), {"noise": noise} | options)

    def _edit(self, edit: Edit, options: dict[str, Any]) -> PCMEditOutput:
        given = {"start": edit.start, "strategy": edit.strategy, "measurement_noise": edit.measurement_noise}
        return self(edit.operator, edit.measurement, edit.size, **(given | options))

    @contextmanager
    def _progress(self, total: int) -> Iterator[Any]:
        """The pipeline's own bar, with what its user has configured."""
        with self.pipe.progress_bar(total=total) as bar:
            yield bar


def _parts(measurement: Any) -> list[torch.Tensor]:
    return [one for part in measurement for one in _parts(part)] if isinstance(measurement, tuple) else [measurement]


def _map(measurement: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return tuple(_map(part, function) for part in measurement) if isinstance(measurement, tuple) else function(measurement)


def _check_generators(generator: Generators, count: int) -> None:
    """Raise ValueError for a list that has neither one generator for all pictures nor one for each."""
    if isinstance(generator, list) and len(generator) not in (1, count):
        raise ValueError(f"{len(generator)} generators do not fit {count} pictures: give one for all, or one for each.")


def _counts(
    pictures: Sequence[int], prompt: str | Sequence[str], negative_prompt: str | Sequence[str]
) -> tuple[int, tuple[list[str], list[str]]]:
    """How many pictures are drawn, and a prompt and a negative prompt for each.

    Args:
        pictures: of how many each thing is that was given.
        prompt, negative_prompt: one text, or several.

    Raises:
        ValueError: several of one kind and several of another, of other numbers.
    """
    texts = [[one] if isinstance(one, str) else list(one) for one in (prompt, negative_prompt)]
    of_pictures = [("pictures", number) for number in pictures]
    lengths = [*of_pictures, ("prompts", len(texts[0])), ("negative prompts", len(texts[1]))]
    count = max(length for _, length in lengths)
    for name, length in lengths:
        if length not in (1, count):
            raise ValueError(f"{length} {name} do not fit {count}: give one for all, or one for each.")
    prompts, negatives = (t if len(t) == count else t * count for t in texts)
    return count, (prompts, negatives)

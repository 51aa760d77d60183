"""Editing: an IMAGE, what must stay true of it, and a prompt; a few steps later an IMAGE in which it is true."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io
from torch.nn import functional as F

from ..pcm_scheduler.edit_tasks import (
    KERNELS,
    STRATEGIES,
    Edit,
    colorization,
    denoising,
    free,
    inpainting,
    outpainting,
    size_of,
    stroke_guided,
    super_resolution,
)
from ..pcm_scheduler.editing import slerp
from ..pcm_scheduler.operators import Downsample
from ..pcm_scheduler.phases import PhaseGrid
from .editing import Host, to_masked_pictures, to_pictures, to_rgb
from .face import HIDDEN, finite_advice, sampling_advice, say
from .inputs import (
    CATEGORY,
    PhaseNode,
    cfg_input,
    chosen_grid,
    eta_input,
    model_input,
    phase_inputs,
    prompt_inputs,
    seed_input,
    steps_input,
)
from .sampling import sigmas_at, stops_in_words

_ETA = "How much of the noise is drawn anew between steps; 1 also for adapters in LCM's style."
_STRENGTH = (
    "Where sampling starts: 1 is pure noise, less keeps more of the picture. The default measured best on a small model."
)

EXACT = ("inpaint", "colorize", "super_resolve")


def strength_input(task: str, tooltip: str = _STRENGTH) -> Any:
    default = STRATEGIES[task].strength
    return io.Float.Input("strength", default=default, min=0.02, max=1.0, step=0.01, tooltip=tooltip)


class EditNode(PhaseNode):
    """What the editing nodes share: the inputs around a task's own, and the run."""

    @classmethod
    def schema(
        cls,
        node_id: str,
        display_name: str,
        description: str,
        task: str,
        own: list[Any],
        strength: bool = True,
        seed: str = "Of all noise.",
    ) -> io.Schema:
        """The schema of a node.

        Args:
            node_id, display_name, description: of the node.
            task: whose strategy gives the defaults.
            own: inputs of the task.
            strength: whether where sampling starts is for the user to say.
            seed: what is said of it.
        """
        kept = "; what was to stay is exact in a saved PNG" if task in EXACT else ""
        return io.Schema(
            node_id=node_id,
            display_name=display_name,
            category=f"{CATEGORY}/editing",
            description=description,
            inputs=[
                model_input(),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                *prompt_inputs(),
                *own,
                seed_input(seed),
                steps_input(),
                cfg_input(),
                *([strength_input(task)] if strength else []),
                eta_input(STRATEGIES[task].eta or 0.0, _ETA),
                *phase_inputs(),
            ],
            outputs=[io.Image.Output("edited", display_name="image", tooltip=f"The result{kept}.")],
            hidden=HIDDEN,
        )

    @staticmethod
    def grid(inputs: dict[str, Any]) -> PhaseGrid:
        """Of a node's inputs, before they are passed on to `edit`."""
        return chosen_grid(inputs.get("settings"), inputs.get("num_phases", 4), inputs.get("num_solver_steps", 50))

    @classmethod
    def edit(
        cls,
        task: Edit,
        model: Any,
        vae: Any,
        positive: Any,
        negative: Any,
        seed: int,
        steps: int,
        cfg: float,
        eta: float,
        strength: float | None = None,
        settings: Any = None,
        num_phases: int = 4,
        num_solver_steps: int = 50,
        noise: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        """Make an edit, and say on the node how exact it is and what is odd about its inputs; noise and kept as `Host.draw`."""
        grid = chosen_grid(settings, num_phases, num_solver_steps)
        if strength is not None:
            task = replace(task, strategy=replace(task.strategy, strength=strength))
        cls.check(task)
        host = Host(model, vae, positive, negative, cfg, seed)
        image, error = host.draw(task, grid, steps, eta, noise, kept)
        said = [stops_in_words(grid, steps, task.strength), *finite_advice(host.finite)]
        if task.measurement.numel() and not task.measurement_noise:
            said.append(f"what was to stay is off by {error:.2f} grey levels")
        said += sampling_advice(cls, model, grid, cfg, eta, settings, editing=True)
        return io.NodeOutput(image, ui=say(cls, *said))

    @staticmethod
    def check(task: Edit) -> None:
        """Refuse what no picture can fulfil, before anything is drawn.

        Raises:
            ValueError: a measurement that no picture has.
        """
        if not task.measurement_noise:
            task.operator.check(task.measurement)


class PCMInpaint(EditNode, io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        own = [
            io.Image.Input("image", tooltip="The picture, of any size."),
            io.Mask.Input(
                "mask",
                tooltip="White is drawn anew, black is kept to the pixel, grey shows so much of the new. "
                "One, or one for each image.",
            ),
        ]
        return cls.schema(
            "PCMInpaint", "PCM Inpaint", "Draw a part of a picture anew; every other pixel is kept.", "inpaint", own
        )

    @classmethod
    def execute(cls, image: torch.Tensor, mask: torch.Tensor, **common: Any) -> io.NodeOutput:
        return cls.edit(inpainting(*to_masked_pictures(image, mask)), kept=to_rgb(image), **common)


class PCMOutpaint(EditNode, io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        own = [io.Image.Input("image", tooltip="The picture, of any size.")]
        for side in ("left", "top", "right", "bottom"):
            own.append(
                io.Int.Input(side, default=64 if side == "right" else 0, min=0, max=4096, tooltip=f"Pixels to add: {side}.")
            )
        return cls.schema(
            "PCMOutpaint", "PCM Outpaint", "Continue a picture past its edges; the picture itself is kept.", "inpaint", own
        )

    @classmethod
    def execute(cls, image: torch.Tensor, left: int, top: int, right: int, bottom: int, **common: Any) -> io.NodeOutput:
        kept = F.pad(to_rgb(image), (0, 0, left, right, top, bottom))
        return cls.edit(outpainting(to_pictures(image), left, top, right, bottom), kept=kept, **common)


class PCMColorize(EditNode, io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        own = [
            io.Image.Input("image", tooltip="A greyscale picture; of a coloured one the luminance is taken."),
            io.Mask.Input(
                "mask",
                optional=True,
                tooltip="White is drawn anew altogether, colour and luminance. One, or one for each image.",
            ),
        ]
        return cls.schema("PCMColorize", "PCM Colorize", "Colour a picture; its luminance is kept.", "colorize", own)

    @classmethod
    def execute(cls, image: torch.Tensor, mask: torch.Tensor | None = None, **common: Any) -> io.NodeOutput:
        task = colorization(to_pictures(image)) if mask is None else colorization(*to_masked_pictures(image, mask))
        return cls.edit(task, **common)


class PCMSuperResolve(EditNode, io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        own = [
            io.Image.Input("image", tooltip="The small picture."),
            io.Int.Input("factor", default=4, min=2, max=16, tooltip="Of enlargement along each side."),
            io.Combo.Input(
                "kernel",
                options=list(KERNELS),
                tooltip="How the picture was made small: mean, of factor x factor pixels; or antialias, by a bicubic filter. "
                "Take mean for a picture that is sharper than bicubic leaves it.",
            ),
        ]
        return cls.schema(
            "PCMSuperResolve",
            "PCM Super-Resolve",
            "Enlarge a picture; shrunk again, the result is the picture.",
            "super_resolve",
            own,
        )

    @classmethod
    def execute(cls, image: torch.Tensor, factor: int, kernel: str, **common: Any) -> io.NodeOutput:
        return cls.edit(super_resolution(to_pictures(image), factor, kernel), **common)

    @staticmethod
    def check(task: Edit) -> None:
        """As of every task, in words for what is met in practice: Lanczos and box filters leave more contrast than bicubic."""
        try:
            EditNode.check(task)
        except ValueError as error:
            if not isinstance(task.operator, Downsample) or not task.measurement.isfinite().all():
                raise
            raise ValueError("This picture is sharper than a bicubic kernel leaves one: set kernel to mean.") from error


class PCMStroke(EditNode, io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        own = [io.Image.Input("image", tooltip="A sketch of coloured strokes, or a photograph.")]
        return cls.schema("PCMStroke", "PCM Stroke", "From a sketch to a picture; strength says how freely.", "stroke", own)

    @classmethod
    def execute(cls, image: torch.Tensor, **common: Any) -> io.NodeOutput:
        return cls.edit(stroke_guided(to_pictures(image)), **common)


class PCMDenoise(EditNode, io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        own = [
            io.Image.Input("image", tooltip="The noisy picture."),
            io.Float.Input(
                "noise_level",
                default=0.0,
                min=0.0,
                max=255.0,
                step=0.1,
                tooltip="Standard deviation of the noise in grey levels of 255; 0 estimates it from the picture.",
            ),
        ]
        return cls.schema(
            "PCMDenoise",
            "PCM Denoise",
            "Take white noise out of a picture, starting at the noise's own level. Little noise leaves room for few steps.",
            "denoise",
            own,
            strength=False,
        )

    @classmethod
    def execute(cls, image: torch.Tensor, noise_level: float, model: Any, steps: int, **common: Any) -> io.NodeOutput:
        grid = cls.grid(common)
        ratios = sigmas_at(model, grid, grid.timesteps[1:]).tolist()
        task = denoising(to_pictures(image), noise_level or None, grid, ratios)
        return cls.edit(task, model=model, steps=min(steps, grid.start_point(task.strength)), **common)


class PCMInterpolate(EditNode, io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        own = [
            io.Int.Input("second_seed", default=1, min=0, max=0xFFFFFFFFFFFFFFFF, tooltip="The other end; seed is the first."),
            io.Int.Input("count", default=5, min=2, max=256, tooltip="Pictures, both ends included, drawn as one batch."),
            io.Int.Input("width", default=512, min=8, max=8192, step=8, tooltip="Between seeds; pictures have their own."),
            io.Int.Input("height", default=512, min=8, max=8192, step=8, tooltip="Between seeds; pictures have their own."),
            io.Image.Input("first", optional=True, tooltip="A picture to start from, instead of seed."),
            io.Image.Input("second", optional=True, tooltip="A picture to end at, instead of second_seed."),
            io.Model.Input(
                "base_model",
                optional=True,
                tooltip="The model before the adapter, which finds a picture's noise. Needed with pictures.",
            ),
        ]
        return cls.schema(
            "PCMInterpolate",
            "PCM Interpolate",
            "Pictures on the way from one to another, between two seeds or two pictures.",
            "stroke",
            own,
            strength=False,
            seed="The first end, and all new noise.",
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: Any,
        positive: Any,
        negative: Any,
        seed: int,
        second_seed: int,
        count: int,
        width: int,
        height: int,
        first: torch.Tensor | None = None,
        second: torch.Tensor | None = None,
        base_model: Any = None,
        **common: Any,
    ) -> io.NodeOutput:
        given = [to_pictures(image[:1]) for image in (first, second) if image is not None]
        if given and base_model is None:
            raise ValueError("To find a picture's noise, connect base_model: the model as it is before the adapter.")
        sizes = {size_of(picture) for picture in given} or {(height, width)}
        if len(sizes) > 1:
            raise ValueError(
                f"Both pictures must have one size; they are {' and '.join(f'{w} x {h}' for h, w in sorted(sizes))}."
            )
        (size,) = sizes
        grid = cls.grid(common)
        # Unguided and told what is wanted, as the model is when it draws at cfg 1.
        host = Host(base_model or model, vae, positive, negative, 1.0, seed)
        ends = [
            host.noise(size, 1, number) if image is None else host.invert(to_pictures(image[:1]), grid)
            for image, number in ((first, seed), (second, second_seed))
        ]
        noise = torch.cat([slerp(ends[0], ends[1], i / (count - 1)) for i in range(count)])
        told = {"model": model, "vae": vae, "positive": positive, "negative": negative, "seed": seed}
        return cls.edit(free(count, size), **told, noise=noise, **common)

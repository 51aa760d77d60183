"""A README for the folder of a finished adapter, in the hub's format: what it is, and how it is loaded."""

from __future__ import annotations

from pathlib import Path

from pcm_scheduler.lora_file import AdapterSettings

from .config import TrainConfig

_TAGS = {"sd15": "stable-diffusion", "sdxl": "stable-diffusion-xl", "animatediff": "animatediff"}
_PIPELINES = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline", "animatediff": "AnimateDiffPipeline"}


def model_card(config: TrainConfig, settings: AdapterSettings, data: str, samples: int, sample: str) -> str:
    """Markdown with the hub's front matter.

    Args:
        config: of the run.
        settings: as in the adapter's header.
        data: what it was trained on, in words.
        samples: of an optimisation step.
        sample: path of the sheet of samples, relative to the card.
    """
    name, edges = Path(config.output).name, ", ".join(map(str, settings.phase_edges))
    stops = ", ".join(map(str, settings.grid.sampling_timesteps(settings.num_inference_steps)))
    call = f"num_inference_steps={settings.num_inference_steps}, guidance_scale={settings.guidance_scale:g}"
    eta = f", eta={settings.eta:g}" if settings.eta else ""
    base = config.model.path if not Path(config.model.path).exists() else ""
    front = ["---", "library_name: diffusers", *([f"base_model: {base}"] if base else [])]
    whole = config.trainable == "unet"
    kind, loader = ("UNet", "load_pcm_unet") if whole else (f"adapter of rank {config.lora.rank}", "load_pcm_lora")
    front += ["tags:", *([] if whole else ["- lora"]), "- phased-consistency", f"- {_TAGS[settings.base_model]}", "---"]
    pipeline, arguments, result = _PIPELINES[settings.base_model], "", "image = pipe({}).images[0]"
    imported = pipeline
    if settings.base_model == "animatediff":
        motion = config.model.motion_adapter if not Path(config.model.motion_adapter).exists() else "the motion adapter"
        imported = f"{pipeline}, MotionAdapter"
        arguments = f', motion_adapter=MotionAdapter.from_pretrained("{motion}")'
        result = "frames = pipe({}).frames[0]"
    drawn = result.format(f'"...", {call}{eta}')
    follows = ", whose own trajectories the jumps begin on" if config.objective.starts == "teacher" else ""
    betas = f", {settings.beta_schedule} betas" if settings.beta_schedule else ""
    return (
        "\n".join(front)
        + f"""

# {config.title}

A {settings.grid.num_phases}-phase consistency {kind} ({settings.base_model}, predicts
{settings.prediction_type}), for {settings.num_inference_steps} steps at guidance {settings.guidance_scale:g}.

```python
from diffusers import {imported}
from pcm_scheduler import {loader}

pipe = {pipeline}.from_pretrained("{base or "the base model"}"{arguments})
{loader}(pipe, "{name}")
{drawn}
```

- phase edges {edges}, on {settings.num_solver_steps} solver steps{betas}; {settings.num_inference_steps} steps stop at {stops}
- trained for {config.optimizer.steps} steps of {samples} samples on {data};
  learning rate {config.optimizer.learning_rate:g}, the teacher's guidance
  {settings.training_guidance_scale:g}, its solver {config.objective.solver}{follows}

Samples from fixed noise, by steps and guidance; no figure of quality was measured for this card:

![samples]({sample})
"""
    )

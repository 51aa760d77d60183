"""Which file a caller means, and whether what it holds was trained for the pipeline's noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from ..lora_file import PEFT_FILE, AdapterSettings
from ..lora_layouts import PEFT_CONFIG
from ..scheduling_pcm import PCMScheduler


def local_file(name: str, weight_name: str | None) -> Path:
    """The file that is named, fetched from the hub if it is there.

    Args:
        name: a `.safetensors` file, a folder, or a hub id.
        weight_name: the file in a folder or hub repository.

    Raises:
        ValueError: a folder or hub repository that does not say which file.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        names = sorted(p.name for p in path.glob("*.safetensors"))
        if weight_name is None and len(names) != 1:
            raise ValueError(f"{name} holds {len(names)} safetensors files; name one with weight_name: {names}.")
        return path / (weight_name or names[0])
    if weight_name is None:
        raise ValueError(f"{name} is not a file here. For one on the hub, pass weight_name, the file in that repository.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if PurePosixPath(weight_name).name == PEFT_FILE:  # beside which is what PEFT says of alpha
        with suppress(EntryNotFoundError):
            hf_hub_download(name, str(PurePosixPath(weight_name).with_name(PEFT_CONFIG)))
    return Path(hf_hub_download(name, weight_name))


def uncompiled(network: Any) -> Any:
    """The network itself where `torch.compile` has wrapped it."""
    return getattr(network, "_orig_mod", network)


@contextmanager
def without_compiler(pipe: Any) -> Iterator[None]:
    """Within it `pipe.unet` is the UNet itself where `torch.compile` has wrapped it, whose names of modules are others."""
    wrapped = pipe.unet
    pipe.unet = uncompiled(wrapped)
    try:
        yield
    finally:
        pipe.unet = wrapped


def fitting_scheduler(pipe: Any, settings: AdapterSettings, name: str, stated: bool = True) -> PCMScheduler:
    """The scheduler that the settings ask for, on the pipeline's noise schedule.

    Args:
        pipe: a diffusers pipeline.
        settings: of the file.
        name: of the file, for the message.
        stated: the settings are the file's own; guesses are not held against the pipeline.

    Raises:
        ValueError: trained for another prediction type or number of timesteps than the pipeline's.
    """

    def check(setting: str, of_pipe: Any) -> None:
        of_file = getattr(settings, setting)
        if stated and of_pipe != of_file:
            raise ValueError(f"{name} was trained with {setting}={of_file!r}, but the pipeline's scheduler has {of_pipe!r}.")

    timesteps = pipe.scheduler.config.get("num_train_timesteps", AdapterSettings.num_train_timesteps)
    check("num_train_timesteps", timesteps)  # first: edges among others are no points of the pipeline's grid
    scheduler = PCMScheduler.from_config(pipe.scheduler.config, **settings.scheduler_config)
    check("prediction_type", scheduler.config.prediction_type)
    return scheduler

"""A whole UNet in one `.safetensors` file, under diffusers' names, with the header that an adapter file has.

ComfyUI reads such a file as a diffusion model of its own; `load_pcm_unet` puts it into a diffusers pipeline.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from .lora_file import AdapterSettings, standard_header, write_safetensors


def write_unet(
    path: str | os.PathLike,
    state_dict: Mapping[str, torch.Tensor],
    settings: AdapterSettings,
    title: str,
    extra: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a UNet that was trained whole; to a temporary name first, then renamed.

    Args:
        path: the `.safetensors` file; its folder is made if missing.
        state_dict: of a diffusers UNet.
        settings: for the header.
        title: a human name for the file.
        extra: further header entries.
        dtype: of the stored tensors.
    """
    tensors = {name: tensor.detach().to("cpu", dtype) for name, tensor in state_dict.items()}
    write_safetensors(tensors, path, standard_header(settings, title, kind="") | dict(extra or {}))

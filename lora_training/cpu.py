"""What makes small networks fast on CPUs: memory that is kept, plain attention, bfloat16 where the processor has it."""

from __future__ import annotations

import ctypes
import sys
from typing import Literal, TypeVar

import torch
from accelerate.utils import parse_flag_from_env
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # <malloc.h>


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory instead of returning it and paying page faults at every step; elsewhere do nothing."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        except (OSError, AttributeError):
            pass  # another C library


def use_plain_attention(unet: UNet2DConditionModel) -> None:
    """On CPUs the backward of fused attention takes longer than the rest of the step; plain matrix products are faster."""
    unet.set_attn_processor(AttnProcessor())


def has_bfloat16() -> bool:
    """Whether this processor computes in bfloat16; for those that do not it takes some twenty times as long as float32."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fast_autocast(device_type: str = "cpu") -> torch.autocast:
    """bfloat16 inside where the device has it, which is about twice as fast as float32; float32 on other processors."""
    return torch.autocast(device_type, torch.bfloat16, enabled=device_type != "cpu" or has_bfloat16())


def fast_precision() -> Literal["bfloat16", "float32"]:
    """What networks compute in inside `fast_autocast`."""
    return "bfloat16" if has_bfloat16() else "float32"


def coming_device() -> torch.device:
    """Of what type the device of an `Accelerator` will be; asking accelerate before would settle how processes talk."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return (None if on_cpu else torch.accelerator.current_accelerator()) or torch.device("cpu")


Precision = TypeVar("Precision", bound=str)


def precision_here(asked: Precision, device: torch.device) -> Precision | Literal["no"]:
    """The precision that networks run in, of `no`, `fp16` and `bf16`.

    Args:
        asked: by a configuration.
        device: they are on.

    Returns:
        `no` for `bf16` on a processor without it, which is said on stderr; otherwise what was asked for.
    """
    if asked == "bf16" and device.type == "cpu" and not has_bfloat16():
        print(
            "This processor has no bfloat16 and would take some twenty times as long with it: computing in float32.",
            file=sys.stderr,
        )
        return "no"
    return asked
